"""TPP: a strength that grows from zero along a power, and a hold in which layers are set to zero."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_prune.schedules.dynamics import Dynamics, check, check_finite, find_ceiling, growth_events

WANTED = 12.0
"""The exponent that a derived schedule aims at: what is left is set to zero anyway."""

LEAST = 0.05
"""The smallest ceiling of a derived schedule: far above any usual weight decay, so that no channel resists it."""


@dataclass(frozen=True)
class TPPSchedule:
    r"""TPP: the strength is a pure function of the step, from 0 to the ceiling, then holds while layers are zeroed.

    .. math::

        \lambda(t) = \tau \left( \min(\lfloor t / K_u \rfloor, n) / n \right)^p,
        \qquad n = \mathrm{round}(\tau / \Delta)

    Args:
        delta: :math:`\Delta`, increment per event of the linear form; it also gives the number of events.
        ceiling: :math:`\tau`, the strength at which growth ends.
        update_every: :math:`K_u`, optimiser steps between events.
        hold: :math:`K_s`, optimiser steps after the last event's step, at constant strength.
        power: :math:`p`; 1 is linear.
        gram: what the decorrelation's strength is multiplied with.
        zero_every: optimiser steps of the hold between two layers whose channels that will go are set to zero.
        gram_every: optimiser steps from one decorrelation to the next, which counts as many times as much.

    Source: Wang and Fu, Trainability Preserving Neural Pruning, ICLR 2023, arXiv 2207.12534, and its published code.

    >>> schedule = TPPSchedule(delta=0.1, ceiling=0.3, update_every=2, hold=4, zero_every=2)
    >>> [round(schedule.strength(step), 1) for step in range(8)]
    [0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
    >>> schedule.last_event, schedule.length, [schedule.zeroed(step, layers=3) for step in range(6, 11)]
    (6, 11, [0, 0, 1, 1, 3])
    """

    delta: float = 1e-4
    ceiling: float = 1.0
    update_every: int = 10
    hold: int = 10_000
    power: float = 1.0
    gram: float = 1000.0
    zero_every: int = 100
    gram_every: int = 1

    def __post_init__(self) -> None:
        check_finite(self)
        delta, ceiling = self.delta, self.ceiling
        check(0 < delta <= ceiling * (1 + 1e-9), f"delta={delta} must be positive and at most ceiling={ceiling}.")
        check(self.update_every >= 1, f"update_every={self.update_every} must be at least 1 optimiser step.")
        check(self.hold >= 0, f"hold={self.hold} must be at least 0 optimiser steps.")
        check(self.power > 0, f"power={self.power} must be positive.")
        check(self.gram >= 0, f"gram={self.gram} must be at least 0.")
        check(self.zero_every >= 1, f"zero_every={self.zero_every} must be at least 1 optimiser step.")
        check(self.gram_every >= 1, f"gram_every={self.gram_every} must be at least 1 optimiser step.")

    @property
    def events(self) -> int:
        """How often the strength grows."""
        return max(1, round(self.ceiling / self.delta))

    @property
    def last_event(self) -> int:
        """The step at which the strength reaches the ceiling."""
        return self.events * self.update_every

    @property
    def length(self) -> int:
        """Optimiser steps from the first one, of strength 0, to the end of the hold."""
        return self.last_event + self.hold + 1

    def strength(self, step: int) -> float:
        """What the channels that will go are penalised with during ``step``."""
        return self._strength(min(step // self.update_every, self.events))

    def _strength(self, event: int) -> float:
        return self.ceiling * float((event / self.events) ** self.power)

    def zeroed(self, step: int, layers: int) -> int:
        """How many layers, counted in order of execution, have their channels set to zero after ``step``.

        After the last step of the hold all have, so that removal is exact however short the hold.

        Args:
            step: the optimiser step just taken.
            layers: how many layers take part.
        """
        if step >= self.length - 1:
            return layers
        return min(layers, max(0, step - self.last_event) // self.zero_every)

    def exponent(self, dynamics: Dynamics) -> float:
        r"""How far the penalty alone shrinks a doomed weight: :math:`-\ln(\lVert w_T \rVert / \lVert w_0 \rVert)`."""
        growing = sum(dynamics.rate(self._strength(event)) for event in range(self.events)) * self.update_every
        return growing + dynamics.rate(self.ceiling) * (self.hold + 1)

    @classmethod
    def derive(
        cls,
        steps: int,
        dynamics: Dynamics,
        layers: int = 1,
        steepness: float | None = None,
        gram_every: int = 1,
    ) -> TPPSchedule:
        r"""The schedule that lets channels collapse in so many optimiser steps: two thirds growth, one third hold.

        The ceiling is the smallest that shrinks a weight to exp(-12) of itself, but at least 0.05: the zeros do the
        rest, and the slower the channels go the more of what they did can move to those that stay. (A stronger penalty
        is faster than the gradient by which it moves, and what the loss cares about least is lost for good.) Adaptive
        optimisers push back however small the gradient, so there the ceiling is at least 0.2 over the learning rate.
        All layers are zero after half of the hold.

        The decorrelation pulls at filters that stay, too, in proportion to what is left of those that go. While those
        vanish under their own penalty it shrinks them by half its steepness over that of the penalty in all, as an
        exponent and however long the stage. So it is at most as steep as the penalty itself, which also keeps it from
        overshooting with any optimiser. Where it takes part in one step of many, as many times as strong, what such a
        step moves with the momentum that follows is no more than what is there.

        Args:
            steps: optimiser steps of the whole sparse stage, at least 2.
            dynamics: of the optimiser at hand.
            layers: how many layers take part.
            steepness: largest second derivative of the decorrelation alone, :math:`4 \lVert W \rVert_2^2 / N^2` of the
                steepest layer, without the divisor where it is summed; ``None`` leaves the published factor.
            gram_every: steps from one decorrelation to the next.

        >>> schedule = TPPSchedule.derive(600, Dynamics(0.05, momentum=0.9), layers=10, steepness=0.02)
        >>> schedule.last_event, schedule.length, round(schedule.ceiling, 3), schedule.gram, schedule.zero_every
        (400, 600, 0.06, 50.0, 9)
        """
        check(steps >= 2, f"TPP needs at least 2 optimiser steps, not {steps}.")
        events, every = growth_events(max(1, round(steps * 2 / 3)))
        hold = steps - 1 - events * every
        zero_every = max(1, hold // (2 * max(1, layers)))

        def schedule(ceiling: float) -> TPPSchedule:
            at_once = gram_every * dynamics.learning_rate * ceiling / (1 - dynamics.momentum) if gram_every > 1 else 0.0
            gram = min(cls.gram, 1.0 / (steepness * max(1.0, at_once))) if steepness else cls.gram
            return cls(ceiling / events, ceiling, every, hold, gram=gram, zero_every=zero_every, gram_every=gram_every)

        least = dynamics.usual if dynamics.decoupled else LEAST
        return schedule(
            find_ceiling(dynamics, lambda ceiling: schedule(ceiling).exponent(dynamics), wanted=WANTED, least=least)
        )


TPP_CIFAR = TPPSchedule()
"""The released constants for CIFAR: 10,000 events every 10 steps, then 10,000 steps of hold (learning rate 1e-3)."""

TPP_IMAGENET = TPPSchedule(update_every=5, hold=40_000)
"""The released constants for ImageNet: 10,000 events every 5 steps, then 40,000 steps of hold (learning rate 1e-3)."""
