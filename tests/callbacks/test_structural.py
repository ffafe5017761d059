"""Surgery in the middle of a fit."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LambdaCallback,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    TQDMProgressBar,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_prune.callbacks import examination, ranks
from lightning_prune.callbacks.ascp import ASCP
from lightning_prune.callbacks.greg import GReg1, GReg2
from lightning_prune.callbacks.recording import MOST, Diary
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.errors import ConfigurationError, ProofError, PruningError
from lightning_prune.reports.files import read_report
from lightning_prune.reports.report import PruningReport
from lightning_prune.schedules import GReg1Schedule, GReg2Schedule
from lightning_prune.structure import choose, load_slim, masked_state, read_slim_header, save_slim, trace
from tests.callbacks.nets import Classifier, image_loader, seeded
from tests.callbacks.nets import trainer as quiet_trainer
from tests.callbacks.slimming import BATCHES, Picker, Residual, Run, Task, Watch, assert_equal, run, weights
from tests.structure.cases_standardised import StandardConv

HERE = Path(__file__).parent
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16-mixed"},
    "fp16": {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))},
}


surgeon = partial(StructuralPruning, latency_batches=())  # measuring takes longer than training here


def held(run: Run) -> set[int]:
    """Identities of all parameters that an optimiser holds."""
    return {id(p) for optimizer in run.trainer.optimizers for group in optimizer.param_groups for p in group["params"]}


def state_shapes_fit(run: Run) -> bool:
    """Whether all of the optimisers' state has its parameter's shape."""
    return all(
        value.shape == parameter.shape
        for optimizer in run.trainer.optimizers
        for parameter, state in optimizer.state.items()
        for value in state.values()
        if isinstance(value, Tensor) and value.dim()
    )


class Snapshot(Callback):
    """The module as it is when surgery is about to take place; must come before it."""

    def __init__(self, epoch: int = 2) -> None:
        self.epoch = epoch
        self.module: Any = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            self.module = copy.deepcopy(pl_module)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_same_fit_goes_on_with_a_slim_network(
    tmp_path: Path, optimizer: str, precision: str, accumulate: int
) -> None:
    task = seeded(Task, optimizer)
    before = {id(parameter) for parameter in task.parameters()}
    settings = PRECISIONS[precision]
    result = run(tmp_path, task=task, accumulate_grad_batches=accumulate, **settings)
    if precision == "fp16":
        assert result.trainer.precision_plugin.scaler is settings["plugins"].scaler
        assert settings["plugins"].scaler.is_enabled()
    assert result.watch.widths == [8] * 2 * BATCHES + [4] * 2 * BATCHES
    assert {id(parameter) for parameter in task.parameters()} == before == held(result)
    assert state_shapes_fit(result)
    assert task.net.conv1.out_channels == task.net.norm1.num_features == task.net.conv2.in_channels == 4
    assert all(torch.isfinite(value).all() for value in task.state_dict().values())
    assert task.losses[-1] < task.losses[0]


def test_right_after_surgery_the_accuracy_is_the_masked_networks(tmp_path: Path) -> None:
    snapshot, surgery = Snapshot(), surgeon(monitor="val_acc")
    quiet_trainer(snapshot, surgery, Picker(epochs=2), max_epochs=4, default_root_dir=tmp_path).fit(
        task := seeded(Task), image_loader(BATCHES), image_loader(3)
    )
    assert surgery.plan is not None
    dense = snapshot.module.eval()
    zeroed = {name.removeprefix("net."): value for name, value in masked_state(dense, surgery.plan).items()}
    task.accuracy.reset()
    for images, labels in image_loader(3):
        masked = torch.func.functional_call(dense.net, zeroed, (images,))
        task.accuracy.update(masked, labels)
    assert surgery.report is not None
    assert surgery.report.accuracy["after"] == pytest.approx(float(task.accuracy.compute()))
    assert all(surgery.report.accuracy[column] is not None for column in ("dense", "before", "finetuned"))


def test_looking_at_accuracy_changes_nothing(tmp_path: Path) -> None:
    def trained(monitor: str | None) -> Run:
        keeper = ModelCheckpoint(tmp_path / str(monitor), monitor="val_acc", mode="max", save_top_k=-1)
        surgery = surgeon(monitor=monitor)
        task = seeded(Task, schedule="step")
        return run(tmp_path, keeper, EarlyStopping("val_loss"), surgery=surgery, task=task, enable_checkpointing=True)

    torch.manual_seed(3)
    plain, state = trained(None), torch.get_rng_state()
    torch.manual_seed(3)
    looked = trained("val_acc")
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(weights(plain.task), weights(looked.task))
    assert plain.task.losses == looked.task.losses
    assert plain.trainer.callback_metrics == looked.trainer.callback_metrics
    assert plain.trainer.fit_loop.state_dict() == looked.trainer.fit_loop.state_dict()
    assert sorted(path.name for path in (tmp_path / "None").iterdir()) == sorted(
        path.name for path in (tmp_path / "val_acc").iterdir()
    )
    # The passes are there: one before the first step, one after surgery.
    extra = list(looked.watch.validations)
    for validation in plain.watch.validations:
        extra.remove(validation)
    assert extra == [(0, 0), (2, 2 * BATCHES)]


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_progress_bars_survive_the_pass(tmp_path: Path, bar: type[Callback]) -> None:
    result = run(tmp_path, bar(), surgery=surgeon(monitor="val_acc"), enable_progress_bar=True, limit_train_batches=3)
    assert result.watch.widths[-1] == 4


def test_weights_that_are_standardised_shrink_and_are_named(tmp_path: Path) -> None:
    net = nn.Sequential(StandardConv(3, 8, 3), nn.Sigmoid(), StandardConv(8, 6, 3), nn.ReLU(), nn.Flatten())
    task, surgery = Classifier(net.append(nn.Linear(6 * 4, 4))), surgeon()
    callbacks = (surgery, Picker(epochs=1, scope="all"))
    quiet_trainer(*callbacks, max_epochs=2, default_root_dir=tmp_path).fit(task, image_loader(BATCHES))
    assert (net[0].out_channels, net[2].in_channels, net[2].out_channels, net[5].in_features) == (4, 4, 3, 3 * 4)
    assert surgery.report is not None and surgery.report.error < 1e-8
    assert list(surgery.report.renormalised) == ["net.2.weight"]


def test_surgery_at_an_epoch_of_choice(tmp_path: Path) -> None:
    result = run(tmp_path, surgery=surgeon(at_epoch=3), picker=Picker(epochs=1))
    assert result.watch.widths == [8] * 3 * BATCHES + [4] * BATCHES


def test_surgery_at_the_next_epoch_start_where_one_follows(tmp_path: Path) -> None:
    result = run(tmp_path, picker=Picker(steps=BATCHES + 2))
    assert result.watch.widths == [8] * 2 * BATCHES + [4] * 2 * BATCHES


@pytest.mark.parametrize(("accumulate", "dense"), [(1, 4), (3, 3)])
def test_surgery_between_two_windows_where_no_epoch_start_follows(tmp_path: Path, accumulate: int, dense: int) -> None:
    steps = -(-dense // accumulate)
    result = run(tmp_path, picker=Picker(steps=steps), max_epochs=1, accumulate_grad_batches=accumulate)
    assert result.watch.widths == [8] * dense + [4] * (BATCHES - dense)


def test_surgery_in_the_epoch_in_which_max_steps_falls(tmp_path: Path) -> None:
    result = run(tmp_path, picker=Picker(steps=2), max_epochs=-1, max_steps=5)
    assert result.watch.widths == [8] * 2 + [4] * 3


@pytest.mark.parametrize("kind", [GReg1, GReg2])
def test_with_a_real_regulariser(tmp_path: Path, kind: type[Any]) -> None:
    surgery = surgeon(monitor="val_acc")
    result = run(tmp_path, surgery=surgery, picker=kind(0.5, epochs=2), train=image_loader(120, 4), max_epochs=3)
    assert surgery.report is not None
    assert result.watch.widths == [8] * 240 + [4] * 120
    assert surgery.report.accuracy["after"] == pytest.approx(surgery.report.accuracy["before"], abs=0.03)


def test_schedulers_go_on(tmp_path: Path) -> None:
    result = run(tmp_path, task=seeded(Task, schedule="step"))
    # Lightning steps epoch-wise schedules at the last batch, before the hook that watches.
    assert result.watch.rates == [0.05 * 0.5 ** ((batch + 1) // BATCHES) for batch in range(4 * BATCHES)]


def test_weight_averages_are_slimmed_along(tmp_path: Path) -> None:
    average = EMAWeightAveraging(decay=0.9)
    result = run(tmp_path, average, surgery=surgeon(monitor="val_acc"))
    assert average._average_model is not None
    assert average._average_model.module.net.conv1.weight.shape == result.task.net.conv1.weight.shape
    assert average._average_model.module.net.conv2.in_channels == 4


def test_stochastic_weight_averages_are_slimmed_along(tmp_path: Path) -> None:
    average = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
    result = run(tmp_path, average, max_epochs=5)
    assert average._average_model is not None
    assert average._average_model.net.conv1.weight.shape == result.task.net.conv1.weight.shape == (4, 8, 3, 3)


def test_what_dense_did_best_is_forgotten(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path / "kept", monitor="val_acc", mode="max", save_top_k=1)
    stopper = EarlyStopping("val_acc", mode="max", patience=50)
    seen: list[Any] = []

    class AfterSurgery(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.current_epoch == 2:
                seen.append((keeper.best_model_score, keeper.best_model_path, float(stopper.best_score)))

    run(tmp_path, keeper, stopper, AfterSurgery(), enable_checkpointing=True)
    assert seen == [(None, "", -torch.inf)] * BATCHES
    slim = torch.load(keeper.best_model_path, weights_only=True)
    assert slim["state_dict"]["net.conv1.weight"].shape[0] == 4
    # The best of the dense network stays on disk.
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_early_stopping_waits_for_surgery(tmp_path: Path) -> None:
    stopper = EarlyStopping("val_acc", mode="max", patience=1, min_delta=2.0)
    with pytest.warns(UserWarning, match="EarlyStopping on 'val_acc' would have ended this run") as caught:
        result = run(tmp_path, stopper, max_epochs=9)
    assert sum("EarlyStopping" in str(warning.message) for warning in caught) == 1
    # The first epoch after surgery sets a new best, the second one doesn't beat it.
    assert result.trainer.current_epoch == 4
    assert stopper.stopped_epoch == 3
    assert "on_validation_end" not in vars(stopper)
    assert "on_train_epoch_end" not in vars(stopper)


def test_a_stop_by_hand_is_respected(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.should_stop = True

    with pytest.warns(UserWarning, match=r"ended before the surgery \(Picker: pick\)|ended before the surgery"):
        result = run(tmp_path, Stop())
    assert result.surgery.plan is None
    assert result.watch.widths == [8] * BATCHES


def test_the_report_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    surgery = StructuralPruning(monitor="val_acc", latency_batches=[1, 4])
    run(tmp_path, surgery=surgery, logger=CSVLogger(tmp_path))
    printed = capsys.readouterr().out
    assert printed.count("From dense to slim") == 1
    assert all(word in printed for word in ("channels", "conv1", "MACs", "parameters", "latency", "val_acc"))
    written = PruningReport.from_json((tmp_path / "lightning_logs/version_0/report.json").read_text())
    assert written == surgery.report
    assert written.layers == (("net.conv1", 8, 4),)
    assert written.cost_after.macs < written.cost_before.macs
    assert [latency.batch for latency in written.latency_after] == [1, 4]
    assert written.error <= written.tolerance
    assert None not in written.accuracy.values()


def test_without_a_monitor_nothing_is_validated_more_often(tmp_path: Path) -> None:
    result = run(tmp_path, num_sanity_val_steps=0)
    assert len(result.watch.validations) == 4
    assert set(result.surgery.report.accuracy.values()) == {None}
    assert json.loads((tmp_path / "report.json").read_text())["monitor"] is None


def test_a_report_that_cant_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    surgery = surgeon(monitor="val_acc", report_file="taken/report.json")
    with pytest.warns(UserWarning, match="can't be written") as caught:
        result = run(tmp_path, surgery=surgery)
    assert sum("can't be written" in str(warning.message) for warning in caught) == 1
    assert result.watch.widths[-1] == 4


def test_a_report_replaces_nobody_elses_file(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<p>accounts of a year</p>")
    (tmp_path / "report-v1.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"report goes to .*report-v2\.json: there is a file of the usual name"):
        surgery = run(tmp_path, surgery=surgeon(monitor="val_acc")).surgery
    assert surgery.report_path == tmp_path / "report-v2.json"
    assert read_report(surgery.report_path) == surgery.report and (tmp_path / "report-v2.html").is_file()
    assert (tmp_path / "report.html").read_text() == "<p>accounts of a year</p>"
    assert (tmp_path / "report-v1.json").read_text() == "{}" and not (tmp_path / "report.json").exists()


def test_a_second_run_leaves_the_report_of_the_first(tmp_path: Path) -> None:
    """As ModelCheckpoint does, with a version; a resumed run goes on with its own, before surgery and behind."""
    first = run(tmp_path).surgery
    text = (tmp_path / "report.json").read_text()

    def keep(trainer: Trainer, _: Any) -> None:
        trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    def again(folder: Path, **settings: Any) -> StructuralPruning:
        keeper = LambdaCallback(on_train_epoch_end=keep)
        return run(folder, keeper, surgery=surgeon(monitor="val_acc"), **settings).surgery

    second = again(tmp_path)
    assert (first.report_path, second.report_path) == (tmp_path / "report.json", tmp_path / "report-v1.json")
    assert (tmp_path / "report-v1.html").is_file() and read_report(tmp_path / "report-v1.json") == second.report
    for epoch in (2, 0):
        path, other = tmp_path / f"{epoch}.ckpt", tmp_path / str(epoch)
        assert again(other, ckpt_path=path).report_path.parent == other
        (tmp_path / "report-v1.html").unlink()
        assert again(tmp_path, ckpt_path=path).report_path == tmp_path / "report-v1.json"
        assert (tmp_path / "report-v1.html").is_file()
    assert (tmp_path / "report.json").read_text() == text and not list(tmp_path.glob("report-v2*"))


@pytest.mark.parametrize("fault", ["html._cost", "tables._caption", "report.PruningReport.write"])
def test_a_page_or_table_that_fails_stops_nothing(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> str:
        raise ValueError("nothing to draw\nin many words")

    monkeypatch.setattr(f"lightning_prune.reports.{fault}", fail)
    with pytest.warns(UserWarning, match="ValueError: nothing to draw; training goes on, and Struct") as caught:
        result = run(tmp_path, surgery=surgeon(monitor="val_acc"))
    assert sum("nothing to draw" in str(warning.message) for warning in caught) == 1
    assert result.watch.widths[-1] == 4 and result.surgery.report.accuracy["finetuned"] is not None


def test_a_network_that_cant_be_counted_is_pruned_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no rule for this\nand more")

    monkeypatch.setattr("lightning_prune.callbacks.examination.count_cost", fail)
    monkeypatch.setattr("lightning_prune.reports.latency.compare_latency", fail)
    report = run(tmp_path, surgery=StructuralPruning()).surgery.report
    assert report is not None
    assert report.warnings == (
        "MACs could not be counted: RuntimeError: no rule for this.",
        "Latency could not be measured: RuntimeError: no rule for this.",
    )
    assert (report.cost_before.parameters, report.latency_before) == (1452, ())


def test_a_copy_without_room_costs_the_latency_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room for one more")

    monkeypatch.setattr(examination, "replica", fail)
    result = run(tmp_path, surgery=StructuralPruning())
    assert result.watch.widths[-1] == 4 and result.surgery.report is not None
    assert result.surgery.report.latency_after == () and result.surgery.report.cost_after.macs
    said = "Latency could not be measured: OutOfMemoryError: no room for one more."
    assert result.surgery.report.warnings == (said,)


def test_every_variant_is_timed_beside_the_dense_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a compiler is missing one sentence says so, and the fit goes on."""

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler was found\nin any of these places")

    monkeypatch.setattr(torch, "compile", fail)
    surgery = StructuralPruning(latency_batches=(1, 2), latency_variants=("eager", "channels_last", "compiled"))
    report = run(tmp_path, surgery=surgery).surgery.report
    assert report is not None
    places = [(each.variant, each.batch) for each in report.latency_after]
    assert places == [(variant, batch) for variant in ("eager", "channels_last") for batch in (1, 2)]
    assert [(each.variant, each.batch) for each in report.latency_before] == places
    failure = "Latency of the compiled network could not be measured: RuntimeError: no compiler was found."
    assert report.warnings == (failure,)
    assert [each.batch for each in report.fastest] == [1, 2]
    shown = " ".join(capsys.readouterr().out.split())
    assert "channels_last, batch 2, ms" in shown and "Fastest slim network:" in shown and failure in shown


