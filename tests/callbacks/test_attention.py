"""Every method on a network of attention: heads go as a whole, and the embedding with them where it is asked for."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from lightning_prune import ASCP, TPP, GReg1, GReg2, Magnitude, MaskSparsity, StructuralPruning
from lightning_prune.schedules import GReg1Schedule, GReg2Schedule, TPPSchedule
from tests.callbacks.nets import Classifier, image_loader, seeded, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*energy was left", "ignore:.*too few optimiser steps", "ignore:enable_nested_tensor"
)


class Transformer(nn.Module):
    """The rows of an image are tokens; one attention of torch's and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.embed = nn.Linear(18, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True, norm_first=True)
        self.norm, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.last, self.head = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer(self.embed(images.transpose(1, 2).flatten(2)))
        q, k, v = self.qkv(self.norm(x)).reshape(len(x), 6, 3, self.num_heads, 4).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(self.last(x + self.proj(y)).mean(1))


METHODS = {
    "greg1": lambda **scope: GReg1(0.5, schedule=GReg1Schedule(0.1, 0.8, 2, 5, stop_ratio=None), **scope),
    "greg2": lambda **scope: GReg2(0.5, schedule=GReg2Schedule(0.02, 0.06, 0.1, 0.56, 2, 4, stop_ratio=None), **scope),
    "magnitude": lambda **scope: Magnitude(0.5, epochs=2, steps=2, **scope),
    "tpp": lambda **scope: TPP(0.5, schedule=TPPSchedule(0.1, 0.8, 2, 3, gram=2.0, zero_every=1), **scope),
}


def pruned(method: Any, optimizer: str = "sgd") -> tuple[Any, StructuralPruning]:
    surgery, net = StructuralPruning(latency_batches=(), report_file=None), seeded(Transformer)
    trainer(method, surgery, max_epochs=4).fit(Classifier(net, optimizer), image_loader(7))
    assert surgery.report is not None and surgery.report.error <= 1e-8
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    return net, surgery


def sizes(net: Transformer) -> dict[str, int]:
    attention = net.layer.self_attn
    return {
        "embedding": net.embed.out_features,
        "heads": attention.num_heads,
        "inner": attention.out_proj.weight.shape[1],
        "own heads": net.num_heads,
        "own inner": net.proj.in_features,
        "hidden": net.layer.linear1.out_features,
    }


@pytest.mark.parametrize(("name", "optimizer"), [*((name, "sgd") for name in METHODS), ("tpp", "adamw")])
def test_whole_heads_go(name: str, optimizer: str) -> None:
    net, _ = pruned(METHODS[name](), optimizer)
    half = {"heads": 2, "inner": 8, "own heads": 2, "own inner": 8, "hidden": 12}
    assert sizes(net) == {"embedding": 16, **half}


@pytest.mark.parametrize("name", METHODS)
def test_heads_and_embedding_go(name: str) -> None:
    net, _ = pruned(METHODS[name](scope="all"))
    assert sizes(net) == {"embedding": 8, "heads": 2, "inner": 8, "own heads": 2, "own inner": 8, "hidden": 12}
    assert type(net.layer.self_attn) is nn.MultiheadAttention


def test_scales_of_norms_choose_the_embedding() -> None:
    net, _ = pruned(MaskSparsity(0.5, epochs=2, scope="all"))
    assert sizes(net)["embedding"] == 8


def test_heads_are_not_merged() -> None:
    net, _ = pruned(ASCP(0.5, epochs=2))
    assert sizes(net) == {"embedding": 16, "heads": 4, "inner": 16, "own heads": 4, "own inner": 16, "hidden": 12}
