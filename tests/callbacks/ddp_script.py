"""Run as a script by test_structural.py: surgery on two processes, with one line of findings per process and option."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lightning_prune.callbacks import examination
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.errors import ProofError, PruningError
from tests.callbacks.nets import seeded
from tests.callbacks.slimming import Task, run
from tests.callbacks.test_checkpointing import checkpointed

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "find_unused": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "bucket_view": {"gradient_as_bucket_view": True},
}


def digest(tensors: list[Tensor]) -> str:
    """A hash of the bytes."""
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().contiguous().numpy().tobytes())
    return whole.hexdigest()[:12]


class Hashes(Callback):
    """Parameters and momentum at each epoch's end; everything right after surgery."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 2:
            self.found.append(digest(list(pl_module.state_dict().values())))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
        assert all(p.shape == state["momentum_buffer"].shape for p, state in optimizer.state.items())
        self.found += [digest(list(pl_module.parameters())), digest(momenta)]


def note(folder: Path, option: str, **findings: Any) -> None:
    """One line, written at once: both processes append to the same file."""
    with (folder / "out.jsonl").open("a") as file:
        file.write(json.dumps({"option": option, **findings}) + "\n")


def ranks_stay_equal(folder: Path) -> None:
    """All options, one after the other."""
    for name, options in OPTIONS.items():
        hashes, surgery = Hashes(), StructuralPruning(monitor="val_acc", latency_batches=())
        strategy = DDPStrategy(process_group_backend="gloo", **options)
        average = EMAWeightAveraging(decay=0.9)
        result = run(folder, average, hashes, task=seeded(Task), surgery=surgery, devices=2, strategy=strategy)
        assert surgery.plan is not None
        assert (surgery.report is not None) == result.trainer.is_global_zero
        note(folder, name, hashes=hashes.found, widths=result.watch.widths, plan=str(surgery.plan))


def resumed_runs_end_equal(folder: Path) -> None:
    """From the checkpoint right before surgery, and from the one after the first finetuned epoch."""
    settings: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
    full, checkpoints = checkpointed(folder / "full", task=seeded(Task), **settings)
    for epoch in (2, 3):
        path = checkpoints[epoch * len(full.watch.widths) // 4]
        again = run(folder / str(epoch), task=seeded(Task), ckpt_path=path, **settings)
        found = digest(list(full.task.parameters())) == digest(list(again.task.parameters()))
        note(folder, f"resumed from epoch {epoch}", equal=found, plan=str(again.surgery.plan))


def one_rank_fails(folder: Path) -> None:
    """The proof fails on the second rank alone: both of them stop, and both say why."""

    def fail(*_: Any, **__: Any) -> Any:
        raise ProofError("It departs here.")

    task = seeded(Task)
    if os.environ.get("LOCAL_RANK") == "1":
        examination.prove = fail
    try:
        run(folder, task=task, devices=2, strategy="ddp")
    except PruningError as error:
        note(folder, "failing rank", error=type(error).__name__, says=str(error), width=task.net.conv1.out_channels)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ranks_stay_equal(Path(sys.argv[1]))
    resumed_runs_end_equal(Path(sys.argv[1]))
    one_rank_fails(Path(sys.argv[1]))
    torch.distributed.barrier()  # nobody waits for the second process; its last line has to be there
    torch.distributed.destroy_process_group()  # its threads must not outlive the interpreter