def test_the_proof_looks_at_a_few_samples_and_at_all_where_it_must() -> None:
    class AtLeast(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.net, self.count = seeded(Residual), count

        def forward(self, images: Tensor) -> Tensor:
            if len(images) < self.count:
                raise ValueError("Too few samples.")
            return self.net(images)

    for needed, batch, seen in ((1, 8, 8), (1, 40, 16), (40, 40, 40)):
        network, images = AtLeast(needed), torch.randn(batch, 3, 6, 6)
        plan = choose(trace(network, images))
        proof = examination._prove(network, plan, ((images,), {}), None)
        assert proof.outputs == len(proof.modes) * seen * 4


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")  # torch 2.10's own, where it compiles
def test_a_compiled_network_is_looked_at_as_it_was_written() -> None:
    images = torch.randn(2, 3, 6, 6)
    plain, compiled = (examination.look(net, ((images,), {})) for net in (Residual(), torch.compile(Residual())))
    assert compiled == plain
    assert plain.cost.macs > 0


@pytest.mark.parametrize("inside", [False, True])
def test_names_are_those_of_the_network_as_it_was_written(tmp_path: Path, inside: bool) -> None:
    """A plan, a report and a slim file don't tell whether the network was compiled when it was pruned."""

    class Whole(Task):
        def forward(self, images: Tensor) -> Tensor:
            return self.net(images)

        def logits(self, images: Tensor) -> Tensor:
            return self(images)

    kind = Whole if inside else Task
    task, watch = seeded(kind), surgeon(latency_batches=(2,))
    task.net = torch.compile(task.net, backend="eager")
    loader, settings = image_loader(BATCHES), {"max_epochs": 3, "default_root_dir": tmp_path}
    quiet_trainer(Picker(epochs=2, ignore=["net.conv2"]), watch, **settings).fit(task, loader, image_loader(2))
    assert watch.plan is not None and watch.report is not None
    assert watch.plan.widths() == {"net.conv1": (8, 4)}
    assert watch.report.cost_after.macs < watch.report.cost_before.macs
    assert not watch.report.warnings and watch.report.latency_after
    save_slim(task, tmp_path / "slim.safetensors", watch.plan)
    fresh = seeded(kind, seed=1)
    assert load_slim(tmp_path / "slim.safetensors", fresh) == watch.plan
    images = torch.randn(2, 3, 6, 6)
    assert torch.equal(fresh.eval().net(images), task.eval().net(images))


def test_a_monitor_without_validation_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="monitor='val_acc' stays unknown, for this run has no validation"):
        result = run(tmp_path, surgery=surgeon(monitor="val_acc"), limit_val_batches=0)
    assert result.surgery.report is not None and set(result.surgery.report.accuracy.values()) == {None}


