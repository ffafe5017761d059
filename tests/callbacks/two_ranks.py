"""A sparse stage on one or two ranks, as a program: ``python -m tests.callbacks.two_ranks FOLDER STRATEGY DEVICES``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from lightning_prune.callbacks.greg import GReg1, GReg2
from lightning_prune.schedules import GReg1Schedule, GReg2Schedule
from tests.callbacks.nets import Classifier, feature_loader, linear_net, seeded, trainer


def main(folder: Path, strategy: str, devices: int) -> None:
    """Write weights and picks of every rank to the folder."""
    data = feature_loader(8).dataset
    regularisers: list[Any] = [
        GReg1(0.5, schedule=GReg1Schedule(0.1, 0.5, 2, 5, stop_ratio=1.5, check_every=2), ignore=["2"]),
        GReg2(0.5, schedule=GReg2Schedule(0.01, 0.02, 0.1, 0.52, 2, 5, stop_ratio=None), ignore=["0"]),
    ]
    module = Classifier(seeded(linear_net))
    run = trainer(
        *regularisers,
        strategy=strategy,
        devices=devices,
        max_epochs=5,
        accumulate_grad_batches=2,
        use_distributed_sampler=False,
    )
    # Lightning's own distributed sampler shuffles: spelled out, both runs see the same global batches
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    run.fit(module, DataLoader(data, 16 // devices, sampler=DistributedSampler(data, devices, rank, shuffle=False)))
    state = {
        "weights": [parameter.detach() for parameter in module.parameters()],
        "picked": [regulariser.removal() for regulariser in regularisers],
        "stopped": regularisers[0].state_dict()["method"]["stopped"],
    }
    torch.save(state, folder / f"{strategy}-{devices}-{run.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
