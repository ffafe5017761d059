"""Operators that multiply and sum: convolutions, linear layers, matrix products, attention, recurrence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from lightning_prune.structure.call import Call
from lightning_prune.structure.labels import Axes, Axis
from lightning_prune.structure.rules.registry import contract, couple, optional, rule, shifted, together

FIXED_PARTNER = "are combined with positions that are fixed"


def _bias(call: Call, out: Axis | None, bias: Tensor | None) -> Axis | None:
    """Add a bias along the output channels."""
    if bias is None:
        return out
    axis = optional(call, bias)
    if axis is not None:
        call.role(axis.labels, "shifts")
    zero = bool(out and out.vanishes and axis and axis.vanishes)
    return together(call, [out, axis], zero, FIXED_PARTNER)


def _roles(call: Call, outputs: Axis | None, inputs: Axis | None) -> None:
    if outputs is not None:
        call.role(outputs.labels, "outputs")
    if inputs is not None:
        call.role(inputs.labels, "inputs")


class Convolution(NamedTuple):
    """The operands of a convolution, plain or transposed."""

    batch: Axes
    channels: Axis | None
    rows: Axis | None
    columns: Axis | None
    bias: Tensor | None
    groups: int
    depthwise: bool
    space: Axes


def _operands(call: Call) -> Convolution:
    """Read a convolution's operands; its kernel and what that slides over stay as they are.

    A kernel of one position slides over nothing: it takes each position by itself.
    """
    groups = int(call.arg(8 if call.name.endswith("convolution") else 6, "groups", 1))
    source, weight, bias = call.arg(0, "input"), call.arg(1, "weight"), call.arg(2, "bias")
    space = weight.dim() - 2
    axes, (rows, columns, *kernel) = call.axes(source), call.axes(weight)
    over = axes[len(axes) - space :]
    passes = call.outputs[0].shape[-space:] == source.shape[-space:] and _is_single(call, weight)
    call.pin((*kernel, *(() if passes else over)), "are a dim that a kernel slides over")
    over = tuple(over if bias is None else shifted(over)) if passes else (None,) * space
    batch = axes[: -space - 1] if bias is None else shifted(axes[: -space - 1])
    depthwise = groups == source.shape[-space - 1] and groups > 1
    return Convolution(batch, axes[-space - 1], rows, columns, bias, groups, depthwise, over)


def _is_single(call: Call, weight: Tensor) -> bool:
    """Whether a kernel has one position, and one step and no padding leave every other where it is."""
    turned = "transpose" in call.name or (call.name.endswith("convolution") and call.arg(6, "transposed"))
    step, padding = call.arg(3, "stride", 1), call.arg(4, "padding", 0)
    steps, rest = ({*each} if isinstance(each, (list, tuple)) else {each} for each in (step, padding))
    return not turned and {*weight.shape[2:]} == steps == {1} and rest <= {0, "same", "valid"}


@rule("conv1d", "conv2d", "conv3d", "convolution", "_convolution")
def convolution(call: Call) -> list[Axes]:
    """Weight ``(out, in / groups, ...)``; grouped channels are coupled index to index, depthwise ones pass through."""
    if call.name.endswith("convolution") and call.arg(6, "transposed"):
        return transposed(call)
    conv = _operands(call)
    if conv.depthwise:
        out = _depthwise(call, conv.channels, conv.rows, conv.columns)
    else:
        out = _grouped(call, conv.channels, conv.rows, conv.columns, conv.groups)
    return [(*conv.batch, _bias(call, out, conv.bias), *conv.space)]


def _depthwise(call: Call, channels: Axis | None, rows: Axis | None, columns: Axis | None) -> Axis | None:
    if rows is not None:
        call.role(rows.labels, "through")
    call.pin(columns, "are the only one of their kind")
    if channels is None or rows is None:
        call.pin(channels, FIXED_PARTNER)
        call.pin(rows, FIXED_PARTNER)
        return None
    call.labels.unite(channels.labels[:, None], rows.labels.reshape(channels.labels.size, -1))
    return rows


def _grouped(call: Call, channels: Axis | None, rows: Axis | None, columns: Axis | None, groups: int) -> Axis | None:
    _roles(call, rows, columns)
    if groups > 1 and rows is not None:
        couple(call, rows.labels, groups)
    if groups > 1 and channels is not None:
        channels = Axis(couple(call, channels.labels, groups), channels.vanishes)
    contract(call, channels, columns)
    return rows


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed(call: Call) -> list[Axes]:
    """Weight ``(in, out / groups, ...)``."""
    conv = _operands(call)
    rows, columns = conv.rows, conv.columns
    if conv.depthwise:
        call.pin(columns, "are counted from the number of groups")
        if rows is not None:
            call.role(rows.labels, "through")
        rows = together(call, [conv.channels, rows], True, FIXED_PARTNER)
        out = rows and Axis(np.repeat(rows.labels, call.arg(1, "weight").shape[1]), rows.vanishes)
    else:
        _roles(call, columns, rows)
        contract(call, conv.channels, rows)
        if conv.groups > 1 and rows is not None:
            couple(call, rows.labels, conv.groups)
        out = columns and Axis(np.tile(columns.labels, conv.groups), columns.vanishes)
    return [(*conv.batch, _bias(call, out, conv.bias), *conv.space)]


@rule("linear")
def linear(call: Call) -> list[Axes]:
    """``x (..., in)`` times ``weight (out, in)`` transposed."""
    source, weight, bias = call.arg(0, "input"), call.arg(1, "weight"), call.arg(2, "bias")
    axes, (rows, columns) = call.axes(source), call.axes(weight)
    _roles(call, rows, columns)
    contract(call, axes[-1], columns)
    return [(*(axes[:-1] if bias is None else shifted(axes[:-1])), _bias(call, rows, bias))]


def _bind(call: Call, axes: Sequence[Axis | None]) -> None:
    """Heads are weighed by what they hold: none can stand for another."""
    for axis in axes:
        if axis is not None:
            call.labels.mark(axis.labels, "bound")


def _product(call: Call, a: Tensor, b: Tensor) -> Axes:
    left, right = call.axes(a), call.axes(b)
    weighted = not (call.known.from_data(a) and call.known.from_data(b))
    if b.dim() == 1:
        contract(call, left[-1], right[0], weighted)
        return left[:-1]
    contract(call, left[-1], right[-2], weighted)
    if a.dim() == 1:
        return (*right[:-2], right[-1])
    batch = []
    for back in range(max(a.dim(), b.dim()), 2, -1):
        sides = [(tensor.shape[-back], axes[-back]) for tensor, axes in ((a, left), (b, right)) if tensor.dim() >= back]
        longest = max(size for size, _ in sides)
        for size, axis in sides:
            if size != longest:
                call.pin(axis, "are stretched over another dim")
        along = [axis for size, axis in sides if size == longest]
        zero = any(axis is not None and axis.vanishes for axis in along)
        if not weighted:
            _bind(call, along)
        batch.append(together(call, along, zero, FIXED_PARTNER))
    return (*batch, left[-2], right[-1])


@rule("matmul", "mm", "bmm", "mv", "dot")
def product(call: Call) -> list[Axes]:
    """Matrix products with broadcast batch dims; a parameter as the right factor is a layer like any other."""
    a, b = call.arg(0, "self"), call.arg(1, "other", call.kwargs.get("mat2"))
    for tensor, inner, outer in ((a, -1, -2), (b, -2, -1)):
        axes = call.axes(tensor)
        if call.known.is_own(tensor) and tensor.dim() == 2:
            _roles(call, axes[outer], axes[inner])
    return [_product(call, a, b)]


@rule("addmm", "baddbmm", "addbmm", "addmv")
def product_and_sum(call: Call) -> list[Axes]:
    """``bias + a @ b``."""
    bias, a, b = call.inputs[:3]
    if call.name.startswith("addbmm"):
        for tensor in call.inputs:
            call.pin(call.axes(tensor), "are summed over a batch")
        return [(None,) * call.outputs[0].dim()]
    out = list(_product(call, a, b))
    for back, axis in enumerate(reversed(call.axes(bias)), start=1):
        old = out[-back]
        if bias.shape[-back] != call.outputs[0].shape[-back]:
            call.pin(axis, "are stretched over another dim")
            out[-back] = old and Axis(old.labels, vanishes=False)
            continue
        out[-back] = together(call, [old, axis], bool(old and old.vanishes and axis and axis.vanishes), FIXED_PARTNER)
    rest = len(out) - bias.dim()
    return [(*shifted(out[:rest]), *out[rest:])]


@rule("scaled_dot_product_attention")
def attention(call: Call) -> list[Axes]:
    """``softmax(q k^T * scale) v``: heads pass; the width of ``q`` and ``k`` sets the scale unless that is given."""
    query, key, value = (call.arg(i, name) for i, name in enumerate(("query", "key", "value")))
    q, k, v = call.axes(query), call.axes(key), call.axes(value)
    if call.kwargs.get("scale") is None:
        call.pin(q[-1], "set the scale of an attention")
        call.pin(k[-1], "set the scale of an attention")
    contract(call, q[-1], k[-1], weighted=False)
    mask: Tensor | None = call.arg(3, "attn_mask")
    seen = () if mask is None else call.axes(mask)
    for axis in (k[-2], v[-2], *seen[-2:]):
        call.pin(axis, "are what an attention looks at")
    if call.kwargs.get("enable_gqa"):
        call.pin((*q[:-2], *k[:-2], *v[:-2]), "are heads that share keys")
    batch = []
    for back in range(query.dim(), 2, -1):
        along = [q[-back], k[-back], v[-back]]
        if mask is not None and mask.dim() >= back and mask.shape[-back] == query.shape[-back]:
            along.append(seen[-back])
        elif mask is not None and mask.dim() >= back:
            call.pin(seen[-back], "are stretched over another dim")
        zero = bool(along[2] and along[2].vanishes)
        batch.append(together(call, along, zero, FIXED_PARTNER))
    _bind(call, batch)
    return [(*batch, *shifted(q[-2:-1]), v[-1])]


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrence(call: Call) -> list[Axes]:
    """Recurrent layers: what they read may shrink, their own state may not."""
    source, readers = call.inputs[0], _input_weights(call)
    axes = call.axes(source)
    for tensor in call.inputs[1:]:
        rows, *columns = call.axes(tensor)
        call.pin(rows, "are the state of a recurrent layer")
        if any(tensor is reader for reader in readers):
            _roles(call, None, columns[0])
            contract(call, axes[-1], columns[0])
        else:
            call.pin(tuple(columns), "are the state of a recurrent layer")
    call.pin(axes if not readers else axes[:-1], "are steps of a sequence")
    return [(None,) * tensor.dim() for tensor in call.outputs]


def _input_weights(call: Call) -> list[Tensor]:
    """The first weight of each direction of the first layer; none for packed sequences, whose arguments differ."""
    params, has_biases = call.arg(2, "params"), call.arg(3, "has_biases")
    if not isinstance(params, (list, tuple)) or not isinstance(has_biases, bool):
        return []
    directions = 2 if call.arg(7, "bidirectional") else 1
    each = len(params) // (int(call.arg(4, "num_layers")) * directions)
    return [params[direction * each] for direction in range(directions)]
