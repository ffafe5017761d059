"""Where Python cuts a dim of channels: numbers that a module keeps follow, others hold the channels."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.structure import choose, pick, prune_, trace
from tests.structure.oracle import judge

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Cut(nn.Module):
    """Twelve channels, cut into four and eight; each part has a reader of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.dim_first, self.dim_rest, self.splits, self.out_chs = 12, 4, 8, [4, 8], 12
        self.count = 4
        self.first, self.a = nn.Conv2d(3, 12, 3), nn.Conv2d(4, 6, 1)
        self.b, self.last = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 5, 1)

    def parts(self, x: Tensor) -> Any:
        return torch.split(x, [self.dim_first, self.dim_rest], 1)

    def forward(self, x: Tensor) -> Tensor:
        first, rest = self.parts(self.first(x))
        return self.last((self.a(first) * self.b(rest)).relu())


class InARow(Cut):
    def parts(self, x: Tensor) -> Any:
        return torch.split(x, self.splits, 1)


class FromTheWhole(Cut):
    def parts(self, x: Tensor) -> Any:
        return torch.split(x, [self.dim_first, self.dim - self.dim_first], 1)


class Slices(Cut):
    def parts(self, x: Tensor) -> Any:
        x = x[:, : self.out_chs]
        return x[:, : self.dim_first], x[:, self.dim_first :]


class Hidden(Cut):
    """Nothing says that ``count`` counts channels."""

    def parts(self, x: Tensor) -> Any:
        return x[:, : self.count], x[:, self.count :]


@pytest.mark.parametrize("build", [Cut, InARow, FromTheWhole, Slices])
def test_numbers_follow(build: type[Cut]) -> None:
    graph = trace(build(), IMAGES)
    assert set(graph.pinned) == {"last"}
    chance = random.Random(0)
    ratios = {group.name: chance.uniform(0.2, 0.8) for group in graph.groups}
    plan = graph.plan(pick(graph, ratios=ratios, score="random"))
    verdict = judge(build, lambda model: prune_(model, plan), IMAGES)
    assert verdict.left < 0.8
    model = build()
    prune_(model, plan)
    kept = (model.a.in_channels, model.b.in_channels)
    assert kept[0] != 4
    assert (
        kept
        == {
            Cut: (model.dim_first, model.dim_rest),
            InARow: tuple(model.splits),
            FromTheWhole: (model.dim_first, model.dim - model.dim_first),
            Slices: (model.dim_first, model.out_chs - model.dim_first),
        }[build]
    )


def test_a_number_of_unknown_meaning_holds_its_channels() -> None:
    model = Hidden()
    graph = trace(model, IMAGES)
    assert "first" in graph.pinned
    prune_(model, choose(graph))
    assert model.a.in_channels == 4
    assert model.count == 4


class Looking(nn.Module):
    """Which places are looked at closely depends on what a head has said: their number is known only on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 1, 1)
        self.wide, self.score = nn.Linear(12, 10), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.features(x).relu()
        places = (self.head(maps).flatten() > 0).nonzero().flatten()
        chosen = maps.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, places)
        return self.score(self.wide(chosen).relu()).sum(0)


def test_networks_that_choose_by_value_shrink_too() -> None:
    torch.manual_seed(0)
    graph = trace(Looking(), IMAGES)
    assert sorted(graph.pinned) == ["head", "score"]
    plan = choose(graph)
    assert judge(Looking, lambda model: prune_(model, plan), IMAGES).left < 0.6


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 12, 3), nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.scale.view(1, -1, 1, 1)


class LookingAtScaled(Looking):
    """A view of a parameter, in a network that looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.features = Scaled()


def test_views_of_parameters_in_networks_that_choose_by_value() -> None:
    torch.manual_seed(0)
    graph = trace(LookingAtScaled(), IMAGES)
    assert sorted(graph.pinned) == ["head", "score"]
    plan = choose(graph)
    assert judge(LookingAtScaled, lambda model: prune_(model, plan), IMAGES).left < 0.6
