"""What a network costs on paper: multiply-adds and parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_prune.reports.silence import silence
from lightning_prune.structure.batches import resized
from lightning_prune.structure.replica import arguments, quiet_room, replica, uncompiled


@dataclass(frozen=True)
class Cost:
    """What one sample costs.

    Args:
        macs: multiply-adds (MACs) of one sample in evaluation mode, as fvcore counts them: convolutions, matrix
            products and attention, and a few per element for norms and adaptive pooling; ``None`` where they could not
            be counted.
        parameters: number of parameters, tied ones once.
        uncounted: operators that fvcore has no rule for, sorted; most of them are elementwise.
    """

    macs: int | None
    parameters: int
    uncounted: tuple[str, ...] = ()


def count_cost(model: nn.Module, example_inputs: Any, kwargs: Mapping[str, Any] | None = None) -> Cost:
    """Count multiply-adds and parameters of a model in evaluation mode; works on a copy.

    Args:
        model: any module that ``torch.jit`` can trace.
        example_inputs: a tuple is the forward's positional arguments; anything else is its only one. The first sample
            alone is used.
        kwargs: the forward's keyword arguments.

    >>> import torch
    >>> count_cost(nn.Linear(8, 4), torch.zeros(32, 8))
    Cost(macs=32, parameters=36, uncounted=())
    """
    leaves, spec = pytree.tree_flatten(resized(arguments(example_inputs, kwargs), 1))
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
    # fvcore uses the deprecated torch.jit.script at its import, and logs what it doesn't count; we return that as data.
    with quiet_room(), silence("fvcore.nn.jit_analysis"):
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(_Flat(uncompiled(replica(model)).eval(), leaves, spec), tensors)
        analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
        analysis.set_op_handle("aten::_convolution_mode", _convolution_macs)
        analysis.set_op_handle("aten::baddbmm", _batched_macs)
        macs = round(analysis.total())
        uncounted = tuple(sorted(analysis.unsupported_ops()))
    return Cost(macs, sum(parameter.numel() for parameter in model.parameters()), uncounted)


class _Flat(nn.Module):
    """Tensors in, tensors out: what ``torch.jit`` can trace, whatever the model takes and returns."""

    def __init__(self, model: nn.Module, leaves: list[Any], spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.model = model
        self._leaves = leaves
        self._spec = spec

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        remaining = iter(tensors)
        leaves = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return tuple(_tensors_in(self.model(*args, **kwargs)))


def _tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors of a nested output, also on the fields of plain objects: what no output needs isn't counted."""
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, type)):
            yield from _tensors_in(vars(leaf))


def _convolution_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Of a convolution whose padding is a word, for which fvcore has no rule."""
    data, weight, result = (tensor.type().sizes() for tensor in (*inputs[:2], outputs[0]))
    return int(data[0] * math.prod(weight) * math.prod(result[2:]))


def _batched_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Of a product of batches of matrices that is added to something, as in attention with a mask."""
    first, second = (tensor.type().sizes() for tensor in inputs[1:3])
    return int(math.prod(first) * second[-1])


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Both matrix products of attention: queries with keys, weights with values."""
    query, key, value = (tensor.type().sizes() for tensor in inputs[:3])
    heads = math.prod(query[:-2])
    return int(heads * query[-2] * key[-2] * (query[-1] + value[-1]))
