"""The stage after surgery: its optimiser, its schedule, and how long it is."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, ReduceLROnPlateau, StepLR

from lightning_prune.callbacks.horizon import another_epoch_starts, remaining_steps
from lightning_prune.callbacks.neighbours import average_models
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.errors import ConfigurationError
from tests.callbacks.nets import image_loader, seeded
from tests.callbacks.nets import trainer as quiet_trainer
from tests.callbacks.slimming import BATCHES, Run, Task, assert_equal, run, weights
from tests.callbacks.test_checkpointing import average, checkpointed

SGD = partial(torch.optim.SGD, lr=0.02, momentum=0.9)


def finetuned(folder: Path, task: Task | None = None, settings: dict[str, Any] | None = None, **arguments: Any) -> Run:
    """A run whose surgery is set up by ``arguments``."""
    surgery = StructuralPruning(latency_batches=(), **arguments)
    return run(
        folder, task=seeded(Task, schedule="step") if task is None else task, surgery=surgery, **(settings or {})
    )


def test_an_optimiser_of_its_own_ends_the_modules_schedule(tmp_path: Path) -> None:
    result = finetuned(tmp_path, finetune_optimizer=partial(torch.optim.AdamW, lr=1e-3))
    assert isinstance(result.trainer.optimizers[0], torch.optim.AdamW)
    assert result.watch.rates[2 * BATCHES :] == [1e-3] * 2 * BATCHES
    assert result.trainer.lr_scheduler_configs == []
    parameters = list(result.task.parameters())
    assert [id(p) for p in result.trainer.optimizers[0].param_groups[0]["params"]] == [id(p) for p in parameters]
    assert all(state["exp_avg"].shape == p.shape for p, state in result.trainer.optimizers[0].state.items())


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_schedule_of_its_own_counts_the_remaining_steps(tmp_path: Path, accumulate: int) -> None:
    schedule = partial(CosineAnnealingLR, T_max=-1)
    settings = {"accumulate_grad_batches": accumulate}
    result = finetuned(tmp_path, settings=settings, finetune_optimizer=SGD, finetune_scheduler=schedule)
    scheduler = result.trainer.lr_scheduler_configs[0].scheduler
    steps = 2 * -(-BATCHES // accumulate)
    assert (scheduler.T_max, scheduler.last_epoch) == (steps, steps)
    assert result.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
    assert max(result.watch.rates[2 * BATCHES :]) <= 0.02


def test_lengths_given_by_hand_stay(tmp_path: Path) -> None:
    result = finetuned(tmp_path, finetune_optimizer=SGD, finetune_scheduler=partial(StepLR, step_size=5, gamma=0.1))
    rates = [0.02 * 0.1 ** ((step + 1) // 5) for step in range(2 * BATCHES)]
    assert result.watch.rates[2 * BATCHES :] == pytest.approx(rates)


@pytest.mark.parametrize(
    "schedule",
    [
        partial(LinearLR, total_iters=-1),
        partial(OneCycleLR, max_lr=0.1, total_steps=-1),
        partial(CosineAnnealingLR, T_max=-1),
    ],
)
def test_all_remaining_steps(tmp_path: Path, schedule: Any) -> None:
    result = finetuned(tmp_path, finetune_optimizer=SGD, finetune_scheduler=schedule)
    state = result.trainer.lr_scheduler_configs[0].scheduler.state_dict()
    assert 2 * BATCHES in (state.get("T_max"), state.get("total_iters"), state.get("total_steps"))


def test_a_schedule_on_the_old_optimiser_starts_at_its_present_rate(tmp_path: Path) -> None:
    result = finetuned(tmp_path, finetune_scheduler=partial(LinearLR, start_factor=1.0, end_factor=0.0, total_iters=-1))
    left = [0.0125 * (1 - (step + 1) / (2 * BATCHES)) for step in range(2 * BATCHES)]
    assert result.watch.rates[2 * BATCHES :] == pytest.approx(left)
    assert all("momentum_buffer" in state for state in result.trainer.optimizers[0].state.values())


class Plateau(ReduceLROnPlateau):
    """As LightningCLI's: it knows what it monitors."""

    monitor = "val_loss"


def test_a_plateau_schedule_is_asked_at_the_epochs_end(tmp_path: Path) -> None:
    schedule = partial(Plateau, patience=0, threshold=10.0, factor=0.5)  # nothing is ever good enough
    result = finetuned(tmp_path, finetune_optimizer=SGD, finetune_scheduler=schedule)
    assert result.watch.rates[2 * BATCHES :] == [0.02] * BATCHES + [0.01] * BATCHES
    assert result.trainer.optimizers[0].param_groups[0]["lr"] == 0.005


def test_restart_asks_the_module_again_with_the_remaining_length(tmp_path: Path) -> None:
    result = finetuned(tmp_path, task=seeded(Task, schedule="remaining"), finetune="restart")
    dense = [0.05 * (1 - 0.9 * (step + 1) / (4 * BATCHES)) for step in range(2 * BATCHES)]
    slim = [0.05 * (1 - 0.9 * (step + 1) / (2 * BATCHES)) for step in range(2 * BATCHES)]
    assert result.watch.rates == pytest.approx(dense + slim)
    assert (result.trainer.max_epochs, result.trainer.max_steps) == (4, -1)


