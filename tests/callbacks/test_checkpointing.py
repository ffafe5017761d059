"""The plan travels in the checkpoint."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn

from lightning_prune.callbacks.checkpointing import (
    KEY,
    SlimCheckpointMixin,
    adapt_,
    attach_,
    detach_,
    history,
    load_from_checkpoint,
    remember_,
)
from lightning_prune.callbacks.decision import rooted
from lightning_prune.callbacks.greg import GReg1, GReg2
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.errors import PlanError
from lightning_prune.structure import choose, load_slim, prune_, save_slim, trace
from tests.callbacks.nets import image_loader, seeded
from tests.callbacks.nets import trainer as quiet_trainer
from tests.callbacks.slimming import BATCHES, Picker, Residual, Run, Task, assert_equal, run, weights

HOOKS = {"validation": "on_validation_end", "epoch end": "on_train_epoch_end", "last batch": "on_train_batch_end"}
EVERY = {**HOOKS, "every batch": "on_train_batch_end"}
Checkpointed = tuple[Run, dict[int, Path]]


class Keeper(Checkpoint):
    """Writes a checkpoint in one hook at the end of every epoch, under the number of steps; remembers nothing."""

    def __init__(self, folder: Path, when: str = "epoch end", weights_only: bool = False) -> None:
        self.folder = folder
        self.weights_only = weights_only
        self.always = when == "every batch"
        setattr(self, EVERY[when], self.keep)

    def keep(self, trainer: Trainer, *_: Any) -> None:
        is_last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if not trainer.sanity_checking and (is_last or self.always) and trainer.global_step > 0:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt", self.weights_only)


def checkpointed(
    folder: Path, *callbacks: Any, when: str = "epoch end", weights_only: bool = False, **settings: Any
) -> Checkpointed:
    """A run, and its checkpoints by optimiser step."""
    keeper = Keeper(folder / "kept", when, weights_only)
    result = run(folder, *callbacks, keeper, enable_checkpointing=True, **settings)
    return result, {int(path.stem): path for path in keeper.folder.iterdir()}


def surgeon(**arguments: Any) -> StructuralPruning:
    return StructuralPruning(**{"latency_batches": (), **arguments})


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize("when", HOOKS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, optimizer: str, when: str, epoch: int) -> None:
    def task() -> Task:
        return seeded(Task, optimizer, schedule="step")

    def settings() -> dict[str, Any]:
        return {"surgery": surgeon(monitor="val_acc"), "when": when, "task": task()}

    full, checkpoints = checkpointed(tmp_path / "full", **settings())
    again, _ = checkpointed(tmp_path / "again", ckpt_path=checkpoints[epoch * BATCHES], **settings())
    assert_equal(weights(full.task), weights(again.task))
    steps = (4 - epoch) * BATCHES
    assert again.task.losses == full.task.losses[-steps:]
    assert again.watch.widths == full.watch.widths[-steps:]
    assert again.surgery.plan == full.surgery.plan
    assert again.surgery.report is not None
    if (when, epoch) != ("last batch", 2):  # there Lightning never runs the validation that was to come
        assert again.surgery.report.accuracy == full.surgery.report.accuracy
    assert again.surgery.report.error <= again.surgery.report.tolerance


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize(("kind", "optimizer"), [(GReg1, "sgd"), (GReg2, "adamw")])
def test_with_real_regularisers(tmp_path: Path, kind: type[Any], optimizer: str, epoch: int) -> None:
    def settings() -> dict[str, Any]:
        task = seeded(Task, optimizer)
        return {"task": task, "picker": kind(0.5, epochs=2), "train": image_loader(120, 4), "max_epochs": 3}

    full, checkpoints = checkpointed(tmp_path / "full", **settings())
    again = run(tmp_path / "again", ckpt_path=checkpoints[120 * epoch], **settings())
    assert again.task.losses == full.task.losses[120 * epoch :]
    assert_equal(weights(full.task), weights(again.task))
    assert again.watch.widths[-1] == 4


class Resumable:
    """A loader that goes on where its checkpoint was written."""

    def __init__(self) -> None:
        self.loader = image_loader(BATCHES)
        self.begun = self.skip = 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        first, self.skip = self.skip, 0
        for number, batch in enumerate(self.loader):
            if number >= first:
                self.begun = number + 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"begun": self.begun % len(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skip = state["begun"]


@pytest.mark.parametrize("late", [False, True])
def test_resumes_at_every_step(tmp_path: Path, late: bool) -> None:
    """Before, at and after surgery, at an epoch's start or (``late``) in the middle of the last epoch."""
    settings: dict[str, Any] = {"train": Resumable(), "picker": Picker(steps=4) if late else Picker(epochs=1)}
    settings["max_epochs"] = 1 if late else 2
    full, checkpoints = checkpointed(tmp_path / "full", when="every batch", task=seeded(Task), **settings)
    assert set(full.watch.widths) == {8, 4}
    for step, path in sorted(checkpoints.items())[:-1]:
        settings |= {"train": Resumable(), "picker": Picker(steps=4) if late else Picker(epochs=1)}
        again = run(tmp_path / str(step), task=seeded(Task), ckpt_path=path, **settings)
        assert again.task.losses == full.task.losses[step:]
        assert again.watch.widths == full.watch.widths[step:]
        assert_equal(weights(full.task), weights(again.task))


