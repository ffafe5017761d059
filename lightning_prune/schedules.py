r"""How a strength grows: frozen records with closed forms, no tensors.

Steps are steps of the optimiser that holds the pruned parameters, counted from 0 at the beginning of the sparse stage.
An *event* is a step at which the strength changes: event :math:`k` is step :math:`k` times ``update_every``, and the
strength it sets already acts in that same step. Counting events in integers leaves no rounding of 10,000 additions.

Every penalty is written :math:`\tfrac{\lambda}{2} w^2`, so :math:`\lambda` compares with an optimiser's
``weight_decay`` and adds to it.

Source: Wang et al., Neural Pruning via Growing Regularization, ICLR 2021, arXiv 2012.09243, and its published code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

from lightning_prune.errors import ConfigurationError

EVENTS = 1000
"""A derived schedule grows in at most about so many events: finer steps change nothing and cost time."""

EXPONENT = 20.0
"""What a derived schedule aims at: a penalty alone shrinks a weight to exp(-20) of itself."""

ENOUGH = 10.0
"""The smallest exponent after which channels count as collapsed."""

TRAVEL = 5.0
"""How many times the largest scale a derived strength of MaskSparsity can move."""

SHAPES = ("exp", "linear", "cosine", "poly3", "const")
"""How ASCP's rate can grow."""

