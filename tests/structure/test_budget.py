"""Budgets: read, met and, where they can't be, refused with what stands in the way."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import vgg

from lightning_prune import Budget, ConfigurationError, choose, prune_, trace
from lightning_prune.reports.cost import Cost, count_cost
from lightning_prune.structure import ChannelGraph, resolve, select, stopwatch
from lightning_prune.structure.choice import spend
from lightning_prune.structure.counting import macs_bill, slim
from lightning_prune.structure.search import Ladder, by_clock, fewest
from lightning_prune.structure.stopwatch import Stopwatch
from tests.callbacks.nets import seeded
from tests.structure.zoo import ZOO

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """As in ResNet-56, with a projection where the width changes."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.short = nn.Conv2d(inner, outer, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.bn2(self.conv2(self.bn1(self.conv1(images)).relu()))
        return (hidden + self.short(images)).relu()


def residual(blocks: int = 2) -> nn.Module:
    """Three stages of 16, 32 and 64 channels; ResNet-56 with nine blocks each."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for stage, width in enumerate((16, 32, 64)):
        before = width if stage == 0 else width // 2
        layers.append(Block(before, width, 1 if stage == 0 else 2))
        layers += [Block(width, width, 1) for _ in range(blocks - 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def separable() -> nn.Module:
    """Depthwise and pointwise convolutions in turn."""

    def pair(inner: int, outer: int) -> list[nn.Module]:
        depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        return [depthwise, nn.BatchNorm2d(inner), nn.ReLU(), nn.Conv2d(inner, outer, 1), nn.BatchNorm2d(outer)]

    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), *pair(16, 32), nn.ReLU(), *pair(32, 48), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))


def plain() -> nn.Module:
    """As VGG: convolutions, pooling, and linear layers that read what has been flattened."""
    layers: list[nn.Module] = []
    for inner, outer in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))


class Pinned(nn.Module):
    """Nearly all of its cost is in layers that can't shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.free, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3), nn.Conv2d(24, 64, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.free(self.stem(images)).relu())


def vgg16() -> nn.Module:
    """Its convolutions, with the head that it has on CIFAR."""
    return nn.Sequential(vgg.make_layers(vgg.cfgs["D"], batch_norm=True), nn.Flatten(), nn.Linear(2048, 10))


NETS: dict[str, Callable[[], nn.Module]] = {
    "residual": residual,
    "separable": separable,
    "plain": plain,
    "pinned": Pinned,
}
KEYS = {"macs": "macs", "params": "parameters"}


def costs(model: nn.Module, plan: Any, images: Tensor = IMAGES) -> tuple[Cost, Cost]:
    """Of the network before and after, counted by fvcore."""
    network = copy.deepcopy(model)
    prune_(network, plan)
    return count_cost(model, images), count_cost(network, images)


def reached(model: nn.Module, plan: Any, quantity: str, images: Tensor = IMAGES) -> float:
    dense, left = (getattr(cost, KEYS[quantity]) for cost in costs(model, plan, images))
    return float(left / dense)


def finer(graph: ChannelGraph, plan: Any, quantity: str, target: float, round_to: int) -> bool:
    """Whether some group of a plan could be a step wider and the whole still be within the target."""
    widths = {name: after for name, (_, after) in plan.widths().items()}
    for group in graph.groups:
        if group.name not in widths:
            continue
        steps = [kept for kept in range(widths[group.name] + 1, group.size + 1) if kept * group.unit % round_to == 0]
        wider = {**widths, group.name: (steps or [group.size])[0]}
        network = slim(graph, {name: kept for name, kept in wider.items() if name in {g.name for g in graph.groups}})
        dense, left = (getattr(count_cost(each, IMAGES), KEYS[quantity]) for each in (graph.model, network))
        if left <= target * dense:
            return True
    return False


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("quantity", ["macs", "params"])
@pytest.mark.parametrize(
    "options",
    [{}, {"scope": "all"}, {"scope": "all", "global_": True}, {"round_to": 8}, {"round_to": 4, "global_": True}],
    ids=str,
)
def test_a_budget_is_met(name: str, quantity: str, options: dict[str, Any]) -> None:
    """Never more than asked for; at least 99 % of it, or no group can be a step wider."""
    model = seeded(NETS[name])
    graph = trace(model, IMAGES)
    for target in (0.93,) if name == "pinned" else (0.45, 0.7):
        plan = choose(graph, budget={quantity: target}, **options)
        share = reached(model, plan, quantity)
        assert share <= target
        assert share >= 0.99 * target or not finer(graph, plan, quantity, target, options.get("round_to", 1))
        widths = plan.widths().values()
        assert all(after % options.get("round_to", 1) == 0 or after == before for before, after in widths)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "vgg16"])