def average(kind: str) -> Any:
    if kind == "ema":
        return EMAWeightAveraging(decay=0.9)
    return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_weight_averages_resume_with_the_same_bits(tmp_path: Path, kind: str, epoch: int) -> None:
    full, checkpoints = checkpointed(tmp_path / "full", average(kind), task=seeded(Task))
    again, _ = checkpointed(
        tmp_path / "again", average(kind), task=seeded(Task), ckpt_path=checkpoints[epoch * BATCHES]
    )
    assert_equal(weights(full.task), weights(again.task))
    assert again.watch.widths == full.watch.widths[-len(again.watch.widths) :]


def test_a_checkpoint_holds_plain_values_only(tmp_path: Path) -> None:
    _, checkpoints = checkpointed(tmp_path)
    dense = torch.load(checkpoints[BATCHES], weights_only=True)
    slim = torch.load(checkpoints[4 * BATCHES], weights_only=True)
    assert KEY not in dense
    assert [entry["module"] for entry in slim[KEY]["plans"]] == ["net"]
    # The decision travels before surgery, so that a resume right before it needs no batch.
    assert dense["callbacks"]["StructuralPruning"]["decision"]["module"] == "net"


def fresh_trainer(*callbacks: Any) -> Trainer:
    return quiet_trainer(surgeon(), Picker(epochs=2), *callbacks, max_epochs=4)


@pytest.mark.parametrize("weights_only", [False, True])
def test_validate_test_and_predict_from_a_slim_checkpoint(tmp_path: Path, weights_only: bool) -> None:
    full, checkpoints = checkpointed(tmp_path, weights_only=weights_only)
    loader, path = image_loader(3), checkpoints[4 * BATCHES]
    expected = torch.cat(quiet_trainer().predict(full.task, loader))  # type: ignore[arg-type]
    for _ in range(2):  # the second time the module is slim already
        fresh = seeded(Task, seed=1)
        trainer = fresh_trainer()
        assert trainer.validate(fresh, loader, ckpt_path=path, verbose=False)
        assert trainer.test(fresh, loader, ckpt_path=path, verbose=False)
        assert torch.equal(torch.cat(trainer.predict(fresh, loader, ckpt_path=path)), expected)  # type: ignore[arg-type]
    assert_equal(weights(fresh), weights(full.task))


def test_the_best_checkpoint_in_the_same_trainer(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path / "best", monitor="val_acc", mode="max")
    result = run(tmp_path, keeper, enable_checkpointing=True)
    assert result.trainer.test(result.task, image_loader(2), ckpt_path="best", verbose=False)


def test_load_from_checkpoint(tmp_path: Path) -> None:
    full, checkpoints = checkpointed(tmp_path)
    slim = load_from_checkpoint(Task, checkpoints[4 * BATCHES])
    assert type(slim) is Task
    assert_equal(weights(slim), weights(full.task))
    assert load_from_checkpoint(Task, checkpoints[BATCHES], optimizer="adamw").hparams["optimizer"] == "adamw"
    assert "on_load_checkpoint" not in vars(Task)
    # What it returns saves checkpoints that load again.
    trainer = quiet_trainer()
    trainer.validate(slim, image_loader(1), verbose=False)
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    assert_equal(weights(load_from_checkpoint(Task, tmp_path / "again.ckpt")), weights(full.task))


