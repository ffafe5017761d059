"""Operators that work position by position, with broadcasting."""

from __future__ import annotations

from torch import Tensor

from lightning_prune.structure.call import Call
from lightning_prune.structure.labels import Axes, Axis
from lightning_prune.structure.rules.registry import rule, same, shifted, together

FIXED_PARTNER = "are combined one by one with positions that are fixed"


def broadcast(call: Call, tensors: list[Tensor], shape: tuple[int, ...]) -> list[tuple[Axis | None, list[Axis | None]]]:
    """Align the operands' dims from the right; a dim's axis and the axes of the operands that run along it.

    What is made of weights and of other tensors of the model's goes by the names of the weights.
    """
    if not any(map(call.known.from_data, tensors)):
        tensors = sorted(tensors, key=lambda tensor: not call.known.is_weight(tensor))
    known = [call.axes(tensor) for tensor in tensors]
    out = []
    for back in range(len(shape), 0, -1):
        at = len(shape) - back
        along: list[Axis | None] = []
        for tensor, axes in zip(tensors, known, strict=True):
            if tensor.dim() < back:
                continue
            if tensor.shape[-back] == shape[at]:
                along.append(axes[-back])
            else:
                call.pin(axes[-back], "are stretched over another dim")
        out.append((together(call, along, False, FIXED_PARTNER), along))
    return out


def _vanishing(axis: Axis | None, along: list[Axis | None], operands: int, product: bool) -> Axis | None:
    if axis is None:
        return None
    zeros = [other is not None and other.vanishes for other in along]
    return Axis(axis.labels, any(zeros) if product else all(zeros) and len(zeros) == operands)


def _combined(call: Call, product: bool) -> list[Axes]:
    found = broadcast(call, call.inputs, call.outputs[0].shape)
    return [tuple(_vanishing(axis, along, len(call.inputs), product) for axis, along in found)]


def pointwise(call: Call) -> list[Axes]:
    """Any pointwise operator: nothing is said about zeros."""
    if not call.inputs:
        return [(None,) * tensor.dim() for tensor in call.outputs]
    return [shifted(tuple(axis for axis, _ in broadcast(call, call.inputs, out.shape))) for out in call.outputs]


@rule("mul", "multiply")
def product(call: Call) -> list[Axes]:
    """A product is zero where one factor is."""
    if len(call.inputs) == 1:
        return [same(call)]
    return _combined(call, product=True)


@rule("div", "true_divide", "divide")
def quotient(call: Call) -> list[Axes]:
    """A quotient is zero where its numerator is, as long as the denominator isn't."""
    if len(call.inputs) == 1:
        return [same(call)] if isinstance(call.args[0], Tensor) else pointwise(call)
    above, below = call.inputs
    for axis in call.axes(below):
        if axis is not None and axis.vanishes:
            call.pin(axis, "are divided by, and would be zero")
    found = broadcast(call, call.inputs, call.outputs[0].shape)
    numerator = call.axes(above)
    skip = len(found) - len(numerator)
    return [
        tuple(
            axis and Axis(axis.labels, bool(i >= skip and (top := numerator[i - skip]) and top.vanishes))
            for i, (axis, _) in enumerate(found)
        )
    ]


@rule("add", "sub", "maximum", "minimum", "fmax", "fmin")
def total(call: Call) -> list[Axes]:
    """A sum is zero where all of its terms are; adding a number is not."""
    if len(call.inputs) == 1:
        return pointwise(call)
    return _combined(call, product=False)


@rule("copy", "lift_fresh")
def copied(call: Call) -> list[Axes]:
    """A copy into a tensor unites both, so that every view of the target agrees."""
    if len(call.inputs) == 1:
        return [same(call)]
    found = broadcast(call, call.inputs, call.outputs[0].shape)
    source = call.axes(call.inputs[1])
    skip = len(found) - len(source)
    zero = [bool(i >= skip and (axis := source[i - skip]) and axis.vanishes) for i in range(len(found))]
    return [tuple(axis and Axis(axis.labels, z) for (axis, _), z in zip(found, zero, strict=True))]


