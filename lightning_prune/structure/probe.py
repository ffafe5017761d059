"""Does Python agree? Trials at other widths, run operator by operator beside the sizes that the labels foretell.

A graph knows sizes as numbers; Python may work them out anew (``C // heads``), or may have them written down
(``view(-1, 512)``). So the model is tried at other widths: every channel is taken a random number of times, once with
numbers so large that no two sizes agree by chance (without memory that costs nothing), once with fewer channels than
there are. Where an operator fails, gives another size than foretold or is fed another number, its channels are pinned,
and the pass goes on with a tensor of the foretold size: one pass finds all such places.

Where the model looks at values, a network of other channels would see others and could take another way. So whatever
leaves the channels that may go (a head's output, say) gets the values that it has in the dense network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.structure.call import tensors_in
from lightning_prune.structure.graph import ChannelGraph, ChannelGroup
from lightning_prune.structure.knowledge import Record
from lightning_prune.structure.labels import Axes, Axis, Ints, Labels, Solution
from lightning_prune.structure.numbers import Fault
from lightning_prune.structure.plan import Member, named_tensors
from lightning_prune.structure.replica import quiet_room, to_device
from lightning_prune.structure.surgery import Cut, Cuts, resize_
from lightning_prune.structure.watch import (
    UNSEEN,
    Constants,
    Repeats,
    compute,
    on_meta,
    open_up,
    operator_name,
    rule_for,
    scalars_of,
)

Values = dict[int, list[Tensor]]
Fresh = Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]


def probe(
    records: list[Record],
    labels: Labels,
    solution: Solution,
    graph: ChannelGraph,
    fresh: Fresh,
    without_memory: bool,
    known: Values | None = None,
    repeats: Repeats | None = None,
) -> list[Fault]:
    """What else must be pinned, or counted; nothing where the model runs as foretold in all trials.

    Args:
        records: of the dense pass.
        labels: of the dense pass.
        solution: of these labels.
        graph: what would be offered.
        fresh: makes a copy of the dense model to try on, and the arguments of its forward.
        without_memory: whether these copies have none.
        known: what some operators of the dense pass have returned.
        repeats: what that pass has computed.
    """
    dense, repeats = None, repeats or Repeats()
    if not without_memory:
        free = _times_of_labels(labels, solution, graph, _nothing(graph)) == 0
        ends = {number for number, record in enumerate(records) if _ends(record, free)}
        dense = _values(ends, known or {}, fresh, repeats)
    for times in _trials(graph, without_memory):
        widths = _times_of_labels(labels, solution, graph, times)
        faults = _try(Prober(records, widths, dense, repeats), graph, times, *fresh())
        if faults:
            return faults
    return []


def _values(ends: set[int], known: Values, fresh: Fresh, repeats: Repeats) -> Values:
    """What the dense network computes, wherever channels that may go are read and none are written."""
    if ends <= known.keys():
        return {number: known[number] for number in ends}
    listener = Listener(ends, repeats)
    model, args, kwargs = fresh()
    with quiet_room(), Constants(), listener:
        model(*args, **kwargs)
    return listener.values


def _ends(record: Record, free: NDArray[np.bool_]) -> bool:
    read, written = (
        any(axis is not None and free[axis.labels].any() for axes in side for axis in axes)
        for side in (record.inputs, record.outputs)
    )
    return read and not written


def _try(
    prober: Prober,
    graph: ChannelGraph,
    widths: dict[str, Ints],
    trial: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> list[Fault]:
    resize_(trial, *_cuts(graph, widths, next(trial.parameters()).is_meta))
    failure = ""
    with quiet_room():
        try:
            with Constants(), prober:
                trial(*args, **kwargs)
        except Exception as error:  # the user's own checks may raise anything
            failure = " ".join(str(error).split())[:200] or type(error).__name__
            prober.blame_next(f"Its channels are counted by the model's own code ({failure}).")
    if prober.faults or (not failure and prober.complete and not prober.failed):
        return prober.faults
    why = failure or "it takes another way"
    reason = f"The model does not run with another number of channels ({why})."
    return [Fault([np.flatnonzero(prober.times != 1)], reason, "")]


def _trials(graph: ChannelGraph, without_memory: bool) -> Iterator[dict[str, Ints]]:
    """How often each channel of each group is taken, a trial at a time."""
    generator = np.random.default_rng(0)
    if without_memory:
        yield {group.name: generator.integers(1, 5000 // group.size + 9, group.size) for group in graph.groups}
    for _ in range(1 if without_memory else 3):
        yield {group.name: _fewer(generator, group) for group in graph.groups}


def _nothing(graph: ChannelGraph) -> dict[str, Ints]:
    return {group.name: np.zeros(group.size, dtype=np.int64) for group in graph.groups}


def _fewer(generator: np.random.Generator, group: ChannelGroup) -> Ints:
    """At least one channel stays (of those with a deviation two, where there are more), and at least one goes."""
    size, least = group.size, 2 if group.renormalised and group.size > 2 else 1
    return generator.permutation(np.arange(size) < generator.integers(least, size)).astype(np.int64)


def _cuts(graph: ChannelGraph, widths: dict[str, Ints], without_memory: bool) -> tuple[dict[str, Cuts], dict[str, int]]:
    """The positions to take along every member's dim, and the numbers that modules keep of them."""
    tensors = named_tensors(graph.model)
    times: dict[Member, Ints] = {}
    lengths: dict[Member, int] = {}
    for group in graph.groups:
        more = int((widths[group.name] - 1).sum())
        for (name, dim), index in group.index.items():
            size = tensors[name].shape[dim]
            lengths[name, dim] = lengths.get((name, dim), size) + more * index.shape[1]
            if not without_memory:
                whole = times.setdefault((name, dim), np.ones(size, dtype=np.int64))
                whole[index.numpy()] = widths[group.name][:, None]
    cuts: dict[str, Cuts] = {}
    for (name, dim), length in lengths.items():
        if without_memory:
            taken = torch.empty(length, dtype=torch.int64, device="meta")
        else:
            taken = torch.from_numpy(np.arange(tensors[name].shape[dim]).repeat(times[name, dim]))
        cuts.setdefault(name, {})[dim] = Cut(taken, None)
    numbers = graph.dense_numbers()
    for attribute, parts in graph.numbers.items():
        numbers[attribute] += sum(int((widths[part] - 1).sum()) * each for part, each in parts)
    return cuts, numbers


