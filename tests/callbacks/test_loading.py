"""The slim file turns another run into the finetune stage."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from lightning_prune.callbacks.checkpointing import load_from_checkpoint
from lightning_prune.callbacks.loading import LoadPruned
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.errors import ConfigurationError, SlimFileError
from lightning_prune.structure import choose, load_slim, prune_, save_slim, slim_file, trace
from tests.callbacks.nets import image_loader, seeded
from tests.callbacks.nets import trainer as quiet_trainer
from tests.callbacks.slimming import BATCHES, Picker, Task, Watch, assert_equal, weights

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Of a pruned task, with weights that no fresh one has."""
    task = seeded(Task, seed=3)
    plan = choose(trace(task.net, torch.zeros(2, 3, 6, 6)))
    prune_(task.net, plan)
    save_slim(task.net, tmp_path / "net.safetensors", plan)
    return tmp_path / "net.safetensors"


def slim(file: Path, task: Task | None = None, *callbacks: Any, **settings: Any) -> tuple[Trainer, Task, Watch]:
    task, watch = task or seeded(Task), Watch()
    run = quiet_trainer(LoadPruned(file, module="net"), *callbacks, watch, **settings)
    return run, task, watch


def test_a_run_finetunes_what_the_file_holds(file: Path, tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path / "kept", save_last=True)
    run, task, watch = slim(file, None, keeper, max_epochs=2, enable_checkpointing=True)
    run.fit(task, image_loader(BATCHES), image_loader(2))
    assert watch.widths == [4] * 2 * BATCHES
    held = {id(parameter) for group in run.optimizers[0].param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in task.parameters()}
    finetuned = weights(task)

    run.validate(task, image_loader(2), verbose=False)  # the same trainer again doesn't fetch the old weights
    assert_equal(weights(task), finetuned)
    again = load_from_checkpoint(Task, tmp_path / "kept" / "last.ckpt")
    assert_equal(weights(again), finetuned)


def test_the_file_is_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = slim_file.safe_open
    monkeypatch.setattr(slim_file, "safe_open", lambda name, **rest: opened.append(name) or real(name, **rest))
    run, task, watch = slim(file, None, EMAWeightAveraging(), max_epochs=1)
    run.fit(task, image_loader(BATCHES))
    assert watch.widths == [4] * BATCHES and opened == [str(file)]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_its_checkpoints_resume_with_the_same_bits(file: Path, tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path / "kept", "{epoch}", save_top_k=-1)
    run, task, _ = slim(file, None, keeper, max_epochs=3, enable_checkpointing=True)
    run.fit(task, image_loader(BATCHES))
    resumed, again, watch = slim(file, seeded(Task, seed=1), max_epochs=3)
    resumed.fit(again, image_loader(BATCHES), ckpt_path=tmp_path / "kept" / "epoch=0.ckpt")
    assert watch.widths == [4] * 2 * BATCHES
    assert_equal(weights(again), weights(task))


def test_validation_test_and_prediction_see_the_slim_network(file: Path) -> None:
    run, task, _ = slim(file)
    outputs = run.predict(task, image_loader(1))
    assert task.net.conv1.out_channels == 4 and outputs is not None
    run, task, _ = slim(file)
    assert run.test(task, image_loader(1), verbose=False)[0]["test_loss"] > 0


@pytest.mark.parametrize(
    ("strategy", "before", "main"),
    [
        ("ddp", "dense", [4, True]),
        ("ddp_spawn", "dense", [8, False]),
        ("ddp_spawn", "slim", [4, True]),
        ("ddp_fork", "dense", [8, False]),
        ("ddp_notebook", "slim", [4, True]),
        ("ddp_spawn", "pruned", [8, False]),
    ],
)
def test_every_launcher(file: Path, strategy: str, before: str, main: list[Any]) -> None:
    """Both processes train the slim network; its weights come back where the main process has a place for them."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.callbacks.test_loading", str(file), strategy, before]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    # others talk as well: the report, and gloo
    found = [json.loads(values) for values in re.findall(r"found (\[.*?\])", done.stdout)]
    assert found == [[4.0, *main]] * (2 if strategy == "ddp" else 1)


def test_a_slim_module_by_another_plan_is_refused(file: Path, tmp_path: Path) -> None:
    run, task, _ = slim(file, max_epochs=1)
    run.fit(task, image_loader(1))
    other = seeded(Task)
    plan = choose(trace(other.net, torch.zeros(2, 3, 6, 6)), ratio=0.25)
    prune_(other.net, plan)
    save_slim(other.net, tmp_path / "other.safetensors", plan)
    with pytest.raises(SlimFileError, match="slim by another plan already"):
        quiet_trainer(LoadPruned(tmp_path / "other.safetensors", module="net")).fit(task, image_loader(1))


def test_bad_files_and_names_are_refused_before_the_first_step(file: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(file.read_bytes()[:-50])
    for path, module, error, match in (
        (tmp_path / "none", "net", SlimFileError, "can't be read"),
        (tmp_path / "broken", "net", SlimFileError, "can't be read"),
        (file, "", SlimFileError, "does not fit this Task"),
        (file, "nett", ConfigurationError, "its children are: net"),
    ):
        task, watch = seeded(Task), Watch()
        with pytest.raises(error, match=match):
            quiet_trainer(LoadPruned(path, module=module), watch).fit(task, image_loader(1))
        assert watch.widths == [] and task.net.conv1.out_channels == 8
        assert not {"on_load_checkpoint", "on_save_checkpoint"} & vars(task).keys()


class Width(Callback):
    """Metrics come back from child processes."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.log("width", float(pl_module.net.conv1.out_channels))


def launched(file: str, strategy: str, before: str) -> None:
    """Train on two processes; what the main process knows afterwards goes to standard output."""
    task = seeded(Task)
    settings: dict[str, Any] = {"max_epochs": 2, "strategy": strategy, "devices": 2, "limit_val_batches": 0}
    if before == "slim":
        load_slim(file, task.net)
    if before == "pruned":
        surgery = StructuralPruning(latency_batches=(), report_file=None)
        run = quiet_trainer(Picker(epochs=1), surgery, Width(), **settings)
    else:
        run, *_ = slim(Path(file), task, Width(), **settings)
    run.fit(task, image_loader(BATCHES))
    moved = not torch.equal(task.net.stem.weight, torch.as_tensor(seeded(Task).net.stem.weight))
    found = run.callback_metrics["width"].item(), task.net.conv1.weight.shape[0], moved
    sys.stdout.write(f"found {json.dumps(found)}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    launched(*sys.argv[1:])
