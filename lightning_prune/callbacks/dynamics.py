"""What the regularisers ask the trainer and its optimisers: how many steps, and what a step does to a penalty."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning.pytorch import Trainer
from torch import nn
from torch.optim import ASGD, LBFGS, SGD, Optimizer

from lightning_prune.callbacks.watching import check
from lightning_prune.schedules import Dynamics


def steps_per_epoch(trainer: Trainer) -> int | None:
    """Optimiser steps in one epoch; ``None`` where the loader doesn't know. Manual optimisation: one per batch."""
    batches = trainer.num_training_batches
    if math.isinf(batches):
        return None
    return math.ceil(batches / trainer.accumulate_grad_batches)


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


def refuse_sharded_state(optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimisers whose state lies on other ranks, where nobody can slice it."""
    for optimizer in optimizers:
        kinds = [kind.__name__ for kind in type(optimizer).__mro__]
        message = "The sharded state of ZeroRedundancyOptimizer can't be sliced; use another optimiser for pruning."
        check("ZeroRedundancyOptimizer" not in kinds, message)
