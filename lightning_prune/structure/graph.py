"""Which channels of a model hang together: ``trace`` watches one forward pass and groups what must go together."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.errors import PlanError, TraceError
from lightning_prune.structure.labels import Ints, Labels, Solution
from lightning_prune.structure.plan import NOWHERE, Member, PruningPlan, layer_of, named_tensors, signature
from lightning_prune.structure.probe import probe
from lightning_prune.structure.replica import arguments, replica, to_device
from lightning_prune.structure.watch import Watcher


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
        renormalised: whether a norm takes its statistics over these channels.
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
    renormalised: bool
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
    """

    model: nn.Module
    groups: tuple[ChannelGroup, ...]
    pinned: Mapping[str, str]
    numbers: Mapping[str, tuple[tuple[str, int], ...]]

    def __getitem__(self, name: str) -> ChannelGroup:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)

    def plan(
        self, removed: Mapping[str, Sequence[int]], into: Mapping[str, Mapping[int, int]] | None = None
    ) -> PruningPlan:
        """The plan by which these channels (group name -> numbers below its size) go.

        Args:
            removed: group name -> channels that go.
            into: group name -> channel that goes -> channel that stands for it afterwards: what its consumers read
                from the one is added to what they read from the other. Groups without an entry just lose channels.

        Raises:
            PlanError: for an unknown group, a number out of range, a group that would lose all its channels, or one
                whose channels can't stand for each other.
        """
        known = {group.name: group for group in self.groups}
        cut: dict[Member, list[int]] = {}
        outputs, renormalised, numbers = set[Member](), set[str](), self._dense_numbers()
        merged: dict[Member, Tensor] = {}
        summed = set[Member]()
        for name, channels in removed.items():
            if name not in known:
                raise PlanError(f"There is no group {name!r}; groups are {', '.join(known) or 'none'}.")
            group, gone = known[name], _numbers(name, channels, known[name].size)
            if not gone:
                continue
            rows = torch.tensor(gone)
            for member, index in group.index.items():
                cut.setdefault(member, []).extend(index[rows].flatten().tolist())
            if into and name in into:
                summed.update(group.inputs)
                for member, targets in group.targets(gone, into[name]).items():
                    size = named_tensors(self.model)[member[0]].shape[member[1]]
                    whole = merged.setdefault(member, torch.arange(size))
                    whole[group.index[member][rows]] = targets
            outputs.update(group.outputs)
            renormalised.update(name for name, _ in group.scales if group.renormalised)
            for attribute, parts in self.numbers.items():
                numbers[attribute] -= sum(len(gone) * each for part, each in parts if part == name)
        tensors = named_tensors(self.model)
        sizes = {(name, dim): tensors[name].shape[dim] for name, dim in cut}
        kept = {
            member: tuple(np.delete(np.arange(sizes[member]), positions).tolist()) for member, positions in cut.items()
        }
        changed = {name: number for name, number in numbers.items() if number != self._dense_numbers()[name]}
        into_all = {member: _or_nowhere(targets, cut[member]) for member, targets in merged.items()}
        rest = tuple(outputs), changed, tuple(renormalised), into_all, tuple(summed)
        return PruningPlan(kept, sizes, signature(self.model), *rest)

    def _dense_numbers(self) -> dict[str, int]:
        return {
            name: getattr(self.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
            for name in self.numbers
        }

    def __str__(self) -> str:
        rows = [
            f"{group.name}  {group.size} channels, read by {', '.join(group.consumers) or 'nobody'}"
            for group in self.groups
        ]
        return "\n".join(rows + [f"{layer}  pinned: {reason}" for layer, reason in self.pinned.items()])


def _or_nowhere(targets: Tensor, gone: list[int]) -> tuple[int, ...]:
    """Positions that go without another standing for them (they belong to a group that just loses channels)."""
    positions = torch.tensor(gone)
    targets[positions[targets[positions] == positions]] = NOWHERE
    return tuple(targets.tolist())


def _numbers(name: str, channels: Sequence[int], size: int) -> list[int]:
    gone = sorted({int(channel) for channel in channels})
    if gone and not 0 <= gone[0] <= gone[-1] < size:
        raise PlanError(f"Channels of group {name!r} are numbered 0..{size - 1}, not {gone[0]}..{gone[-1]}.")
    if len(gone) == size:
        raise PlanError(f"The plan removes all {size} channels of group {name!r}; at least one must stay.")
    return gone


def trace(model: nn.Module, example_inputs: Any, kwargs: Mapping[str, Any] | None = None) -> ChannelGraph:
    """Watch one forward pass and find which channels hang together.

    The model runs in the mode it is in, as a copy without memory (or, where its Python code looks at values, as a
    copy on the CPU). The model itself, its buffers, flags and the random generators are left as they were.

    Args:
        model: any module.
        example_inputs: a tuple is the forward's positional arguments; anything else is its only one.
        kwargs: the forward's keyword arguments.

    Raises:
        TraceError: where the forward pass fails; the message names the statement.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> graph = trace(net, torch.zeros(1, 4))
    >>> [(group.name, group.size, group.consumers) for group in graph.groups], sorted(graph.pinned)
    ([('0', 8, ('2',))], ['2'])
    """
    args, named = arguments(example_inputs, kwargs)
    try:
        watcher = _watch(model, args, named, "meta")
        device = "meta"
    except Exception:  # whatever it was, a pass with values says it better
        device = "cpu"
        try:
            watcher = _watch(model, args, named, device)
        except Exception as error:  # any failure of foreign code is reported the same way
            raise TraceError(f"The model can't be watched: {_statement(error)}.") from error
    solution = watcher.labels.solve()
    graph = _graph(model, watcher, solution)

    def fresh() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        return replica(model, device), *to_device((args, named), device)

    while graph.groups and (pins := probe(watcher, solution, graph, fresh)):
        for labels, reason in pins:
            watcher.labels.pin(labels, reason)
        solution = watcher.labels.solve()
        graph = _graph(model, watcher, solution)
    return graph


def _watch(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], device: str) -> Watcher:
    copied = replica(model, device)
    tensors = named_tensors(copied)
    watcher = Watcher(copied, tensors, Labels(tensors))
    watcher.run(*to_device((args, kwargs), device))
    return watcher


