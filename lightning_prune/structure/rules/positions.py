"""Operators that name positions: slice, select, index, pad, flip, roll."""

from __future__ import annotations

import sys

import numpy as np
import torch

from lightning_prune.structure.call import Call
from lightning_prune.structure.labels import Axes, Axis, Ints
from lightning_prune.structure.rules.registry import couple, fixed, positive, rule, same, shifted, together

FIXED_PARTNER = "are written beside positions that are fixed"


@rule("slice")
def cut_out(call: Call) -> list[Axes]:
    """A stretch of one dim: its ends follow a number of the module's, or it is one of equal stretches, or they stay."""
    source = call.inputs[0]
    axes = call.axes(source)
    dim = positive(call.arg(1, "dim", 0), source.dim())
    axis = axes[dim]
    if axis is None:
        return [axes]
    size, step = axis.labels.size, call.arg(4, "step", 1)
    start, stop = call.arg(2, "start"), call.arg(3, "end")
    first, last, _ = slice(start, stop).indices(size)
    length = last - first
    if _ends_follow(call, axis.labels, start, stop):
        pass
    elif 1 < length < size and size % length == 0 and first % length == 0:
        couple(call, axis.labels, size // length)
    else:
        _hold_ends(call, axis.labels, start, stop)
    piece = axis.labels[first:last]
    if step > 1:
        piece = _every(call, piece, axis, step)
    return [(*axes[:dim], Axis(piece, axis.vanishes), *axes[dim + 1 :])]


def _ends_follow(call: Call, labels: Ints, start: int | None, stop: int | None) -> bool:
    """Whether the module at work keeps the ends, counted from the front, as numbers."""
    ends = [end for end in (start, stop) if end not in (None, 0, sys.maxsize)]
    return bool(ends) and all(0 < end <= labels.size and call.known.note_cut(labels[:end]) for end in ends)


@rule("alias")
def whole(call: Call) -> list[Axes]:
    """A slice that takes everything, as far as that is in the numbers of the module."""
    axes = same(call)
    for axis in axes:
        if axis is not None:
            call.known.note_cut(axis.labels)
    return [axes]


def _hold_ends(call: Call, labels: Ints, start: int | None, stop: int | None) -> None:
    """An end counted from the front needs all before it in place, one counted from the back all behind it."""
    why = f"Its channels are counted off by a slice {call.where}."
    for end in (start, stop):
        if end is not None and 0 < end < labels.size:
            call.labels.pin(labels[:end], why)
        elif end is not None and end < 0:
            call.labels.pin(labels[end:], why)


def _every(call: Call, piece: Ints, axis: Axis, step: int) -> Ints:
    if piece.size % step == 0:
        table = piece.reshape(-1, step)
        call.labels.unite(table[:, :1], table)
    else:
        call.pin(axis, "are taken at regular distances")
    return piece[::step]


@rule("select")
def select(call: Call) -> list[Axes]:
    """One position of a dim: the first or the last may be told from either end, others only if nothing leaves."""
    source = call.inputs[0]
    axes = call.axes(source)
    dim, index = positive(call.arg(1, "dim"), source.dim()), call.arg(2, "index")
    axis = axes[dim]
    if axis is not None:
        alone = index in (0, -1)
        held = Axis(axis.labels[[index]], axis.vanishes) if alone else axis
        call.pin(held, "are picked by number")
    return [(*axes[:dim], *axes[dim + 1 :])]


@rule("unbind")
def unbind(call: Call) -> list[Axes]:
    """Every position of a dim by itself."""
    source = call.inputs[0]
    axes = call.axes(source)
    dim = positive(call.arg(1, "dim", 0), source.dim())
    call.pin(axes[dim], "are picked by number")
    return [(*axes[:dim], *axes[dim + 1 :])] * len(call.outputs)


@rule("index")
def index(call: Call) -> list[Axes]:
    """Advanced indexing: dims that are looked up stay, the others pass."""
    source, where = call.args[0], list(call.arg(1, "indices"))
    axes, (out,) = call.axes(source), call.outputs
    looked_up = [k for k, item in enumerate(where) if item is not None]
    for item in (item for item in where if item is not None):
        call.pin(call.axes(item), "are numbers of positions")
    if any(item is not None and str(item.dtype) in ("torch.bool", "torch.uint8") for item in where):
        call.pin(axes, "are looked up by a mask")
        return [(None,) * out.dim()]
    for k in looked_up:
        call.pin(axes[k], "are looked up by number")
    rest = [axes[k] for k in range(len(axes)) if k not in looked_up]
    new: list[Axis | None] = [None] * (out.dim() - len(rest))
    together_ = looked_up == list(range(looked_up[0], looked_up[0] + len(looked_up))) if looked_up else True
    at = looked_up[0] if looked_up and together_ else 0
    return [(*rest[:at], *new, *rest[at:])]


@rule("index_put")
def index_put(call: Call) -> list[Axes]:
    """Values written at places along the first dims; the other dims are shared with the values."""
    target, where, values = call.args[0], list(call.arg(1, "indices")), call.arg(2, "values")
    axes, given = call.axes(target), call.axes(values)
    call.pin(tuple(axis for item in where if item is not None for axis in call.axes(item)), "are numbers of positions")
    rest = target.dim() - sum(1 if item is None or item.dtype != torch.bool else item.dim() for item in where)
    if any(item is None for item in where) or values.dim() < rest or values.shape[-rest:] != target.shape[-rest:]:
        rest = 0
    call.pin((*axes[: len(axes) - rest], *given[: len(given) - rest]), "are written by number")
    pairs = list(zip(axes[len(axes) - rest :], given[len(given) - rest :], strict=True))
    shared = [together(call, pair, all(axis and axis.vanishes for axis in pair), FIXED_PARTNER) for pair in pairs]
    return [(*(None,) * (len(axes) - rest), *shared)]


@rule("index_select")
def index_select(call: Call) -> list[Axes]:
    """Positions of one dim by number."""
    source, dim = call.inputs[0], call.arg(1, "dim")
    axes = list(call.axes(source))
    call.pin(axes[dim], "are looked up by number")
    call.pin(call.axes(call.inputs[1]), "are numbers of positions")
    axes[dim] = None
    return [tuple(axes)]


@rule("embedding")
def embedding(call: Call) -> list[Axes]:
    """Rows of a table by number; its columns are channels."""
    table, numbers = call.arg(0, "weight"), call.arg(1, "indices")
    rows, columns = call.axes(table)
    call.pin(rows, "are looked up by number")
    call.pin(call.axes(numbers), "are numbers of positions")
    if columns is not None:
        call.role(columns.labels, "outputs")
    return [(*(None,) * numbers.dim(), columns)]


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")
def pad(call: Call) -> list[Axes]:
    """New positions at the ends; constant ones are fixed and tie whatever they meet."""
    source, widths = call.inputs[0], list(call.arg(1, "pad"))
    axes = list(call.axes(source))
    constant = call.name == "constant_pad_nd" or (call.name == "pad" and call.arg(2, "mode", "constant") == "constant")
    value = call.arg(3 if call.name == "pad" else 2, "value") if constant else None
    if value:
        axes = list(shifted(axes))
    for k in range(len(widths) // 2):
        before, after, axis = widths[2 * k], widths[2 * k + 1], axes[-k - 1]
        if axis is None or before == after == 0:
            continue
        if not constant or before < 0 or after < 0:
            call.pin(axis, "are padded with each other")
            axes[-k - 1] = None
        else:
            axes[-k - 1] = Axis(np.concatenate([fixed(before), axis.labels, fixed(after)]), axis.vanishes)
    return [tuple(axes)]


@rule("flip")
def flip(call: Call) -> list[Axes]:
    """The other way round."""
    axes = list(call.axes(call.inputs[0]))
    for dim in call.arg(1, "dims"):
        axis = axes[dim]
        axes[dim] = axis and Axis(axis.labels[::-1].copy(), axis.vanishes)
    return [tuple(axes)]


@rule("roll")
def roll(call: Call) -> list[Axes]:
    """A shift by a number of positions; no dims means all of them, flattened."""
    axes = list(call.axes(call.inputs[0]))
    for dim in call.arg(2, "dims", ()) or range(len(axes)):
        call.pin(axes[dim], "are shifted by a fixed number")
        axes[dim] = None
    return [tuple(axes)]