def test_what_was_left_of_the_channels_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"greg1: 0\.\d+ of the energy was left .* more than 0.01"):
        result = run(
            tmp_path, picker=GReg1(0.5, schedule=GReg1Schedule(0.1, 0.2, 1, 2)), surgery=surgeon(latency_batches=())
        )
    assert result.surgery.report is not None
    assert any("of the energy was left" in sentence for sentence in result.surgery.report.warnings)


def test_lbfgs_begins_anew(tmp_path: Path) -> None:
    class Flat(Task):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=2, history_size=3)

    with pytest.warns(UserWarning, match="LBFGS begins anew after surgery"):
        result = run(tmp_path, task=seeded(Flat))
    assert result.watch.widths[-1] == 4 and all(p.isfinite().all() for p in result.task.parameters())


def test_the_slim_file_brings_it_back(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.surgery.plan is not None
    report = result.surgery.report
    save_slim(result.task, tmp_path / "slim.safetensors", result.surgery.plan, report=report)
    fresh = seeded(Task, seed=1)
    assert load_slim(tmp_path / "slim.safetensors", fresh) == result.surgery.plan
    stored = read_slim_header(tmp_path / "slim.safetensors")["metadata"]["report"]
    assert PruningReport.from_json(json.dumps(stored)) == report
    assert_equal(weights(fresh), weights(result.task))


def test_a_module_that_returns_dicts(tmp_path: Path) -> None:
    assert run(tmp_path, task=seeded(Task, as_dict=True)).watch.widths[-1] == 4


def test_the_pruned_module_by_name(tmp_path: Path) -> None:
    assert run(tmp_path, surgery=surgeon(module="net")).watch.widths[-1] == 4


def test_a_module_whose_own_forward_is_called(tmp_path: Path) -> None:
    class Forward(Task):
        def forward(self, images: Tensor) -> Tensor:
            return self.net(images)

        def logits(self, images: Tensor) -> Tensor:
            return self(images)

    result = run(tmp_path, task=seeded(Forward))
    assert result.surgery.plan is not None
    assert result.surgery.plan.widths() == {"net.conv1": (8, 4)}
    assert result.watch.widths[-1] == 4


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return images + self.conv2(self.conv1(images).relu())


class TwoBlocks(Task):
    """Two groups with one producer, so that two regularisers have something to share."""

    def __init__(self) -> None:
        super().__init__()
        ends = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        self.net = nn.Sequential(ends[0], Block(8), Block(8), *ends[1:])  # type: ignore[assignment]


def two_pickers(first: list[str], second: list[str]) -> tuple[Trainer, StructuralPruning]:
    surgery = surgeon(report_file=None)
    pickers = Picker(epochs=1, ignore=first), Picker(0.25, epochs=2, ignore=second)
    return quiet_trainer(pickers[0], surgery, pickers[1], max_epochs=3), surgery


def test_two_regularisers_of_one_class_make_one_plan(tmp_path: Path) -> None:
    trainer, surgery = two_pickers(["2*"], ["1*"])
    trainer.fit(seeded(TwoBlocks), image_loader(BATCHES), image_loader(2))
    assert surgery.plan is not None
    assert surgery.plan.widths() == {"net.1.conv1": (8, 4), "net.2.conv1": (8, 6)}


def test_two_regularisers_must_not_overlap() -> None:
    trainer, _ = two_pickers([], ["1*"])
    with pytest.raises(ConfigurationError, match=r"Two regularisers have picked channels of '2.conv1'"):
        trainer.fit(seeded(TwoBlocks), image_loader(BATCHES), image_loader(2))


def test_a_second_trainer_in_the_same_process(tmp_path: Path) -> None:
    first, second = run(tmp_path), run(tmp_path)
    assert_equal(weights(first.task), weights(second.task))


def test_the_same_callbacks_with_another_module_begin_anew(tmp_path: Path) -> None:
    surgery, picker = surgeon(), Picker(epochs=2)
    first = run(tmp_path, surgery=surgery, picker=picker)
    second = run(tmp_path, surgery=surgery, picker=picker)
    assert first.watch.widths == second.watch.widths
    assert_equal(weights(first.task), weights(second.task))


def test_a_slim_module_can_be_pruned_again(tmp_path: Path) -> None:
    first = run(tmp_path)
    second = run(tmp_path, task=first.task)
    assert second.watch.widths == [4] * 2 * BATCHES + [2] * 2 * BATCHES


def test_a_second_fit_of_the_same_pair_goes_on_finetuning(tmp_path: Path) -> None:
    result = run(tmp_path)
    result.trainer.fit_loop.max_epochs = 5
    result.trainer.fit(result.task, image_loader(BATCHES), image_loader(3))
    assert result.watch.widths == [8] * 2 * BATCHES + [4] * 3 * BATCHES


def test_after_surgery_nothing_is_watched_any_more(tmp_path: Path) -> None:
    surgery, seen = surgeon(), []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            hooks = [hook for module in pl_module.modules() for hook in module._forward_pre_hooks.values()]
            seen.append((len(hooks) > 0, surgery.capture.inputs is not None))

    run(tmp_path, Look(), surgery=surgery)
    assert seen == [(True, True)] * 2 * BATCHES + [(False, False)] * 2 * BATCHES


# At the door.


def refused(match: str, *callbacks: Callback, **settings: Any) -> None:
    """Nothing is trained, and the message is one line."""
    watch, task = Watch(), seeded(Task)
    with pytest.raises(ConfigurationError, match=match) as caught:
        quiet_trainer(*callbacks, watch, **{"max_epochs": 4, **settings}).fit(task, image_loader(2), image_loader(2))
    assert "\n" not in str(caught.value)
    assert watch.widths == []
    assert "on_load_checkpoint" not in vars(task)


def test_refuses_a_trainer_without_regulariser() -> None:
    refused("found no regulariser", surgeon())


def test_refuses_two_of_itself() -> None:
    first, second = surgeon(), surgeon(module="net")
    second.__class__ = type("Another", (StructuralPruning,), {})
    refused("one StructuralPruning", first, second, Picker(epochs=1))


def test_refuses_surgery_before_the_pick() -> None:
    refused(r"at_epoch=2 must lie after epoch 2", surgeon(at_epoch=2), Picker(epochs=1, start=2))


def test_refuses_surgery_after_the_end() -> None:
    refused(r"start of epoch 4, but the run has epochs 0 to 3", surgeon(), Picker(epochs=4))
    refused(r"start of epoch 7, but the run has epochs 0 to 3", surgeon(at_epoch=7), Picker(epochs=1))


def test_refuses_a_stage_after_which_no_step_is_left() -> None:
    exactly = GReg1Schedule(0.1, 0.2, 1, 6)  # 8 steps, all that 4 epochs of 2 batches have
    refused(
        r"Surgery comes after 8 optimiser steps \(GReg1\), and this run ends after 8",
        surgeon(),
        GReg1(0.5, schedule=exactly),
    )
    refused("ends after 4", surgeon(), Picker(epochs=2), max_steps=4)
    refused("ends after 2", surgeon(at_epoch=1), Picker(epochs=1), max_steps=2)


def test_refuses_an_epoch_before_the_channels_are_known() -> None:
    late = GReg2Schedule(0.1, 0.3, 0.1, 0.5, 1, 1)  # picks before its third step
    refused(
        "at_epoch=1 comes after 2 optimiser steps, but GReg2 knows only after 3",
        surgeon(at_epoch=1),
        GReg2(0.5, schedule=late),
    )


@pytest.mark.parametrize("method", [GReg1(0.5, schedule=GReg1Schedule(10, 20, 1, 1)), ASCP(0.5, epochs=2, pull=20.0)])
def test_refuses_a_penalty_that_would_overshoot(method: Callback) -> None:
    refused("must stay below 1", surgeon(), method)


def test_refuses_a_monitor_that_is_not_logged() -> None:
    refused("monitor='accuracy' isn't logged in validation", surgeon(monitor="accuracy"), Picker(epochs=1))


def test_refuses_an_unknown_module() -> None:
    refused("module='network' is no part", surgeon(module="network"), Picker(epochs=1))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"at_epoch": 0}, "at_epoch=0 must be at least 1"),
        ({"tolerance": 0.0}, "tolerance=0.0 must be positive"),
        (
            {"latency_variants": ["fast"]},
            r"latency_variants=\['fast'\] must be a list of eager, channels_last, compiled",
        ),
        ({"latency_variants": "eager"}, r"latency_variants='eager' must be a list of eager"),
        ({"latency_batches": [0]}, r"latency_batches=\[0\] must be positive"),
        ({"latency_variants": ["eager", "eager"]}, "names 'eager' twice"),
        ({"latency_batches": [1, 64, 1]}, "names 1 twice"),
        ({"finetune_optimizer": "sgd"}, "finetune_optimizer='sgd' must be a function"),
        ({"finetune_scheduler": 3}, "finetune_scheduler=3 must be a function"),
        ({"report_file": "."}, "report_file='.' names the data"),
        ({"finetune": "again"}, 'neither "continue" nor "restart"'),
        ({"finetune": "restart", "finetune_optimizer": partial(torch.optim.SGD, lr=0.1)}, "give one"),
    ],
)
def test_refuses_bad_arguments(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        StructuralPruning(**arguments)


# When something goes wrong.


def test_a_failed_proof_leaves_the_module_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ProofError("It departs.")

    monkeypatch.setattr("lightning_prune.callbacks.examination.prove", fail)
    task, stopper = seeded(Task), EarlyStopping("val_acc", mode="max")
    with pytest.raises(ProofError, match="It departs"):
        run(tmp_path, stopper, task=task)
    assert task.net.conv1.weight.shape[0] == 8
    assert "on_load_checkpoint" not in vars(task)
    assert "on_validation_end" not in vars(stopper)


def test_a_parameter_that_no_optimiser_holds_any_more_stops_the_run(tmp_path: Path) -> None:
    surgery = surgeon(finetune_optimizer=lambda parameters: torch.optim.SGD(list(parameters)[1:], lr=0.1))
    with pytest.raises(PruningError, match=r"no optimiser holds 'net.stem.weight' \(1 of 11 parameters"):
        run(tmp_path, surgery=surgery)


def test_frozen_parameters_stay_out_of_it(tmp_path: Path) -> None:
    task = seeded(Task)
    task.net.stem.weight.requires_grad_(False)
    result = run(tmp_path, task=task, surgery=surgeon(finetune_optimizer=partial(torch.optim.SGD, lr=0.1)))
    assert id(task.net.stem.weight) not in held(result)


def test_the_run_says_so_if_it_ends_dense(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has ended before the surgery"):
        run(tmp_path, picker=Picker(steps=BATCHES), max_epochs=1)


def test_nothing_stays_behind_on_a_dense_module(tmp_path: Path) -> None:
    task = seeded(Task)
    with pytest.warns(UserWarning, match="has ended before the surgery"):
        run(tmp_path, task=task, picker=Picker(steps=BATCHES), max_epochs=1)
    assert not {"on_load_checkpoint", "on_save_checkpoint", "_pruning_history"} & vars(task).keys()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in task.modules())


def test_failures_of_other_ranks_are_raised_here() -> None:
    class Pretend:
        world_size = 2
        is_global_zero = True

    def others(trainer: Any, message: str | None) -> list[str | None]:
        return [message, "PlanError: no"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "_gather", others)
        with pytest.raises(PruningError, match="Surgery failed on rank 1: PlanError: no"):
            ranks.run_together(Pretend(), lambda: 1)  # type: ignore[arg-type]


def test_two_processes_stay_equal(tmp_path: Path) -> None:
    """DDP over gloo, launched as scripts, with several of DDP's options; ddp_script.py asserts the rest."""
    command = [sys.executable, str(HERE / "ddp_script.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=HERE.parents[1], check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, list[Any]] = {}
    for line in (tmp_path / "out.jsonl").read_text().splitlines():
        values = json.loads(line)
        found.setdefault(values.pop("option"), []).append(values)
    errors = found.pop("failing rank")
    assert all(len(pair) == 2 and pair[0] == pair[1] for pair in found.values())
    for option in ("default", "find_unused", "static_graph", "bucket_view"):
        assert found[option][0]["widths"] == [8] * 6 + [4] * 6
        assert found[option][0]["plan"] == "net.conv1  8 -> 4"
    for epoch in (2, 3):
        assert found[f"resumed from epoch {epoch}"][0] == {"equal": True, "plan": "net.conv1  8 -> 4"}
    assert sorted((error["error"], error["says"], error["width"]) for error in errors) == [
        ("ProofError", "It departs here.", 8),
        ("PruningError", "Surgery failed on rank 1: ProofError: It departs here.", 8),
    ]


def test_a_dry_run_goes_through(tmp_path: Path) -> None:
    result = run(tmp_path, fast_dev_run=2)
    assert (result.watch.widths, result.surgery.plan) == ([8, 8], None)


def test_command_line_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning uses jsonargparse's old names
    monkeypatch.setattr(sys, "argv", ["train"])  # LightningCLI warns of pytest's own arguments
    home = "lightning_prune.callbacks"
    arguments = {
        "at_epoch": 3,
        "monitor": "val_acc",
        "finetune": "continue",
        "latency_batches": [1, 64],
        "finetune_optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.02}},
        "finetune_scheduler": {
            "class_path": "torch.optim.lr_scheduler.CosineAnnealingLR",
            "init_args": {"T_max": -1},
        },
    }
    callbacks = [
        {"class_path": f"{home}.structural.StructuralPruning", "init_args": arguments},
        {"class_path": f"{home}.greg.GReg1", "init_args": {"ratio": 0.5, "epochs": 2}},
    ]
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    config = {"trainer": {"max_epochs": 5, "callbacks": callbacks, "default_root_dir": str(tmp_path), **quiet}}
    (tmp_path / "first.json").write_text(json.dumps(config))

    def read(path: Path) -> LightningCLI:
        return LightningCLI(
            Task, args=["--config", str(path)], run=False, seed_everything_default=False, save_config_callback=None
        )

    first = read(tmp_path / "first.json")
    (tmp_path / "second.yaml").write_text(first.parser.dump(first.config))
    second = read(tmp_path / "second.yaml")
    assert first.parser.dump(first.config) == second.parser.dump(second.config)
    surgery = next(callback for callback in second.trainer.callbacks if isinstance(callback, StructuralPruning))
    assert (surgery.at_epoch, surgery.monitor, list(surgery.latency_batches)) == (3, "val_acc", [1, 64])
    assert surgery.finetune_optimizer is not None
    optimizer = surgery.finetune_optimizer([nn.Parameter(torch.zeros(1))])
    assert (type(optimizer), optimizer.param_groups[0]["lr"]) == (torch.optim.SGD, 0.02)


def test_what_a_checkpoint_remembers_of_a_long_run_stays_small(tmp_path: Path) -> None:
    """The report leaves to the diary what that has; of thousands of validations some hundreds are remembered."""
    surgery = run(tmp_path, surgery=surgeon(monitor="val_acc")).surgery
    report = surgery.report
    assert report.validations and json.loads(surgery.state_dict()["report"])["validations"] == []
    fresh = surgeon(monitor="val_acc")
    fresh.load_state_dict(surgery.state_dict())
    assert fresh.report == report

    diary, trainer = Diary(), SimpleNamespace(current_epoch=0, global_step=0)
    for number in range(9000):
        trainer.current_epoch, trainer.global_step = number // 10, number
        diary.note_validation(trainer, 0.5, slim=number >= 2345)
        assert len(diary.validations) <= MOST
    steps = [each.step for each in diary.validations]
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == 8999 and len(steps) > MOST / 3
    assert next(each.step for each in diary.validations if each.slim) == 2345 and 2344 in steps
