"""A live view of the sparse stage: in the progress bar and in whatever logger there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_prune.callbacks.base import Regulariser
from lightning_prune.callbacks.decision import decide, find_partners
from lightning_prune.callbacks.dynamics import logs_after
from lightning_prune.callbacks.neighbours import callbacks_of
from lightning_prune.callbacks.outlook import is_settled, log_outlook, look_ahead
from lightning_prune.callbacks.recording import Diary, numbers_of
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.callbacks.watching import reading_state
from lightning_prune.door import switch, text, whole
from lightning_prune.errors import ConfigurationError
from lightning_prune.reports import plots
from lightning_prune.reports.wording import first_line


class PruningMonitor(Callback):
    r"""Shows how far the sparse stage has come; training is the same with and without it, bit for bit.

    Beside phase, strength and energy, which every method logs, in the progress bar and the logger for each method:

    * ``separation``: root mean square of a weight that stays over that of one that will go,
      :math:`\sqrt{\overline{W_{stays}^2} / \overline{W_{goes}^2}}`, in the median tensor, at most 1e6; for ASCP the
      size of channels over their distance to what will stand for them. It begins near 1 and grows.
    * ``steps_left``: optimiser steps until surgery may follow.
    * ``penalty``: what was added to the loss (or taken off the weights), in units of the loss.

    With ``monitor`` also, at the end of epochs, ``if_cut/<metric>``: what the metric would be if the channels went now,
    and ``if_cut/<metric>_change``: by how much that changes it. The device is waited for once per logging interval
    (``log_every_n_steps`` of the trainer).

    Args:
        monitor: metric that ``validation_step`` logs; each look takes two validation passes, which loggers and
            checkpoints don't see. ``None`` takes none.
        every_n_epochs: epochs from one look, and from one figure, to the next.
        figures: draw energy and separation by epoch for loggers that take figures (TensorBoard, W&B), where matplotlib
            is installed.

    Raises:
        ConfigurationError: an argument is out of range, or the trainer has no regulariser.

    >>> PruningMonitor("val_acc", every_n_epochs=5).monitor
    'val_acc'
    """

    def __init__(self, monitor: str | None = None, *, every_n_epochs: int = 1, figures: bool = True) -> None:
        super().__init__()
        text("monitor", monitor)
        switch("figures", figures)
        whole("every_n_epochs", every_n_epochs, least=1)
        self.monitor = monitor
        self.every_n_epochs = every_n_epochs
        self.figures = figures
        self._regularisers: list[Regulariser] = []
        self._begin()

    def _begin(self) -> None:
        """Everything that belongs to one fit."""
        self._diary = Diary()
        self._shown = -1
        self._can_draw = True
        self._keys: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find what there is to watch."""
        if stage == "fit":
            self._regularisers = find_partners(trainer, type(self).__name__)
            self._begin()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where no look can be taken."""
        if self.monitor is not None and not trainer.enable_validation:
            rank_zero_warn(f"PruningMonitor: monitor={self.monitor!r} stays unknown, for this run has no validation.")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the numbers, once per logging interval."""
        if batch_idx == 0:
            self._wipe(trainer)
        if trainer.global_step == self._shown or not logs_after(trainer, trainer.global_step):
            return
        self._shown = trainer.global_step
        readings = [each.reading() for each in self._active()]
        for reading, numbers in zip(readings, numbers_of(readings), strict=True):
            shown = {"separation": numbers["separation"], "steps_left": reading.steps_left}
            for name, value in {**shown, "penalty": numbers["penalty"]}.items():
                if value is not None:
                    # on the CPU, so that no progress bar waits for the device to read it
                    pl_module.log(f"{reading.label}/{name}", torch.tensor(float(value)), prog_bar=name in shown)
                    self._keys.add(f"{reading.label}/{name}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look ahead and draw, every few epochs of the sparse stage."""
        active = self._active()
        if not active:
            return
        self._diary.note_epoch(trainer, active)
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._look_ahead(trainer, pl_module)
            self._draw(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The epochs so far, for the figures."""
        return self._diary.plain()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        with reading_state(type(self).__name__):
            self._diary.restore(state_dict)

    def _active(self) -> list[Regulariser]:
        return [each for each in self._regularisers if each.phase not in ("wait", "done")]

    def _wipe(self, trainer: Trainer) -> None:
        """After surgery no progress bar shows what was before."""
        if self._keys and not self._active():
            shown = trainer.progress_bar_metrics
            for key in [key for key in shown if key in self._keys or key.startswith("if_cut/")]:
                del shown[key]
            self._keys.clear()

    def _look_ahead(self, trainer: Trainer, pl_module: LightningModule) -> None:
        can_tell = trainer.enable_validation and all(map(is_settled, self._regularisers))
        if self.monitor is None or not can_tell or self._is_told(trainer):
            return
        capture = self._regularisers[0].capture
        if capture.graph is None:  # resumed between the last batch and here
            return
        decision = decide(pl_module, self._regularisers, capture, None)
        if decision is not None:
            log_outlook(pl_module, self.monitor, look_ahead(trainer, pl_module, decision, self.monitor))

    def _is_told(self, trainer: Trainer) -> bool:
        """Whether the surgery looks ahead itself at every epoch's end, and logs that."""
        surgeons = [each for each in callbacks_of(trainer) if isinstance(each, StructuralPruning)]
        return any(each.cut_when == "safe" and each.monitor == self.monitor for each in surgeons)

    def _draw(self, trainer: Trainer) -> None:
        """Hand figures to those loggers that take any, on the rank that logs."""
        if not (self.figures and self._can_draw and trainer.is_global_zero):
            return
        takers = [take for logger in trainer.loggers if (take := _taker(logger)) is not None]
        for quantity in ("energy", "separation") if takers else ():
            try:
                axes = plots.curves(self._diary.moments, quantity)
                for take in takers:
                    take(f"pruning/{quantity}", axes, trainer.global_step)
            except Exception as error:  # matplotlib is missing, or a logger takes no figures today
                said = str(error) if isinstance(error, ConfigurationError) else f"{first_line(error)}."
                rank_zero_warn(f"PruningMonitor draws no figures: {said}")
                self._can_draw = False
                return


def _taker(logger: Any) -> Callable[[str, Any, int], None] | None:
    """How a logger takes a figure, by what it can do; ``None`` where it can't."""
    add = getattr(getattr(logger, "experiment", None), "add_figure", None)
    if callable(add):  # TensorBoard
        return lambda name, axes, step: add(name, axes.figure, step)
    log = getattr(logger, "log_image", None)
    if callable(log):  # W&B
        return lambda name, axes, step: log(key=name, images=[plots.pixels(axes)], step=step)
    return None
