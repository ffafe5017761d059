"""Norms: per channel they pass; over channels they renormalise, or hold."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_prune.structure.call import Call
from lightning_prune.structure.labels import Axes, Axis
from lightning_prune.structure.rules.registry import couple, of_weight, optional, rule, shifted, together

FIXED_PARTNER = "are normalised together with positions that are fixed"


def _affine(call: Call, axis: Axis | None, scale: Tensor | None, shift: Tensor | None) -> Axis | None:
    """Multiply by a scale and add a shift along the channels: zero where both are removed."""
    gamma, beta = optional(call, scale), optional(call, shift)
    for found, role in ((gamma, "scales"), (beta, "shifts")):
        if found is not None and not call.known.is_weight(call.inputs[0]):
            call.role(found.labels, role)
    members = [axis, *(found for tensor, found in ((scale, gamma), (shift, beta)) if tensor is not None)]
    zero = bool(gamma and gamma.vanishes) or bool(axis and axis.vanishes)
    zero = zero and (shift is None or bool(beta and beta.vanishes))
    return together(call, members, zero, FIXED_PARTNER)


def _averaged(call: Call, axes: Sequence[Axis | None]) -> None:
    """Dims over which statistics are taken keep their positions."""
    call.pin(tuple(axes), "are averaged over by a norm")


def _renormalised(call: Call, scale: Tensor) -> None:
    """Statistics are taken over the channels that stay, those of the norm's scale."""
    axis = optional(call, scale)
    if axis is not None and of_weight(call, scale, axis):
        call.known.note_renormalised(axis.labels)
    else:
        call.pin(axis, "are normalised together under a scale that is no weight")


@rule("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm")
def batch_norm(call: Call) -> list[Axes]:
    """Statistics per channel; running ones leave with their channel. A weight's own are those of what stays."""
    source, scale, shift = (call.arg(i, name) for i, name in enumerate(("input", "weight", "bias")))
    axes = list(call.axes(source))
    if call.arg(5, "training") or call.arg(3, "running_mean") is None:
        for axis in (axes[0], *axes[2:]):
            if axis is not None and of_weight(call, source, axis):
                call.known.note_renormalised(axis.labels)
            else:
                _averaged(call, [axis])
    for statistic in (call.arg(3, "running_mean"), call.arg(4, "running_var")):
        if statistic is not None:
            zero = bool(axes[1] and axes[1].vanishes)
            axes[1] = together(call, [axes[1], optional(call, statistic)], zero, FIXED_PARTNER)
    axes = [*shifted(axes[:1]), _affine(call, axes[1], scale, shift), *shifted(axes[2:])]
    return [tuple(axes), *((None,) * out.dim() for out in call.outputs[1:])]


@rule("instance_norm")
def instance_norm(call: Call) -> list[Axes]:
    """Statistics per sample and channel."""
    axes = call.axes(call.arg(0, "input"))
    call.known.note_size("num_features", axes[1])
    _averaged(call, axes[2:])
    return batch_norm(call)


@rule("group_norm")
def group_norm(call: Call) -> list[Axes]:
    """Statistics over the channels of a group: each group loses equally many, the rest is normalised anew."""
    source, groups = call.arg(0, "input"), int(call.arg(1, "num_groups"))
    scale, shift = call.arg(2, "weight"), call.arg(3, "bias")
    axes = list(call.axes(source))
    channels = axes[1]
    _averaged(call, axes[2:])
    if channels is not None and groups == channels.labels.size:
        call.known.note_size("num_groups", channels)
        call.known.note_size("num_channels", channels)
    elif channels is not None and scale is None:
        call.pin(channels, "are normalised together without a scale of their own")
    elif channels is not None:
        couple(call, channels.labels, groups)
        _renormalised(call, scale)
    return [(*shifted(axes[:1]), _affine(call, channels, scale, shift), *(None,) * len(axes[2:]))]


@rule("layer_norm", "native_layer_norm")
def layer_norm(call: Call) -> list[Axes]:
    """Statistics over the last dims: with one such dim the rest can be normalised anew."""
    source, shape = call.arg(0, "input"), call.arg(1, "normalized_shape")
    return _over_last(call, source, shape, call.arg(2, "weight"), call.arg(3, "bias"))


@rule("rms_norm")
def rms_norm(call: Call) -> list[Axes]:
    """Mean squares over the last dims: as for layer norm."""
    return _over_last(call, call.arg(0, "input"), call.arg(1, "normalized_shape"), call.arg(2, "weight"), None)


def _over_last(
    call: Call, source: Tensor, shape: Sequence[int], scale: Tensor | None, shift: Tensor | None
) -> list[Axes]:
    axes = call.axes(source)
    normed = axes[len(axes) - len(shape) :]
    if len(shape) > 1 or scale is None:
        for tensor in (scale, shift):
            if tensor is not None:
                call.pin(call.axes(tensor), "are normalised over several dims")
        call.pin(normed, "are normalised over several dims" if scale is not None else "are normalised without a scale")
        return [(*shifted(axes[: len(axes) - len(shape)]), *(None,) * len(shape))]
    out = _affine(call, normed[0], scale, shift)
    if out is not None:
        _renormalised(call, scale)
    return [(*shifted(axes[:-1]), out)]
