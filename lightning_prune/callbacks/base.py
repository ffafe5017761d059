"""What the methods share: the clock, the phases, the checkpoint, the log."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune import structure
from lightning_prune.callbacks import ranks
from lightning_prune.callbacks.budgeting import spend_together
from lightning_prune.callbacks.dynamics import (
    dynamics_of,
    is_last_batch,
    logs_after,
    refuse_frozen,
    refuse_misfit,
    refuse_sharded_state,
    stage_steps,
    steps_until,
)
from lightning_prune.callbacks.inject import Penalty, add_to_gradients_, add_to_loss_, quietly, shrink_, uses_loss
from lightning_prune.callbacks.joining import holders_of, refuse_shared_groups
from lightning_prune.callbacks.questions import Method
from lightning_prune.callbacks.targets import parameters_of
from lightning_prune.callbacks.watching import PruningCallback, reading_state
from lightning_prune.door import check
from lightning_prune.errors import ConfigurationError, PlanError
from lightning_prune.structure import Outcome
from lightning_prune.structure.bits import compact, from_plain, to_plain
from lightning_prune.structure.multiples import fast_multiple

__all__ = ["PHASES", "Method", "PruningCallback", "Regulariser", "check"]

Decision = TypeVar("Decision")

TRACE = 1e-2
"""Share of its energy up to which a channel goes without a trace worth a warning."""


class Timetable(NamedTuple):
    """A sparse stage in optimiser steps.

    Args:
        known: after how many it is known which channels go.
        length: of the whole stage; ``None`` where nobody can tell.
    """

    known: int
    length: int | None


class Reading(NamedTuple):
    """How a regulariser stands, for those who watch it; nobody has waited for the tensors.

    Args:
        label: its name in the logs.
        phase: one of :data:`PHASES`.
        strength: of the penalty.
        energy: see :meth:`Regulariser.energy`; ``None`` right after a resume, before a batch.
        penalty: value in the latest step, in units of the loss; ``None`` where there was none.
        separation: see :meth:`Method.apart`; ``None`` before the pick.
        steps_left: optimiser steps until it is ready; ``None`` where nobody can tell.
        settled: whether it is known for good what goes.
    """

    label: str
    phase: str
    strength: float
    energy: Tensor | None
    penalty: Tensor | None
    separation: Tensor | None
    steps_left: int | None
    settled: bool


PHASES = ("wait", "pick", "grow", "hold", "ready", "done")
"""A regulariser's phases in their order; the log shows the position in this tuple."""


