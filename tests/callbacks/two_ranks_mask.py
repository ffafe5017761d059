"""MaskSparsity with all its options on two ranks, as a program: ``python -m tests.callbacks.two_ranks_mask FOLDER``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_prune.callbacks.mask_sparsity import MaskSparsity
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.errors import ConfigurationError
from tests.callbacks.nets import Classifier, image_loader, seeded, trainer
from tests.settings import unpadded

REACHABLE, UNREACHABLE = 0.4, 0.001


def main(folder: Path) -> None:
    """Write what every rank has just after the fold, what went, and how it fared with a target out of reach."""
    data = image_loader(8).dataset
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    states: list[dict[str, Tensor]] = []
    removals = []
    errors = []

    class Module(Classifier):
        def on_train_epoch_end(self) -> None:
            states.append({name: value.clone() for name, value in self.net.named_parameters()})

    for macs in (REACHABLE, UNREACHABLE):
        options = {"restart_from": "baseline", "penalize_bias": False, "fold_constant": True}
        method = MaskSparsity(budget={"macs": macs}, epochs=3, global_epochs=1, **options)  # type: ignore[arg-type]
        pruning = StructuralPruning(latency_batches=(), report_file=None)
        settings = {"strategy": "ddp", "devices": 2, "max_epochs": 4, "default_root_dir": folder}
        run = trainer(method, pruning, use_distributed_sampler=False, **settings)
        loader = DataLoader(data, 8, sampler=DistributedSampler(data, 2, rank, shuffle=False))
        try:
            run.fit(Module(seeded(unpadded)), loader)
            removals.append(method.removal())
        except Exception as error:  # of another kind on the other rank
            errors.append(f"{type(error).__name__}: {error}")
            if not isinstance(error, ConfigurationError) and run.is_global_zero:
                raise
    folded = {"states": [{name: value.detach() for name, value in state.items()} for state in states]}
    torch.save({**folded, "removals": removals, "errors": errors}, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
