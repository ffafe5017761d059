"""The live view shows what is there, and leaves no trace."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn

from lightning_prune import GReg1, PruningMonitor, StructuralPruning
from lightning_prune.callbacks import monitor as home
from lightning_prune.callbacks.targets import FAR
from lightning_prune.errors import ConfigurationError, PlanError
from lightning_prune.reports import Moment, plots
from lightning_prune.schedules import GReg1Schedule
from tests.callbacks.nets import Classifier, conv_net, image_loader, seeded
from tests.callbacks.nets import trainer as quiet_trainer
from tests.callbacks.slimming import Task, assert_equal, run, weights
from tests.callbacks.test_checkpointing import checkpointed
from tests.callbacks.test_structural import PRECISIONS, surgeon
from tests.settings import BATCHES, EPOCHS, SETTINGS

ROOT = Path(__file__).parents[2]
ROWS = [
    *("ascp", "greg1", "greg1 on weights", "greg2", "magnitude in steps", "magnitude on weights"),
    *("mask_sparsity, in passes", "mask_sparsity, folded", "tpp"),
]
pytestmark = pytest.mark.filterwarnings("ignore:.*energy was left", "ignore:.*too few optimiser steps")
GROWTH = GReg1Schedule(1.0, 8.0, 1, 6)


class Validated(Classifier):
    """With a validation that draws random numbers, as some do."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        noise = 0.01 * torch.randn_like(batch[0])
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0] + noise), batch[1]))


class Losses(Callback):
    """Every training loss."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.found.append(outputs["loss"].detach().clone())


def outcome(row: str, folder: Path, *extra: Callback, **settings: Any) -> tuple[Any, ...]:
    """Losses, weights and random state of a run from dense to slim."""
    torch.manual_seed(5)
    module, losses = Validated(seeded(SETTINGS[row].net)), Losses()
    callbacks = [*extra, SETTINGS[row].build(), surgeon(monitor="val_loss", report_file=None), losses]
    fit = quiet_trainer(*callbacks, max_epochs=EPOCHS + 1, default_root_dir=folder, log_every_n_steps=2, **settings)
    fit.fit(module, image_loader(BATCHES), image_loader(2))
    return losses.found, weights(module), torch.get_rng_state(), fit


@pytest.mark.parametrize("row", ROWS)
def test_training_is_the_same_with_and_without_it(row: str, tmp_path: Path) -> None:
    plain = outcome(row, tmp_path)
    watched = outcome(row, tmp_path, PruningMonitor("val_loss"), logger=CSVLogger(tmp_path))
    assert all(torch.equal(one, other) for one, other in zip(plain[0], watched[0], strict=True))
    assert_equal(plain[1], watched[1])
    assert torch.equal(plain[2], watched[2])
    assert plain[3].fit_loop.state_dict() == watched[3].fit_loop.state_dict()
    assert plain[3].callback_metrics["val_loss"] == watched[3].callback_metrics["val_loss"]
    assert {"if_cut/val_loss", "if_cut/val_loss_change"} <= watched[3].callback_metrics.keys()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_is_the_same_in_every_precision_with_averages_and_accumulation(tmp_path: Path, precision: str) -> None:
    def trained(*extra: Callback) -> dict[str, Tensor]:
        settings = {"accumulate_grad_batches": 2, "max_epochs": 4, **PRECISIONS[precision]}
        picker = GReg1(0.5, epochs=3)
        result = run(tmp_path, EMAWeightAveraging(decay=0.9), *extra, task=seeded(Task), picker=picker, **settings)
        return weights(result.task)

    assert_equal(trained(), trained(PruningMonitor("val_acc")))


def logged(folder: Path) -> dict[str, list[float]]:
    """Column by column what a CSVLogger has written."""
    with next(folder.rglob("metrics.csv")).open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def test_what_it_shows_is_what_is_there(tmp_path: Path) -> None:
    surgery, picker = surgeon(monitor="val_acc"), GReg1(0.5, schedule=GROWTH)
    settings: dict[str, Any] = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 1, "max_epochs": 4}
    run(tmp_path, PruningMonitor("val_acc"), surgery=surgery, picker=picker, task=seeded(Task), **settings)
    found = logged(tmp_path)
    left = found["greg1/steps_left"]
    assert left[0] == GROWTH.length - 1 and left[-1] == 0 and left == sorted(left, reverse=True)
    assert 1 <= found["greg1/separation"][0] < 5 < found["greg1/separation"][-1] < FAR
    assert all(value > 0 for value in found["greg1/penalty"])
    # what it foretold at the stage's end is what surgery has found
    assert surgery.report is not None
    assert found["if_cut/val_acc"][-1] == pytest.approx(surgery.report.accuracy["after"])
    assert found["if_cut/val_acc_change"][-1] == pytest.approx(
        surgery.report.accuracy["after"] - surgery.report.accuracy["before"], abs=1e-6
    )
    assert len(found["if_cut/val_acc"]) == 3
    # nobody else has seen its passes: one validation per epoch, one before the first step, one after surgery
    assert len(found["val_acc"]) == 4 + 2


@pytest.mark.parametrize("row", ["ascp", "mask_sparsity", "tpp", "greg1 on weights", "magnitude on weights"])
def test_at_the_end_of_the_stage_what_goes_stands_apart(row: str, tmp_path: Path) -> None:
    seen: list[Any] = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append(method.reading())

    method = SETTINGS[row].build()
    fit = quiet_trainer(method, Look(), max_epochs=EPOCHS, default_root_dir=tmp_path)
    fit.fit(Classifier(seeded(SETTINGS[row].net)), image_loader(BATCHES))
    assert seen[-1].settled and seen[-1].steps_left == 0 and seen[-1].phase == "ready"
    assert float(seen[-1].separation) > (100 if SETTINGS[row].exact else 1)


def test_one_transfer_per_logging_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], home.numbers_of
    monkeypatch.setattr(home, "numbers_of", lambda readings: calls.append(1) or original(readings))
    run(tmp_path, PruningMonitor(), picker=GReg1(0.5, epochs=2), surgery=surgeon(), log_every_n_steps=4)
    assert len(calls) == 6  # 24 steps; those without anything to show transfer nothing
    calls.clear()
    run(tmp_path, PruningMonitor(), picker=GReg1(0.5, epochs=2), surgery=surgeon(), log_every_n_steps=0)
    assert not calls


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_progress_bars_show_it_until_surgery(tmp_path: Path, bar: type[Any]) -> None:
    seen: list[set[str]] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            seen.append(set(shown.get_metrics(trainer, pl_module)))

    shown = bar()
    settings: dict[str, Any] = {"picker": GReg1(0.5, epochs=2), "surgery": surgeon(), "enable_progress_bar": True}
    run(tmp_path, shown, PruningMonitor("val_acc"), Look(), limit_train_batches=3, max_epochs=3, **settings)
    wanted = {"greg1/phase", "greg1/strength", "greg1/energy", "greg1/separation", "greg1/steps_left"}
    assert wanted | {"if_cut/val_acc", "if_cut/val_acc_change"} <= seen[5]
    assert not {name for name in seen[-1] if "separation" in name or "steps_left" in name or "if_cut" in name}


class Gallery(Logger):
    """A logger that takes figures as TensorBoard does, or as W&B does, and scalars as all do."""

    name = version = "gallery"

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.figures: list[tuple[str, Any, int]] = []
        self.scalars: set[str] = set()
        self.is_broken = False
        if kind == "log_image":
            self.log_image = self._log_image

    def _log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """With the signature of Lightning's ``WandbLogger.log_image``."""
        if self.is_broken:
            raise ConnectionError("no route to the gallery")
        self.figures.append((key, images[0], step))

    @property
    def experiment(self) -> Any:
        if self.kind != "add_figure":
            return object()
        return type("Writer", (), {"add_figure": lambda _, *arguments: self.figures.append(arguments)})()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.scalars |= metrics.keys()

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


