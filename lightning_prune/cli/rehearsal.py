"""A run's first batches, dense and penalised, to see what the rest of it will do; nothing is written."""

from __future__ import annotations

import functools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry

from lightning_prune.callbacks.base import Regulariser, Timetable
from lightning_prune.callbacks.decision import common_multiple, find_partners, plan_of, rooted
from lightning_prune.callbacks.dynamics import steps_per_epoch
from lightning_prune.callbacks.neighbours import callbacks_of
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.callbacks.watching import PruningCallback, refuse_sharded_parameters
from lightning_prune.cli.glance import LEFT_OUT, Glance, Nowhere
from lightning_prune.cli.preview import Preview, Stage, preview_of
from lightning_prune.errors import ConfigurationError, PruningError
from lightning_prune.reports.silence import silence
from lightning_prune.reports.wording import first_line
from lightning_prune.structure.stopwatch import clock_of

WARM, TIMED = 2, 8
"""Batches that are run before the clock counts, and those that it counts; once dense, once penalised."""

NEVER = 10**9
"""An epoch that no rehearsal comes to."""


class Over(BaseException):
    """The rehearsal has seen enough. No ``Exception``: a training script's own handlers must let it pass."""


@dataclass
class Findings:
    """What came of a script: a preview of its first fit that prunes, or why there is none; neither without such a fit.

    Args:
        preview: of that fit.
        error: that ended a fit.
        passed: fits before it, without pruning callbacks; each had one batch.
    """

    preview: Preview | None = None
    error: Exception | None = None
    passed: int = 0