class MixedTask(SlimCheckpointMixin, Task):
    """A task that reads slim checkpoints by itself."""


def test_the_mixin(tmp_path: Path) -> None:
    full, checkpoints = checkpointed(tmp_path, task=seeded(MixedTask))
    slim = MixedTask.load_from_checkpoint(checkpoints[4 * BATCHES])
    assert_equal(weights(slim), weights(full.task))
    trainer = quiet_trainer()
    trainer.validate(slim, image_loader(1), verbose=False)
    trainer.save_checkpoint(tmp_path / "again.ckpt", weights_only=True)
    assert_equal(weights(MixedTask.load_from_checkpoint(tmp_path / "again.ckpt")), weights(full.task))


class Remembering(Task):
    """Overrides the hooks that are wrapped."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 7

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.mine = checkpoint["mine"]


def test_the_modules_own_hooks_are_called(tmp_path: Path) -> None:
    _, checkpoints = checkpointed(tmp_path, task=seeded(Remembering))
    fresh = seeded(Remembering)
    fresh_trainer().validate(fresh, image_loader(1), ckpt_path=checkpoints[4 * BATCHES], verbose=False)
    assert fresh.mine == 7
    assert load_from_checkpoint(Remembering, checkpoints[4 * BATCHES]).mine == 7
    assert vars(Remembering)["on_load_checkpoint"].__qualname__ == "Remembering.on_load_checkpoint"


@pytest.mark.parametrize("weights_only", [False, True])
def test_saved_by_hand_after_the_fit(tmp_path: Path, weights_only: bool) -> None:
    result = run(tmp_path)
    result.trainer.save_checkpoint(tmp_path / "by_hand.ckpt", weights_only=weights_only)
    assert_equal(weights(load_from_checkpoint(Task, tmp_path / "by_hand.ckpt")), weights(result.task))


def test_twice_pruned(tmp_path: Path) -> None:
    first = run(tmp_path)
    second, checkpoints = checkpointed(tmp_path, task=first.task)
    assert [entry.module for entry in history(second.task)] == ["net", "net"]
    assert_equal(weights(load_from_checkpoint(Task, checkpoints[4 * BATCHES])), weights(second.task))


def test_a_module_from_a_slim_file_takes_a_slim_checkpoint(tmp_path: Path) -> None:
    full, checkpoints = checkpointed(tmp_path)
    assert full.surgery.plan is not None
    save_slim(full.task, tmp_path / "slim.safetensors", full.surgery.plan)
    fresh = seeded(Task, seed=1)
    load_slim(tmp_path / "slim.safetensors", fresh)
    fresh_trainer().validate(fresh, image_loader(1), ckpt_path=checkpoints[4 * BATCHES], verbose=False)
    assert_equal(weights(fresh), weights(full.task))
    assert history(fresh) == history(full.task)


def test_copies_and_pickles_of_a_slim_module(tmp_path: Path) -> None:
    task = run(tmp_path).task
    twin = copy.deepcopy(task)
    assert twin.on_load_checkpoint.args[0] is twin  # type: ignore[attr-defined]
    assert history(pickle.loads(pickle.dumps(task))) == history(task)


# What doesn't fit.


class WideTask(Task):
    """Another architecture."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Residual(width=12)


def test_a_dense_checkpoint_meets_a_slim_module(tmp_path: Path) -> None:
    message = r"dense checkpoint.*'net.conv1.weight' has shape \(8, 8, 3, 3\) there and \(4,"
    full, checkpoints = checkpointed(tmp_path)
    before = weights(full.task)
    with pytest.raises(PlanError, match=message):
        full.trainer.validate(full.task, image_loader(1), ckpt_path=checkpoints[BATCHES], verbose=False)
    assert_equal(weights(full.task), before)


