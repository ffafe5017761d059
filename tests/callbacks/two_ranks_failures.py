"""What happens when one of two ranks fails: ``python -m tests.callbacks.two_ranks_failures FOLDER``.

Each line of a rank's file says where one of them failed, which one, and what this rank raised.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy

from lightning_prune.callbacks import (
    ascp,
    base,
    budgeting,
    capture,
    examination,
    mask_sparsity,
    operation,
    recalibration,
    structural,
)
from lightning_prune.callbacks.ascp import ASCP
from lightning_prune.callbacks.greg import GReg1
from lightning_prune.callbacks.loading import LoadPruned
from lightning_prune.callbacks.magnitude import Magnitude
from lightning_prune.callbacks.mask_sparsity import MaskSparsity
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.callbacks.tpp import TPP
from lightning_prune.schedules import GReg1Schedule
from lightning_prune.structure import choose, prune_, save_slim, trace
from tests.callbacks.nets import Classifier, conv_net, image_loader, seeded, trainer

GROWTH = GReg1Schedule(0.1, 0.8, 2, 5, stop_ratio=1e6, check_every=2)
METHODS: dict[str, Callable[[], Any]] = {
    "ascp": lambda: ASCP(0.5, epochs=2),
    "greg": lambda: GReg1(0.5, schedule=GROWTH),
    "budget": lambda: MaskSparsity(budget={"macs": 0.5}, epochs=2),
    "magnitude": lambda: Magnitude(0.5, epochs=1),
    "mask_sparsity": lambda: MaskSparsity(0.5, epochs=2, penalize_bias=False, fold_constant=True),
    "tpp": lambda: TPP(0.5, epochs=2),
}
POINTS: dict[str, tuple[str, Any, str]] = {
    "tracing": ("greg", capture.structure, "trace"),
    "joining": ("greg", base, "holders_of"),
    "reading constants": ("greg", GReg1, "begin"),
    "entering": ("greg", GReg1, "entered"),
    "choosing": ("greg", GReg1, "choose"),
    "watching": ("greg", GReg1, "_reached"),
    "scores at an epoch's end": ("magnitude", Magnitude, "smallest"),
    "clustering": ("ascp", ascp, "cluster"),
    "recalibrating": ("ascp", recalibration, "_statistics"),
    "counting": ("budget", budgeting, "spend"),
    "measuring": ("mask_sparsity", MaskSparsity, "_largest"),
    "folding": ("mask_sparsity", mask_sparsity, "find_fold"),
    "concluding": ("tpp", TPP, "conclude"),
    "steepness": ("tpp", TPP, "_steepness"),
    "deciding": ("magnitude", structural, "decide"),
    "proving": ("magnitude", examination, "prove"),
    "remaining": ("magnitude", Magnitude, "remainder"),
    "cutting": ("magnitude", operation, "prune_"),
    "the next optimiser": ("magnitude", structural, "refuse_orphans"),
}
FIRST_ONLY = {"counting", "deciding", "folding"}
"""What rank 0 does for all."""


class BrokenError(Exception):
    """Nothing that anybody expects."""


def fail(*_: Any, **__: Any) -> Any:
    raise BrokenError("It broke.\nHere is why.")


def strategy() -> DDPStrategy:
    return DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=30))


def attempt(*callbacks: Callback, folder: Path) -> str:
    """What this rank raised."""
    module = Classifier(seeded(conv_net))
    run = trainer(*callbacks, strategy=strategy(), devices=2, max_epochs=6, default_root_dir=folder)
    try:
        run.fit(module, image_loader(8))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(folder: Path) -> None:
    """Every point on either rank, then a file that only one of them can read."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    found = []
    for point, (method, owner, name) in POINTS.items():
        for culprit in (0,) if point in FIRST_ONLY else (0, 1):
            with patch.object(owner, name, fail) if rank == culprit else patch.dict({}):
                surgery = StructuralPruning(latency_batches=(), report_file=None)
                said = attempt(METHODS[method](), surgery, folder=folder)
            found.append([point, culprit, said])
    for culprit in (0, 1):
        path = folder / f"{culprit}-{rank}.safetensors"
        if rank != culprit:
            slim = seeded(conv_net)
            plan = choose(trace(slim, torch.zeros(2, 3, 6, 6)))
            prune_(slim, plan)
            save_slim(slim, path, plan)
        found.append(["reading", culprit, attempt(LoadPruned(path, module="net"), folder=folder)])
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
