"""Run as a script by test_structural.py: surgery on two processes, with one line of findings per process and option."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lightning_prune.callbacks.structural import StructuralPruning
from tests.callbacks.nets import seeded
from tests.callbacks.slimming import Task, run

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "find_unused": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "bucket_view": {"gradient_as_bucket_view": True},
}


def digest(tensors: list[Tensor]) -> str:
    """A hash of the bytes."""
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().contiguous().numpy().tobytes())
    return whole.hexdigest()[:12]


class Hashes(Callback):
    """Parameters and momentum at each epoch's end; everything right after surgery."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 2:
            self.found.append(digest(list(pl_module.state_dict().values())))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
        assert all(p.shape == state["momentum_buffer"].shape for p, state in optimizer.state.items())
        self.found += [digest(list(pl_module.parameters())), digest(momenta)]


def main(folder: Path) -> None:
    """All options, one after the other."""
    for name, options in OPTIONS.items():
        hashes, surgery = Hashes(), StructuralPruning(monitor="val_acc", latency_batches=())
        result = run(
            folder,
            EMAWeightAveraging(decay=0.9),
            hashes,
            task=seeded(Task),
            surgery=surgery,
            devices=2,
            strategy=DDPStrategy(process_group_backend="gloo", **options),
        )
        assert surgery.plan is not None
        assert (surgery.report is not None) == result.trainer.is_global_zero
        line = {"option": name, "hashes": hashes.found, "widths": result.watch.widths, "plan": str(surgery.plan)}
        with (folder / "out.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