def test_a_slim_checkpoint_meets_another_architecture(tmp_path: Path) -> None:
    message = r"slim checkpoint.*'net.stem.weight' has shape \(8, .*there and \(12,"
    _, checkpoints = checkpointed(tmp_path)
    other = seeded(WideTask)
    before = weights(other)
    with pytest.raises(PlanError, match=message) as caught:
        fresh_trainer().validate(other, image_loader(1), ckpt_path=checkpoints[4 * BATCHES], verbose=False)
    assert "\n" not in str(caught.value)
    assert_equal(weights(other), before)
    with pytest.raises(PlanError, match="slim checkpoint"):
        load_from_checkpoint(WideTask, checkpoints[4 * BATCHES])


def test_two_different_surgeries_dont_mix(tmp_path: Path) -> None:
    _, checkpoints = checkpointed(tmp_path)
    other = run(tmp_path / "other", picker=Picker(0.25, epochs=2)).task
    with pytest.raises(PlanError, match=r"slim checkpoint.*'net.conv1.weight'"):
        fresh_trainer().validate(other, image_loader(1), ckpt_path=checkpoints[4 * BATCHES], verbose=False)


@pytest.mark.parametrize(
    "record",
    [7, {}, {"version": 2, "plans": []}, {"version": 1}, {"version": 1, "plans": [{"module": "net"}]}]
    + [{"version": 1, "plans": [{"module": "net", "plan": plan}]} for plan in ("", "{}", None, "[]", '{"version": 1}')],
)
def test_a_damaged_record_is_refused(record: Any) -> None:
    task = seeded(Task)
    before = weights(task)
    with pytest.raises(PlanError) as caught:
        adapt_(task, {KEY: record, "state_dict": {}})
    assert "\n" not in str(caught.value)
    assert_equal(weights(task), before)


def slim_net() -> tuple[nn.Module, Any]:
    net = seeded(Residual)
    plan = choose(trace(net, torch.zeros(2, 3, 6, 6)))
    return net, plan


def test_a_plan_for_a_submodule_that_is_missing() -> None:
    net, plan = slim_net()
    prune_(net, plan)
    state = {f"net.{name}": value for name, value in net.state_dict().items()}
    record = {"version": 1, "plans": [{"module": "backbone", "plan": plan.to_json()}]}
    with pytest.raises(PlanError, match=r"net\.conv1\.weight"):
        adapt_(seeded(Task), {KEY: record, "state_dict": state})


class Tied(LightningModule):
    """The same network under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.net = seeded(Residual)
        self.alias = self.net

    def forward(self, images: Tensor) -> Tensor:
        return self.alias(images)


def test_tied_names_fit_too() -> None:
    slim, plan = Tied(), slim_net()[1]
    prune_(slim.net, plan)
    remember_(slim, "net", plan)
    checkpoint: dict[str, Any] = {"state_dict": slim.state_dict()}
    attach_(slim)
    slim.on_save_checkpoint(checkpoint)
    fresh = Tied()
    adapt_(fresh, checkpoint)
    fresh.load_state_dict(checkpoint["state_dict"])
    assert fresh.alias is fresh.net


def test_a_plan_for_a_part_and_for_the_whole() -> None:
    part = slim_net()[1]
    whole, fresh = rooted(part, Tied(), "alias"), Tied()
    assert whole.widths() == {"net.conv1": (8, 4)}
    prune_(fresh, whole)
    assert fresh.alias.conv2.in_channels == 4
    assert rooted(part, Tied(), "") is part


def test_attaching_twice_and_detaching_leave_nothing() -> None:
    task = seeded(Task)
    attach_(task)
    first = task.on_save_checkpoint
    attach_(task)
    assert task.on_save_checkpoint is first
    detach_(task)
    detach_(task)
    assert not {"on_load_checkpoint", "on_save_checkpoint"} & vars(task).keys()


def test_detaching_gives_back_what_somebody_else_had_set() -> None:
    task, called = seeded(Task), []
    task.on_save_checkpoint = called.append  # type: ignore[method-assign]
    attach_(task)
    task.on_save_checkpoint({})
    detach_(task)
    assert called == [{}]
    assert vars(task)["on_save_checkpoint"] == called.append
