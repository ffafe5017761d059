"""From united labels to groups of channels, and to a reason for every layer that stays."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from lightning_prune.structure.graph import ChannelGraph, ChannelGroup
from lightning_prune.structure.knowledge import Knowledge
from lightning_prune.structure.labels import Ints, Solution
from lightning_prune.structure.numbers import joining
from lightning_prune.structure.plan import Member, layer_of, named_parameters


def graph_of(model: nn.Module, known: Knowledge, solution: Solution) -> ChannelGraph:
    """The groups that a solution of the labels leaves free, for the model whose copy was watched."""
    groups = _named_apart(_groups(known, solution))
    owner = _owners(known, solution, groups)
    return ChannelGraph(
        model, tuple(groups), _pinned(known, solution), _counted(known, solution, owner), joined=joining(known)
    )


def _owners(known: Knowledge, solution: Solution, groups: list[ChannelGroup]) -> dict[int, str]:
    """Class of labels -> the group that it is a channel of."""
    owner: dict[int, str] = {}
    for group in groups:
        (name, dim), index = next(iter(group.index.items()))
        roots = solution.root[known.labels.first(name, dim) + index[:, 0].numpy()]
        owner.update(dict.fromkeys(roots.tolist(), group.name))
    return owner


def _groups(known: Knowledge, solution: Solution) -> list[ChannelGroup]:
    """Classes of labels that run along the same dims equally often are the channels of one group.

    A class that is the only one of its kind, or that no layer has to do with, can't go; it joins those with a reason.
    """
    labels = known.labels
    ids = np.repeat(np.arange(len(labels.dims)), np.diff(labels.starts))
    used = np.array([name in known.used for name, _ in labels.dims], dtype=bool)
    root = solution.root[1 : labels.atoms]
    free = ~solution.held()[1 : labels.atoms] & used[ids]
    atoms = np.flatnonzero(free)
    order = np.lexsort((atoms, root[atoms]))
    atoms = atoms[order]
    classes, starts, counts = np.unique(root[atoms], return_index=True, return_counts=True)
    if classes.size == 0:
        return []
    prints = np.add.reduceat(_fingerprints(len(labels.dims))[ids[atoms]], starts)
    _, first, kind = np.unique(prints, return_index=True, return_inverse=True)
    bound = labels.marked_roots("bound", solution.root)
    groups: list[ChannelGroup] = []
    for number in np.argsort(first):
        which = np.flatnonzero(kind == number)
        if which.size == 1:
            solution.reasons[int(classes[which[0]])] = (
                "All of its channels hang together, so that none can go by itself."
            )
            continue
        table = atoms[starts[which][:, None] + np.arange(counts[which[0]])]
        if not any(known.roles.get(dim) for dim in ids[table[0]].tolist()):
            solution.reasons.update(dict.fromkeys(classes[which].tolist(), "They are places in a table, no channels."))
            continue
        groups.append(_group(known, table, ids, not bound.isdisjoint(classes[which].tolist())))
    return groups


def _fingerprints(count: int) -> Ints:
    """A random number per dim; the (wrapping) sum over a class tells which dims it runs along, and how often."""
    return np.random.default_rng(0).integers(-(2**62), 2**62, size=count)


def _group(known: Knowledge, table: Ints, ids: Ints, is_bound: bool) -> ChannelGroup:
    labels = known.labels
    columns = ids[table[0]]  # ascending, as the atoms of a class are
    begins = np.flatnonzero(np.diff(columns, prepend=-1))
    numbers = columns[begins].tolist()
    index = {}
    for number, begin, end in zip(numbers, begins, [*begins[1:], columns.size], strict=True):
        index[labels.dims[number]] = torch.from_numpy(table[:, begin:end] + (1 - labels.starts[number]))

    def having(role: str) -> tuple[Member, ...]:
        return tuple(labels.dims[n] for n in numbers if role in known.roles.get(n, ()))

    outputs, inputs = having("outputs"), having("inputs")
    renormalised = tuple(labels.dims[n] for n in numbers if n in known.renormalised)
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
        renormalised=renormalised,
        mergeable=not renormalised and not is_bound,
    )


def _named_apart(groups: list[ChannelGroup]) -> list[ChannelGroup]:
    """Several groups of one layer are told apart by a number: ``qkv``, ``qkv#2``."""
    seen: dict[str, int] = {}
    for group in groups:
        seen[group.name] = seen.get(group.name, 0) + 1
        if seen[group.name] > 1:
            object.__setattr__(group, "name", f"{group.name}#{seen[group.name]}")
    return groups


def _pinned(known: Knowledge, solution: Solution) -> dict[str, str]:
    """Layers some of whose output channels can't go."""
    pinned: dict[str, str] = {}
    labels, held = known.labels, solution.held()
    for number, (name, dim) in enumerate(labels.dims):
        roles = known.roles.get(number, set())
        # a weight without a role has gone through operators that know none
        unknown = not roles and dim == 0 and name.endswith("weight") and known.own(name).dim() > 1
        if name not in known.used:
            if name.endswith("weight"):
                pinned.setdefault(layer_of(name), "It is not used by this forward pass.")
        elif roles & {"outputs", "through"} or unknown:
            own = slice(labels.starts[number], labels.starts[number + 1])
            stay = np.flatnonzero(held[own])
            if stay.size:
                size = known.own(name).shape[dim]
                some = "" if stay.size == size else f" (This holds for {stay.size} of its {size} channels.)"
                pinned.setdefault(layer_of(name), solution.reasons[int(solution.root[own][stay[0]])] + some)
    return _under_all_names(known.model, pinned)


def _under_all_names(model: nn.Module, pinned: dict[str, str]) -> dict[str, str]:
    """Layers that share a parameter share its reason."""
    first: dict[int, str] = {}
    for name, parameter in named_parameters(model, every=True):
        layer = first.setdefault(id(parameter), layer_of(name))
        if layer in pinned and name.endswith("weight"):
            pinned.setdefault(layer_of(name), pinned[layer])
    return pinned


def _counted(known: Knowledge, solution: Solution, owner: dict[int, str]) -> dict[str, tuple[tuple[str, int], ...]]:
    """For each number that a module keeps of its channels: which groups it counts, and how often."""
    counted = {}
    for attribute, labels in known.sizes.items():
        parts: dict[str, int] = {}
        roots, times = np.unique(solution.root[labels], return_counts=True)
        for root, each in zip(roots.tolist(), times.tolist(), strict=True):
            if root in owner:
                parts[owner[root]] = max(each, parts.get(owner[root], 0))
        if parts:
            counted[attribute] = tuple(parts.items())
    return counted