def test_figures_go_to_loggers_that_take_them(tmp_path: Path) -> None:
    galleries = [Gallery(kind) for kind in ("add_figure", "log_image", "neither")]
    run(tmp_path, PruningMonitor(), picker=GReg1(0.5, epochs=2), surgery=surgeon(), logger=galleries)
    names = ["pruning/energy", "pruning/separation"]
    assert [[name for name, *_ in gallery.figures] for gallery in galleries] == [names * 2, names * 2, []]
    assert galleries[0].figures[0][1].savefig is not None
    assert galleries[1].figures[0][1].ndim == 3
    assert all("greg1/separation" in gallery.scalars for gallery in galleries)


def test_lightnings_wandb_logger_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own code, over a library that only writes down what would be sent."""
    from lightning.pytorch.loggers import WandbLogger

    sent: list[dict[str, Any]] = []
    run_ = type("Run", (), {"log": lambda _, metrics, **__: sent.append(metrics)})
    image = type("Image", (), {"__init__": lambda self, pixels: setattr(self, "pixels", pixels)})
    for name in ("wandb", "wandb.sdk", "wandb.sdk.lib", "wandb.wandb_run"):
        module = ModuleType(name)
        vars(module).update({"Image": image, "Run": run_, "RunDisabled": run_, "run": None})
        monkeypatch.setitem(sys.modules, name, module)
    logger = WandbLogger.__new__(WandbLogger)
    vars(logger).update({"_experiment": run_(), "_prefix": "", "_wandb_init": {}})
    take = home._taker(logger)
    assert take is not None
    take("pruning/energy", plots.curves([Moment("greg1", 0, 10, "grow", 0.1, energy=0.5)]), 7)
    (metrics,) = sent
    assert metrics["trainer/global_step"] == 7
    assert metrics["pruning/energy"][0].pixels.shape[2] == 3 and metrics["pruning/energy"][0].pixels.dtype == np.uint8


def test_a_logger_that_fails_stops_the_figures_and_nothing_else(tmp_path: Path) -> None:
    gallery = Gallery("log_image")
    gallery.is_broken = True
    with pytest.warns(UserWarning, match="draws no figures: ConnectionError: no route to the gallery") as caught:
        result = run(tmp_path, PruningMonitor(), picker=GReg1(0.5, epochs=2), surgery=surgeon(), logger=gallery)
    assert sum("draws no figures" in str(warning.message) for warning in caught) == 1
    assert result.surgery.plan is not None and "greg1/separation" in gallery.scalars


def test_tensorboard_itself_takes_them(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path)
    run(tmp_path, PruningMonitor(), picker=GReg1(0.5, epochs=1), surgery=surgeon(), logger=logger, max_epochs=2)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("events.*"))
    assert b"pruning/separation" in written and b"greg1/steps_left" in written


def test_without_matplotlib_it_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match="PruningMonitor draws no figures: Plots need matplotlib") as caught:
        run(
            tmp_path,
            PruningMonitor(),
            picker=GReg1(0.5, epochs=2),
            surgery=surgeon(),
            logger=[Gallery("add_figure")],
        )
    assert sum("draws no figures" in str(warning.message) for warning in caught) == 1


def test_a_resumed_run_goes_on_showing(tmp_path: Path) -> None:
    def settings() -> dict[str, Any]:
        return {"surgery": surgeon(monitor="val_acc"), "picker": GReg1(0.5, epochs=3), "task": seeded(Task)}

    first, second = PruningMonitor("val_acc"), PruningMonitor("val_acc")
    full, checkpoints = checkpointed(tmp_path / "full", first, **settings())
    again, _ = checkpointed(tmp_path / "again", second, ckpt_path=checkpoints[12], **settings())
    assert_equal(weights(full.task), weights(again.task))
    assert second.state_dict() == first.state_dict()
    assert [moment["epoch"] for moment in first.state_dict()["moments"]] == [0, 1, 2]


def test_it_needs_something_to_watch(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="PruningMonitor found no regulariser"):
        quiet_trainer(PruningMonitor()).fit(Classifier(seeded(conv_net)), image_loader(2))
    with pytest.raises(ConfigurationError, match="every_n_epochs=0 must be at least 1"):
        PruningMonitor(every_n_epochs=0)
    with pytest.warns(UserWarning, match="monitor='val_acc' stays unknown"):
        run(tmp_path, PruningMonitor("val_acc"), picker=GReg1(0.5, epochs=2), surgery=surgeon(), limit_val_batches=0)
    with pytest.raises(ConfigurationError, match="monitor='accuracy' isn't logged in validation; logged are:"):
        run(tmp_path, PruningMonitor("accuracy"), picker=GReg1(0.5, epochs=2), surgery=surgeon())


def test_a_damaged_state_is_said() -> None:
    for damaged in ({"moments": [{"epoch": 1}]}, {"validations": [3]}):
        with pytest.raises(PlanError, match="The checkpoint's state of PruningMonitor can't be read"):
            PruningMonitor().load_state_dict(damaged)


def test_every_few_epochs(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"logger": CSVLogger(tmp_path), "max_epochs": 5}
    watch = PruningMonitor("val_acc", every_n_epochs=2)
    run(tmp_path, watch, picker=GReg1(0.5, epochs=4), surgery=surgeon(), **settings)
    assert len(logged(tmp_path)["if_cut/val_acc"]) == 2


def test_on_two_ranks(tmp_path: Path) -> None:
    """Equal weights with and without it, and a safe cut at the same moment on both."""
    command = [sys.executable, "-m", "tests.callbacks.two_ranks_monitor", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["plain"]["weights"] == first["watched"]["weights"]
    assert first["plain"]["slim_from"] == 4 and first["safe"]["slim_from"] < 4


def test_the_report_has_the_history(tmp_path: Path) -> None:
    surgery = StructuralPruning(monitor="val_acc", latency_batches=())
    run(tmp_path, surgery=surgery, picker=GReg1(0.5, epochs=2), task=seeded(Task))
    report = surgery.report
    assert report is not None
    assert [(each.method, each.epoch, each.step) for each in report.history] == [("greg1", 0, 6), ("greg1", 1, 12)]
    assert all(each.penalty and each.energy and each.separation for each in report.history)
    assert [each.slim for each in report.validations] == [False, False, True, True]
    assert report.validations[-1].value == report.accuracy["finetuned"]
    assert report.config["GReg1"]["epochs"] == 2 and report.config["Trainer"]["max_epochs"] == 4
    assert report.config["SGD"]["lr"] == 0.05 and report.config["StructuralPruning"]["monitor"] == "val_acc"
    assert report.bytes_before is not None and report.bytes_after is not None
    assert report.bytes_after < report.bytes_before
    assert (tmp_path / "report.html").read_text().count("greg1") > 4
