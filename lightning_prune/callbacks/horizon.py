"""How much of a run lies ahead."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer


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
