"""Runs that are killed with SIGKILL and resumed: ``python -m tests.callbacks.kills FOLDER ROW OPTIMIZER KILLS SEED``.

Every run is a child of one process that has imported everything, so that twenty kills take seconds, not minutes.
Each child takes the newest checkpoint there is, if any, and goes on until it is killed or done; the last one writes its
weights and losses. One line per life goes to standard output.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prune.callbacks.structural import StructuralPruning
from tests.callbacks.nets import OPTIMIZERS, Classifier, seeded, trainer
from tests.callbacks.slimming import BATCHES as RESUMABLE_BATCHES
from tests.callbacks.test_checkpointing import Resumable
from tests.settings import EPOCHS, SETTINGS

MOMENTS = ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end")


class Death(Callback):
    """Kills its own process in a hook of a step; ``None`` lets it live."""

    def __init__(self, step: int | None, moment: str) -> None:
        self.step = step
        setattr(self, moment, self.strike)

    def strike(self, run: Trainer, *_: Any) -> None:
        if self.step is not None and run.global_step >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Diary(Callback):
    """The loss of every step, also of the lives before."""

    def __init__(self) -> None:
        self.losses: dict[str, float] = {}

    def on_train_batch_end(self, run: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses[str(run.global_step)] = outputs["loss"].item()

    def state_dict(self) -> dict[str, Any]:
        return dict(self.losses)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = dict(state)


def live(folder: Path, row: str, optimizer: str, step: int | None, moment: str) -> None:
    """One life, from the newest checkpoint to death or the end."""
    warnings.simplefilter("ignore")
    folder.mkdir(exist_ok=True)
    kept = sorted(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    module, diary = Classifier(seeded(SETTINGS[row].net), optimizer), Diary()
    # Never in an epoch's last batch: from there Lightning itself, without any callback of ours, goes astray when it is
    # resumed twice.
    keepers = [
        ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1),
        ModelCheckpoint(folder, "{step}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True),
    ]
    callbacks = [Death(step, moment), SETTINGS[row].build(), StructuralPruning(report_file=None, latency_batches=())]
    run = trainer(*callbacks, diary, *keepers, max_epochs=EPOCHS + 1, enable_checkpointing=True)
    run.fit(module, Resumable(), ckpt_path=kept[-1] if kept else None)
    torch.save({"weights": module.state_dict(), "losses": diary.losses}, folder / "end.pt")


def in_a_child(work: Callable[[], None]) -> int:
    """The signal that ended the child; 0 where it came to its end."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the child's own, to its end
            work()
            status = 0
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code > 0:
        raise SystemExit(f"A run failed instead of being killed: exit code {code}.")
    return -code


def main(folder: Path, row: str, optimizer: str, kills: int, seed: int) -> None:
    """An uninterrupted run, and one that dies again and again."""
    torch.set_num_threads(1)
    dice = random.Random(f"{row} {optimizer} {seed}")
    in_a_child(lambda: live(folder / "whole", row, optimizer, None, MOMENTS[0]))
    total = (EPOCHS + 1) * RESUMABLE_BATCHES
    for step in sorted(dice.sample(range(1, total), min(kills, total - 1))):
        moment = dice.choice(MOMENTS)
        died = in_a_child(lambda step=step, moment=moment: live(folder / "killed", row, optimizer, step, moment))
        sys.stdout.write(json.dumps({"step": step, "moment": moment, "signal": died}) + "\n")
    in_a_child(lambda: live(folder / "killed", row, optimizer, None, MOMENTS[0]))


if __name__ == "__main__":
    assert set(OPTIMIZERS) >= {sys.argv[3]}
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
