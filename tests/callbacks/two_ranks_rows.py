"""Every method on several processes, from dense to slim: ``python -m tests.callbacks.two_ranks_rows FOLDER DEVICES``.

At every epoch's end each rank notes hashes of its parameters, of its optimiser's state, and of what the method
remembers (masks, clusters, schedules).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_prune.callbacks.structural import StructuralPruning
from tests.callbacks.nets import Classifier, image_loader, seeded, trainer
from tests.settings import EPOCHS, SETTINGS

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "find_unused": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "bucket_view": {"gradient_as_bucket_view": True},
}
METHODS = ["ascp", "greg1", "greg2", "magnitude", "mask_sparsity", "tpp"]


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


class Alone(Callback):
    """How far gradients are from the penalty's own, where nothing else makes any; stands behind the method."""

    def __init__(self, method: Any) -> None:
        self.method = method
        self.apart: list[float] = []
        self.largest: list[float] = []

    def on_before_optimizer_step(self, run: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        found = self.method.penalty() if self.method.phase != "done" else None
        if found is not None:
            pairs = zip(found.parameters, found.gradients, strict=True)
            self.apart.append(max(float((p.grad - gradient).abs().max()) for p, gradient in pairs))
            self.largest.append(max(float(gradient.abs().max()) for gradient in found.gradients))


class Silent(Classifier):
    """A loss without gradients; weights are jolted instead, so that none rests where a penalty has nothing to pull."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        generator = torch.Generator().manual_seed(batch_idx)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return 0.0 * super().training_step(batch, batch_idx)


def fit(kind: Any, row: str, optimizer: str, option: str, devices: int, watch: Any) -> tuple[Any, Any, Any]:
    """A whole run with surgery; the method, the watching callback, the trainer."""
    method = SETTINGS[row].build()
    seen, surgery = watch(method), StructuralPruning(latency_batches=(), report_file=None)
    strategy = DDPStrategy(process_group_backend="gloo", **OPTIONS[option])
    run = trainer(method, surgery, seen, max_epochs=EPOCHS + 1, strategy=strategy, devices=devices)
    run.fit(kind(seeded(SETTINGS[row].net), optimizer), image_loader(7 * devices))
    return method, seen, run


def instance_normed() -> nn.Module:
    """As the settings' usual network, but no norm looks at more than one sample."""
    net: Any = SETTINGS["greg1"].net()
    net[1], net[4] = (nn.InstanceNorm2d(8, affine=True) for _ in range(2))
    return net


def train(row: str, devices: int) -> dict[str, Any]:
    """The same global batches, whatever the number of devices, in double precision: all that is left afterwards."""
    method, surgery = SETTINGS[row].build(), StructuralPruning(latency_batches=(), report_file=None)
    settings = {"strategy": "ddp" if devices > 1 else "auto", "devices": devices, "max_epochs": EPOCHS + 1}
    run = trainer(method, surgery, use_distributed_sampler=False, precision="64-true", **settings)
    module = Classifier(seeded(instance_normed))
    # Lightning's own distributed sampler shuffles: spelled out, both runs see the same global batches
    rank, data = int(os.environ.get("LOCAL_RANK", "0")), image_loader(7).dataset
    run.fit(module, DataLoader(data, 16 // devices, sampler=DistributedSampler(data, devices, rank, shuffle=False)))
    state = [run.optimizers[0].state[p]["momentum_buffer"] for p in module.parameters()]
    plan = "" if surgery.plan is None else surgery.plan.to_json()
    return {"plan": plan, "weights": [p.detach() for p in module.parameters()], "momenta": state}


def main(folder: Path, devices: int) -> None:
    """One line per row, option and rank; on two ranks also what the penalty adds, and what one process has to equal."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = [(row, option) for row in METHODS for option in OPTIONS]
    others = [row for row in SETTINGS if row not in METHODS]
    rows += [(row, list(OPTIONS)[number % 4]) for number, row in enumerate(others)]
    if devices > 2:
        rows = [(row, list(OPTIONS)[number % 4]) for number, row in enumerate(METHODS)]
    lines = []
    for number, (row, option) in enumerate(rows):
        optimizer = ("sgd", "adamw")[(number + number // 4) % 2]
        method, hashes, run = fit(Classifier, row, optimizer, option, devices, Hashes)
        lines.append({"row": row, "option": option, "found": hashes.found, "phase": method.phase})
    for row in METHODS if devices == 2 else []:
        for option in ("default", "find_unused"):
            _, alone, run = fit(Silent, row, "sgd", option, devices, Alone)
            lines.append({"alone": row, "option": option, "apart": alone.apart, "largest": alone.largest})
    (folder / f"{run.global_rank}.json").write_text(json.dumps(lines))
    if devices == 2:
        torch.save({row: train(row, devices) for row in METHODS}, folder / f"{run.global_rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