def _statement(error: Exception) -> str:
    """The innermost line of the user's own code on the way to an error, and what went wrong there."""
    frames = traceback.extract_tb(error.__traceback__)
    own, library = str(Path(__file__).parents[1]), str(Path(torch.__file__).parent)
    theirs = [frame for frame in frames if not frame.filename.startswith((own, library))] or frames
    where = f"{Path(theirs[-1].filename).name}:{theirs[-1].lineno} `{(theirs[-1].line or '').strip()}`"
    message = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return f"{where} raised {type(error).__name__}: {message[:300]}"


def _graph(model: nn.Module, watcher: Watcher, solution: Solution) -> ChannelGraph:
    groups = _named_apart(_groups(watcher, solution))
    return ChannelGraph(model, tuple(groups), _pinned(watcher, solution), _counted(watcher, solution, groups))


def _groups(watcher: Watcher, solution: Solution) -> list[ChannelGroup]:
    """Classes of labels that run along the same dims equally often are the channels of one group.

    A class that is the only one of its kind can't go; it joins those with a reason.
    """
    labels = watcher.labels
    ids = np.repeat(np.arange(len(labels.dims)), np.diff(labels.starts))
    used = np.array([name in watcher.used for name, _ in labels.dims], dtype=bool)
    root = solution.root[1 : labels.atoms]
    free = ~np.isin(root, np.fromiter(solution.reasons, dtype=np.int64)) & used[ids]
    atoms = np.flatnonzero(free)
    order = np.lexsort((atoms, root[atoms]))
    atoms = atoms[order]
    classes, starts, counts = np.unique(root[atoms], return_index=True, return_counts=True)
    if classes.size == 0:
        return []
    prints = np.add.reduceat(_fingerprints(len(labels.dims))[ids[atoms]], starts)
    _, first, kind = np.unique(prints, return_index=True, return_inverse=True)
    marked = {mark: labels.marked_roots(mark, solution.root) for mark in ("renormalised", "bound")}
    groups: list[ChannelGroup] = []
    for number in np.argsort(first):
        which = np.flatnonzero(kind == number)
        if which.size == 1:
            solution.reasons[int(classes[which[0]])] = (
                "All of its channels hang together, so that none can go by itself."
            )
            continue
        table = atoms[starts[which][:, None] + np.arange(counts[which[0]])]
        marks = {mark for mark, roots in marked.items() if roots.intersection(classes[which].tolist())}
        groups.append(_group(watcher, table, ids, marks))
    return groups


