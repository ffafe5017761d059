"""Statistics over channels that stay: which weights and norms take them, who says so, and what can't."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from lightning_prune.errors import ProofError
from lightning_prune.structure import PruningPlan, choose, pick, prove, prune_, trace
from tests.structure.cases_standardised import BatchNormConv, ScaledConv, StandardConv, WeightStandardised
from tests.structure.oracle import judge

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    return nn.Sequential(StandardConv(3, 8, 3), nn.Sigmoid(), StandardConv(8, 6, 3), nn.BatchNorm2d(6), Pooled(6))


class Pooled(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(2).mean(-1))


class Weighted(nn.Module):
    """A convolution in between, whose weight is what ``made`` makes of it."""

    def __init__(self, made: Callable[[Tensor], Tensor], size: int = 3) -> None:
        super().__init__()
        self.made = made
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, size), Pooled(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.conv2d(self.stem(x).sigmoid(), self.made(self.conv.weight), self.conv.bias).relu())


def unequal(model: nn.Module) -> PruningPlan:
    """Half of the one group, a third of the other."""
    graph = trace(model, IMAGES)
    chance = random.Random(0)
    ratios = {group.name: chance.uniform(0.3, 0.7) for group in graph.groups}
    return graph.plan(pick(graph, ratios=ratios, score="random", renormalise=True))


class Watched(nn.Module):
    """Takes a statistic of what its stem makes: to look at it, to compute with it, or to give it out."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use = use
        self.stem, self.head = nn.Conv2d(3, 8, 3), Pooled(8)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        hidden = self.stem(x).relu()
        level = hidden.detach().mean()
        divisor = {"computes": lambda: level, "asks": level.tolist}.get(self.use, lambda: 0)()
        scores = self.head(hidden / (1 + divisor))
        return (scores, level) if self.use == "returns" else scores


@pytest.mark.parametrize(("use", "binds"), [("looks", False), ("computes", True), ("asks", True), ("returns", True)])
def test_a_statistic_that_nobody_reads_binds_nobody(use: str, binds: bool) -> None:
    graph = trace(Watched(use), IMAGES)
    assert bool(graph["stem"].renormalised) is binds
    assert graph["stem"].mergeable is not binds
    plan = choose(graph, 0.5, renormalise=True)
    assert plan.widths() == {"stem": (8, 4)} and bool(plan.renormalised) is binds
    prove(graph.model, plan, IMAGES)


def test_inputs_of_standardised_weights_ask_for_leave() -> None:
    graph = trace(net(), IMAGES)
    assert graph["0"].renormalised == (("2.weight", 1),) and not graph["2"].renormalised
    assert graph["2"].mergeable and not graph["0"].mergeable
    assert choose(graph, 0.5).widths() == {"2": (6, 3)}
    plan = choose(graph, 0.5, renormalise=True)
    assert plan.widths() == {"0": (8, 4), "2": (6, 3)} and plan.renormalised == ("2.weight",)
    assert PruningPlan.from_json(plan.to_json()) == plan == choose(graph, 0.5, scope="all")


def test_it_is_said() -> None:
    graph = trace(net(), IMAGES)
    said = graph.explain("0")
    assert (
        "Weights are standardised over them (2). What stays is normalised anew, and none can stand for another." in said
    )
    assert "renormalised" in str(graph).splitlines()[2] and "renormalised" not in str(graph).splitlines()[3]


def test_a_norm_and_a_weight_over_the_same_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Sigmoid(), BatchNormConv(8, 6, 3), Pooled(6))
    graph = trace(model, IMAGES)
    assert {name for name, _ in graph["0"].renormalised} == {"1.weight", "3.weight"}
    assert "over them (1). Weights are standardised over them (3). What stays" in graph.explain("0")
    assert prove(model, unequal(model), IMAGES).error < 1e-12


def test_norms_that_stay_per_channel_are_not_named() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.LayerNorm(8), nn.Linear(8, 2))
    plan = choose(trace(model, torch.zeros(2, 3)), 0.5, renormalise=True)
    assert plan.renormalised == ("2.weight",)


