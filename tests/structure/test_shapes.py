"""Shapes that are worked out cheaply agree with torch's own; what does not fit is left to torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prune.structure.shapes import SHAPES, foretell


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def metas(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(meta(*shape) for shape in shapes)


FITS: list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]] = [
    ("linear", F.linear, (meta(2, 5, 3), meta(7, 3), meta(7)), {}),
    ("linear", F.linear, (meta(3), meta(7, 3)), {}),
    ("matmul", torch.matmul, (meta(2, 4, 5, 3), meta(2, 4, 3, 6)), {}),
    ("matmul", torch.matmul, (meta(2, 5, 3), meta(3, 6)), {}),
    ("bmm", torch.bmm, (meta(2, 5, 3), meta(2, 3, 6)), {}),
    ("layer_norm", F.layer_norm, (meta(2, 5, 3), [5, 3], meta(5, 3), meta(5, 3), 1e-5), {}),
    ("group_norm", F.group_norm, (meta(2, 6, 4, 4), 3, meta(6), meta(6)), {}),
    ("conv1d", F.conv1d, (meta(2, 4, 9), meta(6, 2, 3), meta(6), [2], [1], [1], 2), {}),
    ("conv2d", F.conv2d, (meta(2, 4, 9, 8), meta(6, 4, 3, 2), None, [2, 1], [1, 0], [2, 1]), {}),
    ("conv3d", F.conv3d, (meta(1, 4, 5, 6, 7), meta(2, 4, 1, 3, 3)), {}),
    ("adaptive_avg_pool2d", F.adaptive_avg_pool2d, (meta(2, 4, 9, 8), [3, 2]), {}),
    ("scaled_dot_product_attention", F.scaled_dot_product_attention, metas((2, 5, 3), (2, 6, 3), (2, 6, 7)), {}),
    ("roll", torch.roll, (meta(2, 3), [1], [0]), {}),
    ("cat", torch.cat, ([meta(2, 3), meta(2, 4)], -1), {}),
    ("add", torch.add, (meta(2, 1, 3), meta(5, 1)), {"alpha": 2}),
    ("mul", torch.mul, (meta(3), meta(2, 3)), {}),
    ("gelu", F.gelu, (meta(2, 3),), {"approximate": "tanh"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "function", "args", "kwargs"), FITS)
def test_agrees_with_torch(name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    found, expected = foretell(name, args, kwargs), function(*args, **kwargs)
    assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)


MISFITS: list[tuple[str, tuple[Any, ...]]] = [
    ("linear", (meta(2, 4), meta(7, 3))),
    ("linear", (meta(2, 3), meta(7, 3), meta(6))),
    ("linear", (meta(2, 3).double(), meta(7, 3))),
    ("matmul", (meta(2, 5, 3), meta(3, 3, 6))),
    ("layer_norm", (meta(2, 5, 3), [4])),
    ("group_norm", (meta(2, 6, 4, 4), 4)),
    ("batch_norm", (meta(2, 6, 4, 4), meta(5), meta(5), None, None, False, 0.1, 1e-5, True)),
    ("conv2d", (meta(2, 5, 9, 8), meta(6, 4, 3, 3))),
    ("conv2d", (meta(2, 4, 2, 2), meta(6, 4, 3, 3))),
    ("scaled_dot_product_attention", (meta(2, 4, 5, 3), meta(2, 3, 6, 3), meta(2, 3, 6, 7))),
    ("cat", ([meta(2, 3), meta(3, 4)], 1)),
    ("add", (meta(2, 3), meta(4))),
    ("add", (torch.empty(2, device="meta", dtype=torch.int64), 0.5)),
    ("relu", (torch.empty(2),)),
]


@pytest.mark.parametrize(("name", "args"), MISFITS)
def test_what_does_not_fit_is_left_to_torch(name: str, args: tuple[Any, ...]) -> None:
    assert foretell(name, args, {}) is None


@pytest.mark.parametrize(("cell", "bidirectional"), [(torch.nn.LSTM, True), (torch.nn.GRU, False)])
def test_recurrent_layers(cell: Any, bidirectional: bool) -> None:
    layer = cell(3, 4, bidirectional=bidirectional, device="meta")
    start = meta(2 if bidirectional else 1, 5, 4)
    hidden: Any = [start, start] if cell is torch.nn.LSTM else start
    expected = layer(meta(6, 5, 3), tuple(hidden) if cell is torch.nn.LSTM else hidden)
    args = (meta(6, 5, 3), hidden, list(layer.parameters()), True, 1, 0.0, False, bidirectional, False)
    found = foretell(cell.__name__.lower(), args, {})
    states = expected[1] if cell is torch.nn.LSTM else (expected[1],)
    assert [tensor.shape for tensor in found] == [expected[0].shape, *(tensor.shape for tensor in states)]
    assert foretell("lstm", (meta(6, 5, 2), *args[1:]), {}) is None


def test_in_place_operators_return_their_target() -> None:
    target = meta(2, 3)
    assert foretell("relu_", (target,), {}) is target
    assert foretell("add_", (target, meta(3)), {}) is target
    assert foretell("add_", (meta(3), target), {}) is None
    assert set(SHAPES) >= {"linear", "conv2d", "layer_norm"}
