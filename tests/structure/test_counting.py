"""What widths foretell is what fvcore counts on the slim network, and what its parameters number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.errors import ConfigurationError
from lightning_prune.reports.cost import count_cost
from lightning_prune.structure import trace
from lightning_prune.structure.counting import count_macs, macs_bill, parameters_bill, slim
from tests.callbacks.nets import seeded
from tests.structure.cases import CASES, Case
from tests.structure.zoo import ZOO


class Attention(nn.Module):
    """One head whose queries and keys, and values, may get narrower; linear layers over tokens."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 10)
        self.norm, self.out = nn.LayerNorm(10), nn.Linear(10, 3)
        self.fused = fused

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.query(tokens), self.key(tokens), self.value(tokens)
        if self.fused:
            mixed = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
        else:
            mixed = torch.matmul(torch.matmul(query, key.transpose(1, 2)).softmax(-1), value)
        return self.out(self.norm(mixed))


class Einsum(nn.Module):
    """Sums over channels, with and without naming the other dims."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        first, second = self.first(tokens), self.second(tokens)
        return torch.einsum("btc,bsc->bts", first, second).sum() + torch.einsum("...c->...", first).sum()


class Partly(nn.Module):
    """Some of a layer's channels can't go."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.first(tokens)
        part = hidden[..., :3]
        return self.second(hidden) + torch.einsum("btc,bsc->bts", part, part).sum(dim=2, keepdim=True)


class Pyramid(nn.Module):
    """Up and down again, with a sum at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.same = nn.Conv2d(8, 12, 3, padding="same")
        self.up = nn.ConvTranspose2d(12, 10, 4, stride=2, padding=1)
        self.head = nn.Conv2d(10, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.same(self.down(images).relu())
        larger = F.interpolate(hidden, scale_factor=2, mode="nearest") + 0
        smooth = F.interpolate(hidden, scale_factor=2.0, mode="bilinear")
        return self.head(self.up(hidden).relu()), larger.mean(), smooth.mean()  # type: ignore[return-value]


class Recurrent(nn.Module):
    """fvcore has no rule for it; what it consists of doesn't count either."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = nn.Linear(6, 8), nn.LSTM(8, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(tokens))[0])


def convolutions() -> nn.Module:
    """Dense, grouped and depthwise ones, one with several filters per channel, norms of all kinds."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8, affine=False)),
        *(nn.Conv2d(8, 16, 3, padding=1, groups=8), nn.InstanceNorm2d(16, affine=True), nn.ReLU()),
        *(nn.Conv2d(16, 12, 3, groups=4), nn.BatchNorm2d(12, track_running_stats=False)),
        *(nn.Conv2d(12, 12, 1, bias=False), nn.GroupNorm(12, 12), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(48, 10), nn.BatchNorm1d(10), nn.Linear(10, 4)),
    )


def lines() -> nn.Module:
    """Convolutions along one dim and over three."""
    return nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Unflatten(2, (2, 1, 7)), nn.Conv3d(8, 6, (2, 1, 3)), nn.Flatten(2)
    )


IMAGES, TOKENS = torch.randn(2, 3, 12, 12), torch.randn(2, 7, 6)
NETS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "attention": (lambda: Attention(fused=True), TOKENS),
    "attention by hand": (lambda: Attention(fused=False), TOKENS),
    "convolutions": (convolutions, IMAGES),
    "einsum": (Einsum, TOKENS),
    "encoder": (lambda: nn.TransformerEncoderLayer(6, 2, 16, batch_first=True), TOKENS),
    "lines": (lines, torch.randn(2, 3, 16)),
    "partly pinned": (Partly, TOKENS),
    "pyramid": (Pyramid, IMAGES),
    "recurrent": (Recurrent, TOKENS),
    **{
        name: (ZOO[name].build, ZOO[name].inputs()) for name in ("mobilenet_v3_small", "resnet18", "shufflenet_v2_x1_0")
    },
}


@pytest.mark.parametrize("name", NETS)
def test_widths_foretell_what_is_counted(name: str) -> None:
    build, inputs = NETS[name]
    model = seeded(build)
    graph = trace(model, inputs)
    macs, parameters = macs_bill(graph), parameters_bill(graph)
    sizes = np.array([group.size for group in graph.groups])
    assert len(sizes)
    generator = np.random.default_rng(0)
    for widths in (sizes, *(generator.integers(1, sizes + 1) for _ in range(2))):
        named = {group.name: int(width) for group, width in zip(graph.groups, widths, strict=True)}
        network = slim(graph, named)
        cost = count_cost(network, inputs)
        assert cost.macs == int(macs.at(widths)) == count_macs(network, graph.inputs)
        assert cost.parameters == int(parameters.at(widths))
    assert torch.equal(next(model.parameters()), next(seeded(build).parameters()))


OTHERWISE = {
    "CheckpointReentrant": "fvcore can't trace it",
    "HeadsMaskedEach": "it doesn't take one sample alone",
    "UnusedOutput": "fvcore leaves out what no output needs",
}
SOME = [CASES[name] for name in sorted(CASES)[::12] if name not in OTHERWISE]


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_hard_cases_cost_what_is_foretold(case: Case) -> None:
    torch.manual_seed(0)
    graph = trace(case.build(), case.inputs(), case.kwargs())
    sizes = np.array([group.size for group in graph.groups], dtype=np.int64)
    widths = np.random.default_rng(1).integers(1, sizes + 1)
    network = slim(graph, {group.name: int(width) for group, width in zip(graph.groups, widths, strict=True)})
    cost = count_cost(network, case.inputs(), case.kwargs())
    assert (cost.macs, cost.parameters) == (macs_bill(graph).at(widths), parameters_bill(graph).at(widths))


def test_what_fvcore_leaves_out_is_counted_here() -> None:
    for name in ("CheckpointReentrant", "UnusedOutput"):
        case = CASES[name]
        graph = trace(case.build(), case.inputs(), case.kwargs())
        sizes = np.array([group.size for group in graph.groups])
        assert macs_bill(graph).at(sizes) == count_macs(graph.model, graph.inputs) > 0
    assert len(SOME) >= 24


def test_many_widths_are_asked_at_once() -> None:
    graph = trace(seeded(convolutions), IMAGES)
    bill, sizes = macs_bill(graph), np.array([group.size for group in graph.groups])
    several = np.stack([sizes, sizes - 1, np.ones_like(sizes)])
    assert bill.at(several).tolist() == [float(bill.at(widths)) for widths in several]
    assert bill.terms(several).shape == (3, len(bill.where)) and set(bill.where) >= {"0", "3", "15"}


def test_a_network_that_cannot_be_counted_is_refused() -> None:
    class Many(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.view(2, -1)

    with pytest.raises(ConfigurationError, match=r"could not be counted \(RuntimeError: .*\); give a ratio\.$"):
        count_macs(Many(), ((torch.zeros(2, 3, 3),), {}))
