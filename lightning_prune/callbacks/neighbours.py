"""The other callbacks of a Trainer: weight averages that are slimmed along, memories that compare dense with slim."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

_STOP_HOOKS = ("on_validation_end", "on_train_epoch_end")


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """All callbacks, in the order in which their hooks are called."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it from afar
    return callbacks


def average_models(trainer: Trainer) -> Iterator[nn.Module]:
    """The copies of the LightningModule that weight-averaging callbacks (EMA, SWA) keep."""
    for callback in callbacks_of(trainer):
        average = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module):
            yield average.module if isinstance(average, AveragedModel) else average


def is_averaging(trainer: Trainer) -> bool:
    """Whether stochastic weight averaging has begun, so that its learning rate holds."""
    return any(isinstance(each, StochasticWeightAveraging) and each._initialized for each in callbacks_of(trainer))


def go_on_averaging_(trainer: Trainer, device: torch.device) -> None:
    """Let stochastic averaging go on after a resume without a learning rate of its own.

    By itself it would begin once more, and put its schedule in the place of the one that the finetune stage brings.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, StochasticWeightAveraging) and callback._average_model is not None:
            callback._average_model = callback._average_model.to(callback._device or device)
            callback.n_averaged = torch.tensor(callback._init_n_averaged, dtype=torch.long, device=device)
            callback._initialized, callback._scheduler_state = True, None


def forget_dense_scores_(trainer: Trainer) -> None:
    """Lets checkpointing, early stopping and plateau schedulers begin anew: a dense network's best is no yardstick.

    Checkpoint files of the dense network stay on disk; they no longer count among the ``save_top_k``.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, EarlyStopping):
            _forget_best_stop_(callback)
        elif isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            _forget_best_checkpoint_(callback)
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, ReduceLROnPlateau):
            config.scheduler.best = config.scheduler.mode_worse
            config.scheduler.num_bad_epochs = 0


def _forget_best_stop_(stopper: EarlyStopping) -> None:
    worst = torch.tensor(torch.inf if stopper.mode == "min" else -torch.inf)
    stopper.load_state_dict({**stopper.state_dict(), "wait_count": 0, "stopped_epoch": 0, "best_score": worst})


def _forget_best_checkpoint_(keeper: ModelCheckpoint) -> None:
    keeper.best_k_models = {}
    keeper.best_model_path = keeper.kth_best_model_path = ""
    keeper.best_model_score = keeper.current_score = None
    keeper.kth_value = torch.tensor(torch.inf if keeper.mode == "min" else -torch.inf)


def is_keeper(callback: object) -> bool:
    """Whether a callback writes checkpoints or stops runs by what validation says."""
    return isinstance(callback, (Checkpoint, EarlyStopping))


class StopGuard:
    """Takes back what EarlyStopping decides, until it is lifted: a run that ends before surgery has pruned nothing.

    Only EarlyStopping's decisions are undone; a stop by hand, by a timer or by a signal goes through.
    """

    def __init__(self) -> None:
        self._guarded: list[EarlyStopping] = []
        self._has_warned = False

    def raise_(self, trainer: Trainer) -> None:
        """Guard every EarlyStopping of this trainer."""
        self.lift_()
        for callback in callbacks_of(trainer):
            if isinstance(callback, EarlyStopping):
                self._guarded.append(callback)
                for name in _STOP_HOOKS:
                    setattr(callback, name, self._guard(callback, getattr(callback, name)))

    def lift_(self) -> None:
        """Give every EarlyStopping its own hooks back."""
        for callback in self._guarded:
            for name in _STOP_HOOKS:
                vars(callback).pop(name, None)
        self._guarded = []

    def _guard(self, stopper: EarlyStopping, hook: Callable[[Trainer, LightningModule], None]) -> Callable[..., None]:
        def guarded(trainer: Trainer, pl_module: LightningModule) -> None:
            was_stopping, memory = trainer.should_stop, copy.copy(stopper.state_dict())
            hook(trainer, pl_module)
            if trainer.should_stop and not was_stopping:
                trainer.should_stop = False
                stopper.load_state_dict({**memory, "wait_count": 0})
                self._warn(stopper)

        return guarded

    def _warn(self, stopper: EarlyStopping) -> None:
        if not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"EarlyStopping on {stopper.monitor!r} would have ended this run before the surgery;"
                " it may do so only afterwards."
            )
