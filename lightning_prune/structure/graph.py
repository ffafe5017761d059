"""What is known of a model's channels: groups that can go, layers that can't, and the plan for what is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_prune.errors import PlanError
from lightning_prune.structure.explanation import Notes, explain
from lightning_prune.structure.overview import overview
from lightning_prune.structure.plan import NOWHERE, Member, PruningPlan, named_tensors, number_of, signature


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels of one width: each can go by itself, together with everything that is tied to it.

    Letters: ``C`` channels, ``k`` positions that one channel takes along a dim.

    Args:
        name: of the first layer that produces these channels.
        size: ``C``.
        index: member (parameter or buffer name, dim) -> positions of each channel along it, int64, ``(C, k)``.
        producers: layers whose output channels these are.
        consumers: layers that read them.
        outputs: members that are the producers' output dims.
        inputs: members that are the consumers' input dims.
        scales: members that are the scales of norms.
        shifts: members that are biases of layers or norms.
        renormalised: members over which statistics are taken: the scales of norms, weights that are standardised, and
            what makes the channels of other averages.
        mergeable: whether one channel may stand for another that is alike: everything in between treats all of them
            the same way, and whoever reads them multiplies them with weights.
    """

    name: str
    size: int
    index: Mapping[Member, Tensor]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    outputs: tuple[Member, ...]
    inputs: tuple[Member, ...]
    scales: tuple[Member, ...]
    shifts: tuple[Member, ...]
    renormalised: tuple[Member, ...]
    mergeable: bool

    @property
    def members(self) -> tuple[Member, ...]:
        """Every (parameter or buffer name, dim) that these channels run along."""
        return tuple(self.index)

    @property
    def unit(self) -> int:
        """How many output positions of the first producer one channel stands for."""
        return self.index[self.outputs[0]].shape[1] if self.outputs else 1

    def targets(self, gone: Sequence[int], into: Mapping[int, int]) -> dict[Member, Tensor]:
        """Member -> the positions that stand for those of the channels that go, ``(len(gone), k)``."""
        if not self.mergeable:
            raise PlanError(f"Channels of group {self.name!r} can't be merged: something reads them all together.")
        if set(into) != set(gone) or set(into.values()) & set(gone):
            raise PlanError(f"Every channel of group {self.name!r} that goes must be merged into one that stays.")
        rows = torch.tensor([into[channel] for channel in gone])
        return {member: index[rows] for member, index in self.index.items()}


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """What :func:`trace` found.

    Args:
        model: the model that was traced, as it is.
        groups: what can go.
        pinned: layer -> why some or all of its output channels can't go.
        numbers: module attributes that only count channels -> the group and how many positions a channel takes.
        root: name of the model inside a larger module, where it is part of one: patterns may begin with it.
        joined: modules that can only go on as :class:`elastic.Joined` once channels have gone.
        notes: of the trace, for :meth:`explain`.
        inputs: one sample of the arguments that it was traced with, by position and by name; budgets count with them.
    """

    model: nn.Module
    groups: tuple[ChannelGroup, ...]
    pinned: Mapping[str, str]
    numbers: Mapping[str, tuple[tuple[str, int], ...]]
    root: str = ""
    joined: tuple[str, ...] = ()
    notes: Notes | None = field(default=None, repr=False)
    inputs: tuple[tuple[Any, ...], dict[str, Any]] = field(default=((), {}), repr=False)

    def __getitem__(self, name: str) -> ChannelGroup:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)

    def explain(self, name: str) -> str:
        """One paragraph about a layer: what its channels are tied to and where, who reads them, how many can go.

        Args:
            name: of a layer, group, module or parameter; where the model is part of a larger one, from either.

        Raises:
            UnknownLayerError: nothing has that name; the message says what comes near.

        >>> from lightning_prune import trace
        >>> graph = trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(1, 4))
        >>> print(graph.explain("2"))
        '2' (Linear) keeps all of its 2 channels. Its channels are the network's output. It reads channels of group '0'.
        """
        return explain(self, name)

    def plan(
        self,
        removed: Mapping[str, Sequence[int]],
        into: Mapping[str, Mapping[int, int]] | None = None,
        round_to: int = 1,
    ) -> PruningPlan:
        """The plan by which these channels (group name -> numbers below its size) go.

        Args:
            removed: group name -> channels that go.
            into: group name -> channel that goes -> channel that stands for it afterwards: what its consumers read
                from the one is added to what they read from the other. Groups without an entry just lose channels.
            round_to: what the widths that are left are multiples of.

        Raises:
            PlanError: for an unknown group, a number out of range, a group that would lose all its channels, or one
                whose channels can't stand for each other.
        """
        known, tensors = {group.name: group for group in self.groups}, named_tensors(self.model)
        stays: dict[Member, NDArray[np.bool_]] = {}
        outputs, renormalised, dense = set[Member](), set[str](), self.dense_numbers()
        merged: dict[Member, Tensor] = {}
        summed, numbers = set[Member](), dict(dense)
        for name, channels in removed.items():
            if name not in known:
                raise PlanError(f"There is no group {name!r}; groups are {', '.join(known) or 'none'}.")
            group, gone = known[name], _numbers(name, channels, known[name].size)
            if not gone:
                continue
            rows = np.array(gone)
            for member, index in group.index.items():
                if member not in stays:
                    stays[member] = np.ones(tensors[member[0]].shape[member[1]], dtype=np.bool_)
                stays[member][index.numpy()[rows]] = False
            if into and name in into:
                summed.update(group.inputs)
                for member, targets in group.targets(gone, into[name]).items():
                    whole = merged.setdefault(member, torch.arange(stays[member].size))
                    whole[group.index[member][torch.from_numpy(rows)]] = targets
            outputs.update(group.outputs)
            renormalised.update(name for name, _ in group.renormalised)
            for attribute, parts in self.numbers.items():
                numbers[attribute] -= sum(len(gone) * each for part, each in parts if part == name)
        sizes = {member: mask.size for member, mask in stays.items()}
        changed = {name: number for name, number in numbers.items() if number != dense[name]}
        into_all = {member: _or_nowhere(targets, stays[member]) for member, targets in merged.items()}
        rest = tuple(renormalised), into_all, tuple(summed), self.joined if stays else (), round_to
        return PruningPlan(_positions(stays), sizes, signature(self.model), tuple(outputs), changed, *rest)

    def dense_numbers(self) -> dict[str, int]:
        """The numbers that modules of the dense model keep of their channels."""
        return {name: number_of(self.model, name) for name in self.numbers}

    def __str__(self) -> str:
        """A table: a line per group, then what stays and why."""
        return overview(self)


def _positions(stays: Mapping[Member, NDArray[np.bool_]]) -> dict[Member, tuple[int, ...]]:
    """Which positions stay; members that keep the same ones, as most of a group do, share one tuple."""
    known: dict[bytes, tuple[int, ...]] = {}
    kept = {}
    for member, mask in stays.items():
        key = mask.tobytes()
        if key not in known:
            known[key] = tuple(np.flatnonzero(mask).tolist())
        kept[member] = known[key]
    return kept


def _or_nowhere(targets: Tensor, stays: NDArray[np.bool_]) -> tuple[int, ...]:
    """Positions that go without another standing for them (they belong to a group that just loses channels)."""
    whole = targets.numpy()
    return tuple(np.where(~stays & (whole == np.arange(whole.size)), NOWHERE, whole).tolist())


def _numbers(name: str, channels: Sequence[int], size: int) -> list[int]:
    gone = sorted({int(channel) for channel in channels})
    if gone and not 0 <= gone[0] <= gone[-1] < size:
        raise PlanError(f"Channels of group {name!r} are numbered 0..{size - 1}, not {gone[0]}..{gone[-1]}.")
    if len(gone) == size:
        raise PlanError(f"The plan removes all {size} channels of group {name!r}; at least one must stay.")
    return gone
