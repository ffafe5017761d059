"""One validation pass in the middle of a fit that leaves no trace in it.

Lightning's own loop does the work (``fit_loop.epoch_loop.val_loop``), so the number is the one that the user's
``validation_step`` logs. What that loop moves on its way (stage, metrics seen by other callbacks, progress counters,
restart flags, clock, random number generators) is put back afterwards: a run with the pass and a run without it train
the same weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_prune.callbacks.neighbours import callbacks_of, is_keeper
from lightning_prune.callbacks.watching import PruningCallback
from lightning_prune.errors import ConfigurationError

_METRICS = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics", "_current_fx", "_first_loop_iter")
_LOOP = (
    "batch_progress",
    "_has_run",
    "_logged_outputs",
    "_seen_batches_per_dataloader",
    "_restarting",
    "_loaded_from_state_dict",
    "_resuming_from_checkpoint",
    "_restart_stage",
)
_CLOCK = ("_last_val_time",)


class AccuracyColumns:
    """One metric at the moments that matter: "dense", "before", "after" and "finetuned".

    Args:
        monitor: name of a metric that ``validation_step`` logs; ``None`` keeps the columns empty.
    """

    def __init__(self, monitor: str | None) -> None:
        self.monitor = monitor
        self.values: dict[str, float] = {}

    def complete(self) -> dict[str, float | None]:
        """All four columns; ``None`` where a value isn't known yet."""
        return {column: self.values.get(column) for column in ("dense", "before", "after", "finetuned")}

    def note(self, trainer: Trainer, column: str) -> bool:
        """Take over what the validation that has just ended says, unless it is a sanity check.

        Returns:
            Whether the column has been filled.
        """
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return False
        self.values[column] = self._known(trainer, read_metric(trainer, self.monitor))
        return True

    def look(self, trainer: Trainer, column: str) -> None:
        """Fill a column by a :func:`validation_pass`. Every rank has to call it.

        Raises:
            ConfigurationError: validation doesn't log the metric.
        """
        if self.monitor is not None and trainer.enable_validation:
            self.values[column] = self._known(trainer, validation_pass(trainer, self.monitor))

    def _known(self, trainer: Trainer, value: float | None) -> float:
        if value is None:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise ConfigurationError(f"monitor={self.monitor!r} isn't logged in validation; logged are: {logged}.")
        return value


def read_metric(trainer: Trainer, monitor: str) -> float | None:
    """Latest value of a logged metric, ``None`` where nothing of that name has been logged."""
    value = trainer.callback_metrics.get(monitor)
    return None if value is None else float(value)


def validation_pass(trainer: Trainer, monitor: str, *, logs: bool = True) -> float | None:
    """Runs the whole validation set once and says what ``monitor`` is; the fit goes on as if nothing had happened.

    Checkpoint, early-stopping and pruning callbacks don't see the pass. All ranks have to call it together.

    Args:
        trainer: in the middle of ``fit``, between two batches.
        monitor: name of a metric that ``validation_step`` logs.
        logs: whether the loggers see the pass.

    Returns:
        The metric, or ``None`` where there is no validation or it doesn't log that name.
    """
    if not trainer.enable_validation:
        return None
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    with isolate_rng(), _put_back(connector, _METRICS), _put_back(loop, _LOOP), _put_back(trainer, _CLOCK):
        connector._callback_metrics.pop(monitor, None)
        with _validating(trainer, logs):
            # A resumed loop would skip the batches that it believes to have seen.
            loop.restarting = False
            loop.run()
            return read_metric(trainer, monitor)


@contextmanager
def _validating(trainer: Trainer, logs: bool) -> Iterator[None]:
    stage, callbacks, loggers = trainer.state.stage, callbacks_of(trainer), trainer.loggers
    hidden = (cb for cb in callbacks if not (is_keeper(cb) or isinstance(cb, PruningCallback)))
    vars(trainer)["callbacks"] = list(hidden)
    trainer.validating = True
    if not logs:
        trainer.loggers = [DummyLogger() for _ in loggers]  # a validation_step may ask for the experiment
    try:
        yield
    finally:
        trainer.state.stage, vars(trainer)["callbacks"], trainer.loggers = stage, callbacks, loggers


@contextmanager
def _put_back(owner: object, names: tuple[str, ...]) -> Iterator[None]:
    """Lends copies of the named fields for a while; the originals return afterwards, missing ones go missing again."""
    fields = vars(owner)
    originals = {name: fields[name] for name in names if name in fields}
    fields.update(copy.deepcopy(originals))
    try:
        yield
    finally:
        for name in names:
            fields.pop(name, None)
        fields.update(originals)
