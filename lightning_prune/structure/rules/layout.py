"""Operators that move whole dims or stretches: reshape, permute, cat, split, and the like."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from lightning_prune.structure.call import Call
from lightning_prune.structure.labels import Axes, Axis, Ints
from lightning_prune.structure.numbers import HEAD_WIDTHS, HEADS
from lightning_prune.structure.rules.registry import couple, fixed, positive, rule, spread, together

FIXED_PARTNER = "stand beside positions that are fixed"


@rule("view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "view_as", "reshape_as")
def reshape(call: Call) -> list[Axes]:
    """Positions keep their order; only where the dims are cut changes."""
    source, (out,) = call.inputs[0], call.outputs
    axes = call.axes(source)
    if all(axis is None for axis in axes):
        return [(None,) * out.dim()]
    if source.numel() == 0 or source.numel() != out.numel():
        call.pin(axes, "are part of a tensor that is empty or read as another type")
        return [(None,) * out.dim()]
    result: list[Axis | None] = []
    opened = _open(call)
    for before, after in _blocks(source.shape, out.shape):
        into = [out.shape[i] for i in after]
        left_open = after.index(opened) if opened in after else None
        result += _regroup(call, [axes[i] for i in before], [source.shape[i] for i in before], into, left_open)
    return [tuple(result)]


def _open(call: Call) -> int | None:
    """The dim whose size Python leaves to be worked out."""
    if call.name not in ("view", "reshape", "_unsafe_view"):
        return None
    shape = call.arg(1, "size" if call.name == "view" else "shape")
    return list(shape).index(-1) if isinstance(shape, (list, tuple)) and -1 in shape else None


def _blocks(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The smallest stretches of dims on both sides that hold equally many positions."""
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [], []
        if i < len(before):
            left.append(i)
            i += 1
        if j < len(after):
            right.append(j)
            j += 1
        while (a := math.prod(before[k] for k in left)) != (b := math.prod(after[k] for k in right)):
            if a < b:
                left.append(i)
                i += 1
            else:
                right.append(j)
                j += 1
        while i < len(before) and before[i] == 1 and j >= len(after):
            left.append(i)
            i += 1
        while j < len(after) and after[j] == 1 and i >= len(before):
            right.append(j)
            j += 1
        yield left, right


def _regroup(
    call: Call, axes: list[Axis | None], sizes: list[int], out: list[int], left_open: int | None
) -> list[Axis | None]:
    """Merge the dims of one block into one and cut that again."""
    if len(axes) == len(out) == 1:
        return axes
    wide = [k for k, axis in enumerate(axes) if axis is not None and sizes[k] > 1]
    for k, axis in enumerate(axes):
        if axis is not None and sizes[k] == 1:
            call.pin(axis, "are the only one of their kind")
    if not wide:
        return [None] * len(out)
    # a stretched dim suits any size: it gives way to one that is a parameter's
    keep = max(wide, key=lambda k: (bool((spread(axes[k], 0) < call.labels.atoms).any()), sizes[k]))
    for k in wide:
        if k != keep:
            call.pin(axes[k], "are merged with another dim that may shrink")
    kept = axes[keep] or Axis(fixed(sizes[keep]), vanishes=True)
    shape = [1] * len(sizes)
    shape[keep] = sizes[keep]
    flat = np.broadcast_to(kept.labels.reshape(shape), sizes).reshape(-1)
    return _cut(call, flat, kept.vanishes, out, left_open)


