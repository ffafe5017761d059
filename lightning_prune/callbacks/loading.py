"""The second of two runs: a dense module becomes the slim one of a file, and is trained on, validated or used."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_prune.callbacks.base import Regulariser
from lightning_prune.callbacks.checkpointing import AppliedPlan, attach_, detach_, history, remember_
from lightning_prune.callbacks.neighbours import average_models, callbacks_of
from lightning_prune.callbacks.permanence import PermanentMask
from lightning_prune.callbacks.ranks import run_together
from lightning_prune.callbacks.watching import configured_, refuse_sharded_parameters
from lightning_prune.door import check
from lightning_prune.errors import ConfigurationError, SlimFileError
from lightning_prune.structure import Plan, SparsityPlan, signature
from lightning_prune.structure.plan import submodule
from lightning_prune.structure.slim_file import read_slim


class LoadPruned(Callback):
    """Turns any Trainer, or LightningCLI config, into the finetune stage of a slim file.

    Shapes and weights are those of the file before the optimiser is built and DDP wraps the module, on every rank and
    in every launcher. Single weights that the file has at zero stay there while the run trains. A module that has been
    through the file's plan already (a second ``fit``, ``test`` after ``fit``, one that
    :func:`~lightning_prune.load_slim` made) is left as it is. Checkpoints carry the plan, so that they resume and load
    like any other.

    Launchers that train in child processes (``ddp_spawn``, ``ddp_fork``, notebooks) bring no slim weights back into a
    dense module of the main process: call ``load_slim`` on it before, or use the checkpoint.

    Args:
        path: of a file that :func:`~lightning_prune.save_slim` wrote.
        module: name of the submodule that the file holds; ``""`` for the LightningModule itself.

    Raises:
        SlimFileError: where the file is damaged, foreign, or belongs to another model; before the first step.
        ConfigurationError: where the strategy shards parameters, the module has no submodule of that name, or a
            regulariser is to remove channels of a network whose single weights stay at zero.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(callbacks=[LoadPruned("slim.safetensors")], logger=False, enable_checkpointing=False)
    """

    def __init__(self, path: str | os.PathLike[str], *, module: str = "") -> None:
        super().__init__()
        check(isinstance(path, (str, os.PathLike)), f"path={path!r} must name the slim file.")
        check(isinstance(module, str), f"module={module!r} must be a string.")
        self.path = os.fspath(path)
        self.module = module
        self._has_cut = False
        self._plan: Plan | None = None
        self._permanent = PermanentMask()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the module slim, once."""
        if stage == "fit":
            refuse_sharded_parameters(type(trainer.strategy), self)
        run_together(trainer, lambda: self._slim(trainer, pl_module), "LoadPruned")
        attach_(pl_module)

    def _slim(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            network = submodule(configured_(pl_module), self.module)
        except AttributeError:
            children = ", ".join(name for name, _ in pl_module.named_children())
            raise ConfigurationError(
                f"module={self.module!r} is no part of the LightningModule; its children are: {children}."
            ) from None
        found = read_slim(self.path)
        plan = self._plan = found.plan
        _refuse_mixture(trainer, plan)
        if not history(pl_module):
            self._has_cut = found.header.get("signature") != signature(network)
            if self._has_cut or isinstance(plan, SparsityPlan):  # which no signature shows
                for whole in (pl_module, *average_models(trainer)):  # averages that have copied the dense module
                    found.fill_(submodule(whole, self.module))
            remember_(pl_module, self.module, plan)
        elif AppliedPlan(self.module, plan) not in history(pl_module):
            raise SlimFileError(f"{self.path} belongs to a dense module; this one is slim by another plan already.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to keep masked weights at zero."""
        self._hold(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Set the gradients of masked weights to zero."""
        if not self._permanent.knows(trainer.optimizers):  # a stage on the way has brought its own
            self._hold(trainer, pl_module)
        self._permanent.before_step(optimizer)

    def _hold(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._plan is not None:
            self._permanent.hold_(submodule(pl_module, self.module), self._plan, trainer.optimizers)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._permanent.let_go()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind except, on a slim module, the plan in its checkpoints."""
        self._permanent.let_go()
        detach_(pl_module)
        if self._has_cut and stage == "fit":
            bring_nothing_back_(trainer, pl_module)


def _refuse_mixture(trainer: Trainer, plan: Plan) -> None:
    if isinstance(plan, SparsityPlan) and any(
        isinstance(callback, Regulariser) and callback.granularity == "channel" for callback in callbacks_of(trainer)
    ):
        raise ConfigurationError(
            "The file's mask of single weights stays as it is, so no channels can be removed in this run; with"
            " load_slim instead of LoadPruned they can."
        )


def bring_nothing_back_(trainer: Trainer, pl_module: LightningModule) -> None:
    """In a child process: keep its launcher from loading slim weights into the dense module of the main process.

    That would fail after all the training, for nobody can cut the main process's module from here.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        rank_zero_warn(
            "The module in the main process stays dense, for this launcher trains in child processes; load the slim"
            " network from its checkpoint."
        )
        vars(pl_module)["state_dict"] = _nothing


def _nothing(*_: Any, **__: Any) -> dict[str, Any]:
    return {}
