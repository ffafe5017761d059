"""A fit that prunes nothing, and comes before the one that does: one batch of it, so that the script can go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, Checkpoint, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_prune.callbacks.neighbours import callbacks_of

LEFT_OUT = (Checkpoint, BatchSizeFinder, LearningRateFinder)
"""Callbacks that write files, or that run trainings of their own."""


class Nowhere(DummyLogger):
    """A logger that takes whatever its users call, and writes none of it.

    Args:
        folder: where what they write by hand may go.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = folder

    @property
    def save_dir(self) -> str:
        """A folder that is deleted in the end."""
        return self._folder

    log_dir = root_dir = save_dir


class Glance(Callback):
    """Ends a fit after one batch and, where it has validation, one batch of that.

    What the fit writes by ``ModelCheckpoint`` lies in a folder that is deleted in the end: the script may load it.

    Args:
        folder: that one.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._before: list[tuple[Any, str, Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let checkpoints go elsewhere, and leave out what writes or trains besides."""
        kept = callbacks_of(trainer)
        for number, callback in enumerate(kept):
            if isinstance(callback, ModelCheckpoint):
                callback.dirpath = str(Path(self._folder) / f"checkpoints{number}")
        kept = [each for each in kept if isinstance(each, ModelCheckpoint) or not isinstance(each, LEFT_OUT)]
        trainer.callbacks = kept  # type: ignore[attr-defined]  # Lightning sets it from afar

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the first batch be enough for a step, a validation and the end."""
        loop = trainer.fit_loop
        enough = ((trainer, "accumulate_grad_batches", 1), (trainer, "check_val_every_n_epoch", 1))
        for owner, name, value in (*enough, (loop, "min_epochs", None), (loop.epoch_loop, "min_steps", None)):
            self._before.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """That was it."""
        trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the trainer as it was: it may be asked to prune next."""
        for owner, name, value in self._before:
            setattr(owner, name, value)
        trainer.callbacks = [each for each in callbacks_of(trainer) if each is not self]  # type: ignore[attr-defined]
