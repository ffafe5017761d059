r"""How a strength grows: frozen records with closed forms, no tensors.

Steps are steps of the optimiser that holds the pruned parameters, counted from 0 at the beginning of the sparse stage.
An *event* is a step at which the strength changes: event :math:`k` is step :math:`k` times ``update_every``, and the
strength it sets already acts in that same step. Counting events in integers leaves no rounding of 10,000 additions.

Every penalty is written :math:`\tfrac{\lambda}{2} w^2`, so :math:`\lambda` compares with an optimiser's
``weight_decay`` and adds to it.

Source: Wang et al., Neural Pruning via Growing Regularization, ICLR 2021, arXiv 2012.09243, and its published code.
"""

from __future__ import annotations

from lightning_prune.schedules.ascp import SHAPES, ASCPSchedule
from lightning_prune.schedules.dynamics import ENOUGH, EVENTS, EXPONENT, Dynamics
from lightning_prune.schedules.greg import (
    GREG1_CIFAR,
    GREG1_IMAGENET,
    GREG2_CIFAR,
    GREG2_IMAGENET,
    PICK_EXPONENT,
    GReg1Schedule,
    GReg2Schedule,
)
from lightning_prune.schedules.mask_sparsity import MASK_SPARSITY, TRAVEL, MaskSparsityStrength
from lightning_prune.schedules.tpp import TPP_CIFAR, TPP_IMAGENET, TPPSchedule

__all__ = [
    "ASCPSchedule",
    "Dynamics",
    "ENOUGH",
    "EVENTS",
    "EXPONENT",
    "GREG1_CIFAR",
    "GREG1_IMAGENET",
    "GREG2_CIFAR",
    "GREG2_IMAGENET",
    "GReg1Schedule",
    "GReg2Schedule",
    "MASK_SPARSITY",
    "MaskSparsityStrength",
    "PICK_EXPONENT",
    "SHAPES",
    "TPPSchedule",
    "TPP_CIFAR",
    "TPP_IMAGENET",
    "TRAVEL",
]
