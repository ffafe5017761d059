"""How much of a run lies ahead."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning.pytorch import Trainer

from lightning_prune.callbacks.base import Regulariser
from lightning_prune.callbacks.dynamics import counts_batches, steps_per_epoch
from lightning_prune.errors import ConfigurationError


def remaining_steps(trainer: Trainer, batches_done: int) -> int:
    """Optimiser steps from now to the end of the run; -1 where the run has no end.

    Args:
        trainer: between two batches.
        batches_done: how many batches of the current epoch lie behind.
    """
    bounds: list[float] = []
    batches, window = trainer.num_training_batches, trainer.accumulate_grad_batches
    if trainer.max_epochs is not None and trainer.max_epochs != -1 and batches != math.inf:
        later_epochs = trainer.max_epochs - trainer.current_epoch - 1
        bounds.append(math.ceil((batches - batches_done) / window) + math.ceil(batches / window) * later_epochs)
    if trainer.max_steps != -1:
        bounds.append(trainer.max_steps - trainer.global_step)
    return max(0, int(min(bounds))) if bounds else -1


def another_epoch_starts(trainer: Trainer, batches_done: int) -> bool:
    """Whether another epoch follows the present one, as far as the trainer's limits can tell."""
    if trainer.max_epochs is not None and trainer.max_epochs != -1 and trainer.current_epoch + 1 >= trainer.max_epochs:
        return False
    batches = trainer.num_training_batches
    if batches == math.inf:
        return False
    steps = math.ceil((batches - batches_done) / trainer.accumulate_grad_batches)
    return trainer.max_steps == -1 or trainer.global_step + steps < trainer.max_steps


def refuse_late_surgery(trainer: Trainer, partners: Sequence[Regulariser], at_epoch: int | None) -> None:
    """Refuse a surgery before which nobody knows what goes, or after which no step is left.

    Args:
        trainer: before its first step, when it knows its batches.
        partners: the regularisers.
        at_epoch: epoch of surgery where the user says so.

    Raises:
        ConfigurationError: in that case.
    """
    per_epoch = steps_per_epoch(trainer)
    if trainer.fast_dev_run or not counts_batches(trainer):  # type: ignore[attr-defined]  # Lightning sets it from afar
        return
    has_epochs = per_epoch is not None and trainer.max_epochs is not None and trainer.max_epochs != -1
    bounds = [(per_epoch or 0) * (trainer.max_epochs or 0)] if has_epochs else []
    total = min([*bounds, trainer.max_steps] if trainer.max_steps != -1 else bounds, default=math.inf)
    for partner in partners:
        stage = partner.timetable(trainer)
        first = max(partner.start, trainer.current_epoch)
        if stage is None or (per_epoch is None and (first or at_epoch)):
            continue
        who, start = type(partner).__name__, (per_epoch or 0) * first
        end = (per_epoch or 0) * at_epoch if at_epoch is not None else start + (stage.length or 0)
        if at_epoch is not None and end < start + stage.known:
            raise ConfigurationError(
                f"at_epoch={at_epoch} comes after {end} optimiser steps, but {who} knows only after"
                f" {start + stage.known} which channels go; choose a later epoch."
            )
        if total <= end:
            raise ConfigurationError(
                f"Surgery comes after {end} optimiser steps ({who}), and this run ends after {total}; raise max_epochs"
                " or max_steps, or shorten the sparse stage."
            )


def refuse_bad_times(trainer: Trainer, partners: Sequence[Regulariser], at_epoch: int | None) -> None:
    """Refuse a surgery that would come before the pick or after the end, as far as epochs can tell beforehand.

    Args:
        trainer: before its fit; a ``fast_dev_run`` ends before anything can happen, so everything goes there.
        partners: the regularisers.
        at_epoch: epoch of surgery where the user says so.

    Raises:
        ConfigurationError: in that case.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it from afar
        return
    last_start = max(partner.start for partner in partners)
    if at_epoch is not None and at_epoch <= last_start:
        raise ConfigurationError(
            f"at_epoch={at_epoch} must lie after epoch {last_start}, in which the last sparse stage begins."
        )
    ends = [partner.start + partner.epochs for partner in partners if partner.epochs is not None]
    surgery = at_epoch if at_epoch is not None else max(ends, default=0)
    if trainer.max_epochs is not None and trainer.max_epochs != -1 and surgery >= trainer.max_epochs:
        raise ConfigurationError(
            f"Surgery falls on the start of epoch {surgery}, but the run has epochs 0 to {trainer.max_epochs - 1} only;"
            " raise the trainer's max_epochs."
        )
