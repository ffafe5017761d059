"""The command line: what it prints, writes and returns, and that a preview leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_prune.cli import main
from lightning_prune.reports import Cost, PruningReport, read_report, write_report
from lightning_prune.structure import read_slim_plan
from lightning_prune.structure.plan import PruningPlan

ROOT = Path(__file__).parent.parent

NETWORK = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def net(width: int = 8):
    layers = [nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


class Net(LightningModule):
    def __init__(self, width: int = 8):
        super().__init__()
        self.net = net(width)

    def training_step(self, batch, batch_idx):
        print("training on a batch")
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(32, 1, 8, 8), torch.arange(32) % 4), batch_size=8)

    val_dataloader = test_dataloader = train_dataloader
"""

BASE = """
model:
  class_path: {module}.Net
data:
  class_path: {module}.Data
trainer:
  max_epochs: 9
  accelerator: cpu
  default_root_dir: runs
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{dirpath: kept, every_n_train_steps: 1}}
    - class_path: lightning.pytorch.callbacks.LearningRateMonitor
"""

PRUNE = """
trainer:
  callbacks+:
    - class_path: lightning_prune.{method}
      init_args: {{ratio: 0.5, start: 2, epochs: {epochs}}}
    - class_path: lightning_prune.StructuralPruning
      init_args: {{monitor: val_loss}}
"""

SCRIPT = """
from lightning.pytorch import Trainer
from lightning_prune import Magnitude, StructuralPruning
from {module} import Data, Net

callbacks = [Magnitude(0.5, start=2, epochs=3), StructuralPruning()]
trainer = Trainer(max_epochs=9, devices=2, strategy="ddp", accelerator="cpu", callbacks=callbacks)
try:
    trainer.fit(Net(), Data())
except Exception:
    print("swallowed")
"""

WATCHFUL = """
import argparse
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning_prune import GReg1, StructuralPruning
from {module} import Data, Net


class Scheduled(Net):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {{"optimizer": optimizer, "lr_scheduler": {{"scheduler": plateau, "monitor": "val_loss"}}}}


class Phases(Callback):
    def on_train_batch_end(self, *_):
        with open("phases.txt", "a") as file:
            file.write(pull.phase + " ")


parser = argparse.ArgumentParser()
parser.add_argument("--ratio", type=float)
pull = GReg1(parser.parse_args().ratio, epochs=4)
callbacks = [pull, StructuralPruning(monitor="val_loss"), EarlyStopping("val_loss"), Phases()]
Trainer(max_epochs=9, accelerator="cpu", callbacks=callbacks).fit(Scheduled(), Data())
"""


BUSY = """
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from lightning_prune import GReg1, MaskSparsity, StructuralPruning
from {module} import Data, Net


class Reads(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.callback_metrics["val_loss"].item()

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint("by_hand.ckpt")


class Busy(Net):
    lr = 0.05

    def configure_callbacks(self):
        return [ModelCheckpoint(dirpath="kept", every_n_train_steps=1, save_last=True)]

    def on_train_epoch_end(self):
        self.trainer.callback_metrics["val_loss"].item()


mask = MaskSparsity(0.5, epochs=4, global_epochs=3, restart_from="baseline", ignore=["net.3"])
pull = GReg1(0.5, start=3, epochs=3, ignore=["net.0"])
settings = {{"max_epochs": 9, "accelerator": "cpu", "devices": "auto"}}
trainer = Trainer(callbacks=[mask, pull, StructuralPruning(), Reads()], **settings)
print("before:", trainer.validate(Busy(), Data())[0]["val_loss"], len(trainer.test(Busy(), Data(), verbose=False)))
if {tuned}:
    print(Tuner(trainer).lr_find(Busy(), datamodule=Data()))
trainer.fit(Busy(), Data())
"""

