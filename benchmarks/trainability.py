"""How well a linear network can be trained after 80 % of its neurons have gone: plain L1, L1 + OrthP, and TPP.

    python benchmarks/trainability.py

Seven linear layers with 100 neurons in each hidden one and nothing between them (MLP-7-Linear) on scikit-learn's
digits, with the optimiser of ``digits.py``; gradients are clipped to a norm of 1, because so deep a product diverges
without. Every row is one fit of as many epochs: dense training, the sparse stage, surgery, finetuning. L1 trains on
densely in the sparse stage; OrthP then replaces every kept weight by the Q of its QR decomposition, whose singular
values are all 1. Without a nonlinearity the Jacobian is the product of the weights, so its mean singular value says how
well gradients pass. One CPU thread; mean and standard deviation over the seeds, last epochs, never the best ones.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from itertools import pairwise
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
ROWS = ("dense", "L1", "L1 + OrthP", "TPP", "TPP, gram=0", "TPP, gram_every=4", "TPP, gram_every=16")
LEAST_TIMES_L1 = 5.0
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
        layers = [nn.Linear(*pair) for pair in pairwise(widths)]
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
        optimizer = torch.optim.SGD(self.parameters(), self.learning_rate, momentum=0.9, weight_decay=5e-4)
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
    """Measures the mean singular value and the accuracy where the finetune stage begins.

    Args:
        epoch: at whose start.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.value = self.accuracy = float("nan")
        self.neurons: list[int] = []

    @torch.no_grad()
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After all others: this callback is the last of the list."""
        if trainer.current_epoch == self.epoch:
            images, labels = trainer.datamodule.val.tensors
            self.value = mean_jacobian_singular_value(pl_module, images[:SAMPLES])
            self.accuracy = (pl_module(images).argmax(1) == labels).double().mean().item()
            self.neurons = [layer.out_features for layer in pl_module.modules() if isinstance(layer, nn.Linear)][:-1]


def run(row: str, seed: int, epochs: int, learning_rate: float) -> dict[str, Any]:
    """One fit."""
    seed_everything(seed, verbose=False)
    pruning = StructuralPruning(latency_batches=(), report_file=None)
    look = Look(2 * epochs)
    callbacks: dict[str, list[Callback]] = {
        "dense": [],
        "L1": [Magnitude(RATIO, start=epochs, epochs=epochs), pruning],
        "L1 + OrthP": [Magnitude(RATIO, start=epochs, epochs=epochs), pruning, OrthP(2 * epochs)],
        "TPP": [TPP(RATIO, start=epochs, epochs=epochs), pruning],
        "TPP, gram=0": [TPP(RATIO, gram=0.0, start=epochs, epochs=epochs), pruning],
        "TPP, gram_every=4": [TPP(RATIO, gram_every=4, start=epochs, epochs=epochs), pruning],
        "TPP, gram_every=16": [TPP(RATIO, gram_every=16, start=epochs, epochs=epochs), pruning],
    }
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3 * epochs,
        gradient_clip_val=1.0,
        callbacks=[*callbacks[row], look],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )
    start = time.perf_counter()
    with redirect_stdout(io.StringIO()):  # twenty tables of what surgery did
        trainer.fit(LinearMLP(learning_rate, epochs), Digits())
    return {
        "seed": seed,
        "mean_jacobian_singular_value": look.value,
        "accuracy": float(trainer.callback_metrics["val_acc"]),
        "accuracy_before_finetuning": look.accuracy,
        "hidden_neurons": look.neurons,
        "seconds": time.perf_counter() - start,
    }


def spread(runs: Sequence[dict[str, Any]], key: str) -> tuple[float, float]:
    """Mean and standard deviation over the seeds."""
    values = [run[key] for run in runs]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def judge(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What was demanded of TPP, beside what was measured; the smaller of the two standard deviations counts."""
    key = "mean_jacobian_singular_value"
    times = spread(runs["TPP"], key)[0] / spread(runs["L1"], key)[0]
    ours, theirs = spread(runs["TPP"], "accuracy"), spread(runs["L1 + OrthP"], "accuracy")
    deviation = min(ours[1], theirs[1])
    return {
        "times_l1": times,
        "least_times_l1": LEAST_TIMES_L1,
        "accuracy_behind_orthp": theirs[0] - ours[0],
        "most_accuracy_behind_orthp": deviation,
        "targets_met": times >= LEAST_TIMES_L1 and theirs[0] - ours[0] <= deviation,
    }


def table(runs: dict[str, list[dict[str, Any]]]) -> Table:
    """What the terminal shows."""
    seeds = len(runs["TPP"])
    view = Table(title=f"MLP-7-Linear on digits, {RATIO:.0%} of the hidden neurons removed, {seeds} seeds")
    headers = ("method", "neurons", "mean JSV before finetuning", "accuracy after surgery, %", "finetuned, %")
    for header in headers:
        view.add_column(header, justify="right")
    for row, own in runs.items():
        singular, accuracy = spread(own, "mean_jacobian_singular_value"), spread(own, "accuracy")
        after = "" if row == "dense" else f"{100 * spread(own, 'accuracy_before_finetuning')[0]:.1f}"
        view.add_row(
            *(row, str(own[0]["hidden_neurons"][0]), f"{singular[0]:.4f} +- {singular[1]:.4f}", after),
            f"{100 * accuracy[0]:.2f} +- {100 * accuracy[1]:.2f}",
        )
    return view


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60, help="of each of the three stages")
    parser.add_argument("--learning-rate", type=float, default=0.05, help="at the beginning of each stage")
    parser.add_argument("--seeds", type=int, default=5, help="runs of every row")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/trainability.json"), help="where the numbers go, as JSON"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    start = time.perf_counter()
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in ROWS:
        runs[row] = [run(row, seed, options.epochs, options.learning_rate) for seed in range(options.seeds)]
    verdict = judge(runs)
    versions = {
        **{"torch": torch.__version__, "lightning": lightning.__version__},
        **{"scikit-learn": sklearn.__version__, "python": platform.python_version()},
    }
    report = {
        "device": f"CPU, 1 thread, {platform.machine()}",
        "versions": versions,
        "epochs_per_stage": options.epochs,
        "learning_rate": options.learning_rate,
        "verdict": verdict,
        "seconds": time.perf_counter() - start,
        "rows": runs,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    Console(width=120).print(table(runs))
    print(f"TPP's mean JSV is {verdict['times_l1']:.0f} times plain L1's (at least {LEAST_TIMES_L1:.0f} is demanded).")
    print(
        f"TPP ends {100 * verdict['accuracy_behind_orthp']:.2f} points behind L1 + OrthP (at most the smaller standard "
        f"deviation, {100 * verdict['most_accuracy_behind_orthp']:.2f}, is demanded)."
    )
    print(f"Targets met: {verdict['targets_met']}. {report['device']}; {versions}; written to {options.output}.")


if __name__ == "__main__":
    main()