def test_restart_may_take_another_schedule(tmp_path: Path) -> None:
    arguments = {"finetune": "restart", "finetune_scheduler": partial(CosineAnnealingLR, T_max=-1)}
    result = finetuned(tmp_path, **arguments)
    assert result.watch.rates[2 * BATCHES] < 0.05
    assert result.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


STAGES: dict[str, dict[str, Any]] = {
    "restart": {"finetune": "restart"},
    "own": {"finetune_optimizer": SGD, "finetune_scheduler": partial(CosineAnnealingLR, T_max=-1)},
    "schedule": {"finetune_scheduler": partial(CosineAnnealingLR, T_max=-1)},
    "adamw": {"finetune_optimizer": partial(torch.optim.AdamW, lr=1e-3)},
}


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_resumes_with_the_same_bits(tmp_path: Path, stage: str, epoch: int) -> None:
    def settings() -> dict[str, Any]:
        surgery = StructuralPruning(latency_batches=(), **STAGES[stage])
        return {"surgery": surgery, "task": seeded(Task, schedule="remaining")}

    full, checkpoints = checkpointed(tmp_path / "full", **settings())
    again, _ = checkpointed(tmp_path / "again", ckpt_path=checkpoints[epoch * BATCHES], **settings())
    assert_equal(weights(full.task), weights(again.task))
    assert again.watch.rates == full.watch.rates[-len(again.watch.rates) :]
    assert type(again.trainer.optimizers[0]) is type(full.trainer.optimizers[0])


@pytest.mark.parametrize("stage", ["continue", "restart", "own"])
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_weight_averages_resume_in_the_finetune_stage(tmp_path: Path, kind: str, stage: str) -> None:
    def settings() -> dict[str, Any]:
        surgery = StructuralPruning(latency_batches=(), **STAGES.get(stage, {}))
        return {"surgery": surgery, "task": seeded(Task), "max_epochs": 5}

    full, checkpoints = checkpointed(tmp_path / "full", average(kind), **settings())
    again, _ = checkpointed(tmp_path / "again", average(kind), ckpt_path=checkpoints[3 * BATCHES], **settings())
    assert again.watch.widths == full.watch.widths[3 * BATCHES :] and set(again.watch.widths) == {4}
    assert again.task.losses == full.task.losses[3 * BATCHES :]
    assert_equal(weights(full.task), weights(again.task))
    for mine, theirs in zip(average_models(full.trainer), average_models(again.trainer), strict=True):
        assert_equal(weights(mine), weights(theirs))


class TwoOptimizers(Task):
    """Manual optimisation with an optimiser for the head alone."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        head = list(self.net.head.parameters())
        body = [p for p in self.net.parameters() if all(p is not other for other in head)]
        return SGD(body), SGD(head)


@pytest.mark.parametrize("mode", ["continue", "restart"])
def test_manual_optimisation_with_two_optimisers(tmp_path: Path, mode: str) -> None:
    result = finetuned(tmp_path, task=seeded(TwoOptimizers), finetune=mode)
    assert result.watch.widths == [8] * 2 * BATCHES + [4] * 2 * BATCHES
    states = [state for optimizer in result.trainer.optimizers for state in optimizer.state.items()]
    assert len(states) == 11
    assert all(state["momentum_buffer"].shape == parameter.shape for parameter, state in states)


def test_two_optimisers_and_one_of_its_own_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match="finetune_optimizer needs a module with one optimiser; this one has 2"
    ):
        finetuned(tmp_path, task=seeded(TwoOptimizers), finetune_optimizer=SGD)


def test_a_run_without_end_has_no_remaining_steps(tmp_path: Path) -> None:
    settings = {"max_epochs": -1}
    with pytest.raises(ConfigurationError, match=r"T_max=-1 \(all remaining steps\), but this run has no max_epochs"):
        finetuned(tmp_path, settings=settings, finetune_scheduler=partial(CosineAnnealingLR, T_max=-1))


class Horizon(Callback):
    """Notes what is said to remain at every batch start, and how many steps there are in the end."""

    def __init__(self) -> None:
        self.said: list[tuple[int, int, bool]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.said.append(
                (trainer.global_step, remaining_steps(trainer, batch_idx), another_epoch_starts(trainer, batch_idx))
            )


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(
    "limits", [{"max_epochs": 3}, {"max_epochs": 3, "max_steps": 7}, {"max_epochs": -1, "max_steps": 4}]
)
def test_the_horizon_is_where_the_run_ends(limits: dict[str, int], accumulate: int) -> None:
    horizon, task = Horizon(), seeded(Task)
    trainer = quiet_trainer(horizon, accumulate_grad_batches=accumulate, **limits)
    trainer.fit(task, image_loader(BATCHES), image_loader(1))
    assert [step + left for step, left, _ in horizon.said] == [trainer.global_step] * len(horizon.said)
    per_epoch = -(-BATCHES // accumulate)
    last_epoch = (trainer.global_step - 1) // per_epoch
    assert [follows for step, _, follows in horizon.said] == [
        step // per_epoch < last_epoch for step, *_ in horizon.said
    ]


def test_a_run_of_unknown_length() -> None:
    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from image_loader(2).dataset

    horizon = Horizon()
    trainer = quiet_trainer(horizon, max_epochs=1)
    trainer.fit(seeded(Task), torch.utils.data.DataLoader(Endless(), batch_size=16), image_loader(1))
    assert {(left, follows) for _, left, follows in horizon.said} == {(-1, False)}