def test_networks_of_the_field_meet_their_budgets(name: str) -> None:
    model = seeded(ZOO[name].build if name in ZOO else vgg16)
    images = torch.zeros(1, 3, 64, 64)
    graph = trace(model, images)
    dense = count_cost(model, images)
    for quantity, options in (("macs", {}), ("macs", {"round_to": 8}), ("params", {"scope": "all"})):
        plan = choose(graph, budget={quantity: 0.5}, score="random", **options)
        share = getattr(count_cost(_cut(graph, plan), images), KEYS[quantity]) / getattr(dense, KEYS[quantity])
        assert 0.495 <= share <= 0.5


def _cut(graph: ChannelGraph, plan: Any) -> nn.Module:
    network = slim(graph, {})
    prune_(network, plan)
    return network


def test_one_ratio_holds_for_all_layers_but_for_single_channels() -> None:
    graph = trace(seeded(residual), IMAGES)
    plan = choose(graph, budget={"macs": 0.5})
    for before, after in plan.widths().values():
        assert abs(1 - after / before - 0.5) <= 1.5 / before + 0.02


def test_counts_and_shares_are_the_same_budget() -> None:
    model = seeded(plain)
    graph = trace(model, IMAGES)
    dense = count_cost(model, IMAGES)
    plans = [
        choose(graph, budget={"params": value}) for value in (0.5, dense.parameters // 2, str(dense.parameters // 2))
    ]
    assert plans[1] == plans[2]
    assert abs(reached(model, plans[0], "params") - reached(model, plans[1], "params")) < 0.001
    million = choose(graph, budget={"macs": "0.5M"})
    assert 495_000 <= costs(model, million)[1].macs <= 500_000  # type: ignore[operator]


def test_ratios_of_their_own_hold_and_ignored_layers_stay() -> None:
    model = seeded(plain)
    graph = trace(model, IMAGES)
    plan = choose(graph, budget={"macs": 0.5}, ratios={"0": 0.25}, ignore=["13"])
    widths = plan.widths()
    assert widths["0"] == (32, 24) and "13" not in widths and reached(model, plan, "macs") <= 0.5
    alone = choose(graph, budget={"macs": 0.8}, ratios={"4": 0.75})
    assert alone.widths() == {"4": (64, 16)}  # that is enough


def test_a_global_threshold_takes_the_least_valuable_of_all() -> None:
    model = seeded(residual)
    graph = trace(model, IMAGES)
    plan = choose(graph, budget={"macs": 0.6}, global_=True, score="l2")
    weights = {group.name: group for group in graph.groups if group.name in plan.widths()}
    gone, stay = [], []
    for name in weights:
        values = model.get_submodule(name).weight.detach().square().mean(dim=(1, 2, 3)).sqrt()
        kept = list(plan.kept[f"{name}.weight", 0])
        stay += values[kept].tolist() if len(kept) > 1 else []  # one channel stays in every layer
        gone += np.delete(values.numpy(), kept).tolist()
    assert max(gone) < min(stay) * 1.05  # a threshold, but for what is given back
    assert len({after / before for before, after in plan.widths().values()}) > 1


def test_a_cap_holds_in_every_layer() -> None:
    graph = trace(seeded(residual), IMAGES)
    plan = choose(graph, budget={"macs": 0.5, "cap": 0.6}, global_=True, scope="all")
    assert all(after >= 0.4 * before for before, after in plan.widths().values())


def test_streams_keep_what_is_to_be_kept_at_least() -> None:
    graph = trace(seeded(plain), IMAGES)
    assert min(after for _, after in choose(graph, budget={"macs": 0.1}, keep_at_least=6).widths().values()) >= 6


# What can't be met.


def test_a_budget_out_of_reach_names_the_least_and_what_is_in_the_way() -> None:
    graph = trace(seeded(Pinned), IMAGES)
    with pytest.raises(ConfigurationError) as caught:
        choose(graph, budget={"macs": 0.01}, ignore=["stem"])
    message = str(caught.value)
    least = count_cost(slim(graph, {"free": 1}), IMAGES).macs / count_cost(graph.model, IMAGES).macs  # type: ignore[operator]
    assert message.startswith(f"budget macs=0.01 can't be reached: {least:.4g} of the network's MACs are left, the ")
    assert "stem (" in message and "left out by scope, ignore or the method" in message
    assert "head (" in message and "pinned" in message and "free" in message and "at its fewest channels" in message
    assert "\n" not in message
    assert choose(graph, budget={"macs": least + 1e-9}, ignore=["stem"]).widths() == {"free": (24, 1)}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget": {"params": 0.05, "cap": 0.5}}, r"layers that may shrink under cap=0\.5; most of that is in"),
        (
            {"budget": {"params": "1k"}, "ratios": {"13": 0.1}},
            r"params=1k can't .*\(\d.*k of \d.*k\).*a ratio of its own",
        ),
        ({"budget": {"params": 0.1}, "keep_at_least": 40}, "at its fewest channels"),
    ],
)
def test_caps_ratios_and_least_widths_stand_in_the_way(options: dict[str, Any], says: str) -> None:
    graph = trace(seeded(plain), IMAGES)
    with pytest.raises(ConfigurationError, match=says):
        choose(graph, **options)