def _times_of_labels(labels: Labels, solution: Solution, graph: ChannelGraph, widths: dict[str, Ints]) -> Ints:
    """Per label, how often its position is taken in the trial."""
    times = np.ones(solution.root.size, dtype=np.int64)
    for group in graph.groups:
        (name, dim), index = next(iter(group.index.items()))
        times[solution.root[labels.first(name, dim) + index[:, 0].numpy()]] = widths[group.name]
    of_labels: Ints = times[solution.root]
    return of_labels


class Listener(TorchDispatchMode):
    """Keeps what some operators of a pass return, by their number in it."""

    def __init__(self, numbers: set[int], repeats: Repeats) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.numbers = numbers
        self.repeats = repeats
        self.values: Values = {}
        self.position = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if rule_for(func) is None:
            opened = open_up(self, func, args, kwargs)
            if opened is not NotImplemented:
                return opened
        result = self.repeats.compute(func, args, kwargs)
        if operator_name(func) not in UNSEEN:
            if self.position in self.numbers:
                self.values[self.position] = [tensor.clone() for tensor in tensors_in(result)]
            self.position += 1
        return result


class Prober(TorchDispatchMode):
    """Runs the trial beside the records of the dense pass.

    Args:
        records: of that pass.
        times: how often each label is taken.
        dense: number of a record -> values that its results get; nothing for a model that never looks at values.
        repeats: what other passes have computed.
    """

    def __init__(self, records: list[Record], times: Ints, dense: Values | None, repeats: Repeats) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.records = records
        self.times = times
        self.dense = dense
        self.repeats = repeats
        self.faults: list[Fault] = []
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
        name = operator_name(func)
        record = None if name in UNSEEN else self._next(name)
        if record is None:
            return func(*args, **kwargs)
        expected = [tuple(self._sizes(axes, shape)) for axes, shape in zip(record.outputs, record.shapes, strict=True)]
        if scalars_of(func, args, kwargs) != _scalars(record, args):
            self._blame(record.where, record.inputs, f"A number that depends on their count enters {_named(record)}.")
        try:
            result = self._computed(func, args, kwargs, record)
        except Exception:  # a size that does not fit, in whatever words
            reason = f"{_named(record)} fails with another number of channels."
            joins = _joins(args, record, expected)
            if not joins and (pair := self._taken_for(args, record, expected)) is not None:
                self.failed = True
                self.faults.append(Fault([pair[0]], reason, record.where, meant=pair[1]))
            else:
                self._blame(record.where, (*record.inputs, *record.outputs), reason, joins)
            return _stand_in(func, args, kwargs, expected)
        if [tuple(tensor.shape) for tensor in tensors_in(result)] == expected:
            for tensor, value in zip(tensors_in(result), (self.dense or {}).get(self.position - 1, ()), strict=False):
                tensor.copy_(value)
            return result
        self._blame(
            record.where, record.outputs, f"Their count is written down or worked out anew in {_named(record)}."
        )
        return _stand_in(func, args, kwargs, expected)

    def _computed(self, func: Any, args: Any, kwargs: Any, record: Record) -> Any:
        """The result of an operator; where the values of its channels are of no interest, only its shape."""
        plain = isinstance(func, torch._ops.OpOverload) and not func.is_view  # a view is of its tensor's own kind
        if self.dense is None or not plain or not self._changing_along((*record.inputs, *record.outputs)):
            return self.repeats.compute(func, args, kwargs)
        try:
            shaped = compute(func, *on_meta(*to_device((args, kwargs), "meta")))
        except (NotImplementedError, RuntimeError):  # the shape depends on values, or something does not fit
            return compute(func, args, kwargs)
        if operator_name(func).endswith("_"):
            return args[0]
        return pytree.tree_map(lambda leaf: torch.empty(leaf.shape, dtype=leaf.dtype), shaped)

    def blame_next(self, reason: str) -> None:
        """Python itself failed: what the next operator would have read is counted somewhere."""
        following = self.records[self.position : self.position + 1]
        axes = tuple(axes for record in following for axes in (*record.inputs, *record.outputs))
        self._blame(following[0].where if following else "", axes, reason)

    def _next(self, operator: str) -> Record | None:
        if self.astray or self.position >= len(self.records) or self.records[self.position].operator != operator:
            if not self.astray:
                self.blame_next("The model takes another way with another number of channels.")
            self.astray = True
            return None
        self.position += 1
        return self.records[self.position - 1]

    def _sizes(self, axes: Axes, shape: torch.Size) -> Iterator[int]:
        for axis, size in zip(axes, shape, strict=True):
            yield size if axis is None else int(self.times[axis.labels].sum())

    def _blame(self, where: str, tensors: tuple[Axes, ...], reason: str, joins: bool = False) -> None:
        """Blame what has another width along these dims; where nothing has, it was read off an earlier tensor."""
        self.failed = True
        earlier = self.position - 1
        while not (guilty := self._changing_along(tensors)) and earlier >= 0:
            tensors = (*self.records[earlier].inputs, *self.records[earlier].outputs)
            earlier -= 1
        if guilty:
            self.faults.append(Fault([axis.labels for axis in guilty], reason, where, joins))

    def _taken_for(self, args: Any, record: Record, expected: list[tuple[int, ...]]) -> tuple[Ints, Ints] | None:
        """Of a reshape that asks for the size of an earlier dim instead: the dim that it means to cut, and that one."""
        asked = args[1] if record.operator in ("view", "reshape") and len(args) > 1 else ()
        if self.dense is not None or not isinstance(asked, (list, tuple)) or len(asked) != len(expected[0]):
            return None
        apart = [k for k, (size, real) in enumerate(zip(asked, expected[0], strict=True)) if size not in (-1, real)]
        axis = record.outputs[0][apart[0]] if len(apart) == 1 else None
        if axis is None:
            return None
        earlier = (axes for each in reversed(self.records[: self.position]) for axes in (*each.outputs, *each.inputs))
        for other in (other for axes in earlier for other in axes if other is not None):
            if other.labels.size == axis.labels.size and int(self.times[other.labels].sum()) == asked[apart[0]]:
                return axis.labels, other.labels
        return None

    def _changing_along(self, tensors: tuple[Axes, ...]) -> list[Axis]:
        found = (axis for axes in tensors for axis in axes if axis is not None)
        return [axis for axis in found if (self.times[axis.labels] != 1).any()]


