"""Making the channels of one cluster alike, in everything that produces them or acts on them one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.clusters import average, features, gram, medoids, partition, reconstruct
from lightning_prune.structure import ChannelGroup

Partition = Mapping[str, Tensor]
"""Group name -> the number of each channel's cluster, ``(C,)``."""

TOGETHER = 2**26
"""Most inner products that are clustered in one call: all of a convolutional network's, four layers of 4096 channels,
which with what k-means needs beside them are a gigabyte and a half."""


def own_members(group: ChannelGroup) -> tuple[tuple[str, int], ...]:
    """What must be alike for channels to be alike: all members but the weights of those who read them."""
    return tuple(member for member in group.members if member not in group.inputs)


def similarities(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> Tensor:
    """Inner products of the group's filters, those of all its producers side by side, shape ``(C, C)``."""
    members = [member for member in group.outputs if tensors[member[0]].dim() > 1] or own_members(group)
    rows = [tensors[name].detach().movedim(dim, 0)[_rows(group, (name, dim), tensors[name])] for name, dim in members]
    return gram(features([row.float() if row.dtype.itemsize < 4 else row for row in rows]))


def cluster(
    similar: Mapping[str, Tensor],
    counts: Mapping[str, int],
    method: Any,
    before: Partition,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Exactly so many clusters for each group; groups of one size are clustered in one call, unless they are wide.

    Args:
        similar: group name -> inner products of its filters, see :func:`similarities`.
        counts: group name -> number of clusters.
        method: see :func:`~lightning_prune.clusters.partition`.
        before: an earlier partition, from which k-means starts.
        generator: for ``method="random"``.
    """
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name, table in similar.items():
        alike.setdefault((len(table), counts[name], name in before, table.device, table.dtype), []).append(name)
    labels: dict[str, Tensor] = {}
    for (channels, count, is_warm, device, _), names in alike.items():
        few = max(1, TOGETHER // channels**2)
        for own in (names[first : first + few] for first in range(0, len(names), few)):
            start = torch.stack([before[name].to(device) for name in own]) if is_warm else None
            tables = torch.stack([similar[name] for name in own])
            found = partition(tables, count, method, start=start, generator=generator)
            labels.update(zip(own, found, strict=True))
    return labels


@torch.no_grad()
def make_alike_(
    tensors: Mapping[str, Tensor],
    group: ChannelGroup,
    labels: Tensor,
    nearest: Tensor | None = None,
) -> None:
    """Reconstruct the channels of one group: weights, biases, scales, shifts and running statistics.

    Args:
        tensors: parameters and buffers by name.
        group: whose channels.
        labels: their clusters, ``(C,)``.
        nearest: channel numbers to copy instead of taking the mean, ``(C,)``.
    """
    for name, dim in own_members(group):
        if tensors[name].is_floating_point():
            tensor = tensors[name]
            own = labels.to(tensor.device)
            picked = None if nearest is None else nearest.to(tensor.device)
            tensor.copy_(_changed(tensor, group, dim, name, lambda rows: reconstruct(rows, own, medoids=picked)))  # noqa: B023


def nearest_members(similar: Tensor, labels: Tensor) -> Tensor:
    """The medoid of each channel's cluster, ``(C,)``."""
    return medoids(similar.unsqueeze(0), labels.to(similar.device).unsqueeze(0))[0]


@torch.no_grad()
def averages(groups: Iterable[ChannelGroup], labels: Partition, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The cluster means of tensors: parameters, buffers, or what has their shapes, such as gradients and momenta.

    Args:
        groups: whose channels.
        labels: their clusters.
        values: by the names of parameters and buffers.

    Returns:
        New tensors for those names that run along one of the groups.
    """
    found: dict[str, Tensor] = {}
    for group in groups:
        for name, dim in own_members(group) if group.name in labels else ():
            if name in values and values[name].is_floating_point():
                value = found.get(name, values[name])
                own = labels[group.name].to(value.device)
                found[name] = _changed(value, group, dim, name, lambda rows: average(rows, own))  # noqa: B023
    return found


@torch.no_grad()
def average_state_(
    optimizers: Sequence[Optimizer],
    parameters: Mapping[str, nn.Parameter],
    groups: Sequence[ChannelGroup],
    labels: Partition,
) -> None:
    """Give the channels of one cluster one optimiser state: everything in it of a parameter's shape is averaged."""
    for optimizer in optimizers:
        for name, parameter in parameters.items():
            for value in (optimizer.state.get(parameter) or {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
                    for mean in averages(groups, labels, {name: value}).values():
                        value.copy_(mean)


def _changed(tensor: Tensor, group: ChannelGroup, dim: int, name: str, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A copy of a tensor in which a group's channels along one dim are changed."""
    rows = tensor.detach().movedim(dim, 0)
    index = _rows(group, (name, dim), tensor)
    out = rows.clone()
    out[index] = change(rows[index])
    return out.movedim(0, dim)


def _rows(group: ChannelGroup, member: tuple[str, int], tensor: Tensor) -> Tensor:
    return group.index[member].to(tensor.device)
