"""Surgery as soon as nothing worth keeping is left in what goes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_prune import ASCP, TPP, GReg1, GReg2, Magnitude, MaskSparsity, StructuralPruning
from lightning_prune.callbacks.outlook import Outlook
from lightning_prune.errors import ConfigurationError
from lightning_prune.schedules import ASCPSchedule
from lightning_prune.structure import masked_state
from lightning_prune.structure.sparsity import SparsityPlan
from tests.callbacks.nets import image_loader, seeded
from tests.callbacks.nets import trainer as quiet_trainer
from tests.callbacks.slimming import Picker, Task, assert_equal, weights
from tests.callbacks.slimming import run as plain_run
from tests.callbacks.test_checkpointing import HOOKS, checkpointed

pytestmark = pytest.mark.filterwarnings("ignore:.*energy was left", "ignore:.*too few optimiser steps")
START, EPOCHS, LONG, BATCHES = 2, 5, 9, 24
"""First epoch and length of the sparse stage, length of the run, batches of an epoch."""


def safely(change: float = 0.01, **arguments: Any) -> StructuralPruning:
    settings = {"cut_when": "safe", "safe_change": change, "monitor": "val_loss", "latency_batches": ()}
    return StructuralPruning(**{"report_file": None, **settings, **arguments})


def run(folder: Path, *callbacks: Callback, **settings: Any) -> Any:
    return plain_run(folder, *callbacks, train=image_loader(BATCHES), **settings)


def cut_at(result: Any) -> int:
    """The epoch at whose start surgery was."""
    widths = result.watch.widths
    return int(widths.index(4)) // BATCHES if 4 in widths else -1


class Outlooks(Callback):
    """What was logged at the end of every epoch."""

    def __init__(self) -> None:
        self.found: dict[int, Outlook] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = trainer.callback_metrics
        if "if_cut/val_loss" in metrics and trainer.current_epoch not in self.found and not self.is_done(trainer):
            masked, change = float(metrics["if_cut/val_loss"]), float(metrics["if_cut/val_loss_change"])
            self.found[trainer.current_epoch] = Outlook(masked - change, masked)

    @staticmethod
    def is_done(trainer: Trainer) -> bool:
        surgery = next(each for each in trainer.callbacks if isinstance(each, StructuralPruning))  # type: ignore[attr-defined]
        return surgery.plan is not None


def test_it_cuts_at_the_first_epochs_end_where_that_changes_little(tmp_path: Path) -> None:
    diary, picker = Outlooks(), GReg1(0.5, start=START, epochs=EPOCHS)
    result = run(tmp_path, diary, surgery=safely(), picker=picker, max_epochs=LONG, task=seeded(Task))
    assert list(diary.found) == [2, 3]
    assert abs(diary.found[2].change) > 0.01 >= abs(diary.found[3].change)
    assert result.watch.widths == [8] * 4 * BATCHES + [4] * 5 * BATCHES
    accuracy = result.surgery.report.accuracy
    assert accuracy["before"] == pytest.approx(diary.found[3].whole, abs=1e-5)
    assert accuracy["after"] == pytest.approx(diary.found[3].masked, abs=1e-5)
    assert not result.surgery.report.warnings


def test_where_it_never_is_safe_all_is_as_scheduled(tmp_path: Path) -> None:
    def trained(surgery: StructuralPruning) -> Any:
        return run(tmp_path, surgery=surgery, picker=GReg1(0.5, epochs=2), task=seeded(Task), max_epochs=3)

    never = trained(safely(0.0))
    usual = trained(StructuralPruning(monitor="val_loss", latency_batches=(), report_file=None))
    assert cut_at(never) == cut_at(usual) == 2
    assert never.task.losses == usual.task.losses
    assert_equal(weights(never.task), weights(usual.task))


@pytest.mark.parametrize("order", ["before", "after"])
def test_an_epoch_of_surgery_is_then_the_latest(tmp_path: Path, order: str) -> None:
    """In either order of the callbacks."""

    def fit(surgery: StructuralPruning) -> list[int]:
        picker, task, widths = GReg1(0.5, start=START, epochs=EPOCHS), seeded(Task), []

        class Widths(Callback):
            def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
                widths.append(pl_module.net.conv1.out_channels)

        callbacks = [surgery, picker] if order == "before" else [picker, surgery]
        settings: dict[str, Any] = {"max_epochs": LONG, "default_root_dir": tmp_path}
        quiet_trainer(*callbacks, Widths(), **settings).fit(task, image_loader(BATCHES), image_loader(3))
        return widths

    assert fit(safely(at_epoch=5)).index(4) == 4 * BATCHES
    assert fit(safely(0.0, at_epoch=3)).index(4) == 3 * BATCHES


METHODS = {
    "ascp": lambda: ASCP(0.5, schedule=ASCPSchedule(6, "const", freeze_after=0.3), cluster="ward"),
    "greg2": lambda: GReg2(0.5, epochs=6),
    "greg1 on weights": lambda: GReg1(0.5, epochs=6, granularity="weight"),
    "mask_sparsity": lambda: MaskSparsity(0.5, epochs=6),
    "tpp": lambda: TPP(0.5, epochs=6),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_that_shrinks(tmp_path: Path, name: str) -> None:
    """At the first moment at all, where any change is allowed; masked and slim network agree then, too."""

    class Before(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if surgery.plan is None:
                self.module = copy.deepcopy(pl_module)

        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
            if surgery.plan is not None and not outputs:
                images, network = batch[0], copy.deepcopy(self.module).eval()
                if isinstance(surgery.plan, SparsityPlan):
                    zeros = {p: kept for p, kept in surgery.plan.masks(network).items()}
                    with torch.no_grad():
                        for parameter, kept in zeros.items():
                            parameter.masked_fill_(~kept, 0)
                else:
                    network.load_state_dict({**network.state_dict(), **masked_state(network, surgery.plan)})
                with torch.no_grad():
                    outputs.extend([network.net(images), copy.deepcopy(pl_module).eval().net(images)])
                moments.append((trainer.current_epoch, method.phase))

    method, surgery = METHODS[name](), safely(1e9)
    outputs: list[torch.Tensor] = []
    moments: list[tuple[int, str]] = []
    fit = quiet_trainer(Before(), method, surgery, max_epochs=8, default_root_dir=tmp_path)
    fit.fit(seeded(Task), image_loader(6), image_loader(2))
    assert moments[0][0] < 6 and moments[0][1] == "done"
    assert torch.allclose(*outputs, atol=1e-5)


def test_not_before_the_last_mask_is_made(tmp_path: Path) -> None:
    """Half of the channels is what was asked for, and half of the passes brings only a part of them."""
    settings: dict[str, Any] = {"max_epochs": 6, "task": seeded(Task)}
    result = run(tmp_path, surgery=safely(1e9), picker=MaskSparsity(0.5, epochs=4, passes=2), **settings)
    assert cut_at(result) == 3


@pytest.mark.parametrize("when", HOOKS)
def test_a_resumed_run_cuts_at_the_same_moment(tmp_path: Path, when: str) -> None:
    def settings() -> dict[str, Any]:
        method, train = TPP(0.5, start=1, epochs=4), image_loader(BATCHES)
        own = {"surgery": safely(), "picker": method, "task": seeded(Task), "when": when, "train": train}
        return {**own, "max_epochs": 6}

    full, checkpoints = checkpointed(tmp_path / "full", EMAWeightAveraging(decay=0.5), **settings())
    assert 2 < cut_at(full) < 5
    for epoch in (cut_at(full) - 1, cut_at(full), cut_at(full) + 1):
        path = checkpoints[epoch * BATCHES]
        again, _ = checkpointed(tmp_path / f"{epoch}", EMAWeightAveraging(decay=0.5), ckpt_path=path, **settings())
        assert again.watch.widths == full.watch.widths[epoch * BATCHES :]
        assert again.task.losses == full.task.losses[epoch * BATCHES :]
        assert_equal(weights(full.task), weights(again.task))


def test_looking_changes_nothing_but_the_moment(tmp_path: Path) -> None:
    """Up to the safe cut the losses are those of a run that doesn't look."""

    def trained(surgery: StructuralPruning) -> Any:
        torch.manual_seed(1)
        return run(
            tmp_path, surgery=surgery, picker=GReg1(0.5, start=START, epochs=EPOCHS), task=seeded(Task), max_epochs=LONG
        )

    safe = trained(safely())
    usual = trained(StructuralPruning(latency_batches=(), report_file=None))
    steps = cut_at(safe) * BATCHES
    assert steps == 4 * BATCHES
    assert safe.task.losses[:steps] == usual.task.losses[:steps]