def test_a_budget_that_asks_for_nothing_is_refused() -> None:
    graph = trace(seeded(plain), IMAGES)
    with pytest.raises(
        ConfigurationError, match=r"budget params=2\.0M asks for no less .* has \(.*k\); nothing would go"
    ):
        choose(graph, budget={"params": "2.0M"})
    with pytest.raises(ConfigurationError, match="None of the network's operators has MACs"):
        choose(trace(nn.Sequential(nn.ReLU()), IMAGES), budget={"macs": 0.5})


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ({}, "exactly one of macs, params and latency_ms"),
        ({"macs": 0.5, "params": 0.5}, "exactly one of macs, params and latency_ms, not macs and params"),
        ({"mac": 0.5}, r"budget knows macs, params, latency_ms, batch, device, cap, not 'mac'"),
        ({"macs": 0}, r"macs=0 must be the share that is kept, in \(0, 1\), or a whole count"),
        ({"macs": 1.0}, r"macs=1\.0 must be"),
        ({"macs": -3}, "macs=-3 must be"),
        ({"macs": 2.5}, r"macs=2\.5 must be"),
        ({"macs": True}, "macs=True must be"),
        ({"macs": float("nan")}, "macs=nan must be"),
        ({"params": "2.0X"}, r"params='2\.0X' must be .* such as 2_000_000 or '2\.0M' \(with k, M, G or T\)"),
        ({"params": "many"}, "params='many' must be"),
        ({"latency_ms": 0}, "latency_ms=0 must be a positive number"),
        ({"latency_ms": "4"}, "latency_ms='4' must be a positive number"),
        ({"latency_ms": 4, "batch": 0}, "batch=0 must be a whole number of at least 1"),
        ({"latency_ms": 4, "device": "moon"}, "device='moon' is none that torch knows"),
        ({"macs": 0.5, "device": "cpu"}, "batch and device belong to latency_ms; leave them out beside macs"),
        ({"macs": 0.5, "cap": 0}, r"cap=0 must lie in \(0, 1\]"),
        (0.5, r"budget=0\.5 must be a mapping such as \{'macs': 0\.5\}"),
    ],
)
def test_bad_budgets_are_refused_in_one_line(budget: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as caught:
        Budget.of(budget)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["4.2G", "4200M", "4_200_000k", " 4200000000 ", "0.0042T"])
