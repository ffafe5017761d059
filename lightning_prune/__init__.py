"""Structural pruning for Lightning: from dense to slim inside one fit.

Names load on first use, so that ``lightning_prune.structure`` works without Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_prune.callbacks.ascp import ASCP
    from lightning_prune.callbacks.checkpointing import SlimCheckpointMixin, load_from_checkpoint
    from lightning_prune.callbacks.greg import GReg1, GReg2
    from lightning_prune.callbacks.magnitude import Magnitude
    from lightning_prune.callbacks.mask_sparsity import MaskSparsity
    from lightning_prune.callbacks.structural import StructuralPruning
    from lightning_prune.callbacks.tpp import TPP
    from lightning_prune.errors import (
        ConfigurationError,
        PlanError,
        ProofError,
        PruningError,
        SlimFileError,
        TraceError,
    )
    from lightning_prune.structure import (
        ChannelGraph,
        ChannelGroup,
        Proof,
        PruningPlan,
        choose,
        load_slim,
        prove,
        prune_,
        save_slim,
        trace,
    )

_HOMES = {
    "lightning_prune.callbacks.ascp": ("ASCP",),
    "lightning_prune.callbacks.checkpointing": ("SlimCheckpointMixin", "load_from_checkpoint"),
    "lightning_prune.callbacks.greg": ("GReg1", "GReg2"),
    "lightning_prune.callbacks.mask_sparsity": ("MaskSparsity",),
    "lightning_prune.callbacks.magnitude": ("Magnitude",),
    "lightning_prune.callbacks.structural": ("StructuralPruning",),
    "lightning_prune.callbacks.tpp": ("TPP",),
    "lightning_prune.errors": (
        *("ConfigurationError", "PlanError", "ProofError", "PruningError", "SlimFileError", "TraceError"),
    ),
    "lightning_prune.structure": (
        *("ChannelGraph", "ChannelGroup", "Proof", "PruningPlan"),
        *("choose", "load_slim", "prove", "prune_", "save_slim", "trace"),
    ),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ASCP",
    "ChannelGraph",
    "ChannelGroup",
    "ConfigurationError",
    "GReg1",
    "GReg2",
    "Magnitude",
    "MaskSparsity",
    "PlanError",
    "Proof",
    "ProofError",
    "PruningError",
    "PruningPlan",
    "SlimCheckpointMixin",
    "SlimFileError",
    "StructuralPruning",
    "TPP",
    "TraceError",
    "choose",
    "load_from_checkpoint",
    "load_slim",
    "prove",
    "prune_",
    "save_slim",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