TWO_FITS = """
import sys
from pathlib import Path

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar
from lightning_prune import GReg1, StructuralPruning
from {module} import Data, Net


class Counts(Callback):
    def on_train_batch_end(self, *_):
        with open("batches.txt", "a") as file:
            file.write("x")


class Noted(Net):
    def training_step(self, batch, batch_idx):
        self.logger.experiment.add_scalar("by_hand", 1.0)
        return super().training_step(batch, batch_idx)


usual = {{"max_epochs": 9, "min_epochs": 3, "accelerator": "cpu", "accumulate_grad_batches": 2}}
best = ModelCheckpoint(dirpath="kept", monitor="val_loss", save_weights_only=True)
callbacks = [best, Counts(), EarlyStopping("val_loss"), RichProgressBar()]
first = Trainer(callbacks=callbacks, check_val_every_n_epoch=4, **usual)
first.fit(Noted(), Data())
assert first.min_epochs == 3 and first.check_val_every_n_epoch == 4 and first.accumulate_grad_batches == 2
assert first.callbacks[-1] is best
first.validate(ckpt_path="best", datamodule=Data())
path = sys.argv[1] if sys.argv[1:] else best.best_model_path
model = Noted.load_from_checkpoint(path)
{rest}
"""

SECOND = """
callbacks = [GReg1(0.5, epochs=4), StructuralPruning()]
Trainer(callbacks=callbacks, max_epochs=9, accelerator="cpu").fit(model, Data())
"""

SAME = """
first.callbacks += [GReg1(0.5, start=1, epochs=4), StructuralPruning()]
first.fit(model, Data())
"""

