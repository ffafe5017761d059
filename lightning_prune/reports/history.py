"""How a sparse stage went, epoch by epoch, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Moment:
    """How one method stood at the end of one epoch; ``None`` is what nobody knows, or what is not a finite number.

    Args:
        method: its name in the logs.
        epoch: of the trainer, counted from 0.
        step: optimiser steps of the run so far.
        phase: "pick", "grow", "hold" or "ready".
        strength: of the penalty.
        penalty: its value in the latest step, in units of the loss.
        energy: share of squared weight that is left in what will go, 1 at the pick.
        separation: size of a weight that stays over that of one that will go.

    >>> Moment("greg1", 3, 120, "grow", 0.5, math.inf, 0.25).penalty is None
    True
    """

    method: str
    epoch: int
    step: int
    phase: str
    strength: float | None
    penalty: float | None = None
    energy: float | None = None
    separation: float | None = None

    def __post_init__(self) -> None:
        for name in ("strength", "penalty", "energy", "separation"):
            object.__setattr__(self, name, finite(getattr(self, name)))


@dataclass(frozen=True)
class Validation:
    """What the monitored metric was at one validation.

    Args:
        epoch: of the trainer, counted from 0.
        step: optimiser steps of the run so far.
        value: in the metric's own units.
        slim: whether surgery had been done.
    """

    epoch: int
    step: int
    value: float | None
    slim: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", finite(self.value))


def finite(value: float | None) -> float | None:
    """A number that JSON can hold, or ``None``.

    >>> finite(float("nan")), finite(1)
    (None, 1.0)
    """
    return None if value is None or not math.isfinite(value) else float(value)
