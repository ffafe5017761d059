"""How well a linear network can be trained after 80 % of its neurons have gone: plain L1, L1 + OrthP, and TPP.

    python benchmarks/trainability.py

MLP-7-Linear (seven linear layers, 100 neurons in each hidden one, nothing between them) on scikit-learn's digits. Every
row is one fit of as many epochs: dense training, the sparse stage, surgery, finetuning. L1 trains on densely in the
sparse stage; OrthP then replaces every kept weight by the nearest thing QR makes of it whose singular values are all 1.
Without a nonlinearity the Jacobian is the product of the weights, so its mean singular value says how well gradients
pass. One CPU thread; mean and standard deviation over the seeds, last epochs, never the best ones.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import sklearn
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from lightning_prune import TPP, Magnitude, StructuralPruning
from lightning_prune.reports import mean_jacobian_singular_value

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from data import Digits

LAYERS, WIDTH, RATIO = 7, 100, 0.8
ROWS = ("dense", "L1", "L1 + OrthP", "TPP")
TIMES_L1 = 5.0
SAMPLES = 100


class LinearMLP(LightningModule):
    """Seven linear layers with biases; SGD with momentum, one cosine cycle of the learning rate per stage.

    Args:
        learning_rate: at the beginning of each stage.
        cycle: epochs of a stage.
    """

    def __init__(self, learning_rate: float, cycle: int) -> None:
        super().__init__()
        self.learning_rate, self.cycle = learning_rate, cycle
        widths = [64, *[WIDTH] * (LAYERS - 1), 10]
        layers = [nn.Linear(*pair) for pair in zip(widths[:-1], widths[1:], strict=True)]
        self.net = nn.Sequential(nn.Flatten(), *layers)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, 10)``."""
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of one batch."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy over the whole validation set."""
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        """The optimiser, and one learning rate per epoch."""
        optimizer = torch.optim.SGD(self.parameters(), self.learning_rate, momentum=0.9, weight_decay=1e-4)
        return [optimizer], [CosineAnnealingWarmRestarts(optimizer, self.cycle)]


class OrthP(Callback):
    """Makes every kept weight orthogonal where the finetune stage begins, and lets the optimiser forget the old ones.

    Args:
        epoch: at whose start.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    @torch.no_grad()
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After surgery's own hook: this callback stands behind it in the list."""
        if trainer.current_epoch != self.epoch:
            return
        for layer in pl_module.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(orthogonal(layer.weight))
        for optimizer in trainer.optimizers:
            optimizer.state.clear()


def orthogonal(weight: Tensor) -> Tensor:
    """Q of the weight's QR decomposition (of its transpose where it is wide), signs such that R's diagonal is positive.

    >>> wide = orthogonal(torch.randn(2, 5))
    >>> torch.allclose(wide @ wide.T, torch.eye(2), atol=1e-6)
    True
    """
    is_wide = weight.shape[0] < weight.shape[1]
    q, r = torch.linalg.qr(weight.T if is_wide else weight)
    q = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return q.T if is_wide else q


class Look(Callback):
    """Measures the mean singular value where the finetune stage begins.

    Args:
        epoch: at whose start.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.value = float("nan")
        self.neurons: list[int] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After all others: this callback is the last of the list."""
        if trainer.current_epoch == self.epoch:
            images = trainer.datamodule.train.tensors[0][:SAMPLES]
            self.value = mean_jacobian_singular_value(pl_module, images)
            self.neurons = [layer.out_features for layer in pl_module.modules() if isinstance(layer, nn.Linear)][:-1]


def run(row: str, seed: int, epochs: int, learning_rate: float, tpp=None) -> dict[str, Any]:
    """One fit."""
    seed_everything(seed, verbose=False)
    pruning = StructuralPruning(monitor="val_acc", latency_batches=(), report_file=None)
    look = Look(2 * epochs)
    callbacks: dict[str, list[Callback]] = {
        "dense": [],
        "L1": [Magnitude(RATIO, start=epochs, epochs=epochs), pruning],
        "L1 + OrthP": [Magnitude(RATIO, start=epochs, epochs=epochs), pruning, OrthP(2 * epochs)],
        "TPP": [TPP(RATIO, start=epochs, epochs=epochs) if tpp is None else tpp(), pruning],
    }
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3 * epochs,
        callbacks=[*callbacks[row], look],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )
    start = time.perf_counter()
    trainer.fit(LinearMLP(learning_rate, epochs), Digits())
    accuracy = dict(pruning.report.accuracy) if pruning.report is not None else {}
    return {
        "row": row,
        "seed": seed,
        "mean_jacobian_singular_value": look.value,
        "accuracy": float(trainer.callback_metrics["val_acc"]),
        "accuracy_before_surgery": accuracy.get("before"),
        "accuracy_after_surgery": accuracy.get("after"),
        "hidden_neurons": look.neurons,
        "seconds": time.perf_counter() - start,
    }
if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    E, LR, S = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    for row in ROWS:
        for seed in range(S):
            print(run(row, seed, E, LR), flush=True)
