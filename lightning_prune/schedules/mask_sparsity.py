"""MaskSparsity: a constant strength, by how far it has to move a scale."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from lightning_prune.schedules.dynamics import Dynamics, check, check_finite

TRAVEL = 5.0
"""How many times the largest scale a derived strength of MaskSparsity can move."""


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
        check_finite(self)
        for field in fields(self):
            value = getattr(self, field.name)
            check(value > 0, f"{field.name}={value} must be positive.")

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
        check(steps > 0, f"MaskSparsity needs at least 1 optimiser step, not {steps}.")
        least = TRAVEL * abs(largest) / cls(strength=1.0).travel(steps, dynamics)
        hold = 2.0 if dynamics.decoupled else 2 * abs(gradient)
        strength = max(cls.strength, least, hold)
        return cls(strength=strength, global_strength=strength)


MASK_SPARSITY = MaskSparsityStrength()
"""The released constants for ImageNet: 5e-4 in both stages, 100 epochs each (learning rate 0.1, momentum 0.9)."""