PICK_EXPONENT = 0.5
"""How far GReg-2's pick phase shrinks a weight that the loss doesn't hold: exp(-0.5), as with the paper's constants."""


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
        _check(self.learning_rate > 0, f"learning_rate={self.learning_rate} must be positive.")
        _check(0 <= self.momentum < 1, f"momentum={self.momentum} must lie in [0, 1).")

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
        _check(steps >= 1, f"GReg-1 needs at least 1 optimiser step, not {steps}.")
        events, every = _events(max(1, round(steps * 2 / 3)))
        hold = steps - 1 - (events - 1) * every

        def schedule(ceiling: float) -> GReg1Schedule:
            return cls(ceiling / events, ceiling, every, hold, stop_ratio=None)

        return schedule(_ceiling(dynamics, lambda ceiling: schedule(ceiling).exponent(dynamics)))


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
        _check(
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
        _check(steps >= 2, f"GReg-2 needs at least 2 optimiser steps, not {steps}.")
        every = _events(max(1, round(steps * 0.7)))[1]
        picking = max(1, round(steps * 0.1 / every))
        growing = max(1, round(steps * 0.6 / every))
        hold = steps - 1 - (picking + growing - 1) * every
        # the strengths (k + 1) / picking * pick_ceiling add up to every * (picking + 1) / 2 * pick_ceiling
        shrink = dynamics.learning_rate / (1 - dynamics.momentum) * every * (picking + 1) / 2
        pick = min(PICK_EXPONENT / shrink, 0.5 * dynamics.usual)

        def schedule(ceiling: float) -> GReg2Schedule:
            delta = (ceiling - pick) / growing
            return cls(pick / picking, pick, delta, ceiling, every, hold, kept, stop_ratio=None)

        return schedule(_ceiling(dynamics, lambda ceiling: schedule(ceiling).exponent(dynamics)))


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

    def __post_init__(self) -> None:
        _check_finite(self)
        delta, ceiling = self.delta, self.ceiling
        _check(0 < delta <= ceiling * (1 + 1e-9), f"delta={delta} must be positive and at most ceiling={ceiling}.")
        _check(self.update_every >= 1, f"update_every={self.update_every} must be at least 1 optimiser step.")
        _check(self.hold >= 0, f"hold={self.hold} must be at least 0 optimiser steps.")
        _check(self.power > 0, f"power={self.power} must be positive.")
        _check(self.gram >= 0, f"gram={self.gram} must be at least 0.")
        _check(self.zero_every >= 1, f"zero_every={self.zero_every} must be at least 1 optimiser step.")

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
    def derive(cls, steps: int, dynamics: Dynamics, layers: int = 1) -> TPPSchedule:
        r"""The schedule that lets channels collapse in so many optimiser steps: two thirds growth, one third hold.

        The ceiling follows the rule of :meth:`GReg1Schedule.derive`. All layers are zero after half of the hold. The
        decorrelation keeps its published product with the learning rate, 1000 times 1e-3, beyond which it would
        overshoot.

        Args:
            steps: optimiser steps of the whole sparse stage, at least 2.
            dynamics: of the optimiser at hand.
            layers: how many layers take part.

        >>> schedule = TPPSchedule.derive(600, Dynamics(0.05, momentum=0.9), layers=10)
        >>> schedule.last_event, schedule.length, schedule.ceiling, schedule.gram, schedule.zero_every
        (400, 600, 1.0, 20.0, 9)
        """
        _check(steps >= 2, f"TPP needs at least 2 optimiser steps, not {steps}.")
        events, every = _events(max(1, round(steps * 2 / 3)))
        hold = steps - 1 - events * every
        gram = min(cls.gram, 1.0 / dynamics.learning_rate)
        zero_every = max(1, hold // (2 * max(1, layers)))

        def schedule(ceiling: float) -> TPPSchedule:
            return cls(ceiling / events, ceiling, every, hold, gram=gram, zero_every=zero_every)

        return schedule(_ceiling(dynamics, lambda ceiling: schedule(ceiling).exponent(dynamics)))


@dataclass(frozen=True)
class MaskSparsityStrength:
    r"""MaskSparsity: a constant strength, large enough for the way the scales have to go.

    Under a constant pull :math:`\lambda` a scale travels at most

    .. math:: D = \frac{\lambda}{1 - \mu} \sum_t \eta_t

    and rests where the loss pulls as strongly: :math:`\lvert \partial L / \partial \gamma \rvert = \lambda`. Around
    zero a subgradient's scale swings within :math:`\eta \lambda / (1 - \mu)`.

    Args:
        strength: :math:`\lambda_2` on the scales that will go, in the masked stage.
        global_strength: :math:`\lambda_1` on all scales, in the optional stage before the mask.
        threshold: absolute scale up to which a channel counts as collapsed.

    Source: Jiang et al., Pruning-aware Sparse Regularization for Network Pruning, Machine Intelligence Research 2023,
    arXiv 2201.06776, and its published code; the rule for other lengths is ours.
    """

    strength: float = 5e-4
    global_strength: float = 5e-4
    threshold: float = 1e-2

    def __post_init__(self) -> None:
        _check_finite(self)
        for field in fields(self):
            value = getattr(self, field.name)
            _check(value > 0, f"{field.name}={value} must be positive.")

    def travel(self, steps: float, dynamics: Dynamics) -> float:
        r"""How far the masked stage can move a scale: :math:`D`.

        Args:
            steps: optimiser steps at the dynamics' (smallest) learning rate; where the rate follows a schedule, the
                sum of the rates over all steps divided by that rate.
            dynamics: of the optimiser at hand. Where it is decoupled, scales are soft-thresholded by
                :math:`\eta \lambda` after each step.

        >>> round(MaskSparsityStrength().travel(16_668 / 0.1, Dynamics(0.1, momentum=0.9)))
        83
        """
        return self.strength * steps * (dynamics.smallest or dynamics.learning_rate) / (1 - dynamics.momentum)

    def swing(self, dynamics: Dynamics) -> float:
        """How far around zero a collapsed scale still moves; nothing where it is soft-thresholded.

        >>> round(MaskSparsityStrength().swing(Dynamics(0.1, momentum=0.9)), 6)
        0.0005
        """
        return 0.0 if dynamics.decoupled else self.strength * dynamics.learning_rate / (1 - dynamics.momentum)

    def checks(self, steps: int) -> tuple[int, ...]:
        """Steps of the masked stage before which :meth:`corrected` should be asked: at each tenth, 0.3 to 0.8.

        >>> MaskSparsityStrength().checks(100)
        (30, 40, 50, 60, 70, 80)
        """
        return tuple(sorted({steps * tenth // 10 for tenth in range(3, 9)} - {0}))

    def corrected(self, largest: float) -> MaskSparsityStrength:
        """Twice the strength if the largest absolute scale that should have collapsed is above 10 thresholds.

        >>> MaskSparsityStrength().corrected(0.2).strength, MaskSparsityStrength().corrected(0.05).strength
        (0.001, 0.0005)
        """
        return replace(self, strength=2 * self.strength) if largest > 10 * self.threshold else self

    @classmethod
    def derive(
        cls, steps: float, dynamics: Dynamics, *, largest: float = 1.0, gradient: float = 0.0
    ) -> MaskSparsityStrength:
        r"""The paper's strength, raised until scales collapse in so many optimiser steps.

        The travel budget is 5 times the largest scale, and the strength is at least twice the loss's gradient. Where
        scales are soft-thresholded, the strength is at least 2: an adaptive optimiser moves a scale by about
        :math:`\eta` per step whatever the gradient.

        Args:
            steps: as in :meth:`travel`, of the masked stage; positive.
            dynamics: of the optimiser at hand.
            largest: largest absolute scale among those that will go.
            gradient: largest absolute gradient of the loss for one of them, averaged over some batches.

        >>> round(MaskSparsityStrength.derive(600, Dynamics(0.05, momentum=0.9)).strength, 4)
        0.0167
        >>> round(MaskSparsityStrength.derive(600, Dynamics(1e-3, decoupled=True)).strength, 2)
        8.33
        """
        _check(steps > 0, f"MaskSparsity needs at least 1 optimiser step, not {steps}.")
        least = TRAVEL * abs(largest) / cls(strength=1.0).travel(steps, dynamics)
        hold = 2.0 if dynamics.decoupled else 2 * abs(gradient)
        strength = max(cls.strength, least, hold)
        return cls(strength=strength, global_strength=strength)


@dataclass(frozen=True)
class ASCPSchedule:
    r"""ASCP: how much of the pruning rate is reached after ``t`` epochs, and when channels are clustered.

    With :math:`x = t / E` and :math:`E` the epochs of the ramp, the share :math:`P(t) / P^*` is

    ========== ==========================================================================================
    ``exp``    :math:`(1 - e^{-kx}) / (1 - e^{-k})`, through ``(0, 0)``, ``(early, reached)`` and ``(1, 1)``
    ``linear`` :math:`x`
    ``cosine`` :math:`(1 - \cos \pi x) / 2`
    ``poly3``  :math:`1 - (1 - x)^3`
    ``const``  1: not asymptotic
    ========== ==========================================================================================

    Epochs are counted when they are finished: nothing has happened at 0, and the full rate holds from the ramp's end.

    Args:
        epochs: of the whole soft stage.
        shape: of the growth.
        ramp: share of the epochs after which the full rate is reached, in ``(0, 1]``.
        early: where the exponential has reached ``reached``, as a share of the ramp in ``(0, 1)``.
        reached: in ``(early, 1)``.
        interval: epochs between two reconstructions; the last epoch always has one.
        freeze_after: share of the epochs after which the partition stays as it is, once the full rate is reached.

    Source: Niu et al., Asymptotic Soft Cluster Pruning for Deep Neural Networks, 2022, arXiv 2206.08186; the
    exponential's points are those of He et al., Asymptotic Soft Filter Pruning, arXiv 1808.07471.

    >>> schedule = ASCPSchedule(epochs=8)
    >>> [round(schedule.share(epoch), 3) for epoch in (0, 1, 2, 8)]
    [0.0, 0.75, 0.938, 1.0]
    """

    epochs: int
    shape: Literal["exp", "linear", "cosine", "poly3", "const"] = "exp"
    ramp: float = 1.0
    early: float = 0.125
    reached: float = 0.75
    interval: int = 1
    freeze_after: float = 0.9

    def __post_init__(self) -> None:
        _check(self.epochs >= 1, f"epochs={self.epochs} must be at least 1.")
        _check(self.shape in SHAPES, f"shape={self.shape!r} must be one of {', '.join(SHAPES)}.")
        _check(0 < self.ramp <= 1, f"ramp={self.ramp} must lie in (0, 1].")
        _check(
            0 < self.early < self.reached < 1,
            f"early={self.early} and reached={self.reached} must satisfy 0 < early < reached < 1.",
        )
        _check(self.interval >= 1, f"interval={self.interval} must be at least 1 epoch.")
        _check(0 <= self.freeze_after <= 1, f"freeze_after={self.freeze_after} must lie in [0, 1].")

    @property
    def decay(self) -> float:
        """The exponential's ``k``, by bisection.

        >>> round(ASCPSchedule(epochs=1).decay, 5)
        11.08999
        """
        low, high = 0.0, -math.log1p(-self.reached) / self.early
        for _ in range(200):
            middle = (low + high) / 2
            if not low < middle < high:
                break
            short = math.expm1(-middle * self.early) / math.expm1(-middle) < self.reached
            low, high = (middle, high) if short else (low, middle)
        return high

    def share(self, epoch: float) -> float:
        """Share of the final rate after so many epochs, in ``[0, 1]``."""
        part = epoch / (self.epochs * self.ramp)
        if part <= 0:
            return 0.0
        if part >= 1 or self.shape == "const":
            return 1.0
        if self.shape == "linear":
            return part
        if self.shape == "cosine":
            return (1 - math.cos(math.pi * part)) / 2
        if self.shape == "poly3":
            return 1 - (1 - part) ** 3
        decay = self.decay
        return math.expm1(-decay * part) / math.expm1(-decay)

    def clusters(self, epoch: float, channels: int, ratio: float, final: int | None = None) -> int:
        r"""How many clusters a group has after so many epochs.

        .. math:: K(t) = \max(K^*, C - \lfloor C \, P(t) \rfloor)

        Args:
            epoch: finished epochs.
            channels: :math:`C` of the group.
            ratio: :math:`P^*` of the group, in ``[0, 1)``.
            final: :math:`K^*`, how many are left at the full rate, where another rounding decides that.

        >>> [ASCPSchedule(epochs=200).clusters(epoch, channels=64, ratio=0.4) for epoch in (0, 10, 25, 50, 100, 200)]
        [64, 54, 45, 40, 39, 39]
        """
        share = self.share(epoch)
        last = max(1, channels - math.floor(channels * ratio + 1e-9)) if final is None else final
        return last if share == 1 else max(last, channels - math.floor(channels * ratio * share + 1e-9))

    def due(self, epoch: int) -> bool:
        """Whether channels are reconstructed at the end of this epoch, the first being 1."""
        return 1 <= epoch <= self.epochs and (epoch % self.interval == 0 or epoch == self.epochs)

    @property
    def freeze_epoch(self) -> int:
        """The last epoch at whose end channels are clustered anew; its partition is the final one.

        >>> ASCPSchedule(epochs=200).freeze_epoch, ASCPSchedule(epochs=10, shape="linear", ramp=0.7).freeze_epoch
        (180, 9)
        """
        late = (
            epoch
            for epoch in range(1, self.epochs)
            if self.due(epoch) and epoch >= self.freeze_after * self.epochs - 1e-9 and self.share(epoch) >= 0.999
        )
        return next(late, self.epochs)

    @classmethod
    def derive(cls, epochs: int) -> ASCPSchedule:
        """The schedule for a stage of so many epochs, from a trained network.

        From 50 epochs on the published form. A short stage can't make up for three quarters of the rate in its first
        eighth: there the rate follows a cosine over the first three quarters, and the partition stays from then on.

        >>> [round(ASCPSchedule.derive(5).share(epoch), 2) for epoch in range(6)], ASCPSchedule.derive(5).freeze_epoch
        ([0.0, 0.17, 0.55, 0.9, 1.0, 1.0], 4)
        """
        return cls(epochs) if epochs >= 50 else cls(epochs, "cosine", ramp=0.75, freeze_after=0.75)


def _events(growing: int) -> tuple[int, int]:
    """Events and steps between them for a growth of about so many steps."""
    every = max(1, growing // EVENTS)
    return max(1, growing // every), every


def _ceiling(dynamics: Dynamics, exponent: Callable[[float], float]) -> float:
    """The smallest ceiling from the usual one on that reaches the wanted exponent, or nearly the best there is."""
    low, high = dynamics.usual, dynamics.strongest
    wanted = min(EXPONENT, 0.95 * exponent(high))
    if exponent(low) >= wanted:
        return low
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if exponent(middle) < wanted else (low, middle)
    return high


def _check_growth(schedule: GReg1Schedule | GReg2Schedule) -> None:
    _check_finite(schedule)
    delta, ceiling = schedule.delta, schedule.ceiling
    _check(0 < delta <= ceiling * (1 + 1e-9), f"delta={delta} must be positive and at most ceiling={ceiling}.")
    _check(schedule.update_every >= 1, f"update_every={schedule.update_every} must be at least 1 optimiser step.")
    _check(schedule.hold >= 0, f"hold={schedule.hold} must be at least 0 optimiser steps.")
    _check(schedule.check_every >= 1, f"check_every={schedule.check_every} must be at least 1 event.")
    _check(0 <= schedule.smoothing < 1, f"smoothing={schedule.smoothing} must lie in [0, 1).")
    ratio = schedule.stop_ratio
    _check(ratio is None or ratio > 1, f"stop_ratio={ratio} must be above 1, or None.")


def _check_finite(schedule: GReg1Schedule | GReg2Schedule | TPPSchedule | MaskSparsityStrength) -> None:
    for field in fields(schedule):
        value = getattr(schedule, field.name)
        _check(value is None or math.isfinite(value), f"{field.name}={value} must be a finite number.")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigurationError(message)


GREG1_CIFAR = GReg1Schedule()
"""The released constants for CIFAR: 10,000 events every 10 steps, then 10,000 steps of hold (learning rate 1e-3)."""

GREG1_IMAGENET = GReg1Schedule(update_every=5, hold=40_000)
"""The released constants for ImageNet: 10,000 events every 5 steps, then 40,000 steps of hold (learning rate 1e-3)."""

GREG2_CIFAR = GReg2Schedule()
"""The released constants for CIFAR: 1,000 events to the pick, 9,900 more, every 10 steps; 10,000 steps of hold."""

GREG2_IMAGENET = GReg2Schedule(update_every=5, hold=40_000)
"""The released constants for ImageNet: as for CIFAR, with an event every 5 steps and 40,000 steps of hold."""

TPP_CIFAR = TPPSchedule()
"""The released constants for CIFAR: 10,000 events every 10 steps, then 10,000 steps of hold (learning rate 1e-3)."""

TPP_IMAGENET = TPPSchedule(update_every=5, hold=40_000)
"""The released constants for ImageNet: 10,000 events every 5 steps, then 40,000 steps of hold (learning rate 1e-3)."""

MASK_SPARSITY = MaskSparsityStrength()
"""The released constants for ImageNet: 5e-4 in both stages, 100 epochs each (learning rate 0.1, momentum 0.9)."""
