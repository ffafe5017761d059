"""What the methods share: the clock, the phases, the checkpoint, the log."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_prune import structure
from lightning_prune.callbacks.dynamics import dynamics_of, refuse_sharded_state, steps_per_epoch
from lightning_prune.callbacks.inject import Penalty, add_to_gradients_, add_to_loss_, quietly, uses_loss
from lightning_prune.callbacks.targets import Target, aim, squared_norm
from lightning_prune.callbacks.watching import PruningCallback, check
from lightning_prune.errors import ConfigurationError, PlanError
from lightning_prune.schedules import ENOUGH, Dynamics

__all__ = ["PHASES", "PruningCallback", "Regulariser", "Schedule"]

Decision = TypeVar("Decision")

PHASES = ("wait", "pick", "grow", "hold", "ready", "done")
"""A regulariser's phases in their order; the log shows the position in this tuple."""


class Schedule(Protocol):
    """What a regulariser needs to know of the growth of its strength; see :mod:`lightning_prune.schedules`."""

    @property
    def pick_step(self) -> int:
        """The step before which the channels are picked."""

    @property
    def last_event(self) -> int:
        """The step at which growth ends."""

    @property
    def ceiling(self) -> float:
        """The largest strength."""

    @property
    def length(self) -> int:
        """Optimiser steps from the first event to the end of the hold."""

    def exponent(self, dynamics: Dynamics) -> float:
        """How far the penalty alone shrinks a doomed weight."""


