"""GReg: a strength that grows in equal steps, from the beginning on what will go, or first on everything."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_prune.schedules.dynamics import Dynamics, check, check_finite, find_ceiling, growth_events

PICK_EXPONENT = 0.5
"""How far GReg-2's pick phase shrinks a weight that the loss doesn't hold: exp(-0.5), as with the paper's constants."""


@dataclass(frozen=True)
class GReg1Schedule:
    r"""GReg-1: the strength of the channels that will go grows by ``delta`` at every event, then holds.

    .. math:: \lambda(t) = (\min(\lfloor t / K_u \rfloor, n - 1) + 1) \, \Delta, \quad n = \mathrm{round}(\tau / \Delta)

    Args:
        delta: :math:`\Delta`, increment per event.
        ceiling: :math:`\tau`, the strength at which growth ends.
        update_every: :math:`K_u`, optimiser steps between events.
        hold: :math:`K_s`, optimiser steps after the last event's step, at constant strength.
        stop_ratio: growth ends early once the running ratio of mean absolute weights, kept over pruned, has reached
            this in every layer; ``None`` never ends early.
        smoothing: weight of the past in that running ratio.
        check_every: events between two looks at the ratio; each look waits for the device once. 1 is the reference.

    >>> schedule = GReg1Schedule(delta=0.1, ceiling=0.3, update_every=2, hold=4)
    >>> [round(schedule.strength(step), 1) for step in range(7)]
    [0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.3]
    >>> schedule.last_event, schedule.length
    (4, 9)
    """

    delta: float = 1e-4
    ceiling: float = 1.0
    update_every: int = 10
    hold: int = 10_000
    stop_ratio: float | None = 1000.0
    smoothing: float = 0.9
    check_every: int = 100

    def __post_init__(self) -> None:
        _check_growth(self)

    @property
    def events(self) -> int:
        """How often the strength grows."""
        return max(1, round(self.ceiling / self.delta))

    @property
    def pick_step(self) -> int:
        """The step before which the channels are picked."""
        return 0

    @property
    def growth_event(self) -> int:
        """The first event at which the strength grows on the picked channels alone."""
        return 0

    @property
    def last_event(self) -> int:
        """The step at which the strength reaches the ceiling."""
        return (self.events - 1) * self.update_every

    @property
    def length(self) -> int:
        """Optimiser steps from the first event to the end of the hold."""
        return self.last_event + self.hold + 1

    def strength(self, step: int) -> float:
        """What the channels that will go are penalised with during ``step``."""
        return (min(step // self.update_every, self.events - 1) + 1) * self.delta

    def kept_strength(self, step: int) -> float:
        """What the other channels of the same layers are penalised with during ``step``: nothing."""
        return 0.0

    def exponent(self, dynamics: Dynamics) -> float:
        r"""How far the penalty alone shrinks a doomed weight: :math:`-\ln(\lVert w_T \rVert / \lVert w_0 \rVert)`.

        >>> round(GReg1Schedule(update_every=10, hold=10_000).exponent(Dynamics(1e-3, momentum=0.9)))
        600
        """
        growing = sum(dynamics.rate((event + 1) * self.delta) for event in range(self.events - 1)) * self.update_every
        return growing + dynamics.rate(self.events * self.delta) * (self.hold + 1)

    @classmethod
    def derive(cls, steps: int, dynamics: Dynamics) -> GReg1Schedule:
        r"""The schedule that lets channels collapse in so many optimiser steps: two thirds growth, one third hold.

        The ceiling is the paper's (or its like for adaptive optimisers, see :attr:`Dynamics.usual`), raised until the
        exponent reaches 20, within :math:`\eta \lambda \le \tfrac12`. The early stop is off, the length is exact.

        Args:
            steps: optimiser steps of the whole sparse stage, at least 1.
            dynamics: of the optimiser at hand.

        >>> schedule = GReg1Schedule.derive(600, Dynamics(0.05, momentum=0.9))
        >>> schedule.events, schedule.last_event, schedule.length, schedule.ceiling
        (400, 399, 600, 1.0)
        """
        check(steps >= 1, f"GReg-1 needs at least 1 optimiser step, not {steps}.")
        events, every = growth_events(max(1, round(steps * 2 / 3)))
        hold = steps - 1 - (events - 1) * every

        def schedule(ceiling: float) -> GReg1Schedule:
            return cls(ceiling / events, ceiling, every, hold, stop_ratio=None)

        return schedule(find_ceiling(dynamics, lambda ceiling: schedule(ceiling).exponent(dynamics)))


@dataclass(frozen=True)
class GReg2Schedule:
    r"""GReg-2: a weak strength grows on all channels, the smallest then are picked, and theirs goes on growing.

    .. math::

        \lambda(t) = (k + 1) \, \Delta' \text{ on all channels while } k < n', \qquad
        \lambda(t) = \tau' + (\min(k, n' + n - 1) - n' + 1) \, \Delta \text{ on the picked ones afterwards}

    with :math:`k = \lfloor t / K_u \rfloor`, :math:`n' = \mathrm{round}(\tau' / \Delta')` and
    :math:`n = \mathrm{round}((\tau - \tau') / \Delta)`. The kept channels hold :math:`\tau'` from the pick to the next
    event, then ``kept``.

    Args:
        pick_delta: :math:`\Delta'`, increment per event of the pick phase.
        pick_ceiling: :math:`\tau'`, the strength at which the channels are picked.
        delta: :math:`\Delta`, increment per event afterwards.
        ceiling: :math:`\tau`, the strength at which growth ends.
        update_every: :math:`K_u`, optimiser steps between events.
        hold: :math:`K_s`, optimiser steps after the last event's step, at constant strength.
        kept: strength on the kept channels after the pick; the paper's text takes minus the optimiser's weight decay,
            its code -1e-4.
        stop_ratio: a layer's growth ends early once its running ratio of mean absolute weights, kept over pruned, has
            reached this; ``None`` never ends early.
        smoothing: weight of the past in that running ratio.
        check_every: events between two looks at the ratio; each look waits for the device once. 1 is the reference.

    >>> schedule = GReg2Schedule(0.01, 0.02, delta=0.1, ceiling=0.22, update_every=2, hold=4)
    >>> [round(schedule.strength(step), 2) for step in range(9)]
    [0.01, 0.01, 0.02, 0.02, 0.12, 0.12, 0.22, 0.22, 0.22]
    >>> [schedule.kept_strength(step) for step in range(5)]
    [0.01, 0.01, 0.02, 0.02, -0.0001]
    >>> schedule.pick_step, schedule.last_event, schedule.length
    (2, 6, 11)
    """

    pick_delta: float = 1e-5
    pick_ceiling: float = 1e-2
    delta: float = 1e-4
    ceiling: float = 1.0
    update_every: int = 10
    hold: int = 10_000
    kept: float = -1e-4
    stop_ratio: float | None = 1000.0
    smoothing: float = 0.9
    check_every: int = 100

    def __post_init__(self) -> None:
        _check_growth(self)
        check(
            0 < self.pick_delta <= self.pick_ceiling < self.ceiling,
            f"pick_delta={self.pick_delta}, pick_ceiling={self.pick_ceiling} and ceiling={self.ceiling} must satisfy "
            "0 < pick_delta <= pick_ceiling < ceiling.",
        )

    @property
    def pick_events(self) -> int:
        """How often the strength grows before the pick."""
        return max(1, round(self.pick_ceiling / self.pick_delta))

    @property
    def events(self) -> int:
        """How often the strength grows, the pick phase included."""
        return self.pick_events + max(1, round((self.ceiling - self.pick_ceiling) / self.delta))

    @property
    def pick_step(self) -> int:
        """The step before which the channels are picked."""
        return (self.pick_events - 1) * self.update_every

    @property
    def growth_event(self) -> int:
        """The first event at which the strength grows on the picked channels alone."""
        return self.pick_events

    @property
    def last_event(self) -> int:
        """The step at which the strength reaches the ceiling."""
        return (self.events - 1) * self.update_every

    @property
    def length(self) -> int:
        """Optimiser steps from the first event to the end of the hold."""
        return self.last_event + self.hold + 1

    def strength(self, step: int) -> float:
        """What the channels that will go (before the pick: all) are penalised with during ``step``."""
        return self._strength(min(step // self.update_every, self.events - 1))

    def kept_strength(self, step: int) -> float:
        """What the other channels of the same layers are penalised with during ``step``."""
        event = step // self.update_every
        return self._strength(event) if event < self.pick_events else self.kept

    def _strength(self, event: int) -> float:
        if event < self.pick_events:
            return (event + 1) * self.pick_delta
        return self.pick_events * self.pick_delta + (event - self.pick_events + 1) * self.delta

    def exponent(self, dynamics: Dynamics) -> float:
        r"""How far the penalty alone shrinks a doomed weight: :math:`-\ln(\lVert w_T \rVert / \lVert w_0 \rVert)`."""
        growing = sum(dynamics.rate(self._strength(event)) for event in range(self.events - 1)) * self.update_every
        return growing + dynamics.rate(self._strength(self.events - 1)) * (self.hold + 1)

    @classmethod
    def derive(cls, steps: int, dynamics: Dynamics, kept: float = -1e-4) -> GReg2Schedule:
        """The schedule that lets channels collapse in so many steps: a tenth for the pick, the rest like GReg-1.

        The pick phase shrinks a weight by exp(-0.5), as it does with the paper's constants.

        Args:
            steps: optimiser steps of the whole sparse stage, at least 2.
            dynamics: of the optimiser at hand.
            kept: strength on the kept channels after the pick.

        >>> schedule = GReg2Schedule.derive(600, Dynamics(0.05, momentum=0.9))
        >>> schedule.pick_step, schedule.events, schedule.length, round(schedule.pick_ceiling, 4), schedule.ceiling
        (59, 420, 600, 0.0328, 1.0)
        """
        check(steps >= 2, f"GReg-2 needs at least 2 optimiser steps, not {steps}.")
        every = growth_events(max(1, round(steps * 0.7)))[1]
        picking = max(1, round(steps * 0.1 / every))
        growing = max(1, round(steps * 0.6 / every))
        hold = steps - 1 - (picking + growing - 1) * every
        # the strengths (k + 1) / picking * pick_ceiling add up to every * (picking + 1) / 2 * pick_ceiling
        shrink = dynamics.learning_rate / (1 - dynamics.momentum) * every * (picking + 1) / 2
        pick = min(PICK_EXPONENT / shrink, 0.5 * dynamics.usual)

        def schedule(ceiling: float) -> GReg2Schedule:
            delta = (ceiling - pick) / growing
            return cls(pick / picking, pick, delta, ceiling, every, hold, kept, stop_ratio=None)

        return schedule(find_ceiling(dynamics, lambda ceiling: schedule(ceiling).exponent(dynamics)))


def _check_growth(schedule: GReg1Schedule | GReg2Schedule) -> None:
    check_finite(schedule)
    delta, ceiling = schedule.delta, schedule.ceiling
    check(0 < delta <= ceiling * (1 + 1e-9), f"delta={delta} must be positive and at most ceiling={ceiling}.")
    check(schedule.update_every >= 1, f"update_every={schedule.update_every} must be at least 1 optimiser step.")
    check(schedule.hold >= 0, f"hold={schedule.hold} must be at least 0 optimiser steps.")
    check(schedule.check_every >= 1, f"check_every={schedule.check_every} must be at least 1 event.")
    check(0 <= schedule.smoothing < 1, f"smoothing={schedule.smoothing} must lie in [0, 1).")
    ratio = schedule.stop_ratio
    check(ratio is None or ratio > 1, f"stop_ratio={ratio} must be above 1, or None.")


GREG1_CIFAR = GReg1Schedule()
"""The released constants for CIFAR: 10,000 events every 10 steps, then 10,000 steps of hold (learning rate 1e-3)."""

GREG1_IMAGENET = GReg1Schedule(update_every=5, hold=40_000)
"""The released constants for ImageNet: 10,000 events every 5 steps, then 40,000 steps of hold (learning rate 1e-3)."""

GREG2_CIFAR = GReg2Schedule()
"""The released constants for CIFAR: 1,000 events to the pick, 9,900 more, every 10 steps; 10,000 steps of hold."""

GREG2_IMAGENET = GReg2Schedule(update_every=5, hold=40_000)
"""The released constants for ImageNet: as for CIFAR, with an event every 5 steps and 40,000 steps of hold."""