def test_counts_are_read_with_their_suffix(text: str) -> None:
    assert Budget(macs=text).wanted(1e12) == 4.2e9
    assert Budget(params="0.25").wanted(1000) == Budget(params=".25").wanted(1000) == 250


def test_a_ratio_beside_a_budget_is_refused() -> None:
    graph = trace(seeded(plain), IMAGES)
    with pytest.raises(
        ConfigurationError, match=r"Give a ratio or a budget, not both \(ratio=0\.5, budget macs=0\.5\)"
    ):
        choose(graph, 0.5, budget={"macs": 0.5})
    assert choose(graph) == choose(graph, 0.5)


# Counts that differ from what widths foretell.


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.3])
def test_the_aim_is_corrected_by_what_is_counted(factor: float) -> None:
    """A counter that sees something else in the largest layer: the budget holds by its numbers."""
    graph = trace(seeded(plain), IMAGES)

    def count(network: nn.Module) -> int:
        return round((count_cost(network, IMAGES).macs or 0) + (factor - 1) * 16 * network[4].weight.numel())  # type: ignore[index,union-attr]

    prices = {group.name: [n / group.size for n in range(group.size)] for group in graph.groups}
    found = resolve.resolve(graph, Budget(macs=0.5), prices, recount=count)
    assert found.outcome.dense == count(graph.model) and found.outcome.asked == 0.5 * found.outcome.dense
    assert 0.98 * found.outcome.asked <= found.outcome.reached <= found.outcome.asked
    assert found.outcome.reached == count(slim(graph, found.kept))


@pytest.mark.parametrize("more", [-40_000, 40_000])
def test_the_share_is_of_what_is_counted_in_the_dense_network(more: int) -> None:
    """As where only the dense network's operators hide something from the counter, or the slim one's."""
    graph = trace(seeded(residual), IMAGES)

    def count(network: nn.Module) -> int:
        return (count_cost(network, IMAGES).macs or 0) + more * (network[3].conv1.out_channels == 16)  # type: ignore[index,union-attr,operator]

    prices = {group.name: [n / group.size for n in range(group.size)] for group in graph.groups}
    found = resolve.resolve(graph, Budget(macs=0.7), prices, recount=count).outcome
    assert found.dense == count(graph.model) and 0.99 * found.asked <= found.reached <= found.asked


def test_parts_of_the_way_fall_by_equal_factors() -> None:
    graph = trace(seeded(residual), IMAGES)
    share = select(graph)
    half, whole = (spend(graph, Budget(macs=0.36), share, progress=part).outcome for part in (0.5, 1.0))
    assert half.asked == pytest.approx(0.6 * half.dense) and whole.asked == pytest.approx(0.36 * whole.dense)
    assert half.reached <= half.asked and whole.reached <= whole.asked


# By the clock.


class Clock:
    """Instead of a stopwatch: a millisecond per ten thousand MACs, and one for nothing at all."""

    def __init__(self, graph: ChannelGraph, batch: int, device: str | None) -> None:
        self.graph, self.asked = graph, list[float]()
        self.batch, self.device = batch, device
        self.dense = self.time({})
        CLOCKS.append(self)

    def time(self, widths: Any) -> float:
        self.asked.append(1 + (count_cost(slim(self.graph, widths), IMAGES).macs or 0) / 10_000)
        return self.asked[-1]


CLOCKS: list[Clock] = []


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_latency_comes_within_five_percent_by_few_measurements(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "Stopwatch", Clock)
    graph = trace(seeded(residual), IMAGES)
    dense = Clock(graph, 1, None).dense
    budget = Budget(latency_ms=share * dense, batch=4, device="cpu")
    found = spend(graph, budget, {name: 0.5 for name in select(graph, scope="all")})
    clock = CLOCKS[-1]
    assert (clock.batch, clock.device) == (4, "cpu") and len(clock.asked) <= 5
    assert 0.95 * share * dense <= found.outcome.reached <= share * dense
    assert found.outcome.reached == clock.time(found.kept) and found.outcome.dense == clock.dense
    assert str(found.outcome) == f"budget: {share * dense:.4g} ms of latency, reached {found.outcome.reached:.4g} ms"