class Rehearsal(Callback):
    """Watches the first batches of a fit and ends it with :class:`Over`.

    A fit without pruning callbacks is left to a :class:`~lightning_prune.cli.glance.Glance`.

    Args:
        folder: that is deleted in the end.
        batches: batch sizes at which latency is measured.
        variants: how the networks are run for that.
        processes: that the real run has.
        strategy: its class.
    """

    def __init__(
        self, folder: str, batches: Sequence[int], variants: Sequence[str], processes: int, strategy: type
    ) -> None:
        self._folder = folder
        self._batches, self._variants = tuple(batches), tuple(variants)
        self._processes = processes
        self._strategy = strategy
        self._clock: Callable[[], float] = time.perf_counter
        self.gave_way = False
        self._stages: list[Stage] = []
        self._starts: list[int] = []
        self._dense: list[float] = []
        self._penalised: list[float] = []
        self._began = 0.0
        self._seen: Preview | None = None

    def result(self) -> Preview:
        """What was seen; without times where the run was too short to measure them.

        Raises:
            ConfigurationError: not even the first batch was done.
        """
        if self._seen is None:
            raise ConfigurationError("The run ended before its first batch was done; nothing can be said.")
        return replace(self._seen, dense_ms=_fastest(self._dense), sparse_ms=_fastest(self._penalised))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what the real run would, and leave out what a short run without validation can't have."""
        callbacks = callbacks_of(trainer)  # a module's configure_callbacks has brought its own by now
        self.gave_way = not any(isinstance(each, PruningCallback) for each in callbacks)
        if self.gave_way:
            glance = Glance(self._folder)
            trainer.callbacks = [glance if each is self else each for each in callbacks]  # type: ignore[attr-defined]
            glance.setup(trainer, pl_module, stage)  # whose turn in this round of the hook has passed
            return
        refuse_sharded_parameters(self._strategy, find_partners(trainer)[0])
        trainer.limit_val_batches = 0
        kept = [each for each in callbacks if not isinstance(each, LEFT_OUT)]
        trainer.callbacks = kept  # type: ignore[attr-defined]  # Lightning sets it from afar
        for callback in kept:
            if isinstance(callback, StructuralPruning):
                callback.cut_when = "ready"
        _leave_out_("on_train_epoch_end", trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From the second epoch on hooks may ask for what validation has found, and here it finds nothing."""
        _leave_out_("on_train_epoch_start", trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the stages, with the steps that an epoch has on all processes of the real run."""
        self._clock = clock_of(pl_module)
        loop, processes = trainer.fit_loop, self._processes
        if processes > 1 and loop.max_batches != math.inf:
            loop.max_batches = math.ceil(loop.max_batches / processes)
        at_epoch = _without_surgery_(trainer)
        for scheduler in trainer.lr_scheduler_configs:
            scheduler.strict = False  # ReduceLROnPlateau waits for a metric of validation
        epoch = steps_per_epoch(trainer)
        for partner in find_partners(trainer):
            self._stages.append(_stage(trainer, partner, partner.timetable(trainer), epoch, at_epoch))
            self._starts.append(partner.start)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock; no sparse stage begins before the dense batches are timed."""
        if self._seen is None:
            for partner in find_partners(trainer):
                partner.start = NEVER
        self._began = self._now(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock; look at the network after the first batch, begin the sparse stages, and end."""
        took = self._now(pl_module) - self._began
        partners = find_partners(trainer)
        if self._seen is None:
            self._seen = self._look(partners, pl_module)
            return
        times = self._penalised if len(self._dense) >= WARM + TIMED else self._dense
        times.append(took)
        if times is self._dense and len(times) == WARM + TIMED:
            for partner, start in zip(partners, self._starts, strict=True):
                partner.start = start
                partner.begin_early()
        elif len(self._penalised) == WARM + TIMED:
            raise Over

    def explained(self, trainer: Trainer, error: Exception) -> Exception:
        """The error, or one that says what may be behind it: from the second epoch on a real run knows more."""
        if isinstance(error, PruningError) or not trainer.current_epoch or not isinstance(error, _OF_LACK):
            return error
        return ConfigurationError(
            f"The rehearsal stopped in its epoch {trainer.current_epoch} ({first_line(error)})."
            " It runs no validation: where the code reads what validation logs, let it do without, as by"
            " callback_metrics.get(name)."
        )

    def _now(self, pl_module: LightningModule) -> float:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        return self._clock()

    def _look(self, partners: list[Regulariser], pl_module: LightningModule) -> Preview:
        capture = partners[0].capture
        graph, inputs = capture.graph, capture.inputs
        if graph is None or inputs is None or capture.name is None:
            raise ConfigurationError("The first batch's training_step never called the network; nothing can be said.")
        removed, least = dict[str, Sequence[int]](), dict[str, Sequence[int]]()
        for partner in partners:
            removed |= partner.foreseen()
            least |= {name: range(size - 1) for name, size in partner.sizes.items()}
        plan = plan_of(graph, removed, {}, common_multiple(partners))
        smallest = plan_of(graph, least, {}) if partners[0].granularity == "channel" else None
        whole = rooted(plan, pl_module, capture.name)
        return preview_of(graph, whole, plan, smallest, inputs, tuple(self._stages), self._batches, self._variants)


def _stage(
    trainer: Trainer, partner: Regulariser, table: Timetable | None, epoch: int | None, at_epoch: int | None
) -> Stage:
    length, epochs = None if table is None else table.length, partner.epochs
    if at_epoch is not None:
        epochs = max(0, at_epoch - partner.start)
        length = None if epoch is None else epochs * epoch
    total = None
    if epoch is not None and trainer.max_epochs is not None and trainer.max_epochs > 0:
        total = epoch * trainer.max_epochs
    if trainer.max_steps != -1:
        total = trainer.max_steps if total is None else min(total, trainer.max_steps)
    return Stage(
        method=type(partner).__name__,
        start=partner.start,
        epochs=epochs,
        steps_per_epoch=epoch,
        known_after=None if table is None else table.known,
        steps=length,
        total_steps=total,
    )


def _without_surgery_(trainer: Trainer) -> int | None:
    """Put surgery off for good; gives the epoch in which the real run has it, where the user says so."""
    asked = None
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets it from afar
        if isinstance(callback, StructuralPruning):
            asked, callback.at_epoch = callback.at_epoch, NEVER
    return asked


def _fastest(times: list[float]) -> float | None:
    """Milliseconds per batch, without those to warm up."""
    return 1e3 * min(times[WARM:]) if len(times) > WARM else None


def _leave_out_(hook: str, trainer: Trainer, pl_module: LightningModule) -> None:
    """Silence a hook of the module, and of callbacks that are none of ours."""
    vars(pl_module)[hook] = _nothing
    for callback in callbacks_of(trainer):
        if not isinstance(callback, (PruningCallback, Rehearsal)):
            vars(callback)[hook] = _nothing


@contextmanager
def rehearsing(batches: Sequence[int], variants: Sequence[str] = ("eager",)) -> Iterator[Findings]:
    """Every ``Trainer.fit`` in here becomes a rehearsal: on one process, with nothing logged or saved.

    Args:
        batches: batch sizes at which latency is measured.
        variants: how the networks are run for that.

    Yields:
        What came of it, known before :class:`Over` is raised.
    """
    found = Findings()
    make, fit, save = Trainer.__init__, Trainer.fit, Trainer.save_checkpoint

    @functools.wraps(make)
    def quiet(self: Trainer, *args: Any, **kwargs: Any) -> None:
        devices, nodes, strategy = (
            kwargs.get("devices", "auto"),
            int(kwargs.get("num_nodes") or 1),
            kwargs.get("strategy"),
        )
        kwargs |= {
            "devices": 1,
            "num_nodes": 1,
            "strategy": "auto",
            "logger": kwargs.get("logger") is not False and Nowhere(folder),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **{name: int(kwargs.get(name) != 0) for name in _LIMITS},  # of what comes before the fit that prunes
            "default_root_dir": folder,
            "callbacks": [each for each in _listed(kwargs.get("callbacks")) if not isinstance(each, _UNSEEN)],
        }
        make(self, *args, **kwargs)
        rehearsed = _count(devices, self) * nodes, _strategy(strategy)
        self.rehearsed = rehearsed  # type: ignore[attr-defined]  # ours, until the fit

    @functools.wraps(fit)
    def short(self: Trainer, *args: Any, **kwargs: Any) -> None:
        rehearsal = Rehearsal(folder, batches, variants, *getattr(self, "rehearsed", (1, SingleDeviceStrategy)))
        self.callbacks.append(rehearsal)  # type: ignore[attr-defined]  # Lightning sets it from afar
        try:
            fit(self, *args, **{**kwargs, "ckpt_path": None})
        except Over:
            pass
        except Exception as error:  # a script that goes on after errors must not hide this one
            found.error = rehearsal.explained(self, error)
            raise Over from error
        if rehearsal.gave_way:
            found.passed += 1
            return
        found.preview = rehearsal.result()
        raise Over

    @functools.wraps(save)
    def aside(self: Trainer, filepath: Any, *args: Any, **kwargs: Any) -> None:
        if Path(folder) in Path(filepath).parents:
            save(self, filepath, *args, **kwargs)

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for name in ("lightning.pytorch", "lightning.fabric"):
            stack.enter_context(silence(name))
        stack.enter_context(redirect_stdout(sys.stderr))  # ours belongs to the preview alone
        Trainer.__init__, Trainer.fit, Trainer.save_checkpoint = quiet, short, aside  # type: ignore[method-assign]
        try:
            yield found
        finally:
            Trainer.__init__, Trainer.fit, Trainer.save_checkpoint = make, fit, save  # type: ignore[method-assign]


_LIMITS = ("limit_val_batches", "limit_test_batches", "limit_predict_batches")

_UNSEEN = (SaveConfigCallback, ProgressBar, ModelSummary)
"""Callbacks that write or draw from the beginning."""

_OF_LACK = (LookupError, AttributeError, TypeError, ValueError, MisconfigurationException)
"""Errors of code that doesn't find what it looks for."""


def _nothing(*_: Any, **__: Any) -> None:
    """In place of what is left out: between epochs other people's code may ask for a metric of validation."""


def _listed(callbacks: Any) -> list[Callback]:
    return [] if callbacks is None else [callbacks] if isinstance(callbacks, Callback) else list(callbacks)


def _count(devices: Any, trainer: Trainer) -> int:
    """How many devices a trainer's argument means, on the accelerator that it has found."""
    if devices in ("auto", "-1", -1, None):
        return max(1, trainer.accelerator.auto_device_count())
    if isinstance(devices, str):
        devices = int(devices) if devices.isdigit() else [part for part in devices.split(",") if part.strip()]
    return max(1, devices if isinstance(devices, int) else len(devices))


def _strategy(asked: Any) -> type:
    """The class that a trainer's argument stands for; what it would find by itself shards nothing."""
    if isinstance(asked, str):
        found: type = StrategyRegistry[asked]["strategy"] if asked in StrategyRegistry else SingleDeviceStrategy
        return found
    return SingleDeviceStrategy if asked is None else type(asked)
