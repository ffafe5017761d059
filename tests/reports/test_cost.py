"""MACs and parameters, against torch's own counter and by hand."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18

from lightning_prune.reports import count_cost
from tests.reports.untouched import untouched


def by_torch(model: nn.Module, *inputs: Tensor) -> int:
    """Multiply-adds of convolutions and matrix products, by torch's counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops() // 2


def test_resnet18_agrees_with_torchs_counter() -> None:
    model, images = resnet18().eval(), torch.randn(1, 3, 224, 224)
    cost = count_cost(model, images)
    per_element: list[int] = []
    for module in model.modules():
        factor = {nn.BatchNorm2d: 2, nn.AdaptiveAvgPool2d: 1}.get(type(module), 0)  # fvcore's rules
        module.register_forward_hook(lambda _, inputs, output, k=factor: per_element.append(k * inputs[0].numel()))
    macs = by_torch(model, images)
    assert (macs, cost.macs) == (1_814_073_344, macs + sum(per_element))
    assert cost.parameters == 11_689_512
    assert cost.uncounted == ("aten::add_", "aten::max_pool2d")


def test_macs_are_those_of_one_sample() -> None:
    model = nn.Conv2d(3, 8, 3)
    assert count_cost(model, torch.randn(7, 3, 10, 10)).macs == count_cost(model, torch.randn(1, 3, 10, 10)).macs
    assert count_cost(model, torch.randn(7, 3, 10, 10)).macs == 9 * 3 * 8 * 64


def test_padding_by_name_hides_no_convolution() -> None:
    images = torch.randn(1, 3, 10, 10)
    assert count_cost(nn.Conv2d(3, 8, 3, padding="same"), images).macs == 9 * 3 * 8 * 100


def test_a_mask_hides_no_product_of_attention() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, tokens: Tensor) -> Tensor:
            mask = torch.zeros(tokens.shape[1], tokens.shape[1])
            return self.layer(tokens, tokens, tokens, attn_mask=mask)[0]

    assert count_cost(Masked(), torch.randn(1, 5, 8)).macs == 5 * (8 * 24 + 8 * 8) + 2 * 2 * 5 * 5 * 4


def test_attention_is_counted() -> None:
    class Attention(nn.Module):
        def forward(self, query: Tensor, key: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(query, key, key)

    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 6, 8)
    with sdpa_kernel(SDPBackend.MATH):  # older torch doesn't count the fused kernels
        expected = by_torch(Attention(), query, key)
    assert count_cost(Attention(), (query, key)).macs == 2 * 5 * 6 * 8 * 2 == expected


def test_fast_paths_do_not_hide_work() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    tokens = torch.randn(1, 4, 16)
    linear = 4 * (16 * 48 + 16 * 16 + 2 * 16 * 32)
    norms = 2 * 5 * tokens.numel()  # fvcore's rule for an affine layer norm
    assert count_cost(layer, tokens).macs == linear + 2 * 4 * 4 * 8 * 2 + norms


class Structured(nn.Module):
    """Takes a dict, a plain value and a keyword; returns what ``kind`` says."""

    class Result:
        def __init__(self, scores: Tensor) -> None:
            self.scores = scores

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(8, 4)

    def forward(self, batch: dict[str, Tensor], flag: str, *, scale: Tensor) -> Any:
        scores = self.linear(batch["x"]) * scale
        return {"dict": {"scores": [scores], "flag": flag}, "object": self.Result(scores), "tensor": scores}[self.kind]


@pytest.mark.parametrize("kind", ["dict", "object", "tensor"])
def test_any_arguments_and_results(kind: str) -> None:
    inputs = ({"x": torch.randn(5, 8)}, "a")
    assert count_cost(Structured(kind), inputs, {"scale": torch.ones(5, 1)}).macs == 32


def test_tied_parameters_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert count_cost(model, torch.randn(1, 4)).parameters == 16 + 4 + 4


def test_the_model_is_left_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.GELU())
    images = torch.randn(2, 3, 8, 8)
    with caplog.at_level(logging.DEBUG), untouched(model):
        count_cost(model, images)
    assert "Unsupported operator" not in caplog.text
