"""The optimiser and the learning-rate schedule of what follows surgery."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_prune.door import check
from lightning_prune.errors import ConfigurationError

Finetune = Literal["continue", "restart"]
_LENGTHS = ("T_max", "total_steps", "total_iters")
ALL_THAT_REMAIN = -1


@dataclass(frozen=True)
class FinetuneStage:
    """How training goes on after surgery.

    Args:
        mode: "continue" keeps optimisers and schedulers, "restart" asks ``configure_optimizers`` again.
        optimizer: builds the stage's own optimiser from a list of parameters; the module's schedulers end with its
            optimiser.
        scheduler: builds the stage's own schedule from its optimiser. It is stepped once per optimiser step, counted
            from surgery; a ``T_max``, ``total_steps`` or ``total_iters`` of -1 stands for all remaining steps.
    """

    mode: Finetune = "continue"
    optimizer: OptimizerCallable | None = None
    scheduler: LRSchedulerCallable | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("continue", "restart"):
            raise ConfigurationError(f'finetune={self.mode!r} is neither "continue" nor "restart".')
        for name, build in (("optimizer", self.optimizer), ("scheduler", self.scheduler)):
            is_builder = build is None or callable(build)
            check(is_builder, f"finetune_{name}={build!r} must be a function, such as functools.partial(...).")
        if self.mode == "restart" and self.optimizer is not None:
            raise ConfigurationError(
                'finetune="restart" asks the module for its optimiser, finetune_optimizer brings another: give one.'
            )

    @property
    def brings_schedule(self) -> bool:
        """Whether the schedules that held before surgery end there."""
        return self.mode == "restart" or self.optimizer is not None or self.scheduler is not None

    def check(self, trainer: Trainer) -> None:
        """Refuse what can't work with this trainer, before the first step.

        Raises:
            ConfigurationError: the stage's own optimiser or schedule meets several optimisers, or a schedule of all
                remaining steps meets a run without end.
        """
        own = "finetune_optimizer" if self.optimizer is not None else "finetune_scheduler"
        if (self.optimizer is not None or self.scheduler is not None) and len(trainer.optimizers) != 1:
            count = len(trainer.optimizers)
            raise ConfigurationError(f"{own} needs a module with one optimiser; this one has {count}.")
        if self._open_lengths() and trainer.max_epochs == -1 and trainer.max_steps == -1:
            raise ConfigurationError(
                f"finetune_scheduler has {self._open_lengths()[0]}=-1 (all remaining steps), but this run has no"
                " max_epochs and no max_steps."
            )

    def begin_(self, trainer: Trainer, parameters: list[nn.Parameter], remaining: int) -> None:
        """Exchange the trainer's optimisers and schedulers as far as this stage brings its own.

        Args:
            trainer: its module's parameters have their final shapes.
            parameters: what the stage's own optimiser is to hold.
            remaining: optimiser steps from surgery to the end of the run.
        """
        if self.mode == "restart":
            with _shortened(trainer, remaining):
                trainer.strategy.setup_optimizers(trainer)
        if self.optimizer is not None:
            trainer.strategy.optimizers = [self.optimizer(parameters)]
            trainer.strategy.lr_scheduler_configs = []
        if self.scheduler is not None:
            optimizer = trainer.strategy.optimizers[0]
            trainer.strategy.lr_scheduler_configs = [self._schedule(self.scheduler, optimizer, remaining)]

    def _schedule(self, build: LRSchedulerCallable, optimizer: Optimizer, remaining: int) -> LRSchedulerConfig:
        for group in optimizer.param_groups:
            # The first schedule's mark; the new one starts from the rate that holds now.
            group.pop("initial_lr", None)
        lengths: dict[str, Any] = dict.fromkeys(self._open_lengths(), remaining)
        scheduler = build(optimizer, **lengths)
        plateau = isinstance(scheduler, ReduceLROnPlateau)
        return LRSchedulerConfig(
            scheduler,
            interval="epoch" if plateau else "step",
            reduce_on_plateau=plateau,
            monitor=getattr(scheduler, "monitor", None),
        )

    def _open_lengths(self) -> tuple[str, ...]:
        # What LightningCLI builds from YAML is a partial as well.
        given = self.scheduler.keywords if isinstance(self.scheduler, partial) else {}
        return tuple(name for name in _LENGTHS if given.get(name) == ALL_THAT_REMAIN)


@contextmanager
def _shortened(trainer: Trainer, remaining: int) -> Iterator[None]:
    """Lets ``configure_optimizers`` see a run of the remaining length.

    A module may derive its schedule from ``trainer.estimated_stepping_batches``, ``max_steps`` or ``max_epochs``.
    """
    loop, steps_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    epochs, steps = loop.max_epochs, steps_loop.max_steps
    if epochs is not None and epochs != -1:
        loop.max_epochs = max(1, epochs - trainer.current_epoch)
    if remaining > 0:
        steps_loop.max_steps = remaining
    try:
        yield
    finally:
        loop.max_epochs, steps_loop.max_steps = epochs, steps
