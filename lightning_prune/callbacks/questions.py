"""What every method is told, and what it is asked: arguments common to all, and questions that each answers itself."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_prune import structure
from lightning_prune.callbacks.dynamics import dynamics_of
from lightning_prune.callbacks.grains import GRAINS, Grain, refuse_for_weights
from lightning_prune.callbacks.inject import Penalty
from lightning_prune.callbacks.targets import Target, separation, squared_norm
from lightning_prune.callbacks.watching import PruningCallback
from lightning_prune.door import check, number, patterns, shares, text, whole
from lightning_prune.errors import ConfigurationError
from lightning_prune.schedules import Dynamics
from lightning_prune.structure import Budget, Outcome


class Method(PruningCallback):
    """The common arguments, and the questions with their plainest answers; only :meth:`reach` has none.

    A method is a final subclass of :class:`~lightning_prune.callbacks.base.Regulariser`, whose hooks ask. It may read
    the fields below, set ``_strength``, and have fields of its own: state of a training begins in ``_forget`` and
    travels in :meth:`memory`; what refers to the model begins in ``_leave`` and is built anew after a resume. Both are
    called before the method's own constructor has run, and call ``super()``'s first.

    Args:
        ratio: fraction of channels to remove, in (0, 1); ``None`` where the method decides by something else.
        budget: instead of a ratio what may be left of the network, see :class:`~lightning_prune.Budget`.
        ratios: name patterns to ratios in [0, 1); 0 leaves a layer alone.
        ignore: name patterns of layers to leave alone.
        scope: ``"inner"`` for groups with one producer, ``"all"`` for residual streams too.
        round_to: kept widths are multiples of this; ``"auto"`` measures what is fast on the device.
        granularity: ``"channel"``, or ``"weight"`` where the method can remove single weights.
        start: epoch at whose first batch the sparse stage begins.
        epochs: length of the sparse stage; at the end of epoch ``start + epochs - 1`` the regulariser is ready.
        module: name of the pruned module inside the LightningModule; ``None`` finds it in the first training batch.
        name: tells instances of one class apart in checkpoints and logs; without it the layers chosen do.

    Raises:
        ConfigurationError: an argument is out of its range.
    """

    schedule_type: type[Any] | None = None
    """Of the record that :meth:`begin` returns; a checkpoint rebuilds it from its fields."""

    needs: str = "channels"
    """What a group must have to suit the method, in the words of its errors."""

    ranks_all: bool = False
    """Whether the method itself ranks the channels of all groups together, so that a budget becomes widths only then;
    by default one ratio holds for all groups, and the widths are known in the first batch."""

    collapses: bool = True
    """Whether the channels that go are meant to be next to nothing before surgery; where not, nobody is warned."""

    _grain: Grain  # what is counted in, and what of it takes part
    _parameters: dict[str, nn.Parameter]  # of the pruned module, by every name
    _targets: list[Target]  # what `reach` covers of the picked channels; of all while none is picked
    _shares: dict[str, float]  # of each group that takes part, which goes in the end
    _outcome: Outcome | None  # of the budget
    _multiple: int  # that round_to="auto" has found; 0 before
    _picked: dict[str, Sequence[int]]
    _schedule: Any  # what `begin` returned
    _step: int | None  # of the sparse stage, the one being taken
    _strength: float
    _keeper: Optimizer | None  # holds most of the targets; its steps are counted
    _decoupled: bool
    _learning_rate: float | None  # at the stage's beginning
    _energy: Tensor | None  # the `whole` at the pick
    _value: Tensor | None  # of the latest penalty

    def __init__(
        self,
        ratio: float | None,
        *,
        budget: Budget | Mapping[str, Any] | None = None,
        ratios: Mapping[str, float] | None = None,
        ignore: Sequence[str] = (),
        scope: str = "inner",
        round_to: int | str = 1,
        granularity: str = "channel",
        start: int = 0,
        epochs: int | None = None,
        module: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(module)
        if ratio is not None:
            number("ratio", ratio)
            check(0 < ratio < 1, f"ratio={ratio} must lie strictly between 0 and 1.")
        if round_to != "auto":
            whole("round_to", round_to, least=1)
        if epochs is not None:
            whole("epochs", epochs, least=1)
        whole("start", start, least=0)
        text("module", module)
        text("name", name)
        check(scope in ("inner", "all"), f"scope={scope!r} must be 'inner' or 'all'.")
        check(granularity in list(GRAINS), f"granularity={granularity!r} must be one of {', '.join(GRAINS)}.")
        refuse_for_weights(granularity, "budget", budget, None)
        refuse_for_weights(granularity, "scope", scope, "inner")
        refuse_for_weights(granularity, "round_to", round_to, 1)
        check(ratio is None or budget is None, "Give a ratio or a budget, not both.")
        self.ratio = ratio
        self.budget = Budget.of(budget)
        self.ratios = shares("ratios", ratios) or None
        self.ignore = patterns("ignore", ignore)
        self.scope = scope
        self.round_to = round_to
        self.granularity = granularity
        self.start = start
        self.epochs = epochs
        self.name = name
        self._label = name or type(self).__name__.lower()
        self._fit: tuple[weakref.ref[Trainer], weakref.ref[LightningModule]] | None = None
        self._handles: list[RemovableHandle] = []
        self._logged = ""
        self._forget()

    @property
    def state_key(self) -> str:
        """Class and name, or class and choice of layers: two regularisers of one class can't have the same layers."""
        if self.name is not None:
            return self._generate_state_key(name=self.name)
        ratios = sorted((self.ratios or {}).items())
        return self._generate_state_key(
            ratio=self.ratio,
            budget=None if self.budget is None else str(self.budget),
            ratios=ratios,
            ignore=list(self.ignore),
            scope=self.scope,
            granularity=self.granularity,
            module=self.module,
        )

    # The stage.

    def begin(self, steps: int | None, dynamics: Dynamics) -> Any:
        """The constants to begin with, a frozen record or ``None``; changes nothing.

        Asked before the first step, to refuse what can't work, and again when the stage begins.

        Args:
            steps: optimiser steps of the sparse stage where ``epochs`` is given, else ``None``.
            dynamics: of the optimiser that holds the pruned parameters.
        """
        return None

    def entered(self, trainer: Trainer, dynamics: Dynamics) -> None:
        """The stage has begun, and ``_schedule`` is known: refuse or warn of what can't work."""

    def steps_needed(self) -> int | None:
        """Optimiser steps of the sparse stage, where constants say so and not ``epochs``."""
        return None

    def steps_in_all(self) -> int | None:
        """:meth:`steps_needed` by the stage that has begun: an early stop may have shortened it."""
        return self.steps_needed()

    def known_after(self, schedule: Any, steps: int | None) -> int:
        """After how many optimiser steps of the stage it is known which channels go; after the first by default.

        Args:
            schedule: what :meth:`begin` returned.
            steps: optimiser steps of the stage where ``epochs`` is given, else ``None``.
        """
        return 1

    def growing(self, step: int) -> bool:
        """Whether the strength still grows at this step of the sparse stage; afterwards it holds."""
        return False

    def done(self, steps: int) -> bool:
        """Whether the sparse stage is over after so many optimiser steps, where no ``epochs`` says so."""
        return False

    # The channels.

    @abstractmethod
    def reach(self, group: structure.ChannelGroup) -> Sequence[tuple[str, int]]:
        """Which of a group's members, as (parameter name, dim), the method pulls at."""

    def suits(self, group: structure.ChannelGroup) -> bool:
        """Whether the method can work on a group at all; ``needs`` says what it takes."""
        return True

    def picks(self, step: int) -> bool:
        """Whether channels are to be picked, or picked anew, before this step; once at the beginning by default.

        Where none have been picked by the end of the stage, they are picked then.
        """
        return not self._picked

    def choose(self, graph: structure.ChannelGraph) -> Mapping[str, Sequence[int]]:
        """The channels that go, by the weights as they are; the smallest by default. Rank 0's answer counts."""
        return self.smallest(graph)

    def foresee(self, graph: structure.ChannelGraph) -> Mapping[str, Sequence[int]]:
        """What :meth:`choose` would say now, for a preview; of a method that knows only later, as much as will go."""
        return self.choose(graph)

    def settled(self) -> bool:
        """Whether what has been picked is all that goes, and stays picked to the end of the stage."""
        return bool(self._picked)

    def merges(self) -> dict[str, dict[int, int]]:
        """Group name to channel that goes to channel that stands for it afterwards; nothing is merged by default."""
        return {}

    def left(self) -> Tensor:
        """How far the picked channels are from going without a trace; their squared weights by default."""
        return squared_norm(self._targets)

    def whole(self) -> Tensor:
        """What :meth:`left` is a fraction of, measured at the pick; what is left then by default."""
        return self.left()

    def apart(self) -> Tensor | None:
        """How far the picked channels stand apart from the others: size of a weight that stays over one that goes."""
        return separation(self._targets)

    # The steps. All but `penalty` may change weights; none of them needs to think of autograd or autocast.

    def update(self, step: int) -> None:
        """Set the strength for an optimiser step, counted from 0 at the beginning of the sparse stage."""

    def penalty(self) -> Penalty | None:
        """Value and gradients for the current step; ``None`` where there is nothing to penalise."""
        return None

    def before_step(self, optimizer: Optimizer) -> None:
        """Work on the complete gradients of an optimiser, before its step."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Work on the weights, after each step of an optimiser that holds some of them."""

    def end_epoch(self, finished: int) -> None:
        """Work after the last step of each epoch of a stage given in epochs, before validation and checkpoints.

        Args:
            finished: epochs of the stage, this one included.
        """

    def conclude(self) -> None:
        """Work after the last step of the sparse stage, before validation and checkpoints."""

    # The checkpoint.

    def memory(self) -> dict[str, Any]:
        """What this method must remember for a resume, as plain values and tensors."""
        return {}

    def remember(self, memory: dict[str, Any]) -> None:
        """Take over what :meth:`memory` had saved."""

    # What methods may use.

    @property
    def _groups(self) -> dict[str, structure.ChannelGroup]:
        """The channel groups that take part, by name."""
        return self._grain.channels

    @property
    def decoupled(self) -> bool:
        """Whether the optimiser rescales gradients, so that the penalty acts after its steps instead."""
        return self._decoupled

    def smallest(
        self, graph: structure.ChannelGraph, *, score: str = "l1", share: float = 1.0, seed: int = 0
    ) -> Mapping[str, Sequence[int]]:
        """The channels (or weights) of least score in every group that takes part, as many as the ratios say.

        Args:
            graph: of the pruned module.
            score: as in :func:`lightning_prune.choose`.
            share: of the ratios, in (0, 1].
            seed: of ``score="random"``.
        """
        if self.ratio is None and self.budget is None:
            raise ConfigurationError("Without a ratio or a budget a method has to choose its channels itself.")
        chosen = self._grain.smallest(self, graph, score, share, seed)
        return {name: numbers for name, numbers in chosen.items() if name in self._grain.sizes}

    @property
    def multiple(self) -> int:
        """What kept widths are multiples of; with ``round_to="auto"`` known from the first batch on, before that 1."""
        return max(1, self._multiple) if isinstance(self.round_to, str) else self.round_to

    def learning_rate_share(self) -> float:
        """Learning rate now over the one that a derived schedule was made for, at least a tenth.

        A derived schedule promises learning rate times strength; where the rate falls the strength has to rise.
        """
        if self.epochs is None or self._keeper is None or self._learning_rate is None:
            return 1.0
        now = dynamics_of(self._keeper, [target.parameter for target in self._targets]).learning_rate
        return max(now / self._learning_rate, 0.1)

    @property
    def first_epoch(self) -> int:
        """The epoch in which the stage has begun, or will: a resumed run may be past ``start``."""
        return self.start if self._began is None else self._began

    def _run(self) -> tuple[Trainer, LightningModule]:
        """The fit this belongs to."""
        trainer, pl_module = (None, None) if self._fit is None else (self._fit[0](), self._fit[1]())
        if trainer is None or pl_module is None:
            raise ConfigurationError(f"{self._label} belongs to no fit.")
        return trainer, pl_module

    # Beginnings.

    def _forget(self) -> None:
        """Everything that belongs to one training, at its beginning."""
        self._phase = "wait"
        self._ticks = 0
        self._ticked_in = -1
        self._origin = 0
        self._ended = 0
        self._began: int | None = None
        self._is_called = False
        self._schedule = None
        self._strength = 0.0
        self._learning_rate = None
        self._shares = {}
        self._outcome = None
        self._multiple = 0
        self._picked = {}
        self._energy = None
        self._remaining = torch.ones(())
        self._leave()

    def _leave(self) -> None:
        """Let go of the model and of the optimisers."""
        self._grain = GRAINS[self.granularity]()
        self._parameters = {}
        self._targets = []
        self._keeper = None
        self._decoupled = False
        self._step = None
        self._value = None
        for handle in self._handles:
            handle.remove()
        self._handles = []
