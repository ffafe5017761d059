"""Budgets in a training run: met to the count of the report, known early, remembered, said."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from rich.console import Console
from torch import Tensor, nn

from lightning_prune import Budget
from lightning_prune.callbacks import base, budgeting
from lightning_prune.callbacks.ascp import ASCP
from lightning_prune.callbacks.examination import Look, awkward
from lightning_prune.callbacks.greg import GReg1, GReg2
from lightning_prune.callbacks.magnitude import Magnitude
from lightning_prune.callbacks.mask_sparsity import MaskSparsity
from lightning_prune.callbacks.masks import prices_of
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.callbacks.tpp import TPP
from lightning_prune.errors import ConfigurationError
from lightning_prune.reports import Cost, Latency, PruningReport, count_cost, surgery_table
from lightning_prune.schedules import MaskSparsityStrength
from lightning_prune.structure import Outcome, PruningPlan, choose, multiples, prune_, resolve, trace
from tests.callbacks.nets import Classifier, conv_net, image_loader, seeded, trainer
from tests.callbacks.slimming import Residual

pytestmark = pytest.mark.filterwarnings(  # stages of a few steps
    "ignore:.*energy was left", "ignore:.*too few optimiser steps"
)

IMAGES = torch.zeros(2, 3, 6, 6)
METHODS = {"ascp": ASCP, "greg1": GReg1, "greg2": GReg2, "magnitude": Magnitude, "mask": MaskSparsity, "tpp": TPP}
EARLY = [name for name in METHODS if name != "mask"]


def net(build: Any, width: int = 16) -> nn.Module:
    """A network whose scales all differ."""
    built: nn.Module = seeded(build, width)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in built.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.rand(width, generator=generator) + 0.5)
    return built


def scales(model: nn.Module) -> list[Tensor]:
    return [norm.weight.detach().clone() for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)]


class Still(Classifier):
    """Trains so slowly that its scales stay as they are."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-12)


def picked(model: nn.Module, **arguments: Any) -> dict[str, Any]:
    """What MaskSparsity takes after a global stage, by the scales as they are."""
    strength = MaskSparsityStrength(strength=1e13, global_strength=1.0)  # enough for a mask at so small a rate
    method = MaskSparsity(epochs=2, global_epochs=1, constants=strength, **arguments)
    trainer(method, max_epochs=2, limit_train_batches=1).fit(Still(model), image_loader(1))
    return method.removal()


def share(model: nn.Module, removal: Any) -> float:
    graph, dense = trace(model, IMAGES), count_cost(model, IMAGES).macs
    prune_(model, graph.plan(removal))
    return (count_cost(model, IMAGES).macs or 0) / (dense or 1)


def report_of(method: Any) -> PruningReport:
    """Of a run of the method with surgery."""
    pruning = StructuralPruning(latency_batches=(), report_file=None)
    trainer(method, pruning, max_epochs=3).fit(Classifier(net(conv_net)), image_loader(3))
    assert pruning.report is not None
    return pruning.report


# What the report shows.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"params": 0.4}, {"macs": "60k"}, {"params": 1500}], ids=str)
def test_what_was_set_is_what_is_got(method: str, budget: dict[str, Any]) -> None:
    callback = METHODS[method](epochs=2, budget=budget)
    report = report_of(callback)
    assert len(report.budgets) == 1
    outcome = report.budgets[0]
    before, after = (
        (cost.macs if outcome.quantity == "macs" else cost.parameters)
        for cost in (report.cost_before, report.cost_after)
    )
    assert (outcome.dense, outcome.reached) == (before, after) and outcome.quantity in budget
    assert outcome.asked == Budget(**budget).wanted(outcome.dense) and after <= outcome.asked
    assert outcome.asked - after < 0.08 * outcome.asked  # one channel of these layers is up to so much
    assert callback.outcome == outcome


def test_the_table_and_the_file_show_both() -> None:
    report = report_of(GReg1(epochs=2, budget={"macs": 0.5}))
    assert PruningReport.from_json(report.to_json()) == report
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(surgery_table(report))
    share = report.budgets[0].reached / report.budgets[0].dense
    assert f"Budget: 0.500 of MACs, reached {share:.3f}." in console.export_text()


def test_the_log_says_so_in_the_first_batch(caplog: pytest.LogCaptureFixture) -> None:
    method = GReg1(epochs=2, start=2, budget={"macs": 0.5})
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        trainer(method, max_epochs=4, limit_train_batches=1).fit(Classifier(net(conv_net)), image_loader(1))
    assert sum(message.startswith("greg1: budget: 0.500 of MACs, reached 0.4") for message in caplog.messages) == 1