def test_latency_out_of_reach_names_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "Stopwatch", Clock)
    graph = trace(seeded(residual), IMAGES)
    with pytest.raises(ConfigurationError, match=r"latency_ms=1\.0 can't be reached: .* ms is the least") as caught:
        choose(graph, budget={"latency_ms": 1.0})
    assert f"{min(CLOCKS[-1].asked):.4g} ms is the least that was measured, with the fewest" in str(caught.value)
    with pytest.raises(ConfigurationError, match=r"asks for no less than the dense network has \(.* ms\)"):
        choose(graph, budget={"latency_ms": 1e6})


def by_a_clock(time: Any, target: float) -> tuple[Any, dict[tuple[int, ...], list[float]], float]:
    """What the search finds, all that it measured, and what it would have measured without noise."""
    graph = trace(seeded(plain), IMAGES)
    sizes = np.array([group.size for group in graph.groups])
    prices = {group.name: [n / group.size for n in range(group.size)] for group in graph.groups}
    bill = macs_bill(graph)
    ladder = Ladder(graph.groups, sizes, prices, {group.name: 1 for group in graph.groups}, 1, np.ones(len(sizes)))
    drawn: dict[tuple[int, ...], list[float]] = {}

    def share(widths: Any) -> float:
        return float(bill.at(widths) / bill.at(sizes))

    def measure(widths: Any) -> float:
        drawn.setdefault(tuple(widths), []).append(time(share(widths)))
        return drawn[tuple(widths)][-1]

    found = by_clock(measure, bill, ladder, 10.0, target, 0.95)
    return found, drawn, share(found[0]) if isinstance(found, tuple) else 0.0


def test_a_clock_that_wavers_is_asked_twice_and_its_mean_counts() -> None:
    noise = np.random.default_rng(0)
    for target in (2.0, 5.0, 8.0):
        found, drawn, _ = by_a_clock(lambda share: 10 * share * noise.uniform(0.8, 1.2), target)
        assert isinstance(found, tuple) and sum(map(len, drawn.values())) <= 12
        means = {widths: sum(times) / len(times) for widths, times in drawn.items()}
        assert found[1] == pytest.approx(max(mean for mean in means.values() if mean <= target))
        assert means[tuple(found[0])] == pytest.approx(found[1])
        assert max(map(len, drawn.values())) == 2


def test_what_is_near_enough_is_so_the_second_time_too() -> None:
    """The first time each width is measured it seems a tenth faster than it is."""
    seen: set[float] = set()

    def time(share: float) -> float:
        is_new = share not in seen
        seen.add(share)
        return 10 * share * (0.9 if is_new else 1.0)

    found, drawn, share = by_a_clock(time, 5.0)
    assert 4.75 <= found[1] <= 5.0 and len(drawn[tuple(found[0])]) == 2
    assert 4.75 <= 10 * share * 0.95 <= 5.0


def test_an_end_that_was_wrong_is_given_up() -> None:
    """One disturbed measurement, just where the answer is, must not end the search far below."""
    disturbed: list[float] = []

    def time(share: float) -> float:
        is_first = not disturbed and 0.475 < share < 0.5
        disturbed.extend([share] * is_first)
        return 10 * share * (1.06 if is_first else 1.0)

    found, drawn, share = by_a_clock(time, 5.0)
    assert disturbed and 0.475 <= share <= 0.5 and sum(map(len, drawn.values())) <= 12
    assert found[1] <= 5.0


def test_answers_are_right_where_each_time_is_two_percent_off() -> None:
    for seed in range(30):
        noise = np.random.default_rng(seed)
        found, _, share = by_a_clock(lambda share: (2 + 8 * share) * noise.normal(1, 0.02), 6.0)  # noqa: B023
        assert 0.95 * 6.0 <= found[1] <= 6.0
        assert 0.92 <= (2 + 8 * share) / 6.0 <= 1.03


