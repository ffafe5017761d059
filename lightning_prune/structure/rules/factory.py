"""Operators that make tensors out of nothing but a size."""

from __future__ import annotations

from lightning_prune.structure.call import Call
from lightning_prune.structure.labels import Axes, Axis
from lightning_prune.structure.rules.registry import rule


@rule("zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full", "empty_strided")
def uniform(call: Call) -> list[Axes]:
    """The same value everywhere: any size would do, if only Python asks for it."""
    zero = "zeros" in call.name
    return [tuple(Axis(call.labels.fresh(size), zero) for size in out.shape) for out in call.outputs]


@rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "bernoulli.p")
def like(call: Call) -> list[Axes]:
    """The size of another tensor."""
    axes = call.axes(call.inputs[0])
    return [tuple(axis and Axis(axis.labels, vanishes=False) for axis in axes)]


@rule("arange", "linspace", "logspace", "eye", "tril_indices", "triu_indices", "rand", "randn", "randint", "randperm")
def particular(call: Call) -> list[Axes]:
    """Contents that depend on the position."""
    for tensor in call.inputs:
        call.pin(call.axes(tensor), "count positions")
    return [(None,) * out.dim() for out in call.outputs]


@rule("_local_scalar_dense", "item", "equal", "is_nonzero")
def read(call: Call) -> list[Axes]:
    """Python looks at values."""
    for tensor in call.inputs:
        call.pin(call.axes(tensor), "are read by Python")
    return []
