"""Operators that sum up, average, pool or normalise away a dim."""

from __future__ import annotations

from lightning_prune.structure.call import Call
from lightning_prune.structure.labels import Axes, Axis
from lightning_prune.structure.rules.registry import of_channels, of_weight, positive, rule, several


def _reduced(
    call: Call, dims: object, keepdim: bool, *, zeros_pass: bool = False, zeros_stay: bool, statistic: bool = False
) -> list[Axes]:
    """Drop dims: a dim whose removed positions are zero may be summed, any other keeps its channels.

    A ``statistic`` of channels is taken anew over what stays; that of a weight only where the weight itself reads it.
    """
    source = call.inputs[0]
    rank = source.dim()
    gone = several(dims, rank)
    axes = call.axes(source)
    for dim in gone:
        axis = axes[dim] if rank else None
        if axis is not None and zeros_pass and axis.vanishes:
            call.labels.mark(axis.labels, "bound")
        elif axis is not None and statistic and call.known.from_data(source) and of_channels(call, axis):
            call.renormalise_if_read(axis)
        else:
            call.pin_if_read(axis, "are taken together", by_others=statistic and of_weight(call, source, axis))
    kept: list[Axis | None] = []
    for dim, axis in enumerate(axes):
        if dim not in gone:
            kept.append(axis and Axis(axis.labels, axis.vanishes and zeros_stay))
        elif keepdim:
            kept.append(None)
    return [tuple(kept)] * len(call.outputs)


@rule("sum", "nansum")
def total(call: Call) -> list[Axes]:
    """A sum does not notice zeros that leave."""
    return _reduced(call, call.arg(1, "dim"), bool(call.arg(2, "keepdim", False)), zeros_pass=True, zeros_stay=True)


@rule("linalg_vector_norm", "norm")
def vector_norm(call: Call) -> list[Axes]:
    """A norm of positive order does not notice zeros that leave."""
    order = call.arg(1, "ord" if call.name == "linalg_vector_norm" else "p", 2)
    positive_order = order is None or (isinstance(order, (int, float)) and order > 0)
    keep = bool(call.arg(3, "keepdim", False))
    return _reduced(call, call.arg(2, "dim"), keep, zeros_pass=positive_order, zeros_stay=True)


@rule("max", "min", "median", "nanmean")
def level(call: Call) -> list[Axes]:
    """Extremes with their places and the like: zero for a dim of zeros, but they count their terms."""
    if len(call.inputs) > 1:
        from lightning_prune.structure.rules.elementwise import total as elementwise_total

        return elementwise_total(call)
    return _reduced(call, call.arg(1, "dim"), bool(call.arg(2, "keepdim", False)), zeros_stay=True)


@rule("mean", "var", "std", "var_mean", "std_mean", "amax", "amin")
def statistic(call: Call) -> list[Axes]:
    """Averages, deviations, extremes: zero for a dim of zeros, but they count their terms."""
    return _reduced(call, _dims(call), _keeps_dims(call), zeros_stay=True, statistic=True)


@rule("logsumexp", "argmax", "argmin", "prod", "all", "any")
def other(call: Call) -> list[Axes]:
    """Reductions that count their terms, whose value for zeros is not promised."""
    return _reduced(call, _dims(call), _keeps_dims(call), zeros_stay=False)


def _dims(call: Call) -> object:
    """The dims that go; a second argument may be something else instead."""
    dims = call.arg(1, "dim")
    return None if isinstance(dims, bool) else dims


def _keeps_dims(call: Call) -> bool:
    kept = bool(call.outputs) and call.outputs[0].dim() == call.inputs[0].dim()
    return bool(call.kwargs.get("keepdim", kept))


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "sort", "topk", "softmin")
def along_one_dim(call: Call) -> list[Axes]:
    """Operators that mix the positions of one dim and keep the others."""
    source = call.inputs[0]
    axes = list(call.axes(source))
    default = -1 if call.name in ("sort", "topk") else 0
    dim = positive(call.arg(2 if call.name == "topk" else 1, "dim", default), source.dim())
    if axes:
        call.pin(axes[dim], "are weighed against each other")
        axes[dim] = None
    return [tuple(axis and Axis(axis.labels, vanishes=False) for axis in axes)] * len(call.outputs)


POOLS = {
    1: ("max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d", "lp_pool1d"),
    2: ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "fractional_max_pool2d"),
    3: ("max_pool3d", "avg_pool3d", "adaptive_avg_pool3d", "adaptive_max_pool3d"),
}
INDEXED = ("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices")
UPSAMPLES = {
    1: ("upsample_nearest1d", "upsample_linear1d", "_upsample_nearest_exact1d"),
    2: ("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_nearest_exact2d"),
    3: ("upsample_nearest3d", "upsample_trilinear3d", "_upsample_nearest_exact3d"),
}
ANTIALIASED = ("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")


@rule(*(name for table in (POOLS, UPSAMPLES) for names in table.values() for name in names), *INDEXED, *ANTIALIASED)
def pool(call: Call) -> list[Axes]:
    """Pooling and upsampling work within a channel, over one to three dims of space."""
    space = next(n for n in (1, 2, 3) if f"{n}d" in call.name)
    axes = call.axes(call.inputs[0])
    for axis in axes[len(axes) - space :]:
        call.pin(axis, "are pooled")
    return [(*axes[: len(axes) - space], *(None,) * space)] * len(call.outputs)


@rule("torchvision.roi_align", "torchvision.roi_pool")
def region(call: Call) -> list[Axes]:
    """A map's channels under boxes: ``(B, C, H, W)`` and ``(K, 5)`` to ``(K, C, h, w)``."""
    source, boxes = call.inputs[:2]
    batch, channels, *space = call.axes(source)
    call.pin((batch, *space, *call.axes(boxes)), "are pooled under boxes")
    return [(None, channels, None, None)] + [(None,) * out.dim() for out in call.outputs[1:]]