class Regulariser(PruningCallback):
    """Base of the methods that shrink channels during training until they can go.

    A method is a final subclass that answers a few questions: :meth:`begin`, :meth:`reach`, :meth:`update`,
    :meth:`done`, :meth:`penalty`, and what of its own it must remember. Everything else happens here.

    Under SGD the penalty is part of the loss. Other optimisers rescale gradients and with them a penalty, so there the
    weights shrink by learning rate times penalty gradient after each step instead (the log says so).

    Args:
        ratio: fraction of channels to remove, in (0, 1).
        ratios: name patterns to ratios in [0, 1); 0 leaves a layer alone.
        ignore: name patterns of layers to leave alone.
        scope: ``"inner"`` for groups with one producer, ``"all"`` for residual streams too.
        round_to: kept widths are multiples of this.
        start: epoch at whose first batch the sparse stage begins.
        epochs: length of the sparse stage; at the end of epoch ``start + epochs - 1`` the regulariser is ready.
        module: name of the pruned module inside the LightningModule; ``None`` finds it in the first training batch.
        name: tells instances of one class apart in checkpoints and logs; without it the layers chosen do.

    Raises:
        ConfigurationError: an argument is out of its range.
    """

    schedule_type: type[Any]

    _label: str
    _phase: str
    _strength: float
    _ticks: int
    _origin: int
    _schedule: Any
    _learning_rate: float | None
    _picked: dict[str, tuple[int, ...]]
    _energy: Tensor | None
    _remaining: Tensor
    _groups: dict[str, structure.ChannelGroup]
    _parameters: dict[str, nn.Parameter]
    _targets: list[Target]
    _keeper: Optimizer | None
    _decoupled: bool
    _step: int | None
    _handles: list[RemovableHandle]

    def __init__(
        self,
        ratio: float,
        *,
        ratios: Mapping[str, float] | None = None,
        ignore: Sequence[str] = (),
        scope: str = "inner",
        round_to: int = 1,
        start: int = 0,
        epochs: int | None = None,
        module: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(module)
        check(0 < ratio < 1, f"ratio={ratio} must lie strictly between 0 and 1.")
        for pattern, value in (ratios or {}).items():
            check(0 <= value < 1, f"ratios[{pattern!r}]={value} must lie in [0, 1).")
        check(not isinstance(ignore, str), f"ignore={ignore!r} must be a list of patterns.")
        check(scope in ("inner", "all"), f"scope={scope!r} must be 'inner' or 'all'.")
        check(round_to >= 1, f"round_to={round_to} must be at least 1 channel.")
        check(start >= 0, f"start={start} must be at least 0 epochs.")
        check(epochs is None or epochs >= 1, f"epochs={epochs} must be at least 1, or None.")
        self.ratio = ratio
        self.ratios = dict(ratios) if ratios else None
        self.ignore = tuple(ignore)
        self.scope = scope
        self.round_to = round_to
        self.start = start
        self.epochs = epochs
        self.name = name
        self._handles = []
        self._fit: tuple[weakref.ref[Trainer], weakref.ref[LightningModule]] | None = None
        self._label = name or type(self).__name__.lower()
        self._forget()

    # What a method answers.

    @abstractmethod
    def begin(self, steps: int | None, dynamics: Dynamics) -> Schedule:
        """The schedule to begin with; changes nothing.

        Args:
            steps: optimiser steps of the sparse stage where ``epochs`` is given, else ``None``.
            dynamics: of the optimiser that holds the pruned parameters.
        """

    @abstractmethod
    def reach(self, group: structure.ChannelGroup) -> Sequence[tuple[str, int]]:
        """Which of a group's members, as (parameter name, dim), the penalty pulls at."""

    @abstractmethod
    def update(self, step: int) -> None:
        """Set the strength for an optimiser step, counted from 0 at the beginning of the sparse stage."""

    @abstractmethod
    def done(self, steps: int) -> bool:
        """Whether the sparse stage is over after so many optimiser steps, where no ``epochs`` says so."""

    @abstractmethod
    def penalty(self) -> Penalty | None:
        """Value and gradients for the current step; ``None`` where there is nothing to penalise."""

    @abstractmethod
    def memory(self) -> dict[str, Any]:
        """What this method must remember for a resume, as plain values and tensors."""

    @abstractmethod
    def remember(self, memory: dict[str, Any]) -> None:
        """Take over what :meth:`memory` had saved."""

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
    def strength(self) -> float:
        """The strength that acts on the channels that will go, now."""
        return self._strength

    @property
    def state_key(self) -> str:
        """Class and name, or class and choice of layers: two regularisers of one class can't have the same layers."""
        if self.name is not None:
            return self._generate_state_key(name=self.name)
        ratios = sorted((self.ratios or {}).items())
        return self._generate_state_key(
            ratio=self.ratio, ratios=ratios, ignore=list(self.ignore), scope=self.scope, module=self.module
        )

    def removal(self) -> dict[str, tuple[int, ...]]:
        """The channels that will go: group name to channel numbers. Before the pick: an error."""
        if not self._picked:
            raise PlanError(f"{self._label} has picked no channels yet; it is in phase {self._phase!r}.")
        return dict(self._picked)

    @torch.no_grad()
    def energy(self) -> Tensor:
        """Squared weights of the channels that will go, as a fraction of what they were at the pick; no host sync.

        Before the pick 1, after surgery 0, after the fit what it was at its end.
        """
        if self._energy is None or not self._targets or not self._picked:
            return self._remaining
        return squared_norm(self._targets) / self._energy.to(self._targets[0].parameter.device).clamp_min(1e-30)

    def agreed(self, decision: Decision) -> Decision:
        """Rank 0's decision, on every rank."""
        trainer = None if self._fit is None else self._fit[0]()
        return decision if trainer is None else trainer.strategy.broadcast(decision, src=0)

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
        """Refuse a schedule that doesn't fit the trainer, before the first step."""
        if self._phase in ("ready", "done"):
            return
        refuse_sharded_state(trainer.optimizers)
        steps = self._stage_steps(trainer)
        if trainer.optimizers and self._phase == "wait":
            self._fits(trainer, self.begin(steps, dynamics_of(trainer.optimizers[0])))
        if self.epochs is not None and trainer.current_epoch >= self.start + self.epochs and self._picked:
            self._phase = "ready"

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Advance the clock, and add the penalty to the loss."""
        super().on_before_backward(trainer, pl_module, loss)
        if self.finished or not pl_module.automatic_optimization:
            return
        self._advance(trainer, pl_module, trainer.global_step)
        if self._acts and not self._decoupled and uses_loss(trainer, pl_module):
            add_to_loss_(loss, self.penalty, trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the penalty to the gradients where it can't be in the loss; count the steps of manual optimisation."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.finished:
            return
        manual = not pl_module.automatic_optimization
        if manual:
            self._advance(trainer, pl_module, self._ticks)
        if self._acts and not self._decoupled and not uses_loss(trainer, pl_module):
            add_to_gradients_(self.penalty, optimizer, trainer)
        if manual and optimizer is self._keeper:
            self._ticks += 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """See whether the stage is over, and log."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.finished:
            return
        steps = self._completed(trainer, pl_module) - self._origin
        before = self._phase
        if self._acts and self.epochs is None and self.done(steps):
            self._phase = "ready"
        if batch_idx == 0 or steps % trainer.log_every_n_steps == 0 or self._phase != before:  # type: ignore[attr-defined]
            self._log(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The stage given in epochs is over exactly here."""
        if self.epochs is None or not self._acts or trainer.current_epoch < self.start + self.epochs - 1:
            return
        if not self._picked:
            self._pick(trainer)
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
            "schedule": None if self._schedule is None else asdict(self._schedule),
            "learning_rate": self._learning_rate,
            "picked": {name: list(channels) for name, channels in self._picked.items()},
            "energy": None if self._energy is None else self._energy.cpu(),
            "method": self.memory(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; masks are built again in the first batch."""
        self._phase = state_dict["phase"]
        self._ticks = state_dict["ticks"]
        self._origin = state_dict["origin"]
        self._schedule = None if state_dict["schedule"] is None else self.schedule_type(**state_dict["schedule"])
        self._learning_rate = state_dict["learning_rate"]
        self._picked = {name: tuple(channels) for name, channels in state_dict["picked"].items()}
        self._energy = state_dict["energy"]
        self.remember(state_dict["method"])

    # The machinery.

    @property
    def _acts(self) -> bool:
        return self._phase in ("pick", "grow", "hold", "ready") and self._step is not None

    def _completed(self, trainer: Trainer, pl_module: LightningModule) -> int:
        return trainer.global_step if pl_module.automatic_optimization else self._ticks

    def _advance(self, trainer: Trainer, pl_module: LightningModule, completed: int) -> None:
        """Bring phase, picks and strength to the optimiser step that is about to be taken."""
        if self.capture.graph is None:
            return
        if not self._groups:
            self._join(trainer, self.capture.graph)
        if self._phase == "wait" and trainer.current_epoch >= self.start:
            self._enter(trainer, completed)
        step = completed - self._origin
        if self._phase == "wait" or step == self._step:
            return
        self._step = step
        if not self._picked and step >= self._schedule.pick_step:
            self._pick(trainer)
        with quietly(self._targets[0].parameter.device.type):
            self.update(step)
        if self._phase != "ready":
            self._phase = "pick" if not self._picked else "grow" if step < self._growth_end() else "hold"

    def _growth_end(self) -> int:
        return int(self._schedule.last_event)

    def _join(self, trainer: Trainer, graph: structure.ChannelGraph) -> None:
        """Meet the model: which groups take part, and which optimiser holds them."""
        ratios = structure.select(graph, self.ratio, ratios=self.ratios, ignore=self.ignore, scope=self.scope)
        self._groups = {group.name: group for group in graph.groups if ratios.get(group.name, 0.0) > 0}
        if not self._groups:
            reasons = "; ".join(f"{layer}: {reason}" for layer, reason in list(graph.pinned.items())[:3])
            raise ConfigurationError(
                f"{self._label} finds no layer to prune with scope={self.scope!r}. {reasons}".strip()
            )
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            shared = [] if other is self or not isinstance(other, Regulariser) else self._groups.keys() & other._groups
            for name in sorted(shared):
                raise ConfigurationError(f"Two regularisers have picked channels of {name!r}; let one ignore it.")
        self._parameters = dict(graph.model.named_parameters(remove_duplicate=False))
        self._aim(self._picked or {name: range(group.size) for name, group in self._groups.items()})
        if not self._targets:
            raise ConfigurationError(f"{self._label} finds no parameter to penalise in {', '.join(self._groups)}.")
        aimed = {id(target.parameter) for target in self._targets}

        def held(optimizer: Optimizer) -> int:
            return sum(id(parameter) in aimed for group in optimizer.param_groups for parameter in group["params"])

        self._keeper = max(trainer.optimizers, key=held)
        if held(self._keeper) == 0:
            raise ConfigurationError(f"No optimiser holds the parameters that {self._label} is to prune.")
        self._decoupled = dynamics_of(self._keeper).decoupled
        if self._decoupled:
            holders = [optimizer for optimizer in trainer.optimizers if held(optimizer)]
            self._handles += [optimizer.register_step_post_hook(self._decay()) for optimizer in holders]

    def _enter(self, trainer: Trainer, completed: int) -> None:
        """Begin the sparse stage at the step that is about to be taken."""
        if self._keeper is None:
            return
        dynamics = dynamics_of(self._keeper, [target.parameter for target in self._targets])
        self._origin = completed
        self._schedule = self.begin(self._stage_steps(trainer), dynamics)
        self._learning_rate = dynamics.learning_rate
        self._phase = "pick"
        if dynamics.decoupled:
            name = type(self._keeper).__name__
            rank_zero_info(f"{self._label}: {name} rescales gradients, so weights decay by it after each step instead.")
        if dynamics.learning_rate * self._schedule.ceiling >= 1:
            raise ConfigurationError(
                f"{self._label}: learning rate {dynamics.learning_rate:g} times ceiling {self._schedule.ceiling:g} "
                "must stay below 1; lower one of them."
            )
        exponent = self._schedule.exponent(dynamics)
        if self.epochs is not None and exponent < ENOUGH and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"{self._label}: too few optimiser steps ({self._schedule.length}) for the channels to collapse: the "
                f"penalty alone shrinks a weight to exp(-{exponent:.1f}), exp(-{ENOUGH:.0f}) is needed; give more "
                "epochs."
            )

    @torch.no_grad()
    def _pick(self, trainer: Trainer) -> None:
        """Decide which channels go, by the weights as they are: rank 0 decides for all."""
        graph = self.capture.graph
        if graph is None:
            return
        chosen = structure.pick(
            graph,
            self.ratio,
            score="l1",
            ratios=self.ratios,
            ignore=self.ignore,
            scope=self.scope,
            round_to=self.round_to,
        )
        plain = {name: [int(number) for number in chosen[name]] for name in self._groups if chosen.get(name)}
        plain = self.agreed(plain)
        if not plain:
            raise ConfigurationError(
                f"{self._label}: ratio={self.ratio} removes no channel; raise it or lower round_to."
            )
        self._picked = {name: tuple(numbers) for name, numbers in plain.items()}
        self._aim(self._picked)
        self._energy = squared_norm(self._targets)

    def _aim(self, channels: Mapping[str, Sequence[int]]) -> None:
        self._targets = aim(channels, self._groups, self.reach, self._parameters)

    def _decay(self) -> Callable[..., None]:
        """The penalty where gradients are rescaled: after each step, minus learning rate times gradient."""

        @torch.no_grad()
        def decay(optimizer: Optimizer, *_: Any) -> None:
            if not self._acts:
                return
            with quietly(self._targets[0].parameter.device.type):
                found = self.penalty()
            if found is None:
                return
            pulls = {id(p): (p, g) for p, g in zip(found.parameters, found.gradients, strict=True)}
            for group in optimizer.param_groups:
                pairs = [pulls[id(parameter)] for parameter in group["params"] if id(parameter) in pulls]
                if pairs:
                    torch._foreach_sub_([p for p, _ in pairs], torch._foreach_mul([g for _, g in pairs], group["lr"]))

        return decay

    def _learning_rate_share(self) -> float:
        """Learning rate now over the one that a derived schedule was made for, at least a tenth.

        A derived schedule promises learning rate times strength; where the rate falls the strength has to rise.
        """
        if self.epochs is None or self._keeper is None or self._learning_rate is None:
            return 1.0
        now = dynamics_of(self._keeper, [target.parameter for target in self._targets]).learning_rate
        return max(now / self._learning_rate, 0.1)

    def _stage_steps(self, trainer: Trainer) -> int | None:
        """Optimiser steps of the sparse stage, where it is given in epochs."""
        if self.epochs is None:
            return None
        per_epoch = steps_per_epoch(trainer)
        if per_epoch is None:
            raise ConfigurationError(
                f"epochs={self.epochs} needs a known number of batches per epoch; set limit_train_batches to one."
            )
        # a dry run has fewer steps than any schedule needs
        return max(per_epoch * self.epochs, 2) if trainer.fast_dev_run else per_epoch * self.epochs  # type: ignore[attr-defined]

    def _fits(self, trainer: Trainer, schedule: Schedule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        per_epoch = steps_per_epoch(trainer)
        needed = schedule.length + (per_epoch or 0) * self.start
        what = f"start={self.start} and {schedule.length} optimiser steps of schedule"
        if self.epochs is not None:
            what = f"start={self.start} and epochs={self.epochs}"
            limit = trainer.max_epochs
            if limit is not None and 0 <= limit < self.start + self.epochs:
                raise ConfigurationError(f"{type(self).__name__}: {what} don't fit into max_epochs={limit}.")
        elif per_epoch is not None and trainer.max_epochs is not None and 0 <= trainer.max_epochs * per_epoch < needed:
            raise ConfigurationError(
                f"{type(self).__name__}: {what} don't fit into max_epochs={trainer.max_epochs} of {per_epoch} steps."
            )
        if 0 <= trainer.max_steps < needed:
            raise ConfigurationError(f"{type(self).__name__}: {what} don't fit into max_steps={trainer.max_steps}.")

    def _log(self, pl_module: LightningModule) -> None:
        values: dict[str, float | Tensor] = {
            "phase": float(PHASES.index(self._phase)),
            "strength": self._strength,
            "energy": self.energy(),
        }
        for key, value in values.items():
            pl_module.log(f"{self._label}/{key}", value, prog_bar=True)

    def _forget(self) -> None:
        """Everything that belongs to one training, at its beginning."""
        self._phase = "wait"
        self._ticks = 0
        self._origin = 0
        self._schedule = None
        self._strength = 0.0
        self._learning_rate = None
        self._picked = {}
        self._energy = None
        self._remaining = torch.ones(())
        self._leave()

    def _leave(self) -> None:
        """Let go of the model and of the optimisers."""
        self._groups = {}
        self._parameters = {}
        self._targets = []
        self._keeper = None
        self._decoupled = False
        self._step = None
        for handle in self._handles:
            handle.remove()
        self._handles = []