AT_EPOCHS = """
from lightning.pytorch import Callback, Trainer
from lightning_prune import GReg1, StructuralPruning
from {module} import Data, Net


class Reads(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch:
            trainer.callback_metrics["val_loss"].item()


class Reading(Net):
    def on_train_epoch_start(self):
        if self.current_epoch:
            self.trainer.callback_metrics["val_loss"].item()

    def training_step(self, batch, batch_idx):
        if self.current_epoch and {deep}:
            self.trainer.callback_metrics["val_loss"].item()
        return super().training_step(batch, batch_idx)


callbacks = [GReg1(0.5, epochs=4), StructuralPruning(), Reads()]
Trainer(max_epochs=9, accelerator="cpu", callbacks=callbacks).fit(Reading(), Data())
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """A user's package in the working directory, under a name that no other test has imported."""
    name = f"network_of_{abs(hash(request.node.nodeid))}"
    (tmp_path / f"{name}.py").write_text(NETWORK)
    (tmp_path / "base.yaml").write_text(BASE.format(module=name))
    (tmp_path / "script.py").write_text(SCRIPT.format(module=name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)


def configure(method: str, epochs: int | str = 3) -> list[str]:
    Path("prune.yaml").write_text(PRUNE.format(method=method, epochs=epochs))
    return ["plan", "--config", "base.yaml", "--config", "prune.yaml"]


@pytest.mark.usefixtures("module")
def test_a_preview_takes_what_waits_for_validation(capsys: pytest.CaptureFixture[str]) -> None:
    command = configure("GReg1")
    text = Path("prune.yaml").read_text().replace("monitor: val_loss", "monitor: val_loss, cut_when: safe")
    Path("prune.yaml").write_text(text + "    - class_path: lightning_prune.PruningMonitor\n")
    assert main(command) == 0
    assert "net.0" in capsys.readouterr().out


def written() -> set[str]:
    return {str(path) for path in Path().rglob("*") if path.is_file() and "__pycache__" not in path.parts}


@pytest.mark.parametrize("method", ["ASCP", "GReg1", "GReg2", "Magnitude", "MaskSparsity", "TPP"])
def test_a_configured_run_is_previewed(method: str, module: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With four batches an epoch; the run's own files don't come to be, its prints don't reach our output."""
    command, before = configure(method, epochs=6), written() | {"prune.yaml"}
    make, fit = Trainer.__init__, Trainer.fit
    assert main([*command, "--json", "--out", "plan.json"]) == 0
    assert (Trainer.__init__, Trainer.fit) == (make, fit)
    shown = json.loads(capsys.readouterr().out)
    rows = {row["name"]: (row["before"], row["after"]) for row in shown["rows"]}
    assert rows["net.0"] == (8, 4)
    (stage,) = shown["stages"]
    assert (stage["method"], stage["start"], stage["steps_per_epoch"], stage["steps"]) == (method, 2, 4, 24)
    assert stage["total_steps"] == 36
    assert shown["cost_least"]["macs"] < shown["cost_after"]["macs"] < shown["cost_before"]["macs"]
    assert shown["dense_ms"] > 0 and shown["sparse_ms"] > 0
    plan = PruningPlan.from_json(Path("plan.json").read_text())
    assert plan.widths()["net.0"] == (8, 4)
    assert written() == before | {"plan.json"}


def test_people_get_tables(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where ``fit`` is said, as to the script."""
    plan, *configs = configure("GReg1", epochs=6)
    assert main([plan, "fit", *configs]) == 0
    shown = capsys.readouterr().out
    assert "What would go" in shown and "pinned: net.7. Its channels are the network's output." in shown
    assert "Stages" in shown and "finetune" in shown and "A training batch takes" in shown
    assert "training on a batch" not in shown


def test_a_script_is_previewed_on_one_process(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two processes each has half of the four batches; what the script catches doesn't catch us."""
    assert main(["plan", "--script", "script.py", "--json"]) == 0
    caught = capsys.readouterr()
    (stage,) = json.loads(caught.out)["stages"]
    assert (stage["steps_per_epoch"], stage["steps"]) == (2, 6)
    assert "swallowed" not in caught.err
    assert not Path("runs").exists() and not Path("lightning_logs").exists()


def test_what_waits_for_validation_stops_no_preview(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Epochs of four batches end in it; a stage that begins at once is held back until dense batches are timed."""
    Path("watchful.py").write_text(WATCHFUL.format(module=module))
    assert main(["plan", "--script", "watchful.py", "--json", "--", "--ratio", "0.25"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {row["name"]: (row["before"], row["after"]) for row in shown["rows"]}["net.0"] == (8, 6)
    (stage,) = shown["stages"]
    assert (stage["start"], stage["steps"]) == (0, 16)
    phases = Path("phases.txt").read_text().split()
    assert len(phases) == 21 and phases[:11] == ["wait"] * 11 and "wait" not in phases[11:]


@pytest.mark.parametrize("tuned", [False, True])
def test_what_a_busy_script_does_besides_leaves_no_file(
    tuned: bool, module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation before training, a tuner, checkpoints from everywhere, metrics of a validation that doesn't come."""
    monkeypatch.setattr("lightning.pytorch.accelerators.cpu.CPUAccelerator.auto_device_count", lambda _: 2)
    Path("busy.py").write_text(BUSY.format(module=module, tuned=tuned))
    before, save = written(), Trainer.save_checkpoint
    assert main(["plan", "--script", "busy.py", "--json"]) == 0
    caught = capsys.readouterr()
    first, second = json.loads(caught.out)["stages"]
    assert (first["method"], first["start"], first["steps_per_epoch"], first["steps"]) == ("MaskSparsity", 0, 2, 8)
    assert (second["method"], second["start"], second["steps"]) == ("GReg1", 3, 6)
    assert json.loads(caught.out)["sparse_ms"] > 0 and "before: " in caught.err
    assert written() == before and Trainer.save_checkpoint is save


@pytest.mark.parametrize(("rest", "start"), [(SECOND, 0), (SAME, 1)])
def test_a_fit_before_the_one_that_prunes_is_let_through(
    rest: str, start: int, module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One batch of it, whose checkpoint the script may load; the same trainer may prune next."""
    Path("two.py").write_text(TWO_FITS.format(module=module, rest=rest))
    before = written()
    assert main(["plan", "--script", "two.py", "--json"]) == 0
    caught = capsys.readouterr()
    (stage,) = json.loads(caught.out)["stages"]
    assert (stage["start"], stage["epochs"]) == (start, 4)
    assert "One batch was run of each fit without pruning callbacks that came first (1)" in caught.err
    batches = Path("batches.txt").read_text()
    assert len(batches) == 1 if rest == SECOND else len(batches) > 1
    assert written() == before | {"batches.txt"}


@pytest.mark.usefixtures("module")
def test_what_stops_a_script_after_a_fit_before_is_told(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("two.py").write_text(TWO_FITS.format(module=module, rest=SECOND))
    assert main(["plan", "--script", "two.py", "--", "by_hand.ckpt"]) == 1
    error = capsys.readouterr().err
    assert "two.py stopped after a fit without pruning callbacks" in error and "by_hand.ckpt" in error
    Path("two.py").write_text(TWO_FITS.format(module=module, rest=""))
    assert main(["plan", "--script", "two.py"]) == 1
    assert "no regulariser among the trainer's callbacks, in none of the fits" in capsys.readouterr().err


def test_hooks_between_epochs_may_ask_for_validation(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Those at an epoch's start are left out; whoever asks within a step is told what to do."""
    Path("at_epochs.py").write_text(AT_EPOCHS.format(module=module, deep=False))
    assert main(["plan", "--script", "at_epochs.py", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sparse_ms"] > 0
    Path("at_epochs.py").write_text(AT_EPOCHS.format(module=module, deep=True))
    assert main(["plan", "--script", "at_epochs.py"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "stopped in its epoch 1 (KeyError: 'val_loss')" in error and "callback_metrics.get(name)" in error


@pytest.mark.usefixtures("module")
def test_a_surgery_with_a_date_of_its_own_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    command = configure("GReg1", epochs=3)
    text = Path("prune.yaml").read_text().replace("monitor: val_loss", "at_epoch: 7")
    Path("prune.yaml").write_text(text)
    assert main(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "sparse │ 2 to 6 │ 20 │" in shown and "finetune │ 7 to the end │ 8 │" in shown


def test_single_weights_are_previewed(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("weights.yaml").write_text(PRUNE.format(method="GReg1", epochs="6, granularity: weight"))
    assert main(["plan", "-c", "base.yaml", "-c", "weights.yaml", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {row["name"]: (row["before"], row["after"]) for row in shown["rows"]}["net.3"] == (576, 288)
    assert shown["cost_least"] is None


def test_what_the_run_would_refuse_is_refused(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*configure("GReg1", epochs=7), "--trainer.max_epochs", "9"]) == 1
    assert "raise the trainer's max_epochs" in capsys.readouterr().err
    for strategy in ("fsdp", "deepspeed_stage_2"):
        assert main([*configure("GReg1"), "--trainer.strategy", strategy, "--trainer.devices", "2"]) == 1
        assert "can't change shapes under" in capsys.readouterr().err
    assert main(["plan", "-c", "base.yaml"]) == 1
    assert "no regulariser among the trainer's callbacks" in capsys.readouterr().err
    for flag in ("--trainer.callbacks.ratio=1.5", "--trainer.callbacks.budget.mac=0.5"):
        assert (
            main(["plan", "-c", "base.yaml", "--trainer.callbacks+=GReg1", "--trainer.callbacks.epochs=3", flag]) == 1
        )
        said = capsys.readouterr().err
        assert ("error: ratio=1.5 must lie" in said or "error: budget knows macs" in said) and said.count("\n") == 1


def test_a_typo_in_the_config_is_named(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("typo.yaml").write_text(PRUNE.format(method="GReg1", epochs="3, ratoi: 0.5"))
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "-c", "base.yaml", "-c", "typo.yaml"])
    assert stopped.value.code == 2
    assert "ratoi" in (said := capsys.readouterr().err) and "--script" not in said
    Path("prune.yaml").write_text(PRUNE.format(method="GReg1", epochs=3))
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "-c", "prune.yaml"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "usage: lightning-prune plan" in said and "No model is named: where the script that trains does" in said


def test_flags_alone_add_pruning(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Short names, because the package is imported; ``--help`` of a callback tells what its arguments mean."""
    flags = ["--trainer.callbacks+=GReg1", "--trainer.callbacks.ratio=0.5", "--trainer.callbacks.epochs=6"]
    assert main(["plan", "-c", "base.yaml", *flags, "--trainer.callbacks+=StructuralPruning", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [stage["method"] for stage in shown["stages"]] == ["GReg1"]
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "-c", "base.yaml", "--trainer.callbacks.help", "GReg1"])
    assert stopped.value.code == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "tells instances of one class apart in checkpoints and logs" in told and "--trainer.callbacks.ratio" in told


def test_a_budget_is_previewed(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", f"{module}.net", "--model-args", '{"width": 32}', "--input", "2,1,8,8", "--json"]
    variants = ["--variant", "eager", "--variant", "channels_last"]
    assert main(["plan", *model, "--budget", '{"macs": 0.5}', "--round-to", "4", *variants]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert [each["variant"] for each in seen["latency_after"]] == ["eager", "channels_last"]
    flat = ["--model", "torch.nn.Linear", "--model-args", '{"in_features": 4, "out_features": 2}', "--input", "2,4"]
    assert main(["plan", *flat, *variants]) == 0
    assert "Latency of the channels_last network could not be measured" in capsys.readouterr().out
    assert main(["plan", *model[:-1], *variants]) == 0
    assert "Fastest slim network: " in capsys.readouterr().out
    assert 0.45 < seen["cost_after"]["macs"] / seen["cost_before"]["macs"] <= 0.5
    assert {row["after"] % 4 for row in seen["rows"]} == {0}
    flags = ["--trainer.callbacks+=GReg1", "--trainer.callbacks.epochs=3", "--trainer.callbacks.budget.params=0.6"]
    assert main(["plan", "-c", "base.yaml", *flags, "--trainer.callbacks+=StructuralPruning", "--json"]) == 0
    out = capsys.readouterr().out
    seen = json.loads(out[out.index("{") :])
    assert 0.5 < seen["cost_after"]["parameters"] / seen["cost_before"]["parameters"] <= 0.6
    assert main(["plan", *model, "--budget", '{"macs": 0.0001}']) == 1
    assert "budget macs=0.0001 can't be reached" in capsys.readouterr().err


def test_from_a_plan_to_onnx(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Model, plan, slim file, ONNX: a chain of commands."""
    import importlib

    sys.path.insert(0, "")
    torch.manual_seed(0)
    torch.save(importlib.import_module(module).net().state_dict(), "dense.pt")
    model = ["--model", f"{module}.net", "--model-args", '{"width": 8}']
    assert main(["plan", *model, "--weights", "dense.pt", "--input", "2,1,8,8", "--out", "plan.json"]) == 0
    assert main(["plan", "apply", "plan.json", *model, "--weights", "dense.pt", "--out", "slim.safetensors"]) == 0
    assert read_slim_plan("slim.safetensors") == PruningPlan.from_json(Path("plan.json").read_text())
    assert main(["plan", "diff", "plan.json", "slim.safetensors"]) == 0
    assert "-> 216 parameters" in (shown := capsys.readouterr().out), shown
    assert main(["inspect", "slim.safetensors"]) == 0
    assert "signature" in capsys.readouterr().out
    assert main(["inspect", "slim.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"]["0"] == [8, 4]
    export = ["export", "slim.safetensors", *model, "--input", "2,1,8,8"]
    assert main([*export, "--out", "slim.onnx", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["batches"] == [2, 3]
    assert Path("slim.onnx").stat().st_size > 0
    widths = read_slim_plan("slim.safetensors").widths()
    rows = [(layer, before, after) for layer, (before, after) in widths.items()]
    write_report(PruningReport(rows, Cost(800, 100), Cost(400, 50)), "report.json")
    write_report(PruningReport([("other", 4, 2)], Cost(800, 100), Cost(400, 50)), "others.json")
    archive = ["--format", "torch_export", "--out", "slim.pt2"]
    assert main([*export, *archive]) == 0
    assert "Named in report.json and on its page." in capsys.readouterr().out
    assert [each.file for each in read_report("report.json").exports] == ["slim.pt2"]
    assert main([*export, *archive, "--report", "others.json"]) == 1
    assert "others.json is the report of another surgery" in capsys.readouterr().err
    Path("others.json").replace("report.json")
    assert main([*export, *archive]) == 0 and "Named" not in capsys.readouterr().out
    assert main([*export, *archive, "--report", "none.json"]) == 1
    capsys.readouterr()
    assert main([*export, "--out", "none/slim.onnx"]) == 1
    assert main(["plan", "apply", "plan.json", *model, "--out", "none/slim.safetensors"]) == 1
    assert capsys.readouterr().err.count(": there is no folder none.\n") == 2
    assert main(["plan", *model, "--input", "2,1,8,8", "--ratio", "0.25", "--out", "less.json"]) == 0
    capsys.readouterr()
    assert main(["plan", "diff", "plan.json", "less.json"]) == 1
    assert "0.weight dim 0: 4 -> 6 of 8" in capsys.readouterr().out


def test_what_round_to_auto_has_found_is_told(
    module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the preview, in the plan's file, and by every command that reads it."""
    monkeypatch.setattr("lightning_prune.structure.choice.fast_multiple", lambda model: 4)
    monkeypatch.setattr("lightning_prune.callbacks.base.fast_multiple", lambda model: 2)
    model = ["--model", f"{module}.net", "--model-args", '{"width": 16}']
    shape = ["--input", "2,1,8,8"]
    assert main(["plan", *model, *shape, "--ratio", "0.6", "--round-to", "auto", "--out", "plan.json"]) == 0
    assert main(["inspect", "plan.json"]) == 0
    assert main(["plan", "apply", "plan.json", *model, "--out", "slim.safetensors"]) == 0
    assert capsys.readouterr().out.lower().count("widths are multiples of 4") == 3
    assert json.loads(Path("plan.json").read_text())["round_to"] == 4
    assert main(["inspect", "slim.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["round_to"] == 4
    assert main(["plan", *model, *shape, "--ratio", "0.6", "--round-to", "8", "--out", "other.json"]) == 0
    capsys.readouterr()
    assert main(["plan", "diff", "plan.json", "other.json"]) == 1
    assert "round_to: 4 -> 8" in capsys.readouterr().out
    Path("auto.yaml").write_text(PRUNE.format(method="GReg1", epochs="3, round_to: auto"))
    assert main(["plan", "-c", "base.yaml", "-c", "auto.yaml", "--json", "--out", "run.json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{") :])["round_to"] == 2
    assert json.loads(Path("run.json").read_text())["round_to"] == 2


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        (["plan"], 1, "Say what to preview"),
        (["plan", "--model", "torch.nn.Linear"], 1, "--input 1,3,224,224"),
        (
            ["plan", "--model", "torch.nn.Nothing", "--input", "1,2"],
            1,
            "nothing to call under the name 'torch.nn.Nothing'",
        ),
        (["plan", "--model", "torch.nn.Linear", "--input", "1,2"], 1, "can't be called with {}"),
        (["plan", "--model", "torch.Tensor", "--input", "1,2"], 1, "makes a Tensor, not a torch.nn.Module"),
        (["plan", "--model", "torch.nn.ReLU", "--input", "1,2", "--config", "a.yaml"], 1, "a preview of its own"),
        (["plan", "--script", "none.py"], 2, "There is no script none.py"),
        (["plan", "--script", "a.py", "--ratio", "0.5"], 1, "--ratio belongs to --model; a configured run has its own"),
        (["plan", "--script", "a.py", "--model-args", '{"a": 1}'], 1, "--model-args belongs to --model"),
        (["plan", "-c", "a.yaml", "--global"], 1, "--global belongs to --model"),
        (["plan", "--config", "none.yaml"], 2, "There is no file none.yaml"),
        (["plan", "diff", "none.json", "none.json"], 2, "There is no file none.json"),
        (["inspect", "none.safetensors"], 2, "There is no file none.safetensors"),
        (["inspect", "foreign.json/plan.json"], 2, "foreign.json/plan.json"),
        (["inspect", "foreign.json"], 1, "This is not a pruning plan"),
        (["inspect", "binary.json"], 1, "binary.json is no plan"),
        (["export", "foreign.safetensors", "--model", "torch.nn.ReLU", "--input", "1", "--out", "x"], 1, "slim file"),
    ],
)
def test_errors_are_one_line(
    command: list[str],
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("foreign.json").write_text("{}")
    Path("binary.json").write_bytes(bytes(range(128, 256)))
    Path("foreign.safetensors").write_text("nothing of ours")
    assert main(command) == status
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["prune"], "invalid choice: 'prune'"),
        (["inspect", "a", "--fast"], "unrecognized arguments: --fast"),
        (["plan", "--model", "m", "--input", "3,a"], "'3,a' is no shape"),
        (["plan", "--model", "m", "--model-args", "[]"], "is no JSON object"),
        (["plan", "--model", "m", "--batch", "0"], "'0' is no whole number of at least 1"),
        (["plan", "--model", "m", "--input", "1,3", "--budgett", "1"], "unrecognized arguments: --budgett 1"),
        (["plan", "--model", "m", "--round-to", "eight"], "'eight' is no whole number of at least 1"),
    ],
)
def test_wrong_usage_ends_with_two(command: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_it_runs_as_a_module() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lightning_prune", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "plan diff" in result.stdout and "inspect" in result.stdout
