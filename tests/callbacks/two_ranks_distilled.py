"""Distillation on two ranks, and resumed there: ``python -m tests.callbacks.two_ranks_distilled FOLDER``."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_prune.callbacks.magnitude import Magnitude
from lightning_prune.callbacks.structural import StructuralPruning
from tests.callbacks.nets import Classifier, conv_net, feature_loader, image_loader, linear_net, seeded, trainer

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "find_unused": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "heads": {"find_unused_parameters": True},
}


class Heads(nn.Module):
    """Of two heads the first one gives the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.two = linear_net(), nn.Linear(12, 4)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        found = self.body[:4](features)
        return {"logits": self.body[4](found), "two": self.two(found)}


class Turns(Classifier):
    """Two batches' losses take one head, the next two's the other; the first one has no gradients then."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0])["two" if batch_idx // 2 % 2 else "logits"], batch[1])


def train(
    folder: Path, devices: int, option: str = "default", path: Path | None = None, norms: bool = False
) -> dict[str, Any]:
    """Weights at the end, and the teacher's; a run from the beginning keeps a checkpoint of every epoch.

    Args:
        folder: for the checkpoints.
        devices: ranks.
        option: of DDP.
        path: checkpoint to go on from.
        norms: whether the network has running statistics, which differ between ranks.
    """
    data = (image_loader(8) if norms else feature_loader(8)).dataset
    asked = {"temperature": 2, "weight": 0.8}
    pruning = StructuralPruning(latency_batches=(), report_file=None, distill=asked)
    keeper = ModelCheckpoint(folder / option, f"{devices}-{norms}-{{epoch}}", save_top_k=-1)
    build: Any = Heads if option == "heads" else conv_net if norms else linear_net
    net: nn.Module = seeded(build, seed=0 if path is None else 1)
    module = (Turns if option == "heads" else Classifier)(net)
    run = trainer(
        Magnitude(0.7, start=1, epochs=1),
        pruning,
        keeper,
        *([EMAWeightAveraging(decay=0.9)] if norms else []),
        enable_checkpointing=True,
        accumulate_grad_batches=1 if option == "static_graph" else 2,  # a static graph takes no unsynchronised step
        strategy="auto" if devices == 1 else DDPStrategy(process_group_backend="gloo", **OPTIONS[option]),
        devices=devices,
        max_epochs=4,
        use_distributed_sampler=False,
    )
    # Lightning's own distributed sampler shuffles: spelled out, both runs see the same global batches
    sampler = DistributedSampler(data, devices, int(os.environ.get("LOCAL_RANK", "0")), shuffle=False)
    run.fit(module, DataLoader(data, 16 // devices, sampler=sampler), ckpt_path=path)
    teacher = pruning._distiller._teacher.network
    return {
        "weights": {name: parameter.detach() for name, parameter in module.named_parameters()},
        "teacher": {} if teacher is None else dict(teacher.state_dict()),
    }


def main(folder: Path) -> None:
    """All options, and a resume within the sparse stage's epoch and behind surgery."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    runs = {option: train(folder, 2, option) for option in OPTIONS}
    runs["norms"] = train(folder, 2, norms=True)
    for epoch in (1, 2):
        start = folder / "default" / f"2-False-epoch={epoch}.ckpt"
        runs[f"from epoch {epoch}"] = train(folder / "again", 2, path=start)
        start = folder / "default" / f"2-True-epoch={epoch}.ckpt"
        runs[f"norms, from epoch {epoch}"] = train(folder / "again", 2, path=start, norms=True)
    torch.save(runs, folder / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