def _fingerprints(count: int) -> Ints:
    """A random number per dim; the (wrapping) sum over a class tells which dims it runs along, and how often."""
    return np.random.default_rng(0).integers(-(2**62), 2**62, size=count)


def _group(watcher: Watcher, table: Ints, ids: Ints, marks: set[str]) -> ChannelGroup:
    labels = watcher.labels
    columns = ids[table[0]]
    index = {}
    for number in dict.fromkeys(columns.tolist()):
        positions = table[:, columns == number] + 1 - labels.starts[number]
        index[labels.dims[number]] = torch.from_numpy(np.ascontiguousarray(positions))

    def having(role: str) -> tuple[Member, ...]:
        return tuple(labels.dims[n] for n in dict.fromkeys(columns.tolist()) if role in watcher.roles.get(n, ()))

    outputs, inputs = having("outputs"), having("inputs")
    producers = tuple(dict.fromkeys(layer_of(name) for name, _ in outputs))
    consumers = tuple(dict.fromkeys(layer_of(name) for name, _ in inputs))
    return ChannelGroup(
        name=producers[0] if producers else layer_of(next(iter(index))[0]),
        size=len(table),
        index=index,
        producers=producers,
        consumers=consumers,
        outputs=outputs,
        inputs=inputs,
        scales=having("scales"),
        shifts=having("shifts"),
        renormalised="renormalised" in marks,
        mergeable=not marks,
    )


def _named_apart(groups: list[ChannelGroup]) -> list[ChannelGroup]:
    """Several groups of one layer are told apart by a number: ``qkv``, ``qkv#2``."""
    seen: dict[str, int] = {}
    for group in groups:
        seen[group.name] = seen.get(group.name, 0) + 1
        if seen[group.name] > 1:
            object.__setattr__(group, "name", f"{group.name}#{seen[group.name]}")
    return groups


def _pinned(watcher: Watcher, solution: Solution) -> dict[str, str]:
    """Layers some of whose output channels can't go."""
    pinned: dict[str, str] = {}
    tensors = named_tensors(watcher.model)
    for number, (name, dim) in enumerate(watcher.labels.dims):
        roles = watcher.roles.get(number, set())
        # a weight without a role has gone through operators that know none
        unknown = not roles and dim == 0 and name.endswith("weight") and tensors[name].dim() > 1
        if name not in watcher.used:
            if name.endswith("weight"):
                pinned.setdefault(layer_of(name), "It is not used by this forward pass.")
        elif roles & {"outputs", "through"} or unknown:
            roots = solution.root[watcher.labels.starts[number] : watcher.labels.starts[number + 1]]
            held = [root for root in roots.tolist() if root in solution.reasons]
            if held:
                some = "" if len(held) == len(roots) else f" (This holds for {len(held)} of its {len(roots)} channels.)"
                pinned.setdefault(layer_of(name), solution.reasons[held[0]] + some)
    return _under_all_names(watcher.model, pinned)


def _under_all_names(model: nn.Module, pinned: dict[str, str]) -> dict[str, str]:
    """Layers that share a parameter share its reason."""
    first = {id(parameter): layer_of(name) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        layer = first[id(parameter)]
        if layer in pinned and name.endswith("weight"):
            pinned.setdefault(layer_of(name), pinned[layer])
    return pinned


def _counted(
    watcher: Watcher, solution: Solution, groups: list[ChannelGroup]
) -> dict[str, tuple[tuple[str, int], ...]]:
    """For each number that a module keeps of its channels: which groups it counts, and how often."""
    owner: dict[int, str] = {}
    for group in groups:
        (name, dim), index = next(iter(group.index.items()))
        roots = solution.root[watcher.labels.first(name, dim) + index[:, 0].numpy()]
        owner.update(dict.fromkeys(roots.tolist(), group.name))
    counted = {}
    for attribute, labels in watcher.sizes.items():
        parts: dict[str, set[int]] = {}
        roots = solution.root[labels].tolist()
        for root in roots:
            if root in owner:
                parts.setdefault(owner[root], set()).add(roots.count(root))
        if parts:
            counted[attribute] = tuple((name, max(each)) for name, each in parts.items())
    return counted