# At the door.


def refused(match: str, *callbacks: Callback, **settings: Any) -> None:
    fit = quiet_trainer(*callbacks, max_epochs=4, **settings)
    with pytest.raises(ConfigurationError, match=match) as caught:
        fit.fit(seeded(Task), image_loader(2), image_loader(2))
    assert "\n" not in str(caught.value)


def test_refuses_what_brings_no_safe_moment_about() -> None:
    refused("Magnitude shrinks nothing before it cuts", Magnitude(0.5), safely())
    refused("Picker shrinks nothing before it cuts", Picker(epochs=2), GReg1(0.5, epochs=2), safely())


def test_refuses_a_run_without_validation() -> None:
    refused(
        'cut_when="safe" goes by validation, and this run has none', GReg1(0.5, epochs=2), safely(), limit_val_batches=0
    )


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"cut_when": "soon"}, "cut_when='soon' is neither"),
        ({"cut_when": "safe"}, "name it with monitor="),
        ({"safe_change": -0.1}, "safe_change=-0.1 must be a finite number of at least 0"),
        ({"safe_change": float("nan")}, "safe_change=nan must be"),
        ({"report_file": "report.html"}, "report_file='report.html' names the data"),
    ],
)
def test_refuses_bad_arguments(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        StructuralPruning(**arguments)


def test_a_look_ahead_leaves_the_weights_as_they_were(tmp_path: Path) -> None:
    from lightning_prune.callbacks.decision import Decision
    from lightning_prune.callbacks.outlook import masked
    from lightning_prune.structure import choose, choose_weights, trace

    task = seeded(Task)
    before = weights(task)
    plans = [choose(trace(task.net, torch.zeros(2, 3, 6, 6)), scope="all"), choose_weights(task.net, ratio=0.5)]
    for plan in plans:
        with masked(quiet_trainer(), task, Decision({}, {}, "net", plan, plan)):
            assert any(not torch.equal(value, before[name]) for name, value in task.state_dict().items())
        assert_equal(before, weights(task))