def _joins(args: Any, record: Record, expected: list[tuple[int, ...]]) -> bool:
    """Whether only the last size that a reshape asks for is another than foretold."""
    if record.operator not in ("view", "reshape") or len(args) < 2 or not isinstance(args[1], (list, tuple)):
        return False
    return len(args[1]) > 1 and tuple(args[1][:-1]) == expected[0][:-1]


def _scalars(record: Record, args: Any) -> tuple[float, ...]:
    """What enters an operator's arithmetic; a norm with a group for every channel has one for each that is left."""
    apart = record.operator == "group_norm" and record.scalars == tuple(record.shapes[0][1:2])
    return tuple(args[0].shape[1:2]) if apart else record.scalars


def _named(record: Record) -> str:
    operator = "a new tensor" if record.operator == "lift_fresh" else record.operator
    return f"{operator} ({record.where or 'the model itself'})"


def _stand_in(func: Any, args: Any, kwargs: Any, shapes: list[tuple[int, ...]]) -> Any:
    """A result of the foretold shapes, in the form that the operator would return."""
    like = next(tensors_in((args, kwargs)), torch.empty(0))
    made = [like.new_zeros(shape) for shape in shapes]
    returns = func._schema.returns
    if len(returns) == 1 and str(returns[0].type) == "Tensor":
        return made[0]
    return made if len(returns) == 1 else tuple(made)
