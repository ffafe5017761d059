"""What a network costs as a function of its widths: one watched pass, and no slim network built.

The operators of one forward pass are counted as fvcore counts them; each cost is a product of lengths, and each length
is linear in the channels that stay, because the labels of its positions say whose they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_prune.errors import ConfigurationError
from lightning_prune.structure.batches import resized
from lightning_prune.structure.call import tensors_in
from lightning_prune.structure.custom import sealed
from lightning_prune.structure.elastic import loosen_
from lightning_prune.structure.graph import ChannelGraph
from lightning_prune.structure.labels import Axis, Ints
from lightning_prune.structure.plan import layer_of, plain_name
from lightning_prune.structure.replica import replica, to_device
from lightning_prune.structure.surgery import prune_
from lightning_prune.structure.watch import Watcher, operator_name

Floats = NDArray[np.float64]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]

Length = tuple[int, "Ints | None"]
"""Of one dim: its size now, and the labels of its positions where some of them may leave."""


class Work(NamedTuple):
    """What one operator costs: ``scale`` times the product of the lengths."""

    where: str
    scale: float
    lengths: tuple[Length, ...]


class Bill(NamedTuple):
    r"""A cost as a function of widths :math:`n_g`.

    .. math:: \sum_i s_i \prod_j \left( o_{ij} + \sum_g k_{ijg} \, n_g \right)

    Letters: ``m`` terms, ``d`` factors, ``G`` groups.

    Args:
        where: the layer that each term belongs to.
        scales: :math:`s`, ``(m,)``.
        offsets: :math:`o`, ``(m, d)``.
        slopes: :math:`k`, ``(m, d, G)``.
    """

    where: tuple[str, ...]
    scales: Floats
    offsets: Floats
    slopes: Floats

    def terms(self, widths: NDArray[Any]) -> Floats:
        """Every term at these widths, ``(..., G)`` -> ``(..., m)``; exact below 2 ** 53."""
        lengths = self.offsets + np.tensordot(np.asarray(widths, dtype=np.float64), self.slopes, axes=(-1, -1))
        terms: Floats = self.scales * lengths.prod(axis=-1)
        return terms

    def at(self, widths: NDArray[Any]) -> Floats:
        """The sum at these widths, ``(..., G)`` -> ``(...)``."""
        total: Floats = self.terms(widths).sum(axis=-1)
        return total


def macs_bill(graph: ChannelGraph) -> Bill:
    """Multiply-adds of one sample in evaluation mode, by the widths of the graph's groups.

    Raises:
        ConfigurationError: the network doesn't run with one sample in evaluation mode.
    """
    counter = _count(graph.model, graph.inputs)
    labels = counter.known.labels
    root = labels.solve().root
    owner = np.full(root.size, len(graph.groups), dtype=np.int64)
    for number, group in enumerate(graph.groups):
        for (name, dim), index in group.index.items():
            owner[root[labels.first(name, dim) + index.numpy()]] = number
    owner = owner[root]
    sizes = np.array([group.size for group in graph.groups] + [1], dtype=np.float64)

    def slopes(size: int, found: Ints | None) -> tuple[float, Floats]:
        if found is None:
            return size, np.zeros(len(graph.groups))
        times = np.bincount(owner[found], minlength=sizes.size) / sizes
        return times[-1], times[:-1]

    rows = [(work.where, work.scale, [slopes(*length) for length in work.lengths]) for work in counter.work]
    return _bill(rows, len(graph.groups))


def parameters_bill(graph: ChannelGraph) -> Bill:
    """The number of parameters, tied ones once, by the widths of the graph's groups."""
    cut: dict[str, dict[int, Floats]] = {}
    for number, group in enumerate(graph.groups):
        for (name, dim), index in group.index.items():
            empty = np.zeros(len(graph.groups))
            cut.setdefault(name, {}).setdefault(dim, empty)[number] = index.shape[1]
    sizes = np.array([group.size for group in graph.groups], dtype=np.float64)
    rows = []
    for raw, parameter in graph.model.named_parameters():
        name = plain_name(raw)
        dims = cut.get(name, {})
        rest = math.prod(size for dim, size in enumerate(parameter.shape) if dim not in dims)
        factors = [(parameter.shape[dim] - float(slope @ sizes), slope) for dim, slope in dims.items()]
        rows.append((layer_of(name), rest, factors))
    return _bill(rows, len(graph.groups))