def test_all_methods_but_one_have_the_widths_of_choose() -> None:
    """Which don't depend on weights, so that they are known before the first step."""
    wanted = choose(trace(net(conv_net), IMAGES), budget={"macs": 0.5}, round_to=2).widths()
    for name in EARLY:
        method = METHODS[name](epochs=2, start=1, budget={"macs": 0.5}, round_to=2)
        run = trainer(method, max_epochs=3, limit_train_batches=1)
        run.fit(Classifier(net(conv_net)), image_loader(1))
        shares = method.state_dict()["shares"]
        assert {group: round(16 * (1 - gone)) for group, gone in shares.items()} == {
            group: after for group, (_, after) in wanted.items()
        }


def test_steps_of_magnitude_come_down_to_the_budget() -> None:
    seen = []

    class Look(Callback):
        def on_train_epoch_end(self, run: Trainer, pl_module: Any) -> None:
            seen.append({name: len(gone) for name, gone in method.removal().items()})

    method = Magnitude(epochs=2, steps=2, budget={"params": 0.4})
    trainer(Look(), method, max_epochs=2).fit(Classifier(net(conv_net)), image_loader(2))
    trainer_seen = {name: len(gone) for name, gone in method.removal().items()}
    assert seen[-1] == trainer_seen and all(0 < seen[0][name] == -(-count // 2) for name, count in trainer_seen.items())


# MaskSparsity ranks the channels of all layers, once a global stage has made their scales comparable.


def test_without_a_global_stage_every_layer_loses_the_same_share() -> None:
    model = net(conv_net)
    with torch.no_grad():
        model[1].weight.mul_(10)  # by which nothing is worth more: the next layer's weights may be a tenth
    method = MaskSparsity(epochs=1, budget={"macs": 0.5})
    trainer(method, limit_train_batches=1).fit(Classifier(model), image_loader(1))
    wanted = choose(trace(net(conv_net), IMAGES), budget={"macs": 0.5}).widths()
    assert {name: (16, 16 - len(gone)) for name, gone in method.removal().items()} == wanted


@pytest.mark.parametrize("target", [0.2, 0.35, 0.5, 0.8, 0.97])
def test_one_threshold_for_the_scales_of_all_layers(target: float) -> None:
    model = net(conv_net)
    first, second = scales(model)
    gone = picked(model, budget={"macs": target})
    reached = share(seeded(conv_net, 16), gone)
    assert reached <= target
    # what goes is what the smallest scales say, but for the one or two channels that bring it nearer
    values = {("0", c): float(first[c]) for c in range(16)} | {("3", c): float(second[c]) for c in range(16)}
    order = sorted(values, key=lambda key: values[key])
    mine = {(name, channel) for name, channels in gone.items() for channel in channels}
    assert len(mine ^ set(order[: len(mine)])) <= 6
    for name in gone:
        ranked = [channel for group, channel in order if group == name]
        assert set(gone[name]) == set(ranked[: len(gone[name])])
        fewer = {**gone, name: sorted(ranked[: len(gone[name]) - 1])}
        assert reached >= 0.99 * target or share(seeded(conv_net, 16), fewer) > target


@pytest.mark.parametrize("rule", ["mean", "vote"])
def test_residual_streams_count_too(rule: Any) -> None:
    gone = picked(net(Residual), budget={"macs": 0.4}, scope="all", group_rule=rule)
    reached = share(seeded(Residual, 16), gone)
    assert 0.4 - 0.03 < reached <= 0.4
    assert set(gone) == {"stem", "conv1"}


def test_widths_ratios_and_what_is_ignored_hold() -> None:
    gone = picked(net(conv_net), budget={"macs": 0.55}, round_to=4)
    assert {len(channels) % 4 for channels in gone.values()} == {0}
    assert share(seeded(conv_net, 16), gone) <= 0.55
    gone = picked(net(conv_net), budget={"macs": 0.5}, ignore=["3"])
    assert set(gone) == {"0"} and share(seeded(conv_net, 16), gone) <= 0.5
    gone = picked(net(conv_net), budget={"macs": 0.5}, ratios={"3": 0.25})
    assert len(gone["3"]) == 4 and share(seeded(conv_net, 16), gone) <= 0.5
    gone = picked(net(conv_net), budget={"macs": 0.5}, ratios={"3": 0.75})
    assert len(gone["3"]) == 12 and "0" not in gone  # that alone is enough


def test_equal_scales_are_told_apart() -> None:
    gone = picked(seeded(conv_net, 16), budget={"macs": 0.7})
    assert 0.67 < share(seeded(conv_net, 16), gone) <= 0.7


def test_prices_are_where_a_threshold_takes_one_more() -> None:
    tables = torch.tensor([[0.3, 0.1, 0.6], [0.5, 0.7, 0.2]])
    assert prices_of(tables, "mean") == pytest.approx([0.4, 0.4, 0.4])
    assert prices_of(tables, "vote") == pytest.approx([0.2, 0.5, 0.7])


# What can't be met, and what can't be meant.


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_out_of_reach_stops_the_run_in_its_first_batch(method: str) -> None:
    model = net(conv_net)
    least = share(seeded(conv_net, 16), {"3": range(1, 16)})
    callback = METHODS[method](epochs=2, start=5, budget={"macs": 0.05}, ignore=["0"])
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ConfigurationError, match=r"budget macs=0\.05 can't be reached") as caught:
        trainer(callback, max_epochs=9).fit(Classifier(model), image_loader(1))
    assert f"{least:.4g} of the network's MACs are left, the smallest share there is" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("method", "arguments", "says"),
    [
        *((name, {"ratio": 0.5, "budget": {"macs": 0.5}}, "exactly one of ratio=... and budget=...") for name in EARLY),
        *((name, {}, "Give exactly one of ratio=... and budget=...") for name in EARLY),
        ("mask", {}, "Give exactly one of ratio=..., threshold=... and budget=..."),
        ("mask", {"budget": {"macs": 0.5}, "threshold": 0.5}, "Give exactly one of"),
        ("greg1", {"budget": {"macs": 0.5}, "granularity": "weight"}, "budget={'macs': 0.5} has no meaning with gran"),
        ("tpp", {"budget": {"mac": 0.5}}, "budget knows macs, params, latency_ms, batch, device, cap, not 'mac'"),
        ("ascp", {"budget": {"params": "2.0X"}}, "budget params='2.0X' must be the share that is kept"),
        ("magnitude", {"budget": 0.5}, "budget=0.5 must be a mapping such as"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_in_one_line(method: str, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        METHODS[method](epochs=4, **arguments)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_what_fvcore_cannot_trace_is_counted_by_its_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = choose(trace(net(conv_net), IMAGES), budget={"macs": 0.5}).widths()

    def fail(*_: Any) -> None:
        raise RuntimeError("not traceable")

    monkeypatch.setattr(budgeting, "count_cost", fail)
    method = GReg1(epochs=1, budget={"macs": 0.5})
    trainer(method, limit_train_batches=1).fit(Classifier(net(conv_net)), image_loader(1))
    assert {name: 16 - len(gone) for name, gone in method.removal().items()} == {
        n: after for n, (_, after) in wanted.items()
    }


# Latency, resumes, configuration files.


class Clock:
    """Instead of a stopwatch: one that counts, and that nobody asks twice."""

    asked = 0

    def __init__(self, graph: Any, batch: int, device: str | None) -> None:
        self.graph, self.dense = graph, 10.0

    def time(self, widths: dict[str, int]) -> float:
        Clock.asked += 1
        return 10 * sum(widths.values()) / sum(group.size for group in self.graph.groups)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_measures_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "Stopwatch", Clock)
    saving = ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)

    def fit(path: Path | None) -> tuple[Any, Any]:
        method = GReg1(epochs=2, start=1, budget={"latency_ms": 6.0, "batch": 2, "device": "cpu"})
        pruning = StructuralPruning(latency_batches=(), report_file=None)
        extra = [] if path else [saving]
        run = trainer(method, pruning, *extra, max_epochs=4, enable_checkpointing=not path)
        run.fit(Classifier(net(conv_net)), image_loader(2), ckpt_path=path, weights_only=True)
        return method, pruning.report

    first, report = fit(None)
    asked = Clock.asked
    assert asked and report.budgets == (Outcome("latency_ms", 6.0, 5.9375, 10.0),)
    for path in sorted(tmp_path.glob("*.ckpt"))[:2]:  # before the stage, and in it
        again, other = fit(path)
        assert Clock.asked == asked and again.removal() == first.removal() and other.budgets == report.budgets


BUDGETS = {
    "by its name": ["--trainer.callbacks.budget.macs=0.5"],
    "at once": ["--trainer.callbacks.budget", "{macs: 0.5}"],
}


def configured(args: list[str]) -> Any:
    cli = LightningCLI(BoringModel, run=False, args=["--trainer.logger=false", *args], save_config_callback=None)
    return next(callback for callback in cli.trainer.callbacks if isinstance(callback, GReg1))  # type: ignore[attr-defined]


@pytest.mark.parametrize("flags", BUDGETS)
@pytest.mark.filterwarnings("ignore")
def test_flags_set_a_budget(flags: str) -> None:
    own = ["--trainer.callbacks+=lightning_prune.GReg1", "--trainer.callbacks.epochs=2", *BUDGETS[flags]]
    method = configured(own)
    assert method.budget == Budget(macs=0.5) and method.ratio is None


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("{params: 2.0M}", Budget(params="2.0M")),
        ("{macs: 2_000_000}", Budget(macs=2_000_000)),
        ("{latency_ms: 4, batch: 8, device: cpu}", Budget(latency_ms=4.0, batch=8, device="cpu")),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_yaml_sets_a_budget(written: str, meant: Budget, tmp_path: Path) -> None:
    (tmp_path / "prune.yaml").write_text(
        "trainer:\n  callbacks:\n    - class_path: lightning_prune.GReg1\n"
        f"      init_args: {{epochs: 2, budget: {written}}}\n"
    )
    assert configured(["-c", str(tmp_path / "prune.yaml")]).budget == meant


@pytest.mark.filterwarnings("ignore")
def test_yaml_names_what_is_wrong(tmp_path: Path) -> None:
    own = ["--trainer.callbacks+=lightning_prune.GReg1", "--trainer.callbacks.epochs=2"]
    with pytest.raises((ValueError, SystemExit)) as caught:
        configured([*own, "--trainer.callbacks.budget", "{mac: 0.5}"])
    assert "budget knows macs, params, latency_ms, batch, device, cap, not 'mac'" in str(caught.value)


# Widths that are fast.


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_what_is_fast_is_measured_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(base, "fast_multiple", lambda model: asked.append(model) or 4)
    saving = ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)

    def fit(path: Path | None) -> Any:
        method = GReg1(0.55, epochs=2, start=1, round_to="auto")
        pruning = StructuralPruning(latency_batches=(), report_file=None)
        run = trainer(method, pruning, *([] if path else [saving]), max_epochs=4, enable_checkpointing=not path)
        run.fit(Classifier(net(conv_net)), image_loader(2), ckpt_path=path, weights_only=True)
        assert method.multiple == 4 and method.round_to == "auto"
        assert pruning.plan is not None and PruningPlan.from_json(pruning.plan.to_json()).round_to == 4
        return pruning.report

    report = fit(None)
    assert report.layers == (("net.0", 16, 8), ("net.3", 16, 8)) and report.round_to == 4 and len(asked) == 1
    assert fit(min(tmp_path.glob("*.ckpt"))).layers == report.layers and len(asked) == 1
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(surgery_table(report))
    assert "Widths are multiples of 4." in console.export_text()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_to_what_is_fast(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "fast_multiple", lambda model: 8)
    callback = METHODS[method](epochs=2, budget={"macs": 0.6}, round_to="auto")
    report = report_of(callback)
    assert {after % 8 for _, _, after in report.layers} == {0} and report.budgets[0].reached <= report.budgets[0].asked
    with pytest.raises(ConfigurationError, match="round_to='fast' must be a whole number"):
        METHODS[method](0.5, epochs=2, round_to="fast")


def test_the_clock_decides_what_is_fast() -> None:
    assert multiples.finest({1: 2.0, 2: 1.06, 4: 1.05, 8: 1.0}) == 4
    for multiple in multiples.MULTIPLES:
        works = [work for work, _ in multiples._works(multiple, torch.empty(0, dtype=torch.float64))]
        widths = {work().shape[1] for work in works}
        assert all(width % multiple == 0 and width % (2 * multiple) for width in widths)
        assert sum(widths) / len(widths) == multiples.CENTRE
    plan = choose(trace(net(conv_net, 64), IMAGES), round_to="auto")
    assert set(plan.widths().values()) <= {(64, 32)} and plan.round_to in multiples.MULTIPLES


@pytest.mark.parametrize(
    ("widths", "times", "is_told"),
    [
        ((37, 41, 64), (10.0, 7.0), True),  # 1.43x measured, 2x promised
        ((37, 41, 64), (10.0, 5.5), False),  # fast enough
        ((37, 40, 64), (10.0, 7.0), False),  # most are multiples of 8
        ((37, 41, 64), (1.0, 0.7), False),  # too short to tell
    ],
)
def test_odd_widths_are_told_where_they_cost_speed(widths: Any, times: Any, is_told: bool) -> None:
    rows = [(str(number), 80, width) for number, width in enumerate(widths)]
    dense, slim = (
        Look(Cost(macs, 10), (Latency(time, 0.1, 8, "cpu", 1, 5),), stored=1000, warnings=())
        for macs, time in zip((200, 100), times, strict=True)
    )
    found = awkward(dense, slim, rows)
    assert len(found) == is_told
    if is_told:
        assert found[0].startswith(
            "2 of 3 widths are no multiples of 8, and at batch 8 the slim network is 1.43x as fast"
        )
        assert "promise 2.00x: round_to=8 or 'auto' may be faster." in found[0]
