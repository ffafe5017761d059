"""What the regularisers ask the trainer and its optimisers: how many steps, and what a step does to a penalty."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.optim import ASGD, LBFGS, SGD, Optimizer

from lightning_prune.door import check
from lightning_prune.errors import ConfigurationError
from lightning_prune.schedules import Dynamics


def steps_per_epoch(trainer: Trainer) -> int | None:
    """Optimiser steps in one epoch; ``None`` where the loader doesn't know. Manual optimisation: one per batch."""
    batches = trainer.num_training_batches
    if math.isinf(batches):
        return None
    return math.ceil(batches / trainer.accumulate_grad_batches)


def counts_batches(trainer: Trainer) -> bool:
    """Whether batches tell how many optimiser steps there will be.

    They don't under manual optimisation, nor where the accumulation window changes on the way.
    """
    changes = any(
        isinstance(callback, GradientAccumulationScheduler) and len(callback.scheduling) > 1
        for callback in trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it from afar
    )
    return trainer.lightning_module.automatic_optimization and not changes


def stage_steps(trainer: Trainer, epochs: int | None) -> int | None:
    """Optimiser steps of a sparse stage that is given in epochs.

    Raises:
        ConfigurationError: nobody knows how many batches an epoch has.
    """
    if epochs is None:
        return None
    per_epoch = steps_per_epoch(trainer)
    if per_epoch is None:
        raise ConfigurationError(
            f"epochs={epochs} needs a known number of batches per epoch; set limit_train_batches to one."
        )
    # a dry run has fewer steps than any schedule needs
    return max(per_epoch * epochs, 2) if trainer.fast_dev_run else per_epoch * epochs  # type: ignore[attr-defined]


def steps_until(trainer: Trainer, epoch: int) -> int | None:
    """Optimiser steps from now to the beginning of an epoch, at least 0; ``None`` where batches don't tell."""
    per_epoch = steps_per_epoch(trainer)
    if per_epoch is None or not counts_batches(trainer):
        return None
    batches: int = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    taken = min(math.ceil(batches / trainer.accumulate_grad_batches), per_epoch)
    return max(0, per_epoch * (epoch - trainer.current_epoch) - taken)


def logs_after(trainer: Trainer, steps: int) -> bool:
    """Whether the trainer's ``log_every_n_steps`` asks for a log entry after so many steps; 0 never does."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it from afar
    return bool(every) and steps % every == 0


def is_last_batch(trainer: Trainer, batch_idx: int) -> bool:
    """Whether this training batch is the last one of its epoch."""
    return bool(trainer.is_last_batch) or batch_idx + 1 >= trainer.num_training_batches


def refuse_misfit(trainer: Trainer, who: str, start: int, epochs: int | None, length: int | None) -> None:
    """Refuse a sparse stage that the run is too short for.

    Args:
        trainer: before its first step.
        who: has the stage.
        start: epoch at which the stage begins.
        epochs: its length, where it is given so.
        length: its optimiser steps, where they are known.

    Raises:
        ConfigurationError: in that case.
    """
    if trainer.fast_dev_run or length is None:  # type: ignore[attr-defined]
        return
    per_epoch = steps_per_epoch(trainer)
    needed = length + (per_epoch or 0) * start
    what = f"{who}: start={start} and {length} optimiser steps of schedule don't fit into"
    limit, can_tell = trainer.max_epochs, counts_batches(trainer)
    if epochs is not None:
        what = f"{who}: start={start} and epochs={epochs} don't fit into"
        if limit is not None and 0 <= limit < start + epochs:
            raise ConfigurationError(f"{what} max_epochs={limit}.")
    elif can_tell and per_epoch is not None and limit is not None and 0 <= limit * per_epoch < needed:
        raise ConfigurationError(f"{what} max_epochs={limit} of {per_epoch} steps.")
    if can_tell and 0 <= trainer.max_steps < needed:
        raise ConfigurationError(f"{what} max_steps={trainer.max_steps}.")


def dynamics_of(optimizer: Optimizer, parameters: Sequence[nn.Parameter] = ()) -> Dynamics:
    """How an optimiser treats the given parameters (default: all of its own)."""
    wanted = {id(parameter) for parameter in parameters}
    groups = [
        group
        for group in optimizer.param_groups
        if not wanted or any(id(parameter) in wanted for parameter in group["params"])
    ] or optimizer.param_groups
    # a warm-up may begin at 0; what it begins from is then the best guess
    rates = [float(group["lr"]) or float(group.get("initial_lr", 0.0)) for group in groups]
    rates = [rate for rate in rates if rate > 0] or [1e-3]
    if isinstance(optimizer, (SGD, ASGD, LBFGS)):
        return Dynamics(max(rates), max(float(group.get("momentum", 0.0)) for group in groups), False, min(rates))
    return Dynamics(max(rates), 0.0, True, min(rates))


def refuse_frozen(module: nn.Module, who: str) -> None:
    """Refuse a module that has parameters, but none that is trained."""
    message = f"{who}: every parameter of {type(module).__name__} is frozen, so there is nothing to train or prune."
    parameters = list(module.parameters())
    check(not parameters or any(parameter.requires_grad for parameter in parameters), message)


def refuse_sharded_state(optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimisers whose state lies on other ranks, where nobody can slice it."""
    for optimizer in optimizers:
        kinds = [kind.__name__ for kind in type(optimizer).__mro__]
        message = "The sharded state of ZeroRedundancyOptimizer can't be sliced; use another optimiser for pruning."
        check("ZeroRedundancyOptimizer" not in kinds, message)