def count_macs(model: nn.Module, inputs: Inputs) -> int:
    """Multiply-adds of one sample in evaluation mode, without running a kernel where the model allows it.

    >>> import torch
    >>> count_macs(nn.Conv2d(3, 8, 3), ((torch.zeros(2, 3, 10, 10),), {}))
    13824
    """
    return sum(int(work.scale * math.prod(size for size, _ in work.lengths)) for work in _count(model, inputs).work)


def slim(graph: ChannelGraph, widths: Mapping[str, int], device: Any = None) -> nn.Module:
    """A copy of the network of these widths; which channels stay has no meaning."""
    network = replica(graph.model, device)
    gone = {name: range(kept, graph[name].size) for name, kept in widths.items() if kept < graph[name].size}
    if gone:
        prune_(network, graph.plan(gone))
    return network


def _bill(rows: Sequence[tuple[str, float, list[tuple[float, Floats]]]], groups: int) -> Bill:
    scales = [scale * math.prod(offset for offset, slope in factors if not slope.any()) for _, scale, factors in rows]
    moving = [[factor for factor in factors if factor[1].any()] for _, _, factors in rows]
    depth = max(map(len, moving), default=0)
    offsets, slopes = np.ones((len(rows), depth)), np.zeros((len(rows), depth, groups))
    for row, factors in enumerate(moving):
        for column, (offset, slope) in enumerate(factors):
            offsets[row, column], slopes[row, column] = offset, slope
    return Bill(tuple(where for where, _, _ in rows), np.array(scales, dtype=np.float64), offsets, slopes)


def _count(model: nn.Module, inputs: Inputs) -> Counter:
    for device in ("meta", "cpu"):
        counter = Counter(loosen_(sealed(replica(model, device))).eval())
        try:
            counter.run(*to_device(resized(inputs, 1), device))
        except Exception as error:  # whatever foreign code raises; with values it may work
            if device == "cpu":
                first = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
                raise ConfigurationError(f"The network's MACs could not be counted ({first}); give a ratio.") from error
            continue
        break
    return counter


