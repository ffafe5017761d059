"""From dense to slim in the middle of a fit."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.callbacks.accuracy import AccuracyColumns
from lightning_prune.callbacks.base import Regulariser
from lightning_prune.callbacks.checkpointing import attach_, detach_, history
from lightning_prune.callbacks.decision import Decision, common_multiple, decide, find_partners
from lightning_prune.callbacks.distillation import Distillation, Distiller
from lightning_prune.callbacks.dynamics import is_last_batch
from lightning_prune.callbacks.examination import Examination, Inputs, conclude, examine, latencies_wanted
from lightning_prune.callbacks.finetune import FinetuneStage
from lightning_prune.callbacks.horizon import (
    another_epoch_starts,
    refuse_bad_times,
    refuse_late_surgery,
    remaining_steps,
)
from lightning_prune.callbacks.loading import bring_nothing_back_
from lightning_prune.callbacks.neighbours import StopGuard, callbacks_of, go_on_averaging_, is_averaging
from lightning_prune.callbacks.operation import held_parameters, operate_, refuse_orphans
from lightning_prune.callbacks.outlook import is_settled, log_outlook, look_ahead, refuse_nothing_to_await
from lightning_prune.callbacks.permanence import PermanentMask
from lightning_prune.callbacks.publishing import Publisher
from lightning_prune.callbacks.ranks import agreed, run_together
from lightning_prune.callbacks.recording import Diary, configuration
from lightning_prune.callbacks.watching import PruningCallback, reading_state
from lightning_prune.door import check, number, text, whole
from lightning_prune.errors import ConfigurationError, PlanError
from lightning_prune.reports.report import PruningReport
from lightning_prune.structure import Outcome, Plan
from lightning_prune.structure.plan import submodule
from lightning_prune.structure.replica import replica


class StructuralPruning(PruningCallback):
    """Removes what the regularisers have shrunk, once all of them are ready; the same fit then finetunes.

    Channels go physically. Single weights (``granularity="weight"``) stay at exactly zero from then on, with their
    momenta and their weight averages.

    Surgery takes place at the first epoch start after that; where none follows, at the next batch start outside a
    gradient accumulation window. The plan is decided on rank 0, proved on the latest training batch, and applied on all
    ranks together with the optimisers' state and the weight averages (EMA, SWA). Checkpoints carry it.

    Args:
        at_epoch: epoch at whose start surgery takes place, whether the regularisers are ready or not; ``None`` waits
            until they are.
        cut_when: ``"ready"`` goes by the regularisers' schedules; ``"safe"`` ends their stages as soon as the network
            without what goes is as good, by ``monitor``, as the network with it. That is looked at when an epoch ends,
            by two validation passes, from the pick on; at the latest surgery comes when it would have come anyway.
        safe_change: by how much the metric may change at a ``"safe"`` cut, up or down, in its own units.
        monitor: metric that ``validation_step`` logs, for the report's accuracy columns; costs one validation pass
            right after surgery, and one at the beginning where the sparse stage begins with the first epoch.
        module: name of the pruned module inside the LightningModule; ``None`` finds it.
        finetune: "continue" goes on with optimisers and schedulers, "restart" asks ``configure_optimizers`` again,
            which then sees a trainer of the remaining length.
        finetune_optimizer: builds the finetune stage's own optimiser from a list of parameters.
        finetune_scheduler: builds the finetune stage's own schedule, stepped once per optimiser step and counted from
            surgery; ``T_max``, ``total_steps`` or ``total_iters`` of -1 stands for all remaining steps.
        distill: lets the finetune stage learn from the dense network too: ``{"temperature": 4, "weight": 0.5}``, see
            :class:`~lightning_prune.Distillation`; costs a forward pass of the dense network per batch after surgery.
        teacher: file of the dense network's weights to learn from, a checkpoint or a ``state_dict`` (``.ckpt``,
            ``.pt``, ``.safetensors``); ``None`` takes the network as it is when the first sparse stage begins.
        logits_from: name of the module inside the LightningModule whose output is the logits. ``None`` takes the
            LightningModule's ``forward`` or, where ``training_step`` doesn't call that, the pruned network if no
            callback names it.
        tolerance: largest relative difference between masked and slim network; ``None`` derives it from the dtype.
        latency_batches: batch sizes at which latency is measured before and after.
        latency_variants: how both networks are run for that: ``"eager"``, ``"channels_last"`` (for 2-d convolutions)
            and ``"compiled"`` (by ``torch.compile``, which takes minutes); the report says which one is the fastest.
        report_file: name of the report in the run's directory; the same as a page stands beside it, under ``.html``.
            What is there already stays: the name becomes ``report-v1.json`` then. ``None`` writes neither.

    Raises:
        ConfigurationError: an argument is out of range, or contradicts another or the trainer.

    >>> pruning = StructuralPruning(monitor="val_acc")  # with regularisers among a Trainer's callbacks
    >>> pruning.plan is None, pruning.report is None    # until surgery
    (True, True)
    """

    def __init__(
        self,
        at_epoch: int | None = None,
        *,
        cut_when: Literal["ready", "safe"] = "ready",
        safe_change: float = 0.005,
        monitor: str | None = None,
        module: str | None = None,
        finetune: Literal["continue", "restart"] = "continue",
        finetune_optimizer: OptimizerCallable | None = None,
        finetune_scheduler: LRSchedulerCallable | None = None,
        distill: Distillation | Mapping[str, Any] | None = None,
        teacher: str | os.PathLike[str] | None = None,
        logits_from: str | None = None,
        tolerance: float | None = None,
        latency_batches: Sequence[int] = (1, 64),
        latency_variants: Sequence[Literal["eager", "channels_last", "compiled"]] = ("eager",),
        report_file: str | None = "report.json",
    ) -> None:
        super().__init__(module)
        text("module", module)
        text("monitor", monitor)
        if at_epoch is not None:
            whole("at_epoch", at_epoch)
            check(at_epoch >= 1, f"at_epoch={at_epoch} must be at least 1: something has to be trained before.")
        if cut_when not in ("ready", "safe"):
            raise ConfigurationError(f'cut_when={cut_when!r} is neither "ready" nor "safe".')
        if cut_when == "safe" and monitor is None:
            raise ConfigurationError('cut_when="safe" goes by a metric of validation; name it with monitor=....')
        number("safe_change", safe_change)
        if not 0 <= safe_change < float("inf"):
            raise ConfigurationError(f"safe_change={safe_change} must be a finite number of at least 0.")
        if tolerance is not None:
            number("tolerance", tolerance)
            check(tolerance > 0, f"tolerance={tolerance} must be positive.")
        self.at_epoch = at_epoch
        self.cut_when = cut_when
        self.safe_change = safe_change
        self.monitor = monitor
        self.finetune = finetune
        self.finetune_optimizer = finetune_optimizer
        self.finetune_scheduler = finetune_scheduler
        self.distill = Distillation.of(distill)
        self.teacher = os.fspath(teacher) if isinstance(teacher, os.PathLike) else teacher
        self.logits_from = logits_from
        self.tolerance = tolerance
        self.latency_batches, self.latency_variants = latencies_wanted(latency_batches, latency_variants)
        self.report_file = report_file
        self._stage = FinetuneStage(finetune, finetune_optimizer, finetune_scheduler)
        self._guard = StopGuard()
        self._permanent = PermanentMask()
        self._partners: list[Regulariser] = []
        self._fit: tuple[Any, Any] | None = None
        self._began_slim = False
        self._forget()

    def _forget(self) -> None:
        """Everything that belongs to one training, at its beginning."""
        self._done = False
        self._decision: Decision | None = None
        self._remaining = -1
        self._averaged = False  # before surgery, and by a schedule that ended there
        self._is_late = False
        self._is_safe = False
        self._remainders: list[str] = []
        self._budgets: list[Outcome] = []
        self._dense: nn.Module | None = None
        self._columns = AccuracyColumns(self.monitor)
        self._diary = Diary()
        self._publisher = Publisher(self.report_file)
        self._distiller = Distiller(self.distill, self.teacher, self.logits_from)
        self._report: PruningReport | None = None

    @property
    def plan(self) -> Plan | None:
        """What went, as a plan for the LightningModule (``save_slim`` takes both); ``None`` before surgery."""
        return self._decision.whole if self._done and self._decision is not None else None

    @property
    def finished(self) -> bool:
        """Whether surgery is over and proved."""
        return self._done and self._dense is None

    @property
    def needs_channels(self) -> bool:
        """It takes what the regularisers have."""
        return False

    @property
    def report(self) -> PruningReport | None:
        """What surgery did, with the accuracy known so far; ``None`` before surgery and on other ranks than 0."""
        return self._report

    @property
    def report_path(self) -> Path | None:
        """The report's file, for :func:`~lightning_prune.export`; ``None`` before it is written, and on other ranks."""
        return self._publisher.path

    # Before the first step.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the plan travel in checkpoints; refuse what can't work; begin anew with another trainer or module."""
        super().setup(trainer, pl_module, stage)
        attach_(pl_module)
        self._began_slim = bool(history(pl_module))
        if stage != "fit":
            return
        fit = (weakref.ref(trainer), weakref.ref(pl_module))
        if self._fit is not None and self._fit != fit:
            self._forget()
        self._fit = fit
        if sum(isinstance(callback, StructuralPruning) for callback in callbacks_of(trainer)) > 1:
            raise ConfigurationError("A trainer takes one StructuralPruning; it serves all of the regularisers.")
        self._partners = find_partners(trainer)
        refuse_bad_times(trainer, self._partners, self.at_epoch)
        if self.cut_when == "safe":
            refuse_nothing_to_await(self._partners)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a resume behind surgery, build the finetune stage's optimiser before its state loads."""
        super().on_fit_start(trainer, pl_module)
        self._stage.check(trainer)
        self._distiller.meet(trainer, pl_module, self._is_dense(), self._done)
        if self.monitor is not None and not trainer.enable_validation:
            if self.cut_when == "safe" and not self._done:
                raise ConfigurationError('cut_when="safe" goes by validation, and this run has none.')
            rank_zero_warn(f"monitor={self.monitor!r} stays unknown, for this run has no validation.")
        if not self._done:
            self._guard.raise_(trainer)
            return
        self._begin_stage(trainer, pl_module, held_parameters(trainer, pl_module))
        if self._averaged:
            go_on_averaging_(trainer, pl_module.device)

    def before_cut(self, pl_module: LightningModule) -> None:
        """The teacher is built as the module is now."""
        self._distiller.keep_dense(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out the dense accuracy, where no validation will come before the sparse stage."""
        super().on_train_start(trainer, pl_module)
        self._publisher.settle(trainer)
        if not self._done:
            refuse_late_surgery(trainer, self._partners, self.at_epoch)
        begins_now = min(partner.start for partner in self._partners) <= trainer.current_epoch
        if begins_now and self._is_dense() and not self._columns.values:
            self._columns.look(trainer, "dense")

    # The right moment.

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Surgery, if it is due."""
        super().on_train_epoch_start(trainer, pl_module)
        if self._is_due(trainer):
            self._operate(trainer, pl_module, batches_done=0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Surgery, if it is due and no epoch start follows, or the last one was no occasion."""
        if not self._done and trainer.current_epoch >= min(partner.start for partner in self._partners):
            self._distiller.take(trainer, pl_module)
        # Before super's: the base begins to watch this batch, and it should watch the slim network.
        between_windows = batch_idx % trainer.accumulate_grad_batches == 0
        # A resumed run may begin with the first batch, without its epoch's start.
        no_other_chance = batch_idx == 0 or self._is_late or not another_epoch_starts(trainer, batch_idx)
        if self._is_due(trainer) and between_windows and no_other_chance:
            self._operate(trainer, pl_module, batches_done=batch_idx)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._distiller.begin_batch(pl_module)

    def _is_due(self, trainer: Trainer) -> bool:
        if self._done:
            return False
        if self.at_epoch is not None and not self._is_safe:
            return trainer.current_epoch >= self.at_epoch
        return all(partner.ready for partner in self._partners)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At an epoch's end: see whether it is safe to cut, before any checkpoint is written."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._distiller.end_batch(trainer, pl_module, batch_idx)
        is_asked = self.cut_when == "safe" and not self._done and is_last_batch(trainer, batch_idx)
        if is_asked and another_epoch_starts(trainer, batch_idx + 1) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            for partner in self._partners:
                partner.close_epoch(trainer)  # whichever of us comes first in the list of callbacks
            if not all(partner.ready for partner in self._partners) and all(map(is_settled, self._partners)):
                self._end_if_safe(trainer, pl_module)

    def _end_if_safe(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the sparse stage if nothing worth keeping is left in what goes."""
        decision = self._decide_together(trainer)
        if decision is None or self.monitor is None:
            return
        seen = look_ahead(trainer, pl_module, decision, self.monitor)
        log_outlook(pl_module, self.monitor, seen)
        if not abs(seen.change) <= self.safe_change:
            return
        self._is_safe = True
        for partner in self._partners:
            partner.end_early()
        rank_zero_info(
            f"Safe to cut: {self.monitor} is {seen.masked:.4g} without what goes and {seen.whole:.4g} with it; surgery"
            " comes before the next epoch."
        )

    # Surgery.

    def _operate(self, trainer: Trainer, pl_module: LightningModule, batches_done: int) -> None:
        decision = self._decide_together(trainer)
        if decision is None:
            self._is_late = True
            return
        network = submodule(pl_module, decision.module)
        inputs, seen = self.capture.inputs, None
        if inputs is None:
            # Resumed between the last batch and surgery: the proof waits for the first batch of this process.
            self._dense = run_together(trainer, lambda: replica(network))
        else:
            seen = self._examine(trainer, network, decision.plan, inputs)
        # what a safe cut leaves has been weighed already
        asked = [] if self._is_safe else self._partners
        said = run_together(trainer, lambda: [partner.remainder() for partner in asked])
        self._remainders = [sentence for sentence in said if sentence is not None]
        for sentence in self._remainders:
            rank_zero_warn(sentence)
        self._budgets = [partner.outcome for partner in self._partners if partner.outcome is not None]
        held = held_parameters(trainer, pl_module)
        self._distiller.begin(trainer, pl_module)
        operate_(trainer, pl_module, decision.module, decision.plan)
        self._decision, self._done = decision, True
        self._remaining = remaining_steps(trainer, batches_done)
        self._begin_stage(trainer, pl_module, held)
        self._averaged = self._stage.brings_schedule and is_averaging(trainer)
        self._guard.lift_()
        for partner in self._partners:
            partner.release()
        self._columns.look(trainer, "after")
        if inputs is not None and seen is not None:
            self._conclude(trainer, pl_module, inputs, seen)

    def _decide_together(self, trainer: Trainer) -> Decision | None:
        def plainly() -> dict[str, Any] | None:
            found = self._decide() if trainer.is_global_zero else None
            return None if found is None else found.to_plain()

        received = agreed(trainer, plainly)
        return None if received is None else Decision.from_plain(received)

    def _decide(self) -> Decision | None:
        pl_module = None if self._fit is None else self._fit[1]()
        return None if pl_module is None else decide(pl_module, self._partners, self.capture, self._decision)

    def _begin_stage(self, trainer: Trainer, pl_module: LightningModule, held: list[str]) -> None:
        def begin() -> None:
            parameters = dict(pl_module.named_parameters())
            self._stage.begin_(trainer, [parameters[name] for name in held], self._remaining)
            refuse_orphans(trainer, pl_module, held)
            if self._decision is not None:
                network = submodule(pl_module, self._decision.module)
                self._permanent.hold_(network, self._decision.plan, trainer.optimizers)

        run_together(trainer, begin)

    # What is found out.

    def _examine(self, trainer: Trainer, network: nn.Module, plan: Plan, inputs: Inputs) -> Examination:
        wanted = self.latency_batches, self.latency_variants
        return examine(trainer, network, plan, inputs, self.tolerance, *wanted)

    def _conclude(self, trainer: Trainer, pl_module: LightningModule, inputs: Inputs, seen: Examination) -> None:
        """Report, now that the network is slim."""
        if self._decision is None:
            return
        network = submodule(pl_module, self._decision.module)
        config = configuration(trainer, [*self._partners, self])
        rest = self.monitor, tuple(self._remainders), tuple(self._budgets), common_multiple(self._partners), config
        found = conclude(trainer, network, self._decision, inputs, seen, *rest)
        self._report = None if found is None else replace(found, distilled=self._distiller.summary)
        self._publish(trainer)
        if self._report is not None and trainer.is_global_zero:
            self._publisher.show(self._report)
        self.capture.close()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The proof that a resumed run still owes; and what is to be learnt from the dense network."""
        super().on_before_backward(trainer, pl_module, loss)
        self._catch_up(trainer, pl_module)
        is_found = all(each.module is None for each in (self, *self._partners))
        self._distiller.add_(loss, trainer, self._network_name(), is_found)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Another forward pass may follow in the same batch."""
        super().on_after_backward(trainer, pl_module)
        self._distiller.go_on()

    def _network_name(self) -> str:
        """Of the network that is pruned."""
        return (self._decision.module if self._done and self._decision is not None else self.capture.name) or ""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Keep masked weights still; and the proof, where manual optimisation has bypassed ``on_before_backward``."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self._catch_up(trainer, pl_module)
        self._permanent.before_step(optimizer)

    def _catch_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        inputs, decision, dense = self.capture.inputs, self._decision, self._dense
        if dense is None or inputs is None or decision is None:
            return
        self._dense = None
        self._conclude(trainer, pl_module, inputs, self._examine(trainer, dense, decision.plan, inputs))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write down how the methods stand, before a checkpoint is written that has to know."""
        super().on_validation_start(trainer, pl_module)
        is_last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if is_last and not (trainer.sanity_checking or self._done) and trainer.state.fn == TrainerFn.FITTING:
            self._diary.note_epoch(trainer, self._partners)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same where no validation came at the epoch's end."""
        super().on_train_epoch_end(trainer, pl_module)
        if not self._done:
            self._diary.note_epoch(trainer, self._partners)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fill the accuracy column that this validation belongs to."""
        super().on_validation_end(trainer, pl_module)
        column = "finetuned" if self._done else "dense" if self._is_dense() else "before"
        if self._columns.note(trainer, column):
            self._diary.note_validation(trainer, self._columns.values[column], self._done)
            self._publish(trainer)

    def _is_dense(self) -> bool:
        return all(partner.phase == "wait" for partner in self._partners)

    def _publish(self, trainer: Trainer) -> None:
        """Write the report with the accuracy known so far."""
        if self._report is not None:
            moments, validations = self._diary.moments, self._diary.validations
            accuracy = self._columns.complete()
            self._report = replace(self._report, accuracy=accuracy, history=moments, validations=validations)
        self._publisher.write(trainer, self._report)

    # The end.

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if nothing has been pruned."""
        super().on_train_end(trainer, pl_module)
        if not self._done and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            phases = ", ".join(f"{type(partner).__name__}: {partner.phase}" for partner in self._partners)
            rank_zero_warn(f"The run has ended before the surgery ({phases}); the model is still dense.")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind except, on a slim module, the plan in its checkpoints."""
        super().teardown(trainer, pl_module, stage)
        self._let_go(pl_module)
        if stage == "fit" and not self._began_slim and history(pl_module):
            bring_nothing_back_(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same after an error."""
        super().on_exception(trainer, pl_module, exception)
        self._let_go(pl_module)

    def _let_go(self, pl_module: LightningModule) -> None:
        self._guard.lift_()
        self._permanent.let_go()
        self._dense = None
        self._distiller.close()
        detach_(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The decision, as soon as it is known: a resume between it and surgery can't ask the graph for it."""
        return {
            **super().state_dict(),
            "done": self._done,
            "safe": self._is_safe,
            "remaining": self._remaining,
            "averaged": self._averaged,
            "decision": self._saved_decision(),
            "accuracy": dict(self._columns.values),
            "diary": self._diary.plain(),
            "distillation": self._distiller.plain(),
            # without what the diary has
            "report_name": self._publisher.name,
            "report": None if self._report is None else replace(self._report, history=(), validations=()).to_json(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a checkpoint's decision and findings."""
        super().load_state_dict(state_dict)
        with reading_state(type(self).__name__):
            self._done, self._remaining = bool(state_dict["done"]), int(state_dict["remaining"])
            self._averaged = bool(state_dict.get("averaged", False))
            self._is_safe = bool(state_dict.get("safe", False))
            saved = state_dict["decision"]
            self._decision = None if saved is None else Decision.from_plain(saved)
            self._columns.values = dict(state_dict["accuracy"])
            self._diary.restore(state_dict.get("diary", {}))
            self._distiller.restore(state_dict.get("distillation", {}))
            self._publisher.resume(state_dict.get("report_name"))
            report = state_dict["report"]
            known: Any = {"history": self._diary.moments, "validations": self._diary.validations}
            self._report = None if report is None else replace(PruningReport.from_json(report), **known)

    def _saved_decision(self) -> dict[str, Any] | None:
        decision = self._decision
        if not self._done and self._partners:
            try:
                decision = self._decide()
            except (PlanError, ConfigurationError):  # a regulariser hasn't picked yet
                decision = None
        return None if decision is None else decision.to_plain()
