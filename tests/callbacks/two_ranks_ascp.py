"""ASCP and its surgery on two ranks, as a program: ``python -m tests.callbacks.two_ranks_ascp FOLDER FINISH``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from lightning_prune.callbacks.ascp import ASCP
from lightning_prune.callbacks.structural import StructuralPruning
from tests.callbacks.nets import Classifier, conv_net, image_loader, seeded, trainer


def main(folder: Path, finish: Any) -> None:
    """Write everything that each rank has just after the last reconstruction, and at the end, to the folder."""
    data = image_loader(8).dataset
    method = ASCP(0.5, epochs=3, finish=finish, pull=0.1)
    pruning = StructuralPruning(latency_batches=(), report_file=None)
    states: list[dict[str, Any]] = []

    class Module(Classifier):
        def on_train_epoch_end(self) -> None:
            state = {name: value.clone() for name, value in self.net.state_dict().items()}
            states.append({"weights": state, "labels": method.state_dict()["method"]["labels"]})

    module = Module(seeded(conv_net))
    run = trainer(
        method,
        pruning,
        strategy="ddp",
        devices=2,
        max_epochs=4,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    run.fit(module, DataLoader(data, 8, sampler=DistributedSampler(data, 2, rank, shuffle=False)))
    torch.save({"states": states, "merges": method.merges()}, folder / f"{run.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
