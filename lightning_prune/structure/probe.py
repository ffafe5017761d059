"""Does Python agree? A trial cut, run operator by operator beside the sizes that the labels foretell.

A graph knows sizes as numbers; Python may work them out anew (``C // heads``), or may have them written down
(``view(-1, 512)``). A few trials remove other shares of every group, so that no two sizes agree by chance. Where
an operator fails, gives another size than foretold or is fed another number, its channels are pinned, and the pass
goes on with a tensor of the foretold size: one pass finds all such places.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.structure.labels import Axes, Axis, Ints, Solution
from lightning_prune.structure.plan import PruningPlan
from lightning_prune.structure.replica import quiet_room
from lightning_prune.structure.surgery import prune_
from lightning_prune.structure.watch import (
    Record,
    Watcher,
    compute,
    on_meta,
    open_up,
    operator_name,
    rule_for,
    scalars_of,
    tensors_in,
)

if TYPE_CHECKING:
    from lightning_prune.structure.graph import ChannelGraph

Pins = list[tuple[Ints, str]]


def probe(
    watcher: Watcher,
    solution: Solution,
    graph: ChannelGraph,
    fresh: Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]],
) -> Pins:
    """What else must be pinned, with reasons; nothing where the model runs as foretold in all trials.

    Args:
        watcher: of the dense pass.
        solution: of its labels.
        graph: what would be offered.
        fresh: makes a copy of the dense model to cut, and the arguments of its forward.
    """
    for removed in _trials(graph):
        pins = _try(watcher.records, _leaving(watcher, solution, graph, removed), graph.plan(removed), *fresh())
        if pins:
            return pins
    return []


def _try(
    records: list[Record],
    leaving: NDArray[np.bool_],
    plan: PruningPlan,
    trial: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Pins:
    prune_(trial, plan)
    prober = Prober(records, leaving)
    failure = ""
    with quiet_room():
        try:
            with prober:
                trial(*args, **kwargs)
        except Exception as error:  # the user's own checks may raise anything
            failure = " ".join(str(error).split())[:200] or type(error).__name__
            prober.blame_next(f"Its channels are counted by the model's own code ({failure}).")
    if prober.pins or (not failure and prober.complete and not prober.failed):
        return prober.pins
    everything = np.flatnonzero(leaving)
    return [(everything, f"The model does not run with fewer channels ({failure or 'it takes another way'}).")]


def _trials(graph: ChannelGraph) -> Iterator[dict[str, list[int]]]:
    """Channels that go, a trial at a time: no two groups of one size lose equally many in all of them.

    The counts of a group over the trials are the digits of a random number to the base of its size, another number
    for every group of that size; none is zero in all digits. Two trials do, unless very small groups are many.
    """
    generator = np.random.default_rng(0)
    sizes = Counter(group.size for group in graph.groups)
    trials = max(2, *(math.ceil(math.log(count + 1, size) + 1e-9) for size, count in sizes.items()))
    numbers = {
        size: generator.choice(min(size**trials, 2**31) - 1, size=count, replace=False) + 1
        for size, count in sizes.items()
    }
    codes = {size: iter(chosen.tolist()) for size, chosen in numbers.items()}
    code = {group.name: next(codes[group.size]) for group in graph.groups}
    for trial in range(trials):
        yield {
            group.name: generator.permutation(group.size)[: code[group.name] // group.size**trial % group.size].tolist()
            for group in graph.groups
        }


def _leaving(
    watcher: Watcher, solution: Solution, graph: ChannelGraph, removed: dict[str, list[int]]
) -> NDArray[np.bool_]:
    """Per label, whether it leaves in the trial."""
    gone = np.zeros(solution.root.size, dtype=bool)
    for group in graph.groups:
        (name, dim), index = next(iter(group.index.items()))
        atoms = watcher.labels.first(name, dim) + index[removed[group.name], 0].numpy()
        gone[solution.root[atoms]] = True
    leaving: NDArray[np.bool_] = gone[solution.root]
    return leaving


class Prober(TorchDispatchMode):
    """Runs the trial beside the records of the dense pass."""

    def __init__(self, records: list[Record], leaving: NDArray[np.bool_]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.records = records
        self.leaving = leaving
        self.pins: Pins = []
        self.position = 0
        self.astray = False
        self.failed = False

    @property
    def complete(self) -> bool:
        """Whether the trial did the same operators as the dense pass."""
        return not self.astray and self.position == len(self.records)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if rule_for(func) is None:
            opened = open_up(self, func, args, kwargs)
            if opened is not NotImplemented:
                return opened
        args, kwargs = on_meta(args, kwargs)
        record = self._next(operator_name(func))
        if record is None:
            return func(*args, **kwargs)
        expected = [tuple(self._sizes(axes, shape)) for axes, shape in zip(record.outputs, record.shapes, strict=True)]
        if scalars_of(func, args, kwargs) != record.scalars:
            self._blame(record.inputs, f"A number that depends on their count enters {_named(record)}.")
        try:
            result = compute(func, args, kwargs)
        except Exception:  # a size that does not fit, in whatever words
            self._blame((*record.inputs, *record.outputs), f"{_named(record)} fails with fewer channels.")
            return _stand_in(func, args, kwargs, expected)
        if [tuple(tensor.shape) for tensor in tensors_in(result)] == expected:
            return result
        self._blame(record.outputs, f"Their count is written down or worked out anew in {_named(record)}.")
        return _stand_in(func, args, kwargs, expected)

    def blame_next(self, reason: str) -> None:
        """Python itself failed: what the next operator would have read is counted somewhere."""
        following = self.records[self.position : self.position + 1]
        self._blame(tuple(axes for record in following for axes in (*record.inputs, *record.outputs)), reason)

    def _next(self, operator: str) -> Record | None:
        if self.astray or self.position >= len(self.records) or self.records[self.position].operator != operator:
            if not self.astray:
                self.blame_next("The model takes another way with fewer channels.")
            self.astray = True
            return None
        self.position += 1
        return self.records[self.position - 1]

    def _sizes(self, axes: Axes, shape: torch.Size) -> Iterator[int]:
        for axis, size in zip(axes, shape, strict=True):
            yield size if axis is None else size - int(np.count_nonzero(self.leaving[axis.labels]))

    def _blame(self, tensors: tuple[Axes, ...], reason: str) -> None:
        """Pin what leaves along these dims; where nothing does, the size was read off a tensor a little earlier."""
        self.failed = True
        earlier = self.position - 1
        while not (guilty := self._leaving_along(tensors)) and earlier >= 0:
            tensors = (*self.records[earlier].inputs, *self.records[earlier].outputs)
            earlier -= 1
        self.pins += [(axis.labels, reason) for axis in guilty]

    def _leaving_along(self, tensors: tuple[Axes, ...]) -> list[Axis]:
        found = (axis for axes in tensors for axis in axes if axis is not None)
        return [axis for axis in found if self.leaving[axis.labels].any()]


def _named(record: Record) -> str:
    return f"{record.operator} ({record.where or 'the model itself'})"


def _stand_in(func: Any, args: Any, kwargs: Any, shapes: list[tuple[int, ...]]) -> Any:
    """A result of the foretold shapes, in the form that the operator would return."""
    like = next(tensors_in((args, kwargs)), torch.empty(0))
    made = [like.new_zeros(shape) for shape in shapes]
    returns = func._schema.returns
    if len(returns) == 1 and str(returns[0].type) == "Tensor":
        return made[0]
    return made if len(returns) == 1 else tuple(made)