@pytest.mark.parametrize("kind", [StandardConv, BatchNormConv, ScaledConv])
def test_without_it_the_proof_fails(kind: type[nn.Conv2d]) -> None:
    model = WeightStandardised(kind)
    plan = unequal(model)
    assert prove(model, plan, IMAGES).error < 1e-12
    with pytest.raises(ProofError, match="departs from the masked one"):
        prove(model, replace(plan, renormalised=()), IMAGES)


def test_the_judge_finds_a_wrong_input() -> None:
    plan = choose(trace(WeightStandardised(BatchNormConv), IMAGES), 0.5, renormalise=True)
    others = tuple(sorted((position + 1) % 8 for position in plan.kept["b.weight", 1]))
    wrong = replace(plan, kept={**plan.kept, ("b.weight", 1): others})

    def cut(model: nn.Module) -> None:
        prune_(model, wrong)

    with pytest.raises(AssertionError, match="departs"):
        judge(lambda: WeightStandardised(BatchNormConv), cut, IMAGES)


def test_numbers_of_the_fan_in_stay() -> None:
    model = WeightStandardised(ScaledConv)
    before = model.b.scale
    prune_(model, unequal(model))
    assert model.b.in_channels < 8 and model.b.scale == before
    graph = trace(WeightStandardised(ScaledConv), IMAGES)
    assert not graph["b"].scales, "a gain is part of its weight, no norm's scale"


MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "over rows and columns": lambda w: (w - w.mean()) / (w.abs().mean() + 1),
    "extremes": lambda w: w / (w.abs().amax((1, 2, 3), True) + 1),
    "over rows": lambda w: w - w.mean(0),
    "binary": lambda w: w.sign() * w.abs().mean((1, 2, 3), keepdim=True),
    "root mean square": lambda w: w * (w.pow(2).mean((1, 2, 3), keepdim=True) + 1e-6).rsqrt(),
    "only the mean": lambda w: w - w.flatten(1).mean(1).reshape(-1, 1, 1, 1),
    "population": lambda w: (w - w.mean((1, 2, 3), True)) / w.std((1, 2, 3), correction=0, keepdim=True).clamp(1e-4),
    "shifted": lambda w: (w + 1 - (w + 1).mean((1, 2, 3), True)) * 2,
    "batch norm with running statistics of none": lambda w: (
        F.batch_norm(w.flatten(1).t(), None, None, training=True).t().view_as(w)
    ),
}


@pytest.mark.parametrize("made", MADE.values(), ids=MADE.keys())
def test_any_statistic_of_a_weight(made: Callable[[Tensor], Tensor]) -> None:
    model = Weighted(made)
    plan = unequal(model)
    assert set(plan.widths()) == {"stem", "conv"} and plan.renormalised == ("conv.weight",)
    assert prove(model, plan, IMAGES).error < 1e-12


def test_weights_of_linear_layers_and_parametrised_ones() -> None:
    class Centred(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight - weight.mean(1, keepdim=True)

    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    register_parametrization(model[2], "weight", Centred())
    inputs = torch.randn(3, 4)
    plan = choose(trace(model, inputs), 0.5, renormalise=True)
    assert plan.renormalised == ("2.parametrizations.weight.original",)
    assert plan.widths() == {"0": (8, 4), "2": (6, 3)}
    assert prove(model, plan, inputs).error < 1e-12


PINNED: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "no epsilon": (lambda w: (w - w.mean((1, 2, 3), True)) / w.std((1, 2, 3), keepdim=True), "conv", "would be zero"),
    "extremes with places": (lambda w: w / (w.flatten(1).max(1)[0].view(-1, 1, 1, 1) + 9), "stem", "taken together"),
    "not followed": (lambda w: w - (w.flatten(1) @ torch.eye(72)).mean(1).view(-1, 1, 1, 1), "stem", "does not vanish"),
    "its own number": (
        lambda w: (w - w.mean((1, 2, 3), True)) / w[0].numel(),
        "stem",
        "number that depends on their count",
    ),
}


