"""The library's place in Lightning: when to penalise, when to cut.

Names load on first use, so that one of them doesn't load the others.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_prune.callbacks.ascp import ASCP
    from lightning_prune.callbacks.base import Regulariser
    from lightning_prune.callbacks.checkpointing import SlimCheckpointMixin, load_from_checkpoint
    from lightning_prune.callbacks.distillation import Distillation
    from lightning_prune.callbacks.greg import GReg1, GReg2
    from lightning_prune.callbacks.loading import LoadPruned
    from lightning_prune.callbacks.magnitude import Magnitude
    from lightning_prune.callbacks.mask_sparsity import MaskSparsity
    from lightning_prune.callbacks.monitor import PruningMonitor
    from lightning_prune.callbacks.structural import StructuralPruning
    from lightning_prune.callbacks.tpp import TPP

_HOME = {
    "ASCP": "ascp",
    "Distillation": "distillation",
    "GReg1": "greg",
    "GReg2": "greg",
    "LoadPruned": "loading",
    "Magnitude": "magnitude",
    "MaskSparsity": "mask_sparsity",
    "PruningMonitor": "monitor",
    "Regulariser": "base",
    "SlimCheckpointMixin": "checkpointing",
    "StructuralPruning": "structural",
    "TPP": "tpp",
    "load_from_checkpoint": "checkpointing",
}

__all__ = [
    "ASCP",
    "Distillation",
    "GReg1",
    "GReg2",
    "LoadPruned",
    "Magnitude",
    "MaskSparsity",
    "PruningMonitor",
    "Regulariser",
    "SlimCheckpointMixin",
    "StructuralPruning",
    "TPP",
    "load_from_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
