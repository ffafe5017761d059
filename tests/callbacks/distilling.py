"""What the tests of distillation share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prune.callbacks.structural import StructuralPruning
from tests.callbacks.slimming import Run, run

ASKED = {"temperature": 3.0, "weight": 0.75}


def surgeon(**arguments: Any) -> StructuralPruning:
    return StructuralPruning(**{"latency_batches": (), "report_file": None, "distill": ASKED, **arguments})


def distilled(folder: Path, *callbacks: Callback, surgery: StructuralPruning | None = None, **settings: Any) -> Run:
    """Surgery after epoch 2 of 4, and a checkpoint after each epoch."""
    keeper = ModelCheckpoint(folder / "kept", "{epoch}", save_top_k=-1)
    surgery = surgeon() if surgery is None else surgery
    return run(folder, *callbacks, keeper, surgery=surgery, enable_checkpointing=True, **settings)
