"""Methods whose strength grows: along constants in optimiser steps, or along what is derived for some epochs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_prune.callbacks.base import Regulariser
from lightning_prune.door import check
from lightning_prune.errors import ConfigurationError
from lightning_prune.schedules import ENOUGH, Dynamics


class Schedule(Protocol):
    """The growth of a strength; see :mod:`lightning_prune.schedules`."""

    @property
    def last_event(self) -> int:
        """The step at which growth ends."""

    @property
    def ceiling(self) -> float:
        """The largest strength."""

    @property
    def hold(self) -> int:
        """Optimiser steps after the last event's step."""

    @property
    def length(self) -> int:
        """Optimiser steps from the first one to the end of the hold."""

    def exponent(self, dynamics: Dynamics) -> float:
        """How far the penalty alone shrinks a doomed weight."""


class Growing(Regulariser):
    """Base of the methods with a growing strength: given as ``schedule``, or derived for ``epochs``."""

    _constants: Any

    @abstractmethod
    def derive(self, steps: int, dynamics: Dynamics) -> Schedule:
        """The schedule for so many optimiser steps."""

    def begin(self, steps: int | None, dynamics: Dynamics) -> Schedule:
        """The given constants, or those derived for so many steps of this optimiser; refuses those that overshoot."""
        schedule: Schedule = self._constants if steps is None else self.derive(steps, dynamics)
        if dynamics.learning_rate * schedule.ceiling >= 1:
            raise ConfigurationError(
                f"{self._label}: learning rate {dynamics.learning_rate:g} times ceiling {schedule.ceiling:g} "
                "must stay below 1; lower one of them."
            )
        return schedule

    def entered(self, trainer: Trainer, dynamics: Dynamics) -> None:
        """Say how the penalty acts; warn of one that can't do its work."""
        schedule: Schedule = self._schedule
        if dynamics.decoupled:
            name = type(self._keeper).__name__
            rank_zero_info(f"{self._label}: {name} rescales gradients, so weights decay by it after each step instead.")
        exponent = schedule.exponent(dynamics)
        if self.epochs is not None and exponent < ENOUGH and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"{self._label}: too few optimiser steps ({schedule.length}) for the channels to collapse: the "
                f"penalty alone shrinks a weight to exp(-{exponent:.1f}), exp(-{ENOUGH:.0f}) is needed; give more "
                "epochs."
            )

    def steps_needed(self) -> int | None:
        """The length of the given constants."""
        return None if self._constants is None else int(self._constants.length)

    def steps_in_all(self) -> int | None:
        """To the first step for which :meth:`done` says so."""
        return None if self._schedule is None else self._growth_end() + int(self._schedule.hold) + 1

    def growing(self, step: int) -> bool:
        """Whether the last event is still to come."""
        return step < self._growth_end()

    def done(self, steps: int) -> bool:
        """The hold counts from the event at which growth ended."""
        return steps > self._growth_end() + int(self._schedule.hold)

    def _growth_end(self) -> int:
        return int(self._schedule.last_event)


def constants(epochs: int | None, schedule: Any, published: Mapping[str, Any]) -> Any:
    """The constants that were asked for, by record or by name; ``None`` where ``epochs`` is given.

    Raises:
        ConfigurationError: not exactly one of both is given, the name is unknown, or the record is of another type
            than the published ones.
    """
    check((epochs is None) != (schedule is None), "Give exactly one of epochs=... and schedule=....")
    kind = type(next(iter(published.values())))
    if schedule is None or isinstance(schedule, kind):
        return schedule
    is_known = isinstance(schedule, str) and schedule in published
    check(is_known, f"schedule={schedule!r} must be one of {sorted(published)} or a {kind.__name__}.")
    return published[schedule]
