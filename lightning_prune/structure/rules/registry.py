"""The table of rules, and what several rules share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from torch import Tensor

from lightning_prune.structure.call import Call, Rule
from lightning_prune.structure.labels import FIXED, Axes, Axis, Ints

R = TypeVar("R", bound=Rule)

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[R], R]:
    """Enter a function as the rule of the operators of these names (without ``aten.`` and overload)."""

    def enter(function: R) -> R:
        for name in names:
            RULES[name] = function
        return function

    return enter


def together(call: Call, axes: Sequence[Axis | None], vanishes: bool, why: str) -> Axis | None:
    """One dim that several tensors share position by position: they live and die together, or are fixed together."""
    labelled = [axis for axis in axes if axis is not None]
    if not labelled:
        return None
    if len(labelled) < len(axes):
        for axis in labelled:
            call.pin(axis, why)
        return None
    first = labelled[0].labels
    for axis in labelled[1:]:
        call.labels.unite(first, axis.labels)
    return Axis(first, vanishes)


def contract(call: Call, a: Axis | None, b: Axis | None, weighted: bool = True) -> None:
    """Two dims that are multiplied position by position and summed over; ``weighted``: one of them is a weight's."""
    if a is not None and b is not None and (a.vanishes or b.vanishes):
        call.labels.unite(a.labels, b.labels)
        if not weighted:
            call.labels.mark(a.labels, "bound")
        return
    why = "are summed over with something that does not vanish" if a and b else "meet positions that are fixed"
    call.pin(a, why)
    call.pin(b, why)


def of_weight(call: Call, source: Tensor, axis: Axis | None) -> bool:
    """Whether this is a weight along a dim of its own, over which statistics can be those of what stays."""
    if axis is None or call.known.from_data(source) or not call.known.is_weight(source):
        return False
    return bool(((axis.labels > FIXED) & (axis.labels < call.labels.atoms)).all())


def of_channels(call: Call, axis: Axis | None) -> bool:
    """Whether statistics can be those of the channels that stay: they hold all of one parameter dim, and zeros else."""
    if axis is None or not axis.vanishes or not 0 < axis.labels[0] < call.labels.atoms:
        return False
    name, dim = call.labels.dims[int(call.labels.member_ids(axis.labels[:1])[0])]
    whole = call.labels.of(name)[dim]
    return whole is not None and np.array_equal(whole.labels, axis.labels)


def couple(call: Call, labels: Ints, rows: int) -> Ints:
    """Unite equal positions of ``rows`` equal stretches; returns the labels of the first stretch."""
    table = labels.reshape(rows, -1)
    if rows > 1:
        call.labels.unite(table[:1], table[1:])
    first: Ints = table[0]
    return first


def fixed(size: int) -> Ints:
    """Labels for positions that never leave."""
    return np.full(size, FIXED, dtype=np.int64)


def spread(axis: Axis | None, size: int) -> Ints:
    """The labels of a dim, fixed ones where nothing is known."""
    return fixed(size) if axis is None else axis.labels


def positive(dim: int, rank: int) -> int:
    """A dim counted from the front."""
    return dim + max(rank, 1) if dim < 0 else dim


def several(dims: object, rank: int) -> set[int]:
    """Dims that are named one by one, in a list, or not at all where all are meant; counted from the front."""
    listed = list(range(rank)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)  # type: ignore[call-overload]
    return {positive(dim, rank) for dim in listed}


def optional(call: Call, tensor: Tensor | None) -> Axis | None:
    """The only dim of a bias-like vector, if there is one."""
    return call.axes(tensor)[0] if tensor is not None and tensor.dim() else None


def shifted(axes: Sequence[Axis | None]) -> Axes:
    """Dims along which something is added to every position, so that none is zero any more."""
    return tuple(axis and Axis(axis.labels, vanishes=False) for axis in axes)


def same(call: Call) -> Axes:
    """The output's dims are those of the first tensor read."""
    return call.axes(call.inputs[0])