def _cut(call: Call, flat: Ints, vanishes: bool, out: list[int], left_open: int | None) -> list[Axis | None]:
    """Along which of the new dims do labels change? One of these may shrink; along the others they unite."""
    table = flat.reshape(out)
    varying = [k for k, size in enumerate(out) if size > 1 and np.any(table != table.take([0], k))]
    if not varying:
        call.labels.pin(flat[:1], "Its channels are the only one of their kind.")
        return [None] * len(out)
    # only of the model's own channels may a module keep numbers
    heads, widths = (HEADS, HEAD_WIDTHS) if (flat < call.labels.atoms).any() else ((), ())
    counted = [k for k in varying if call.known.number(heads, out[k])]
    others = [k for k in varying if not call.known.number(widths, out[k])]
    if counted:
        # (3, heads, width) and (heads, width), whichever of them are equal
        elastic = counted[-2] if len(counted) > 1 and counted[-1] == len(out) - 1 else counted[-1]
    elif left_open in varying:
        elastic = left_open
    else:
        elastic = max(others or varying, key=lambda k: out[k])
    rows = np.moveaxis(table, elastic, 0).reshape(out[elastic], -1)
    axis = Axis(rows[:, 0], vanishes)
    if len(varying) > 1:
        call.labels.unite(rows[:, :1], rows)
        if name := call.known.number(heads, out[elastic]):
            call.known.note_size(name, axis)
            call.labels.mark(axis.labels, "bound")
    return [axis if k == elastic else None for k in range(len(out))]


@rule("permute")
def permute(call: Call) -> list[Axes]:
    """Dims in another order."""
    axes = call.axes(call.inputs[0])
    return [tuple(axes[dim] for dim in call.arg(1, "dims"))]


@rule("transpose", "swapaxes", "swapdims")
def transpose(call: Call) -> list[Axes]:
    """Two dims change places."""
    axes = list(call.axes(call.inputs[0]))
    if axes:
        a, b = call.arg(1, "dim0"), call.arg(2, "dim1")
        axes[a], axes[b] = axes[b], axes[a]
    return [tuple(axes)]


@rule("t")
def matrix_transpose(call: Call) -> list[Axes]:
    """Rows become columns."""
    return [tuple(reversed(call.axes(call.inputs[0])))]


@rule("unsqueeze")
def unsqueeze(call: Call) -> list[Axes]:
    """A new dim of size one."""
    axes = list(call.axes(call.inputs[0]))
    axes.insert(positive(call.arg(1, "dim"), len(axes) + 1), None)
    return [tuple(axes)]


@rule("squeeze")
def squeeze(call: Call) -> list[Axes]:
    """Dims of size one are dropped."""
    source = call.inputs[0]
    dims = call.arg(1, "dim", list(range(source.dim())))
    dims = [dims] if isinstance(dims, int) else dims
    gone = {positive(dim, source.dim()) for dim in dims if source.dim() and source.shape[dim] == 1}
    axes = call.axes(source)
    for dim in gone:
        call.pin(axes[dim], "are the only one of their kind")
    return [tuple(axis for dim, axis in enumerate(axes) if dim not in gone)]


@rule("expand", "broadcast_to", "expand_as")
def expand(call: Call) -> list[Axes]:
    """Dims of size one are stretched; a stretched dim suits any size."""
    source, (out,) = call.inputs[0], call.outputs
    axes, new = call.axes(source), out.dim() - source.dim()
    result: list[Axis | None] = [Axis(call.labels.fresh(size), False) for size in out.shape[:new]]
    for axis, before, after in zip(axes, source.shape, out.shape[new:], strict=True):
        if before == after:
            result.append(axis)
        else:
            call.pin(axis, "are stretched over another dim")
            result.append(Axis(call.labels.fresh(after), False))
    return [tuple(result)]


@rule("repeat")
def repeat(call: Call) -> list[Axes]:
    """Whole copies one after another."""
    source, times = call.inputs[0], list(call.arg(1, "repeats"))
    axes: Axes = (None,) * (len(times) - source.dim()) + call.axes(source)
    return [tuple(axis and Axis(np.tile(axis.labels, n), axis.vanishes) for axis, n in zip(axes, times, strict=True))]


@rule("cat", "concat", "concatenate")
def concatenate(call: Call) -> list[Axes]:
    """One after another along a dim; the other dims are shared."""
    (out,) = call.outputs
    parts = [tensor for tensor in call.inputs if tensor.dim() == out.dim()]
    dim = positive(call.arg(1, "dim", 0), out.dim())
    known = [call.axes(tensor) for tensor in parts]
    result: list[Axis | None] = []
    for k in range(out.dim()):
        along = [axes[k] for axes in known]
        if k != dim:
            result.append(together(call, along, _all_vanish(along), FIXED_PARTNER))
        elif all(axis is None for axis in along):
            result.append(None)
        else:
            pieces = [spread(axis, part.shape[k]) for axis, part in zip(along, parts, strict=True)]
            result.append(Axis(np.concatenate(pieces), all(axis is None or axis.vanishes for axis in along)))
    return [tuple(result)]