class Counter(Watcher):
    """Watches a pass and notes what its operators cost, from outside: not what a counted one consists of."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.work: list[Work] = []
        self._is_inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._is_inside or operator_name(func) in OPENED:
            return super().__torch_dispatch__(func, types, args, kwargs)
        rule, where = COSTS.get(operator_name(func)), self.known.module
        found = list(tensors_in((args, kwargs or {}))) if rule else []
        read = [self._lengths(tensor) for tensor in found]
        self._is_inside = True
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._is_inside = False
        if rule:
            written = self._lengths(next(tensors_in(result)))
            scale, lengths = rule(args, kwargs or {}, read, written)
            fixed = math.prod(size for size, labels in lengths if labels is None)
            free = tuple(length for length in lengths if length[1] is not None)
            self.work.append(Work(where, scale * fixed, free))
        return result

    def _lengths(self, tensor: Tensor) -> list[Length]:
        axes: Sequence[Axis | None] = self.known.axes(tensor)
        pairs = zip(tensor.shape, axes, strict=True)
        return [(int(size), None if axis is None else axis.labels) for size, axis in pairs]


Lengths = list[Length]
Costing = Callable[[Any, Any, list[Lengths], Lengths], tuple[float, Sequence[Length]]]


def _convolution(transposed: bool) -> Costing:
    def cost(args: Any, kwargs: Any, read: list[Lengths], written: Lengths) -> tuple[float, Sequence[Length]]:
        data, weight = read[0], read[1]
        spatial = len(weight) - 2
        batch = data[:1] if len(data) > spatial + 1 else []
        where = data if transposed else written
        return 1, [*batch, *weight, *where[-spatial:]]

    return cost


def _general_convolution(
    args: Any, kwargs: Any, read: list[Lengths], written: Lengths
) -> tuple[float, Sequence[Length]]:
    return _convolution(bool(args[6] if len(args) > 6 else kwargs.get("transposed")))(args, kwargs, read, written)


def _linear(args: Any, kwargs: Any, read: list[Lengths], written: Lengths) -> tuple[float, Sequence[Length]]:
    return 1, [*read[0], read[1][0]]


def _product(first: int) -> Costing:
    def cost(args: Any, kwargs: Any, read: list[Lengths], written: Lengths) -> tuple[float, Sequence[Length]]:
        a, b = read[first], read[first + 1]
        return 1, [*a, b[-1]] if len(b) > 1 else a

    return cost


def _einsum(args: Any, kwargs: Any, read: list[Lengths], written: Lengths) -> tuple[float, Sequence[Length]]:
    """Every index once; half of that where none is summed over."""
    terms, _, result = str(args[0]).replace(" ", "").partition("->")
    lengths: dict[str, Length] = {}
    for term, axes in zip(terms.split(","), read, strict=True):
        head, _, tail = term.partition("...")
        rest = [f"...{place}" for place in range(len(head) + len(tail) - len(axes), 0)]
        for letter, length in zip([*head, *rest, *tail], axes, strict=True):
            known = lengths.setdefault(letter, length)
            if length[0] > known[0] or known[1] is None:
                lengths[letter] = length
    is_summed = any(letter not in result for letter in lengths if letter.isalpha())
    return 1 if is_summed else 0.5, list(lengths.values())


def _attention(args: Any, kwargs: Any, read: list[Lengths], written: Lengths) -> tuple[float, Sequence[Length]]:
    return 1, [*read[0][:-1], read[1][-2], _joined(read[0][-1], read[2][-1])]


def _joined(a: Length, b: Length) -> Length:
    """One length as long as both."""
    if a[1] is None and b[1] is None:
        return a[0] + b[0], None
    parts = [np.zeros(size, dtype=np.int64) if labels is None else labels for size, labels in (a, b)]
    return a[0] + b[0], np.concatenate(parts)


def _norm(with_weight: int, without: int, weight: int) -> Costing:
    def cost(args: Any, kwargs: Any, read: list[Lengths], written: Lengths) -> tuple[float, Sequence[Length]]:
        scale = args[weight] if len(args) > weight else kwargs.get("weight")
        return without if scale is None else with_weight, read[0]

    return cost


def _batch_norm(args: Any, kwargs: Any, read: list[Lengths], written: Lengths) -> tuple[float, Sequence[Length]]:
    of_batch = args[5] if len(args) > 5 else kwargs.get("training", False)
    return _norm(5, 4, 1)(args, kwargs, read, written) if of_batch else _norm(2, 1, 1)(args, kwargs, read, written)


def _elementwise(scale: int, of_output: bool) -> Costing:
    return lambda args, kwargs, read, written: (scale, written if of_output else read[0])


OPENED = {"gru_cell", "lstm_cell", "rnn_relu_cell", "rnn_tanh_cell"}
"""Operators that fvcore sees only the parts of."""

COSTS: dict[str, Costing] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution(transposed=False)),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution(transposed=True)),
    **dict.fromkeys(("convolution", "_convolution"), _general_convolution),
    **dict.fromkeys(("bmm", "matmul", "mm"), _product(0)),
    **dict.fromkeys(("addmm", "baddbmm"), _product(1)),
    "linear": _linear,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    "batch_norm": _batch_norm,
    **dict.fromkeys(("group_norm", "layer_norm"), _norm(5, 4, 2)),
    "instance_norm": _norm(5, 4, 1),
    "adaptive_avg_pool2d": _elementwise(1, of_output=False),
    "upsample_nearest2d": _elementwise(1, of_output=True),
    **dict.fromkeys(("grid_sampler", "upsample_bilinear2d"), _elementwise(4, of_output=True)),
}
"""Operator -> its cost by fvcore's rules, from the lengths of the tensors that it reads and of the one it writes."""
