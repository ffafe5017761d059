"""ASCP: how the pruning rate grows from epoch to epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_prune.schedules.dynamics import check, check_finite

SHAPES = ("exp", "linear", "cosine", "poly3", "const")
"""How ASCP's rate can grow."""


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
        check_finite(self)
        check(self.epochs >= 1, f"epochs={self.epochs} must be at least 1.")
        check(self.shape in SHAPES, f"shape={self.shape!r} must be one of {', '.join(SHAPES)}.")
        check(0 < self.ramp <= 1, f"ramp={self.ramp} must lie in (0, 1].")
        check(
            0 < self.early < self.reached < 1,
            f"early={self.early} and reached={self.reached} must satisfy 0 < early < reached < 1.",
        )
        check(self.interval >= 1, f"interval={self.interval} must be at least 1 epoch.")
        check(0 <= self.freeze_after <= 1, f"freeze_after={self.freeze_after} must lie in [0, 1].")

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

        From 50 epochs on the published form. In a short stage the learning rate often falls to zero: there the ramp
        ends after three quarters, and the partition stays from then on. The shape is the published one, which merges
        early, while there is training to make up for it.

        >>> [round(ASCPSchedule.derive(5).share(epoch), 2) for epoch in range(6)], ASCPSchedule.derive(5).freeze_epoch
        ([0.0, 0.95, 1.0, 1.0, 1.0, 1.0], 4)
        """
        return cls(epochs) if epochs >= 50 else cls(epochs, ramp=0.75, freeze_after=0.75)
