"""A run's first batches, dense and penalised, to see what the rest of it will do; nothing is written."""

from __future__ import annotations

import functools
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, Checkpoint, LearningRateFinder
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry

from lightning_prune.callbacks.base import Regulariser, Timetable
from lightning_prune.callbacks.decision import common_multiple, find_partners, plan_of, rooted
from lightning_prune.callbacks.dynamics import steps_per_epoch
from lightning_prune.callbacks.neighbours import callbacks_of
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.callbacks.watching import PruningCallback, refuse_sharded_parameters
from lightning_prune.cli.preview import Preview, Stage, preview_of
from lightning_prune.errors import ConfigurationError
from lightning_prune.reports.silence import silence

WARM, TIMED = 2, 8
"""Batches that are run before the clock counts, and those that it counts; once dense, once penalised."""

NEVER = 10**9
"""An epoch that no rehearsal comes to."""


class Over(BaseException):
    """The rehearsal has seen enough. No ``Exception``: a training script's own handlers must let it pass."""


@dataclass
class Outcome:
    """What came of a rehearsal: a preview, or why there is none; neither where no fit was called."""

    preview: Preview | None = None
    error: Exception | None = None


class Rehearsal(Callback):
    """Watches the first batches of a fit and ends it with :class:`Over`.

    Args:
        batches: batch sizes at which latency is measured.
        variants: how the networks are run for that.
        processes: that the real run has.
        strategy: its class.
    """

    def __init__(self, batches: Sequence[int], variants: Sequence[str], processes: int, strategy: type) -> None:
        self._batches, self._variants = tuple(batches), tuple(variants)
        self._processes = processes
        self._strategy = strategy
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
        refuse_sharded_parameters(self._strategy, find_partners(trainer)[0])
        # a module's configure_callbacks has brought its own by now
        kept = [each for each in callbacks_of(trainer) if not isinstance(each, _LEFT_OUT)]
        trainer.callbacks = kept  # type: ignore[attr-defined]  # Lightning sets it from afar
        for callback in kept:
            if isinstance(callback, StructuralPruning):
                callback.cut_when = "ready"
            if not isinstance(callback, PruningCallback):
                vars(callback)["on_train_epoch_end"] = _nothing
        vars(pl_module)["on_train_epoch_end"] = _nothing

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the stages, with the steps that an epoch has on all processes of the real run."""
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
        self._began = _now(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock; look at the network after the first batch, begin the sparse stages, and end."""
        took = _now(pl_module) - self._began
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


def _now(pl_module: LightningModule) -> float:
    if pl_module.device.type == "cuda":
        torch.cuda.synchronize(pl_module.device)
    return time.perf_counter()


@contextmanager
def rehearsing(batches: Sequence[int], variants: Sequence[str] = ("eager",)) -> Iterator[Outcome]:
    """Every ``Trainer.fit`` in here becomes a rehearsal: on one process, with nothing logged or saved.

    Args:
        batches: batch sizes at which latency is measured.
        variants: how the networks are run for that.

    Yields:
        What came of it, known before :class:`Over` is raised.
    """
    found = Outcome()
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
            "logger": kwargs.get("logger") is not False and _nowhere(folder),
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 1,  # of a script that validates or tests before it trains
            "limit_test_batches": 1,
            "limit_predict_batches": 1,
            "default_root_dir": folder,
            "callbacks": [each for each in _listed(kwargs.get("callbacks")) if not isinstance(each, _LEFT_OUT)],
        }
        make(self, *args, **kwargs)
        rehearsed = _count(devices, self) * nodes, _strategy(strategy)
        self.rehearsed = rehearsed  # type: ignore[attr-defined]  # ours, until the fit

    @functools.wraps(fit)
    def short(self: Trainer, *args: Any, **kwargs: Any) -> None:
        self.limit_val_batches = 0
        rehearsal = Rehearsal(batches, variants, *getattr(self, "rehearsed", (1, SingleDeviceStrategy)))
        self.callbacks.append(rehearsal)  # type: ignore[attr-defined]  # Lightning sets it from afar
        try:
            fit(self, *args, **{**kwargs, "ckpt_path": None})
        except Over:
            pass
        except Exception as error:  # a script that goes on after errors must not hide this one
            found.error = error
            raise Over from error
        found.preview = rehearsal.result()
        raise Over

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for name in ("lightning.pytorch", "lightning.fabric"):
            stack.enter_context(silence(name))
        stack.enter_context(redirect_stdout(sys.stderr))  # ours belongs to the preview alone
        Trainer.__init__, Trainer.fit, Trainer.save_checkpoint = quiet, short, _nothing  # type: ignore[method-assign]
        try:
            yield found
        finally:
            Trainer.__init__, Trainer.fit, Trainer.save_checkpoint = make, fit, save  # type: ignore[method-assign]


_LEFT_OUT = (Checkpoint, SaveConfigCallback, BatchSizeFinder, LearningRateFinder)
"""Callbacks that write files, or that run trainings of their own."""


def _nothing(*_: Any, **__: Any) -> None:
    """In place of what is left out: at an epoch's end other people's code may ask for a metric of validation."""


def _listed(callbacks: Any) -> list[Callback]:
    return [] if callbacks is None else [callbacks] if isinstance(callbacks, Callback) else list(callbacks)


def _nowhere(folder: str) -> Any:
    from lightning.pytorch.loggers import CSVLogger

    return CSVLogger(folder)


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