def _all_vanish(along: Sequence[Axis | None]) -> bool:
    return all(axis is not None and axis.vanishes for axis in along)


@rule("stack")
def stack(call: Call) -> list[Axes]:
    """A new dim; the old ones are shared."""
    dim = positive(call.arg(1, "dim", 0), call.outputs[0].dim())
    known = [call.axes(tensor) for tensor in call.inputs]
    shared = [together(call, list(along), _all_vanish(along), FIXED_PARTNER) for along in zip(*known, strict=True)]
    return [(*shared[:dim], None, *shared[dim:])]


@rule("split", "chunk", "split_with_sizes", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes")
def split(call: Call) -> list[Axes]:
    """Pieces of one dim: equal ones are coupled index to index, others need numbers that say where they end."""
    source = call.inputs[0]
    axes = call.axes(source)
    dim = positive(call.arg(2, "dim", 0), source.dim())
    axis = axes[dim]
    if axis is None:
        return [axes] * len(call.outputs)
    sizes = [out.shape[dim] for out in call.outputs]
    pieces = np.split(axis.labels, np.cumsum(sizes)[:-1])
    followed = "chunk" not in call.name and (call.known.note_cut(*pieces) | call.known.note_cut(axis.labels))
    if len(set(sizes)) > 1 and not followed:
        call.pin(axis, "are split unevenly")
    for size in set(sizes):
        alike = [piece for piece in pieces if len(piece) == size]
        couple(call, np.concatenate(alike), len(alike))
    return [(*axes[:dim], Axis(piece, axis.vanishes), *axes[dim + 1 :]) for piece in pieces]


@rule("pixel_shuffle")
def pixel_shuffle(call: Call) -> list[Axes]:
    """``(C r r, H, W)`` to ``(C, H r, W r)``: the r*r channels of one pixel go together."""
    axes = call.axes(call.inputs[0])
    factor = call.arg(1, "upscale_factor")
    channels = axes[-3]
    for axis in axes[-2:]:
        call.pin(axis, "are woven into each other")
    if channels is not None:
        table = channels.labels.reshape(-1, factor * factor)
        call.labels.unite(table[:, :1], table)
        channels = Axis(table[:, 0], channels.vanishes)
    return [(*axes[:-3], channels, None, None)]


@rule("pixel_unshuffle")
def pixel_unshuffle(call: Call) -> list[Axes]:
    """``(C, H r, W r)`` to ``(C r r, H, W)``."""
    axes = call.axes(call.inputs[0])
    factor = call.arg(1, "downscale_factor")
    for axis in axes[-2:]:
        call.pin(axis, "are woven into each other")
    channels = axes[-3] and Axis(axes[-3].labels.repeat(factor * factor), axes[-3].vanishes)
    return [(*axes[:-3], channels, None, None)]


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(call: Call) -> list[Axes]:
    """Equal stretches are dealt out in turn."""
    axes, groups = list(call.axes(call.inputs[0])), call.arg(1, "groups")
    channels = axes[1]
    if channels is not None:
        couple(call, channels.labels, groups)
        axes[1] = Axis(channels.labels.reshape(groups, -1).T.reshape(-1), channels.vanishes)
    return [tuple(axes)]


@rule("_weight_norm")
def weight_norm(call: Call) -> list[Axes]:
    """``g v / |v|``: a sum of squares does not notice zeros that leave."""
    direction, size = call.inputs[:2]
    axes, dim = list(call.axes(direction)), call.arg(2, "dim", 0)
    if dim >= 0:
        axes[dim] = together(call, [axes[dim], call.axes(size)[dim]], True, FIXED_PARTNER)
    for k, axis in enumerate(axes):
        if axis is not None and k != dim:
            call.labels.mark(axis.labels, "bound")
        if axis is not None and not axis.vanishes and k != dim:
            call.pin(axis, "enter the length of a weight")
    return [tuple(axes)]