class Regulariser(Method):
    """The hooks, which ask a method its questions at the right moments; see :class:`Method` for what they are.

    Under SGD the penalty is part of the loss. Other optimisers rescale gradients and with them a penalty, so there the
    weights shrink by learning rate times penalty gradient after each step instead.
    """

    # What others may ask.

    @property
    def phase(self) -> str:
        """One of :data:`PHASES`."""
        return self._phase

    @property
    def ready(self) -> bool:
        """Whether the channels are as small as they get and surgery may follow."""
        return self._phase == "ready"

    @property
    def finished(self) -> bool:
        """Whether surgery has been done, so that this regulariser is silent."""
        return self._phase == "done"

    @property
    def needs_channels(self) -> bool:
        """Single weights hang together with nothing."""
        return self.granularity == "channel"

    @property
    def sizes(self) -> dict[str, int]:
        """Name and size of every group that takes part; none before the first batch."""
        return dict(self._grain.sizes)

    @property
    def strength(self) -> float:
        """The strength that acts on the channels that will go, now."""
        return self._strength

    def removal(self) -> dict[str, Sequence[int]]:
        """What will go: group name to channel numbers, or to positions in the flattened weight (:class:`Bits`).

        Before the pick: an error.
        """
        if not self._picked:
            raise PlanError(f"{self._label} has picked no {self._grain.unit} yet; it is in phase {self._phase!r}.")
        return dict(self._picked)

    @torch.no_grad()
    def foreseen(self) -> dict[str, Sequence[int]]:
        """What would go by the weights as they are, in the form of :meth:`removal`; from the first batch on."""
        graph = self.capture.graph
        if graph is None:
            raise PlanError(f"{self._label} has seen no batch yet.")
        return self._own(self.foresee(graph))

    @torch.no_grad()
    def energy(self) -> Tensor:
        """What is :meth:`left` of the channels that will go, as a fraction of that at the pick; no host sync.

        Before the pick 1, after surgery 0, after the fit what it was at its end.
        """
        if self._energy is None or not self._targets or not self._picked:
            return self._remaining
        return self.left() / self._energy.to(self._targets[0].parameter.device).clamp_min(1e-30)

    @torch.no_grad()
    def reading(self) -> Reading:
        """How it stands now; no host sync."""
        is_aimed = bool(self._picked and self._targets)
        is_known = is_aimed or self._phase not in ("grow", "hold", "ready")
        return Reading(
            self._label,
            self._phase,
            self._strength,
            self.energy() if is_known else None,
            self._value if self._acts else None,
            self.apart() if is_aimed else None,
            self._steps_left(),
            self.settled(),
        )

    def _steps_left(self) -> int | None:
        if self.ready or self.finished:
            return 0
        trainer, pl_module = self._run()
        if self.epochs is not None:
            first = self.first_epoch if self._has_begun else max(self.start, trainer.current_epoch)
            return steps_until(trainer, first + self.epochs)
        whole = self.steps_in_all() if self._has_begun else None
        taken = (trainer.global_step if pl_module.automatic_optimization else self._ticks) - self._origin
        return None if whole is None else max(0, whole - taken)

    def timetable(self, trainer: Trainer) -> Timetable | None:
        """When the sparse stage will do what, before it has begun; ``None`` afterwards.

        Raises:
            ConfigurationError: the stage can't work with this trainer and its optimisers.
        """
        steps = stage_steps(trainer, self.epochs)
        if not trainer.optimizers or self._phase != "wait":
            return None
        # which optimiser and which of its groups it will be is known later; the gentlest is refused last
        slowest = min(map(dynamics_of, trainer.optimizers), key=lambda each: each.smallest or each.learning_rate)
        dynamics = replace(slowest, learning_rate=slowest.smallest or slowest.learning_rate)
        schedule = self.begin(steps, dynamics)
        return Timetable(self.known_after(schedule, steps), self.steps_needed() if steps is None else steps)

    def remainder(self) -> str | None:
        """One sentence where more than a trace is left of the channels that go, just before surgery; waits for it."""
        if not self.collapses or not self._targets or not self._picked:
            return None
        left = float(self.energy())
        if left <= TRACE:
            return None
        return (
            f"{self._label}: {left:.2g} of the energy was left in the {self._grain.unit} that went, more than"
            f" {TRACE:g}; a longer sparse stage loses less."
        )

    @property
    def outcome(self) -> Outcome | None:
        """What the budget asked for and what is left; ``None`` without one, or before its widths are known."""
        return self._outcome

    def agreed(self, decide: Callable[[], Decision]) -> Decision:
        """Rank 0's decision, on every rank; where one of them can't decide, all raise."""
        trainer = None if self._fit is None else self._fit[0]()
        return decide() if trainer is None else ranks.agreed(trainer, decide, self._label)

    def close_epoch(self, trainer: Trainer) -> None:
        """After an epoch's last batch: do what belongs to its end now, if that has not been done."""
        if self._acts:
            self._end_epoch(trainer)

    def begin_early(self) -> None:
        """Begin the sparse stage with the next batch, whatever ``start`` says; for previews."""
        self._is_called = True

    def end_early(self) -> None:
        """End the sparse stage now; surgery may follow. Only after a batch of this process."""
        if self._acts and not self.ready:
            ranks.run_together(self._run()[0], self._conclude, self._label)
            self._phase = "ready"

    def release(self) -> None:
        """Surgery is done: fall silent and drop everything that belonged to the dense network."""
        self._phase = "done"
        self._strength = 0.0
        self._remaining = torch.zeros(())
        self._leave()

    # The hooks.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew in a new trainer or with a new module; a second ``fit`` of the same pair goes on."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._leave()
        fit = (weakref.ref(trainer), weakref.ref(pl_module))
        if self._fit is not None and self._fit != fit:
            self._forget()
        self._fit = fit
        own = [callback for callback in trainer.callbacks if type(callback) is type(self)]  # type: ignore[attr-defined]
        number = own.index(self) + 1 if self in own else 1
        self._label = self.name or type(self).__name__.lower() + (f"_{number}" if number > 1 else "")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a stage that doesn't fit the trainer, before the first step."""
        if self._phase in ("ready", "done"):
            return
        refuse_sharded_state(trainer.optimizers)
        refuse_frozen(pl_module, self._label)
        ranks.run_together(trainer, lambda: self._refuse_misfit(trainer), self._label)
        if self.epochs is not None and trainer.current_epoch >= self.first_epoch + self.epochs and self._picked:
            self._phase = "ready"

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Advance the clock, and add the penalty to the loss."""
        super().on_before_backward(trainer, pl_module, loss)
        if self.finished or not pl_module.automatic_optimization:
            return
        self._advance(trainer, trainer.global_step)
        if self._acts and not self._decoupled and uses_loss(trainer, pl_module):
            add_to_loss_(loss, self._penalise, trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the penalty to the gradients where it can't be in the loss; count the steps of manual optimisation."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.finished:
            return
        manual = not pl_module.automatic_optimization
        if manual:
            # who steps after the keeper in the same batch still takes the keeper's step
            batch = trainer.fit_loop.epoch_loop.batch_progress.total.ready
            behind = optimizer is not self._keeper and self._ticked_in == batch
            self._advance(trainer, self._ticks - behind)
        if self._acts and not self._decoupled and not uses_loss(trainer, pl_module):
            add_to_gradients_(self._penalise, optimizer, trainer)
        if self._acts:
            with quietly(self._device):
                self.before_step(optimizer)
        if manual and optimizer is self._keeper:
            self._ticks += 1
            self._ticked_in = trainer.fit_loop.epoch_loop.batch_progress.total.ready

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """See whether an epoch or the stage is over, and log."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.finished:
            if self._logged != self._phase:
                self._log(pl_module)  # once, so that nobody takes the last strength for the present one
            return
        steps = (trainer.global_step if pl_module.automatic_optimization else self._ticks) - self._origin
        if self._acts and self.epochs is None and self.done(steps) and not self.ready:
            ranks.run_together(trainer, self._conclude, self._label)
            self._phase = "ready"
        elif self._acts and is_last_batch(trainer, batch_idx):
            self._end_epoch(trainer)
        if batch_idx == 0 or logs_after(trainer, steps) or self._phase != self._logged:
            self._log(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The stage given in epochs is over exactly here."""
        if self.epochs is None or not self._has_begun or trainer.current_epoch < self.first_epoch + self.epochs - 1:
            return
        if self._acts:
            self._end_epoch(trainer)
        if self._picked:  # nothing is, where a resumed run gets here without a batch
            self._phase = "ready"

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        super().teardown(trainer, pl_module, stage)
        self._remaining = self.energy()
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        super().on_exception(trainer, pl_module, exception)
        self._leave()

    def state_dict(self) -> dict[str, Any]:
        """Phase, clock, schedule, picked channels, and what the method itself remembers."""
        return {
            "phase": self._phase,
            "ticks": self._ticks,
            "origin": self._origin,
            "ended": self._ended,
            "began": self._began,
            "schedule": None if self._schedule is None else asdict(self._schedule),
            "learning_rate": self._learning_rate,
            "picked": {name: to_plain(numbers) for name, numbers in self._picked.items()},
            "energy": None if self._energy is None else self._energy.cpu(),
            "shares": dict(self._shares),
            "multiple": self._multiple,
            "outcome": None if self._outcome is None else asdict(self._outcome),
            "method": self.memory(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; masks are built again in the first batch."""
        with reading_state(type(self).__name__):
            kind, constants = self.schedule_type, state_dict["schedule"]
            self._phase = state_dict["phase"]
            self._ticks = state_dict["ticks"]
            self._origin = state_dict["origin"]
            self._ended = state_dict["ended"]
            self._began = state_dict["began"]
            self._schedule = None if constants is None or kind is None else kind(**constants)
            self._learning_rate = state_dict["learning_rate"]
            self._picked = {name: from_plain(numbers) for name, numbers in state_dict["picked"].items()}
            self._energy = state_dict["energy"]
            self._shares = dict(state_dict["shares"])
            self._multiple = state_dict["multiple"]
            self._outcome = None if state_dict["outcome"] is None else Outcome(**state_dict["outcome"])
            self.remember(state_dict["method"])

    # The machinery.

    @property
    def _has_begun(self) -> bool:
        return self._phase in ("pick", "grow", "hold", "ready")

    @property
    def _acts(self) -> bool:
        return self._has_begun and self._step is not None

    def _refuse_misfit(self, trainer: Trainer) -> None:
        stage = self.timetable(trainer)
        if stage is not None:
            start = max(self.start, trainer.current_epoch)
            refuse_misfit(trainer, type(self).__name__, start, self.epochs, stage.length)

    def _advance(self, trainer: Trainer, completed: int) -> None:
        """Bring phase, picks and strength to the optimiser step that is about to be taken."""
        graph = self.capture.graph
        if graph is None:
            return
        if not self._grain.sizes:
            ranks.run_together(trainer, lambda: self._join(trainer, graph), self._label)
        if self._phase == "wait" and (self._is_called or trainer.current_epoch >= self.start):
            ranks.run_together(trainer, lambda: self._enter(trainer, completed), self._label)
        step = completed - self._origin
        if self._phase == "wait" or step == self._step:
            return
        self._step = step
        if not self.ready and self.picks(step):
            self._pick()
        with quietly(self._device):
            self.update(step)
        if not self.ready:
            self._phase = "pick" if not self._picked else "grow" if self.growing(step) else "hold"

    @property
    def _device(self) -> str:
        return self._targets[0].parameter.device.type

    def _join(self, trainer: Trainer, graph: structure.ChannelGraph) -> None:
        """Meet the model: which groups take part, and which optimiser holds them."""
        self._grain.join(self, graph, self._label)
        others = [other for other in trainer.callbacks if isinstance(other, Regulariser) and other is not self]  # type: ignore[attr-defined]
        refuse_shared_groups(self._grain.sizes, [other._grain.sizes for other in others])
        self._settle(trainer, graph)
        self._parameters = parameters_of(graph.model)
        self._aim(self._picked or {name: range(size) for name, size in self._grain.sizes.items()})
        if not self._targets:
            raise ConfigurationError(f"{self._label} finds no parameter to work on in {', '.join(self._grain.sizes)}.")
        self._keeper, holders = holders_of(self._targets, trainer.optimizers, self._label)
        self._decoupled = dynamics_of(self._keeper).decoupled
        self._handles += [optimizer.register_step_post_hook(self._stepped()) for optimizer in holders]

    def _settle(self, trainer: Trainer, graph: structure.ChannelGraph) -> None:
        """Which share of each group goes in the end: as the ratios say, or as a budget comes to."""
        if self._shares or not self._groups:
            return
        if self.round_to == "auto":
            self._multiple = self.agreed(lambda: fast_multiple(graph.model) if trainer.is_global_zero else 0)
            rank_zero_info(f"{self._label}: round_to={self._multiple} is fast on this device.")
        ratio = self.ratio or 0.5
        chosen = structure.select(graph, ratio, ratios=self.ratios, ignore=self.ignore, scope=self.scope)
        shares = {name: chosen[name] for name in self._groups}
        if self.budget is not None:
            # a method that ranks all channels itself asks again; whether the budget can be reached is known now
            options: Any = {"round_to": self.multiple, "label": self._label}
            found = spend_together(trainer, graph, self.budget, shares, self.ratios, **options)
            if not self.ranks_all:
                shares = {name: 1 - kept / self._groups[name].size for name, kept in found.kept.items()}
                self._note(found.outcome)
        self._shares = shares

    def _note(self, outcome: Outcome) -> None:
        self._outcome = outcome
        rank_zero_info(f"{self._label}: {outcome}")

    def _enter(self, trainer: Trainer, completed: int) -> None:
        """Begin the sparse stage at the step that is about to be taken."""
        if self._keeper is None:
            return
        if self.collapses and not any(target.parameter.requires_grad for target in self._targets):
            raise ConfigurationError(
                f"{self._label}: all weights that it is to shrink are frozen; unfreeze them, or cut with Magnitude."
            )
        dynamics = dynamics_of(self._keeper, [target.parameter for target in self._targets])
        self._origin, self._began = completed, trainer.current_epoch
        self._schedule = self.begin(self._steps_ahead(trainer), dynamics)
        self._learning_rate = dynamics.learning_rate
        self._phase = "pick"
        self.entered(trainer, dynamics)

    def _steps_ahead(self, trainer: Trainer) -> int | None:
        """Optimiser steps of the stage that begins; under manual optimisation as many per batch as there were so far.

        Without an epoch before the stage one per batch is assumed.
        """
        steps, batches = stage_steps(trainer, self.epochs), trainer.fit_loop.epoch_loop.batch_progress.total.completed
        if steps is None or trainer.lightning_module.automatic_optimization or not (self._ticks and batches):
            return steps
        return max(2, round(steps * self._ticks / batches))

    @torch.no_grad()
    def _pick(self) -> None:
        """Decide which channels go: rank 0 decides for all."""
        graph = self.capture.graph
        if graph is None:
            return
        self._picked = self.agreed(lambda: self._own(self.choose(graph)))
        if not self._picked:
            ratio = "the choice" if self.ratio is None else f"ratio={self.ratio}"
            raise ConfigurationError(f"{self._label}: {ratio} removes no channel; raise it or lower round_to.")
        self._aim(self._picked)
        self._energy = self.whole()

    def _own(self, chosen: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
        """Of the groups that take part, those that lose anything."""
        return {name: compact(chosen[name]) for name in self._grain.sizes if len(chosen.get(name, ()))}

    def _aim(self, numbers: Mapping[str, Sequence[int]]) -> None:
        self._targets = self._grain.aim(self, numbers)

    def _stepped(self) -> Callable[..., None]:
        """What happens after each step of an optimiser: the penalty where it is decoupled, and the method's own."""

        @torch.no_grad()
        def stepped(optimizer: Optimizer, *_: Any) -> None:
            if not self._acts:
                return
            if self._decoupled:
                shrink_(self._penalise, optimizer, self._device)
            with quietly(self._device):
                self.after_step(optimizer)

        return stepped

    def _penalise(self) -> Penalty | None:
        """The penalty, whose value is remembered for those who watch."""
        found = self.penalty()
        self._value = None if found is None else found.value
        return found

    def _end_epoch(self, trainer: Trainer) -> None:
        """An epoch of the stage is over, or the whole stage: once each, whichever hook sees it first."""
        if self.epochs is None:
            return
        finished = min(trainer.current_epoch - self.first_epoch + 1, self.epochs)
        if finished <= self._ended:
            return
        self._ended = finished
        ranks.run_together(trainer, lambda: self._finish_epoch(finished), self._label)

    def _finish_epoch(self, finished: int) -> None:
        with quietly(self._device):
            self.end_epoch(finished)
        if finished == self.epochs:
            self._conclude()

    def _conclude(self) -> None:
        if not self._picked:
            self._pick()
        with quietly(self._device):
            self.conclude()

    def _log(self, pl_module: LightningModule) -> None:
        values: dict[str, float | Tensor] = {
            "phase": float(PHASES.index(self._phase)),
            "strength": self._strength,
            "energy": self.energy(),
        }
        for key, value in values.items():
            pl_module.log(f"{self._label}/{key}", value, prog_bar=True)
        self._logged = self._phase
