"""Checkpoints that don't fit are refused by the name of the first tensor, wherever they are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune.callbacks.checkpointing import KEY, SlimCheckpointMixin, load_from_checkpoint
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.errors import PlanError
from tests.callbacks.nets import image_loader, seeded
from tests.callbacks.nets import trainer as quiet_trainer
from tests.callbacks.slimming import BATCHES, Picker, Residual, Run, Task, Watch, assert_equal, weights
from tests.callbacks.test_checkpointing import Checkpointed, WideTask, checkpointed

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
DENSE, SLIM = BATCHES, 4 * BATCHES


class DeepTask(Task):
    """One layer more."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Linear(2, 2)


class ShallowTask(Task):
    """One layer less."""

    def __init__(self) -> None:
        super().__init__()
        net = Residual()
        del net.norm2
        self.net = net


OTHERS = {
    "wide": (WideTask, r"'net.stem.weight' has shape \(8, 3, 3, 3\) there and \(12, 3, 3, 3\) here"),
    "deep": (DeepTask, r"it lacks 'deep.weight'"),
    "shallow": (ShallowTask, r"it holds 'net.norm2.weight', which is not there"),
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Checkpointed:
    return checkpointed(tmp_path_factory.mktemp("kept"))


def loads(task: Task, path: Path, how: str) -> Any:
    """Read a checkpoint in one of the Trainer's four ways."""
    run = quiet_trainer(StructuralPruning(latency_batches=(), report_file=None), Picker(epochs=2), max_epochs=5)
    if how == "fit":
        return run.fit(task, image_loader(BATCHES), image_loader(1), ckpt_path=path)
    quiet = {} if how == "predict" else {"verbose": False}
    return getattr(run, how)(task, image_loader(1), ckpt_path=path, **quiet)


WAYS = ["fit", "validate", "test", "predict"]


def refused(work: Callable[[], Any], match: str) -> None:
    with pytest.raises(PlanError, match=match) as caught:
        work()
    assert "\n" not in str(caught.value) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("other", OTHERS)
def test_a_slim_checkpoint_meets_another_architecture(other: str, how: str, kept: Checkpointed) -> None:
    kind, match = OTHERS[other]
    task = seeded(kind)
    before = weights(task)
    refused(lambda: loads(task, kept[1][SLIM], how), f"The slim checkpoint doesn't fit this module: {match}")
    assert_equal(weights(task), before)


@pytest.mark.parametrize("how", WAYS)
def test_the_best_from_before_surgery_meets_a_slim_module(how: str, kept: Checkpointed, tmp_path: Path) -> None:
    task = load_from_checkpoint(Task, kept[1][SLIM])
    before = weights(task)
    match = (
        r"The dense checkpoint doesn't fit this module: 'net.conv1.weight' has shape \(8, 8, 3, 3\) there and \(4, 8"
    )
    refused(lambda: loads(task, kept[1][DENSE], how), match)
    assert_equal(weights(task), before)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("other", OTHERS)
def test_a_module_with_the_mixin_under_a_trainer(other: str, how: str, kept: Checkpointed) -> None:
    kind, match = OTHERS[other]
    refused(
        lambda: loads(seeded(mixed(kind)), kept[1][SLIM], how), f"The slim checkpoint doesn't fit this module: {match}"
    )


def mixed(kind: type[Task]) -> type[Task]:
    return type("Mixed", (SlimCheckpointMixin, kind), {})


@pytest.mark.parametrize("reads", [load_from_checkpoint, lambda kind, path: mixed(kind).load_from_checkpoint(path)])
@pytest.mark.parametrize("other", OTHERS)
def test_without_a_trainer_too(other: str, reads: Any, kept: Checkpointed) -> None:
    kind, match = OTHERS[other]
    refused(lambda: reads(kind, kept[1][SLIM]), f"The slim checkpoint doesn't fit this module: {match}")
    assert not {"on_load_checkpoint", "on_save_checkpoint"} & vars(kind).keys()


def test_whoever_renames_weights_by_hand_may(kept: Checkpointed) -> None:
    """The module's own hook comes after ours, and sees to the names."""

    class Renaming(DeepTask):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] |= {f"deep.{name}": value for name, value in self.deep.state_dict().items()}

    class Lenient(DeepTask):
        def __init__(self) -> None:
            super().__init__()
            self.strict_loading = False

    for kind in (Renaming, Lenient):
        task = seeded(kind)
        loads(task, kept[1][SLIM], "validate")
        slim = {name: value for name, value in weights(task).items() if not name.startswith("deep")}
        assert_equal(slim, weights(kept[0].task))


# Checkpoints that know nothing of pruning.


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run without our callbacks, after one epoch."""
    path = tmp_path_factory.mktemp("foreign") / "plain.ckpt"
    run = quiet_trainer(max_epochs=1)
    run.fit(seeded(Task), image_loader(BATCHES), image_loader(1))
    run.save_checkpoint(path)
    assert KEY not in torch.load(path, weights_only=True)
    return path


@pytest.mark.parametrize("how", WAYS)
def test_checkpoints_without_our_keys_are_dense_ones(how: str, foreign: Path) -> None:
    task = seeded(Task, seed=1)
    loads(task, foreign, how)
    assert task.net.conv1.out_channels == (4 if how == "fit" else 8)
    if how != "fit":
        assert_equal(weights(task), dict(torch.load(foreign, weights_only=True)["state_dict"]))


def test_a_run_without_pruning_goes_on_with_it(foreign: Path) -> None:
    watch, surgery = Watch(), StructuralPruning(latency_batches=(), report_file=None)
    run = quiet_trainer(Picker(epochs=2, start=1), surgery, watch, max_epochs=5)
    run.fit(seeded(Task, seed=1), image_loader(BATCHES), image_loader(1), ckpt_path=foreign)
    assert watch.widths == [8] * 2 * BATCHES + [4] * 2 * BATCHES


@pytest.mark.parametrize("reads", [load_from_checkpoint, lambda kind, path: mixed(kind).load_from_checkpoint(path)])
def test_a_plain_checkpoint_without_a_trainer(reads: Any, foreign: Path) -> None:
    assert_equal(weights(reads(Task, foreign)), dict(torch.load(foreign, weights_only=True)["state_dict"]))


def test_a_callback_whose_state_lacks_something(kept: Checkpointed, tmp_path: Path) -> None:
    for number, (name, key) in enumerate([("StructuralPruning", "decision"), ("Picker", "phase")]):
        checkpoint = torch.load(kept[1][DENSE], weights_only=True)
        own = next(state for state in checkpoint["callbacks"] if state.startswith(name))
        del checkpoint["callbacks"][own][key]
        torch.save(checkpoint, path := tmp_path / f"{number}.ckpt")
        task = seeded(Task)
        refused(
            lambda path=path, task=task: loads(task, path, "fit"), f"state of {name} can't be read .KeyError: '{key}'"
        )  # type: ignore[misc]


def test_kept_is_what_it_says(kept: Checkpointed) -> None:
    result: Run = kept[0]
    assert result.task.net.conv1.out_channels == 4 and {DENSE, SLIM} <= set(kept[1])
