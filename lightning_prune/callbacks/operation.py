"""Surgery on a module in training: what has to happen around ``prune_`` so that the same fit goes on."""

from __future__ import annotations

import gc

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from lightning_prune.callbacks.checkpointing import remember_
from lightning_prune.callbacks.neighbours import average_models, forget_dense_scores_
from lightning_prune.callbacks.ranks import run_together
from lightning_prune.errors import PruningError
from lightning_prune.structure import Plan, prune_
from lightning_prune.structure.plan import submodule


def operate_(trainer: Trainer, pl_module: LightningModule, module: str, plan: Plan) -> None:
    """Apply a plan to the module in training, to its optimisers' state and to its weight averages, on every rank.

    Args:
        trainer: between two batches of a fit.
        pl_module: the module in training.
        module: name of the pruned submodule, ``""`` for ``pl_module`` itself.
        plan: the same on all ranks.

    Raises:
        PruningError: the plan could not be applied, here or on another rank.
    """
    is_wrapped = bool(plan.lengths()) and _unwrap_(trainer, pl_module)
    run_together(trainer, lambda: _cut_(trainer, pl_module, module, plan))
    if is_wrapped:
        _wrap_(trainer)
    remember_(pl_module, module, plan)
    forget_dense_scores_(trainer)
    trainer.strategy.barrier("lightning_prune.surgery")


def _cut_(trainer: Trainer, pl_module: LightningModule, module: str, plan: Plan) -> None:
    prune_(submodule(pl_module, module), plan, trainer.optimizers)
    for average in average_models(trainer):
        prune_(submodule(average, module), plan)


def _unwrap_(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Drop DDP's reducer, whose buckets and gradient hooks know the dense shapes."""
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy) or not isinstance(strategy.model, DistributedDataParallel):
        return False
    strategy.model = pl_module
    gc.collect()
    return True


def _wrap_(trainer: Trainer) -> None:
    """Wrap anew: buckets of the slim shapes; parameters and buffers of rank 0 go to everybody."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        strategy.configure_ddp()
        strategy._pl_static_graph_delay_done = False


def held_parameters(trainer: Trainer, pl_module: LightningModule) -> list[str]:
    """Names of the trainable parameters that some optimiser holds."""
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    return [name for name, p in pl_module.named_parameters() if p.requires_grad and id(p) in held]


def refuse_orphans(trainer: Trainer, pl_module: LightningModule, held_before: list[str]) -> None:
    """The last check of every surgery: who was trained before is trained afterwards.

    Raises:
        PruningError: an optimiser no longer holds a live parameter that was held before.
    """
    orphans = set(held_before) - set(held_parameters(trainer, pl_module))
    if orphans:
        raise PruningError(
            f"After surgery no optimiser holds {min(orphans)!r} ({len(orphans)} of {len(held_before)} parameters that"
            " were trained before); the run stops, for it would leave them as they are."
        )
