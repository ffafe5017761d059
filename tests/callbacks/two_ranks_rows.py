"""Every method on two processes, from dense to slim: ``python -m tests.callbacks.two_ranks_rows FOLDER``.

At every epoch's end each rank notes hashes of its parameters, of its optimiser's state, and of what the method
remembers (masks, clusters, schedules).
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_prune.callbacks.structural import StructuralPruning
from tests.callbacks.nets import Classifier, image_loader, seeded, trainer
from tests.settings import EPOCHS, SETTINGS


def digest(value: Any) -> str:
    """Of tensors and plain values, however they are nested."""
    whole = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            whole.update(part.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(part, dict):
            for key in part:
                whole.update(str(key).encode())
                add(part[key])
        elif isinstance(part, (list, tuple)):
            for each in part:
                add(each)
        else:
            whole.update(repr(part).encode())

    add(value)
    return whole.hexdigest()[:12]


class Hashes(Callback):
    """What must be equal on all ranks, at every epoch's end."""

    def __init__(self, method: Any) -> None:
        self.method = method
        self.found: list[list[str]] = []

    def on_train_epoch_end(self, run: Trainer, pl_module: LightningModule) -> None:
        memory = self.method.state_dict()
        memory["method"] = {key: value for key, value in memory["method"].items() if key != "calls"}  # each rank's own
        state = [list(run.optimizers[0].state[p].values()) for p in pl_module.parameters()]
        self.found.append([digest(list(pl_module.parameters())), digest(state), digest(memory)])


def main(folder: Path) -> None:
    """One line per row and rank."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for number, (row, setting) in enumerate(SETTINGS.items()):
        callback = setting.build()
        hashes, optimizer = Hashes(callback), ("sgd", "adamw")[number % 2]
        surgery = StructuralPruning(latency_batches=(), report_file=None)
        module = Classifier(seeded(setting.net), optimizer)
        run = trainer(callback, surgery, hashes, max_epochs=EPOCHS + 1, strategy="ddp", devices=2)
        run.fit(module, image_loader(14))
        line = {"row": row, "rank": run.global_rank, "found": hashes.found, "phase": callback.phase}
        with (folder / f"{run.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