@pytest.mark.parametrize(("made", "layer", "reason"), PINNED.values(), ids=PINNED.keys())
def test_what_cant_be_is_pinned(made: Callable[[Tensor], Tensor], layer: str, reason: str) -> None:
    graph = trace(Weighted(made), IMAGES)
    assert reason in graph.pinned[layer]
    assert layer not in {name for group in graph.groups for name in group.producers}
    plan = graph.plan(pick(graph, 0.5, renormalise=True))
    assert prove(graph.model, plan, IMAGES).error < 1e-12


class Averaging(nn.Module):
    """Two stretches of equally many channels; what ``made`` makes of each is multiplied with it."""

    def __init__(self, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.made = made
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), Pooled(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.b(x * self.made(x)).tanh()
        return self.head(x * self.made(x))


AVERAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "root mean square": lambda x: (x.square().mean(1, keepdim=True) + 1e-6).rsqrt(),
    "attention over space": lambda x: torch.cat([x.mean(1, True), x.amax(1, True)], 1).mean(1, keepdim=True).sigmoid(),
    "deviation": lambda x: x.var(1, keepdim=True, correction=0).add(1e-5).rsqrt(),
    "response": lambda x: x.norm(2, (2, 3), True) / (x.norm(2, (2, 3), True).mean(1, keepdim=True) + 1e-6),
    "over all": lambda x: x.abs().mean((1, 2, 3), keepdim=True),
}


@pytest.mark.parametrize("made", AVERAGES.values(), ids=AVERAGES.keys())
def test_averages_of_channels(made: Callable[[Tensor], Tensor]) -> None:
    model = Averaging(made)
    with torch.no_grad():
        model.a.weight[3], model.a.bias[3] = 0, 0  # dead, and yet a channel that stays or goes like any other
    graph = trace(model, IMAGES)
    assert "Averages are taken over them." in graph.explain("a") and not choose(graph, 0.5).kept
    for seed in range(3):
        plan = graph.plan(pick(graph, ratios={"a": 0.4, "b": 0.6}, score="random", renormalise=True, seed=seed))
        assert plan.renormalised == ("a.weight", "b.weight")
        assert prove(model, plan, IMAGES).error < 1e-12
        assert judge(lambda: Averaging(made), lambda net: prune_(net, plan), IMAGES).left < 0.7  # noqa: B023
    with pytest.raises(ProofError, match="departs from the masked one"):
        prove(model, replace(plan, renormalised=()), IMAGES)


def test_root_mean_squares_of_torch() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.RMSNorm(8), nn.Sigmoid(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    inputs = torch.randn(3, 4)
    plan = choose(trace(model, inputs), 0.5, renormalise=True)
    assert plan.renormalised == ("1.weight",) and plan.widths() == {"0": (8, 4), "3": (6, 3)}
    assert prove(model, plan, inputs).error < 1e-12
    prune_(model, plan)
    assert tuple(model[1].normalized_shape) == (4,)


def test_averages_of_what_does_not_vanish_hold_their_channels() -> None:
    graph = trace(Averaging(lambda x: x.sigmoid().mean(1, keepdim=True)), IMAGES)
    assert "are taken together (mean" in graph.pinned["a"] and "are taken together (mean" in graph.pinned["b"]


def test_single_positions_are_tried_in_pairs() -> None:
    """A batch norm refuses to standardise a single weight; a trial must not ask for that."""
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), BatchNormConv(3, 6, 1), nn.ReLU(), Pooled(6))
    assert set(trace(model, IMAGES).pinned) == {"4.fc"}


class Adapted(nn.Module):
    """A weight beside one of low rank, standardised together; the sum is taken either way round."""

    def __init__(self, weight_first: bool) -> None:
        super().__init__()
        self.weight_first = weight_first
        self.a, self.c = nn.Linear(4, 8), nn.Linear(6, 5)
        self.up, self.down, self.w = (nn.Parameter(torch.randn(shape)) for shape in ((6, 2), (2, 8), (6, 8)))

    def forward(self, x: Tensor) -> Tensor:
        low = self.up @ self.down
        weight = self.w + low if self.weight_first else low + self.w
        return self.c(F.linear(self.a(x).sigmoid(), F.batch_norm(weight[None], None, None, training=True)[0]))


