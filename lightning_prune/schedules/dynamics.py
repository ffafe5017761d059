"""What an optimiser makes of a penalty, and the arithmetic that all schedules share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from numbers import Integral, Real
from typing import Any, get_args, get_type_hints

from lightning_prune.errors import ConfigurationError

EVENTS = 1000
"""A derived schedule grows in at most about so many events: finer steps change nothing and cost time."""

EXPONENT = 20.0
"""What a derived schedule aims at: a penalty alone shrinks a weight to exp(-20) of itself."""

ENOUGH = 10.0
"""The smallest exponent after which channels count as collapsed."""


@dataclass(frozen=True)
class Dynamics:
    r"""How an optimiser turns a penalty into a decay.

    Args:
        learning_rate: largest :math:`\eta` among the penalised parameters.
        momentum: :math:`\mu` in ``[0, 1)``; 0 where the decay is decoupled.
        decoupled: the weights shrink by :math:`1 - \eta \lambda` after each step, instead of through the gradient.
        smallest: smallest :math:`\eta` among the penalised parameters; ``None`` means the same as ``learning_rate``.
    """

    learning_rate: float
    momentum: float = 0.0
    decoupled: bool = False
    smallest: float | None = None

    def __post_init__(self) -> None:
        check(self.learning_rate > 0, f"learning_rate={self.learning_rate} must be positive.")
        check(0 <= self.momentum < 1, f"momentum={self.momentum} must lie in [0, 1).")

    def rate(self, strength: float) -> float:
        r"""How much the logarithm of a weight falls per step under a constant strength, from below.

        The heavy ball :math:`z^2 - (1 + \mu - a) z + \mu = 0` with :math:`a = \eta \lambda` decides. Slow decays run at
        :math:`a / (1 - \mu)`; above :math:`a = (1 - \sqrt\mu)^2` the weight swings and decays at
        :math:`-\tfrac12 \ln \mu`, however strong the penalty: momentum 0.9 allows 0.053 per step. The smaller one of
        the two laws is returned.

        >>> round(Dynamics(0.05, momentum=0.9).rate(0.01), 4), round(Dynamics(0.05, momentum=0.9).rate(1.0), 4)
        (0.005, 0.0527)
        >>> round(Dynamics(1e-3, decoupled=True).rate(100.0), 4)
        0.1
        """
        pull = (self.smallest or self.learning_rate) * strength
        if pull <= 0:
            return 0.0
        slow = pull / (1 - self.momentum)
        middle = (1 + self.momentum - pull) / 2
        under = middle * middle - self.momentum
        radius = math.sqrt(self.momentum) if under < 0 else abs(middle) + math.sqrt(under)
        return min(slow, -math.log(radius)) if 0 < radius < 1 else slow

    @property
    def strongest(self) -> float:
        r"""The strength at which :math:`\eta \lambda = \tfrac12`: no derived schedule goes beyond."""
        return 0.5 / self.learning_rate

    @property
    def usual(self) -> float:
        r"""The ceiling a derived schedule starts from.

        The paper's 1 where the penalty goes through the gradient. Adaptive optimisers move every weight by about
        :math:`\eta` per step whatever the size of its gradient, so a weight rests at about :math:`1 / \lambda`:
        there :math:`\eta \lambda = 0.2`.
        """
        return 0.2 / self.learning_rate if self.decoupled else min(1.0, self.strongest)


def growth_events(growing: int) -> tuple[int, int]:
    """Events and steps between them for a growth of about so many steps."""
    every = max(1, growing // EVENTS)
    return max(1, growing // every), every


def find_ceiling(
    dynamics: Dynamics, exponent: Callable[[float], float], *, wanted: float = EXPONENT, least: float | None = None
) -> float:
    """The smallest ceiling that reaches the wanted exponent, or nearly the best there is.

    Args:
        dynamics: of the optimiser; no ceiling is larger than its :attr:`Dynamics.strongest`.
        exponent: what a ceiling leads to.
        wanted: the exponent.
        least: the smallest ceiling to consider; ``None`` means the usual one.
    """
    high = dynamics.strongest
    low = dynamics.usual if least is None else min(least, high)
    wanted = min(wanted, 0.95 * exponent(high))
    if exponent(low) >= wanted:
        return low
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if exponent(middle) < wanted else (low, middle)
    return high


def check_finite(schedule: Any) -> None:
    """Refuse a record that counts in anything but whole numbers, or measures in anything but finite ones."""
    for name, kinds in _kinds(schedule.__class__).items():
        value = getattr(schedule, name)
        if value is None and type(None) in kinds:
            continue
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if int in kinds:
            check(is_number and isinstance(value, Integral), f"{name}={value!r} must be a whole number.")
        elif float in kinds:
            check(is_number, f"{name}={value!r} must be a number.")
            check(math.isfinite(value), f"{name}={value} must be a finite number.")


@cache
def _kinds(record: type) -> dict[str, tuple[Any, ...]]:
    """The types that each field of a record may have."""
    hints = get_type_hints(record)
    return {field.name: get_args(hints[field.name]) or (hints[field.name],) for field in fields(record)}


def check(condition: bool, message: str) -> None:
    """Refuse a constant with one sentence."""
    if not condition:
        raise ConfigurationError(message)