def test_a_machine_that_gets_slower_slows_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times slower from turn to turn, with pauses now and then: the ratio to the dense network stays."""
    graph, turns = trace(seeded(plain), IMAGES), [0]
    dense = count_cost(graph.model, IMAGES).macs or 1

    def seconds(network: nn.Module, passes: int) -> float:
        turns[0] += 1
        pause = 0.05 if turns[0] % 7 == 0 else 0.0
        return (count_cost(network, IMAGES).macs or 0) / dense * 0.01 * (1 + turns[0] / 50) + pause

    monkeypatch.setattr(Stopwatch, "_turn", lambda self, network, passes: seconds(network, passes))
    clock = Stopwatch(graph, 1, "cpu")
    widths = {group.name: group.size // 2 for group in graph.groups}
    exact = clock.dense * (count_cost(slim(graph, widths), IMAGES).macs or 0) / dense
    assert clock.time(widths) == pytest.approx(exact, rel=0.04)


def test_one_thread_of_the_cpu_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that other programs don't count; several threads, and other devices, by the one on the wall."""
    network = nn.Linear(2, 2)
    for threads, clock in ((1, time.thread_time), (2, time.perf_counter)):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)  # noqa: B023
        assert stopwatch.clock_of(network) is clock
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert stopwatch.clock_of(network.to("meta")) is time.perf_counter
    ticks = iter([2.0, 8.0])
    assert stopwatch.seconds(lambda: None, passes=3, clock=lambda: next(ticks)) == 2.0


def test_every_turn_begins_with_a_pass_that_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds in the caches what the other network has left there."""
    done: list[str] = []
    clock = Stopwatch(trace(seeded(plain), IMAGES), 1, "cpu")
    monkeypatch.setattr(stopwatch, "seconds", lambda work, passes, clock: done.append(f"{passes} timed") or 1.0)
    clock._turn(lambda *_: done.append("run"), 3)  # type: ignore[arg-type]
    assert done == ["run", "3 timed"]


def test_a_real_clock_measures_and_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "PATIENCE", 0.1)
    model = seeded(separable)
    before = copy.deepcopy(model.state_dict())
    graph = trace(model, IMAGES)
    clock = Stopwatch(graph, 3, "cpu")
    assert clock.dense > 0 and clock.time({"0": 4}) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and model.training
    with pytest.raises(ConfigurationError, match=r"Latency can't be measured on cuda:99 with a batch of 1 \("):
        Stopwatch(graph, 1, "cuda:99")


def test_a_median_stands_firm_before_it_counts() -> None:
    """Where draws waver, more are taken; half of them far off don't matter for long."""
    noise, drawn = np.random.default_rng(0), [0, 0]

    def draw(which: int, spread: float) -> float:
        drawn[which] += 1
        return float(noise.normal(1.0, spread))

    assert stopwatch.steady(lambda: draw(0, 1e-4)) == pytest.approx(1.0, abs=1e-3) and drawn[0] == stopwatch.LEAST
    assert stopwatch.steady(lambda: draw(1, 0.05)) == pytest.approx(1.0, abs=0.04) and drawn[1] > 3 * stopwatch.LEAST


def test_bisection_finds_what_counting_up_finds_and_asks_seldom() -> None:
    generator = torch.Generator().manual_seed(0)

    def left(values: list[float], asked: list[int], number: int) -> float:
        asked.append(number)
        return values[number]

    for most in (1, 2, 3, 17, 1000):
        values = [1.0, *(1 - torch.rand(most, generator=generator).sort().values).tolist()]
        for target in (0.02, 0.3, 0.77, 0.999):
            asked: list[int] = []
            found = fewest(partial(left, values, asked), most, target)
            assert found == next((n for n, value in enumerate(values) if value <= target), None)
            assert len(asked) <= 3 + most.bit_length()
    assert fewest(lambda number: 0.1, 5, 0.5) == 0
    wavy = [1.0, 0.7, 0.9, 0.4, 0.6, 0.3]
    found = fewest(wavy.__getitem__, 5, 0.5)
    assert found is not None and wavy[found] <= 0.5 < wavy[found - 1]