@pytest.mark.parametrize("weight_first", [True, False])
def test_a_weight_is_known_whatever_it_is_added_to(weight_first: bool) -> None:
    torch.manual_seed(0)
    model, inputs = Adapted(weight_first), torch.randn(3, 4)
    plan = choose(trace(model, inputs), 0.5, renormalise=True, scope="all")
    assert plan.renormalised == ("w",) and plan.kept["down", 1] == plan.kept["w", 1] == plan.kept["a.weight", 0]
    assert prove(model, plan, inputs).error < 1e-12


class Counting(nn.Module):
    """A centred parameter, and beside it a sum of what that is at zero: it tells how many channels there are."""

    def __init__(self, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.made = made
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 5)
        self.shift = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        centred = self.shift - self.shift.mean()
        return self.b(self.a(x) + centred) * self.made(centred)


def test_a_standardised_weight_is_no_licence_to_count_channels() -> None:
    assert "are taken together (sum" in trace(Counting(lambda w: w.cos().sum()), torch.randn(3, 4)).pinned["a"]
    model, inputs = Counting(lambda w: w.square().sum()), torch.randn(3, 4)
    plan = choose(trace(model, inputs), 0.5, renormalise=True)
    assert plan.widths() == {"a": (8, 4)} and prove(model, plan, inputs).error < 1e-12


def test_a_scale_that_is_no_weight_holds_its_channels() -> None:
    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.scale = nn.Linear(4, 8), nn.Linear(8, 5), nn.Linear(3, 8)
            self.code = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.layer_norm(self.a(x), (8,), self.scale(self.code)))

    assert "under a scale that is no weight" in trace(Made(), torch.randn(3, 4)).pinned["a"]


@pytest.mark.parametrize("name", ["weight", "running_var"])
def test_a_statistic_of_what_a_batch_norm_reads(name: str) -> None:
    """Attention by the scales of a batch norm, each over their mean."""

    class Weighed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Pooled(8)

        def forward(self, x: Tensor) -> Tensor:
            scale = getattr(self.norm, name).detach().abs()
            return self.head(self.norm(self.a(x)) * (scale / (scale.mean() + 1))[:, None, None])

    model = Weighed()
    nn.init.uniform_(model.norm.weight)
    nn.init.uniform_(model.norm.running_var)
    plan = choose(trace(model.eval(), IMAGES), 0.5, renormalise=True)
    assert plan.renormalised == (f"norm.{name}",) and prove(model, plan, IMAGES).error < 1e-12


def test_a_lent_shape_makes_no_weight() -> None:
    class Lent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 5)
            self.code, self.shape = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(1, 8))

        def forward(self, x: Tensor) -> Tensor:
            code = self.b(self.code).view_as(self.shape)
            return self.c(self.a(x) + (code - code.mean(-1, keepdim=True)) + self.shape)

    model, inputs = Lent(), torch.randn(3, 4)
    graph = trace(model, inputs)
    assert "are taken together (mean" in graph.pinned["a"]
    assert prove(model, graph.plan(pick(graph, 0.5, scope="all")), inputs).error < 1e-12


class Padded(nn.Module):
    """As many tokens as channels; the average over tokens counts those that are padded with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.embed(x)) * (x.abs().sum(-1, keepdim=True) > 0)
        return self.head(tokens.mean(1))


def test_zeros_along_another_dim_of_the_same_length_are_no_channels() -> None:
    """The padded tokens have the numbers of the channels that go."""
    torch.manual_seed(0)
    model, x = Padded().eval(), torch.randn(2, 8, 3)
    plan = choose(trace(model, x), 0.5, scope="all")
    assert plan.renormalised and len(plan.kept["embed.weight", 0]) == 4
    x[:, sorted(set(range(8)) - set(plan.kept["embed.weight", 0]))] = 0
    assert prove(model, plan, x).error < 1e-12
    with torch.no_grad():
        model.norm.weight[:] = 0
        model.norm.bias[:] = torch.arange(8.0)
    assert prove(model, plan, x).error < 1e-12
