"""Structural pruning for Lightning: from dense to slim inside one fit.

Names load on first use, so that ``lightning_prune.structure`` works without Lightning.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_prune.short_names import CLI, Follower, is_underway

if TYPE_CHECKING:
    from lightning_prune.callbacks.ascp import ASCP
    from lightning_prune.callbacks.checkpointing import SlimCheckpointMixin, load_from_checkpoint
    from lightning_prune.callbacks.distillation import Distillation
    from lightning_prune.callbacks.greg import GReg1, GReg2
    from lightning_prune.callbacks.loading import LoadPruned
    from lightning_prune.callbacks.magnitude import Magnitude
    from lightning_prune.callbacks.mask_sparsity import MaskSparsity
    from lightning_prune.callbacks.monitor import PruningMonitor
    from lightning_prune.callbacks.structural import StructuralPruning
    from lightning_prune.callbacks.tpp import TPP
    from lightning_prune.errors import (
        ConfigurationError,
        ExportError,
        PlanError,
        ProofError,
        PruningError,
        SlimFileError,
        TraceError,
        UnknownLayerError,
    )
    from lightning_prune.reports import export
    from lightning_prune.schedules import (
        ASCPSchedule,
        GReg1Schedule,
        GReg2Schedule,
        MaskSparsityStrength,
        TPPSchedule,
    )
    from lightning_prune.structure import (
        Budget,
        ChannelGraph,
        ChannelGroup,
        Flow,
        Proof,
        PruningPlan,
        SparsityPlan,
        choose,
        choose_weights,
        load_slim,
        prove,
        prune_,
        register_rule,
        save_slim,
        trace,
    )

_HOMES = {
    "lightning_prune.callbacks.ascp": ("ASCP",),
    "lightning_prune.callbacks.checkpointing": ("SlimCheckpointMixin", "load_from_checkpoint"),
    "lightning_prune.callbacks.distillation": ("Distillation",),
    "lightning_prune.callbacks.greg": ("GReg1", "GReg2"),
    "lightning_prune.callbacks.loading": ("LoadPruned",),
    "lightning_prune.callbacks.mask_sparsity": ("MaskSparsity",),
    "lightning_prune.callbacks.magnitude": ("Magnitude",),
    "lightning_prune.callbacks.monitor": ("PruningMonitor",),
    "lightning_prune.callbacks.structural": ("StructuralPruning",),
    "lightning_prune.callbacks.tpp": ("TPP",),
    "lightning_prune.errors": (
        *("ConfigurationError", "ExportError", "PlanError", "ProofError", "PruningError", "SlimFileError"),
        *("TraceError", "UnknownLayerError"),
    ),
    "lightning_prune.reports": ("export",),
    "lightning_prune.schedules": (
        *("ASCPSchedule", "GReg1Schedule", "GReg2Schedule", "MaskSparsityStrength", "TPPSchedule"),
    ),
    "lightning_prune.structure": (
        *("Budget", "ChannelGraph", "ChannelGroup", "Flow", "Proof", "PruningPlan", "SparsityPlan"),
        *("choose", "choose_weights", "load_slim", "prove", "prune_", "register_rule"),
        *("save_slim", "trace"),
    ),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ASCP",
    "ASCPSchedule",
    "Budget",
    "ChannelGraph",
    "ChannelGroup",
    "ConfigurationError",
    "Distillation",
    "ExportError",
    "Flow",
    "GReg1",
    "GReg1Schedule",
    "GReg2",
    "GReg2Schedule",
    "LoadPruned",
    "Magnitude",
    "MaskSparsity",
    "MaskSparsityStrength",
    "PlanError",
    "Proof",
    "ProofError",
    "PruningError",
    "PruningMonitor",
    "PruningPlan",
    "SlimCheckpointMixin",
    "SlimFileError",
    "SparsityPlan",
    "StructuralPruning",
    "TPP",
    "TPPSchedule",
    "TraceError",
    "UnknownLayerError",
    "__version__",
    "choose",
    "choose_weights",
    "export",
    "load_from_checkpoint",
    "load_slim",
    "prove",
    "prune_",
    "register_rule",
    "save_slim",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _installed_version()
    if name in _HOME:
        found = getattr(import_module(_HOME[name]), name)
        if CLI in sys.modules and not is_underway():
            _load()
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _installed_version() -> str:
    """As the package's metadata says; a checkout that isn't installed has none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lightning-prune")
    except PackageNotFoundError:
        return "unknown"


def __dir__() -> list[str]:
    return __all__


def _load() -> None:
    for home, names in _HOMES.items():
        module = import_module(home)
        globals().update({name: getattr(module, name) for name in names})


if "lightning.pytorch" in sys.modules:
    _load()
else:
    sys.meta_path.insert(0, Follower(_load))