@rule(
    *("relu", "relu6", "gelu", "silu", "mish", "elu", "selu", "celu", "leaky_relu", "hardswish", "tanh", "hardtanh"),
    *("softsign", "softshrink", "hardshrink", "neg", "abs", "sqrt", "square", "sin", "sign", "round", "floor", "erf"),
    *("dropout", "feature_dropout", "alpha_dropout", "clone", "detach", "contiguous", "to", "_to_copy"),
    *("type_as", "nan_to_num", "zero", "rrelu", "float", "half", "double", "positive", "tanhshrink", "expm1", "log1p"),
)
def zero_to_zero(call: Call) -> list[Axes]:
    """Functions of one tensor that leave zero as it is."""
    return [same(call)]


@rule("clamp", "clip", "clamp_min", "clamp_max")
def clamped(call: Call) -> list[Axes]:
    """Clamping leaves zero as it is when zero lies within the bounds."""
    low = call.arg(1, "min") if call.name.rstrip("_") != "clamp_max" else None
    high = call.arg(2, "max") if call.name.rstrip("_") in ("clamp", "clip") else None
    high = call.arg(1, "max") if call.name.rstrip("_") == "clamp_max" else high
    numbers = all(bound is None or isinstance(bound, (int, float)) for bound in (low, high))
    if numbers and (low is None or low <= 0) and (high is None or high >= 0):
        return [same(call)]
    return pointwise(call)


@rule("pow")
def power(call: Call) -> list[Axes]:
    """A positive power leaves zero as it is."""
    exponent = call.arg(1, "exponent")
    return [same(call)] if isinstance(exponent, (int, float)) and exponent > 0 else _no_poles(call)


@rule("rsqrt", "reciprocal", "log", "log2", "log10", "logit")
def _no_poles(call: Call) -> list[Axes]:
    """Functions with a pole at zero: a channel that would be zero can't pass."""
    for axis in call.axes(call.inputs[0]):
        if axis is not None and axis.vanishes:
            call.pin(axis, "would be zero where the function has a pole")
    return pointwise(call)


@rule("masked_fill")
def masked_fill(call: Call) -> list[Axes]:
    """Filling under a mask: the mask is combined like any operand."""
    target = call.axes(call.inputs[0])
    value = call.arg(2, "value")
    (found,) = pointwise(call)
    if isinstance(value, (int, float)) and value == 0:
        return [
            tuple(new and Axis(new.labels, bool(old and old.vanishes)) for new, old in zip(found, target, strict=True))
        ]
    return [found]


@rule("fill", "bernoulli", "uniform", "normal", "random", "exponential")
def overwritten(call: Call) -> list[Axes]:
    """New contents that do not depend on the position."""
    return [shifted(same(call))]


@rule("prelu", "_prelu_kernel")
def prelu(call: Call) -> list[Axes]:
    """A slope per channel, or one for all; the channel dim is the second."""
    source, slope = call.inputs
    axes = list(call.axes(source))
    if slope.numel() > 1 and source.dim() > 1:
        if axes[1] is None:
            call.pin(call.axes(slope), FIXED_PARTNER)
        together(call, [axes[1], call.axes(slope)[0 if slope.dim() == 1 else 1]], False, FIXED_PARTNER)
    return [tuple(axes)]


@rule("glu")
def glu(call: Call) -> list[Axes]:
    """Two halves, one gating the other: ``a * sigmoid(b)``."""
    source = call.inputs[0]
    axes = list(call.axes(source))
    dim = call.arg(1, "dim", -1) % source.dim()
    axis = axes[dim]
    if axis is not None:
        half = axis.labels.size // 2
        call.labels.unite(axis.labels[:half], axis.labels[half:])
        axes[dim] = Axis(axis.labels[:half], axis.vanishes)
    return [tuple(axes)]
