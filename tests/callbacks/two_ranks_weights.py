"""Single weights on two ranks, and resumed there: ``python -m tests.callbacks.two_ranks_weights FOLDER``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler

from lightning_prune.callbacks.greg import GReg1, GReg2
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.schedules import GReg1Schedule, GReg2Schedule
from tests.callbacks.nets import Classifier, feature_loader, linear_net, seeded, trainer


def train(folder: Path, devices: int, path: Path | None = None) -> dict[str, Any]:
    """Plan, weights and momenta at the end; a run from the beginning keeps a checkpoint of every epoch.

    Args:
        folder: for the checkpoints.
        devices: ranks.
        path: checkpoint to go on from.
    """
    data = feature_loader(8).dataset
    grown1 = GReg1Schedule(0.1, 0.5, 2, 5, stop_ratio=None)
    grown2 = GReg2Schedule(0.01, 0.02, 0.1, 0.52, 2, 1, stop_ratio=None)
    pruning = StructuralPruning(latency_batches=(), report_file=None)
    keeper = ModelCheckpoint(folder, f"{devices}-{{epoch}}", save_top_k=-1)
    module = Classifier(seeded(linear_net, seed=0 if path is None else 1))
    run = trainer(
        GReg1(0.7, schedule=grown1, ignore=["2"], granularity="weight"),
        GReg2(0.7, schedule=grown2, ignore=["0", "4"], granularity="weight"),
        pruning,
        *([keeper] if path is None else []),
        enable_checkpointing=path is None,
        strategy="auto" if devices == 1 else "ddp",
        devices=devices,
        max_epochs=5,
        use_distributed_sampler=False,
    )
    # Lightning's own distributed sampler shuffles: spelled out, both runs see the same global batches
    sampler = DistributedSampler(data, devices, int(os.environ.get("LOCAL_RANK", "0")), shuffle=False)
    run.fit(module, DataLoader(data, 16 // devices, sampler=sampler), ckpt_path=path)
    named, state = dict(module.named_parameters()), run.optimizers[0].state
    return {
        "plan": "" if pruning.plan is None else pruning.plan.to_json(),
        "weights": {name: parameter.detach() for name, parameter in named.items()},
        "momenta": {name: state[parameter]["momentum_buffer"] for name, parameter in named.items()},
    }


if __name__ == "__main__":
    home = Path(sys.argv[1])
    runs = {"whole": train(home, 2)}
    runs |= {f"from epoch {epoch}": train(home, 2, home / f"2-epoch={epoch}.ckpt") for epoch in (1, 3)}
    torch.save(runs, home / f"{torch.distributed.get_rank()}.pt")
