"""Making the channels of one cluster alike, in everything that produces them or acts on them one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.clusters import cluster_means, features, first_members, gram, medoids, partition, reconstruct
from lightning_prune.structure import ChannelGroup

Partition = Mapping[str, Tensor]
"""Group name -> the number of each channel's cluster, ``(C,)``."""

TOGETHER = 2**26
"""Most inner products that are clustered in one call: all of a convolutional network's, four layers of 4096 channels,
which with what k-means needs beside them are a gigabyte and a half."""

JOINED = 2**20
"""About how many numbers are averaged in one call: enough for one call per shape of a small network's layers, and
little enough to stay in a processor's cache."""

SETS = 8
"""For how many sets of tensors (parameters, gradients of each optimiser) it is remembered what can be joined."""


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
            rows = tensors[name].detach().movedim(dim, 0)
            index, own = _rows(group, (name, dim), rows), labels.to(rows.device)
            picked = None if nearest is None else nearest.to(rows.device)
            rows[index] = reconstruct(rows[index], own, medoids=picked)


def nearest_members(similar: Tensor, labels: Tensor) -> Tensor:
    """The medoid of each channel's cluster, ``(C,)``."""
    return medoids(similar.unsqueeze(0), labels.to(similar.device).unsqueeze(0))[0]


class Averaging:
    """Takes cluster means of many tensors at once, in every step: those with rows of one length in one call.

    What depends on the partition alone is worked out once for each set of tensors, so that no call waits for a device.

    Args:
        groups: whose channels.
        labels: their clusters.
    """

    def __init__(self, groups: Iterable[ChannelGroup], labels: Partition) -> None:
        self._groups = [group for group in groups if group.name in labels]
        self._labels = {name: own.cpu() for name, own in labels.items()}
        self._names = list(dict.fromkeys(name for group in self._groups for name, _ in own_members(group)))
        self._tables: dict[tuple[Any, ...], list[_Rows]] = {}

    @torch.no_grad()
    def average_(self, values: Mapping[str, Tensor]) -> None:
        """Replace the channels of each cluster by their mean, in place.

        Integers and what is sparse (gradients of embeddings, and momenta under them) stay as they are.

        Args:
            values: parameters and buffers by name, or what has their shapes, such as gradients and momenta.
        """
        known = self._known(values)
        for table in self._tables_of(known):
            views = [known[name].detach().movedim(dim, 0) for name, dim in table.members]
            flat = [view.reshape(len(view), -1) for view in views]
            rows = flat[0] if len(flat) == 1 else torch.cat(flat)
            shared = rows.index_select(0, table.shared)
            means = cluster_means(shared, table.labels, table.first, table.counts)
            rows.index_copy_(0, table.shared, means.index_select(0, table.labels).to(rows.dtype))
            if rows.data_ptr() != views[0].data_ptr():  # it is a copy of them
                parts = rows.split([len(view) for view in views])
                torch._foreach_copy_(views, [part.view(view.shape) for part, view in zip(parts, views, strict=True)])

    def means(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """New tensors for those names that run along one of the groups; see :meth:`average_`."""
        found = {name: value.detach().clone() for name, value in self._known(values).items()}
        self.average_(found)
        return found

    def _known(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = {name: values[name] for name in self._names if name in values}
        return {name: v for name, v in own.items() if v.is_floating_point() and v.layout == torch.strided}

    def _tables_of(self, values: Mapping[str, Tensor]) -> list[_Rows]:
        """What joins these tensors; where ever other ones are without a gradient, each by itself."""
        key = tuple((name, value.dtype, value.device) for name, value in values.items())
        if key not in self._tables:
            if len(key) > 1 and len(self._tables) >= SETS:
                return [table for pair in values.items() for table in self._tables_of(dict([pair]))]
            self._tables[key] = self._tabulate(values)
        return self._tables[key]

    def _tabulate(self, values: Mapping[str, Tensor]) -> list[_Rows]:
        """What can be joined: rows of one length and kind, a tensor's other dims later."""
        joined: dict[tuple[Any, ...], list[tuple[ChannelGroup, str, int]]] = {}
        turns: dict[str, int] = {}
        filled: dict[tuple[Any, ...], int] = {}
        for group in self._groups:
            for name, dim in own_members(group):
                if name in values:
                    value = values[name]
                    turns[name] = turns.get(name, -1) + 1
                    kind = (turns[name], value.numel() // value.shape[dim], value.dtype, value.device)
                    filled[kind] = filled.get(kind, 0) + value.numel()
                    joined.setdefault((*kind, filled[kind] // JOINED), []).append((group, name, dim))
        tables = (self._rows(joined[kind], values) for kind in sorted(joined, key=lambda kind: kind[0]))
        return [table for table in tables if len(table.shared)]

    def _rows(self, members: Sequence[tuple[ChannelGroup, str, int]], values: Mapping[str, Tensor]) -> _Rows:
        """The rows of joined tensors that are not alone in their cluster."""
        rows, labels, below, clusters = [], [], 0, 0
        for group, name, dim in members:
            index = group.index[name, dim]
            own = self._labels[group.name].unsqueeze(1) * index.shape[1] + torch.arange(index.shape[1])
            rows.append(index.flatten() + below)
            labels.append(own.flatten() + clusters)
            below, clusters = below + values[name].shape[dim], clusters + index.numel()
        every = torch.cat(labels)
        is_shared = every.bincount()[every] > 1
        found, own = every[is_shared].unique(return_inverse=True)
        device = values[members[0][1]].device
        parts = (torch.cat(rows)[is_shared], own, *first_members(own, len(found)))
        return _Rows(tuple((name, dim) for _, name, dim in members), *(part.to(device) for part in parts))


class _Rows(NamedTuple):
    """Tensors joined row by row, and which rows of that share a cluster with others.

    Args:
        members: names of the tensors, and the dim along which each has its rows.
        shared: rows that are not alone.
        labels: their clusters.
        first: of each cluster its first row, counted among those that are not alone.
        counts: of each cluster its rows.
    """

    members: tuple[tuple[str, int], ...]
    shared: Tensor
    labels: Tensor
    first: Tensor
    counts: Tensor


@torch.no_grad()
def average_state_(
    optimizers: Sequence[Optimizer], parameters: Mapping[str, nn.Parameter], averaging: Averaging
) -> None:
    """Give the channels of one cluster one optimiser state: everything in it of a parameter's shape is averaged."""
    for optimizer in optimizers:
        found: dict[str, dict[str, Tensor]] = {}
        for name, parameter in parameters.items():
            for key, value in (optimizer.state.get(parameter) or {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
                    found.setdefault(key, {})[name] = value
        for values in found.values():
            averaging.average_(values)


def _rows(group: ChannelGroup, member: tuple[str, int], tensor: Tensor) -> Tensor:
    return group.index[member].to(tensor.device)
