"""Accuracy on scikit-learn's digits: the tables of the method cards.

python benchmarks/digits.py                     GReg and TPP, coupled or not, and two forms of plain L1 for as long
python benchmarks/digits.py l1 greg1-coupled    some of the rows; each number is the mean (and the worst) of three seeds
python benchmarks/digits.py weights             single weights instead of channels
python benchmarks/digits.py mask-sparsity       MaskSparsity with one argument or another
python benchmarks/digits.py ascp
"""

from __future__ import annotations

import logging
import statistics
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table

from lightning_prune import ASCP, TPP, GReg1, GReg2, Magnitude, MaskSparsity, StructuralPruning, choose, prune_, trace

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from classifier import Classifier
from data import Digits

EPOCHS, RATIO, SEEDS = 12, 0.6, (0, 1, 2)
WEIGHT_RATIO = 0.9
SINGLE: dict[str, Any] = {"ratio": WEIGHT_RATIO, "granularity": "weight"}
METHODS: dict[str, Any] = {
    "magnitude": partial(Magnitude, RATIO),
    "greg1-coupled": partial(GReg1, RATIO),
    "greg1-published": partial(GReg1, RATIO, coupled=False),
    "greg2-coupled": partial(GReg2, RATIO),
    "greg2-published": partial(GReg2, RATIO, coupled=False),
    "tpp-coupled": partial(TPP, RATIO),
    "tpp-published": partial(TPP, RATIO, coupled=False),
    "ascp": partial(ASCP, RATIO),
    "mask-sparsity": partial(MaskSparsity, RATIO),
    "mask-sparsity-global": partial(MaskSparsity, RATIO, global_epochs=3),
    "mask-sparsity-restart": partial(MaskSparsity, RATIO, global_epochs=3, restart_from="baseline"),
    "mask-sparsity-budget": partial(MaskSparsity, budget={"macs": 0.4}, global_epochs=3),
    "mask-sparsity-streams": partial(MaskSparsity, 0.4, scope="all"),
    "mask-sparsity-no-bias": partial(MaskSparsity, RATIO, penalize_bias=False),
    "mask-sparsity-constants": partial(MaskSparsity, RATIO, constants="imagenet"),
    "magnitude-weights": partial(Magnitude, **SINGLE),
    "greg1-weights": partial(GReg1, **SINGLE),
    "greg2-weights": partial(GReg2, **SINGLE),
}
TABLES = {
    "": ("l1", "magnitude", *(name for name in METHODS if name.endswith(("-coupled", "-published")))),
    "weights": tuple(name for name in METHODS if name.endswith("-weights")),
    "mask-sparsity": tuple(name for name in METHODS if name.startswith("mask-sparsity")),
}
"""Rows by what is asked for."""
COLUMNS = ("dense", "before surgery", "after surgery", "finetuned")


def trainer_of(epochs: int, *callbacks: Callback) -> Trainer:
    """A trainer that says nothing and writes nothing."""
    return Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )


def plain_l1(model: LightningModule) -> list[float]:
    """Twice the dense epochs, the smallest filters go at once, finetuning."""
    accuracies = []
    for epochs in (EPOCHS, EPOCHS):  # the cosine cycle ends with each
        trainer = trainer_of(epochs)
        trainer.fit(model, Digits())
        accuracies.append(float(trainer.callback_metrics["val_acc"]))
    prune_(model, choose(trace(model, torch.zeros(2, 1, 8, 8)), RATIO))
    accuracies.append(trainer_of(1).validate(model, Digits(), verbose=False)[0]["val_acc"])
    trainer = trainer_of(EPOCHS)
    trainer.fit(model, Digits())
    return [*accuracies, float(trainer.callback_metrics["val_acc"])]


def in_one_fit(model: LightningModule, row: str) -> list[float]:
    """Dense epochs, as many of the method's stage, surgery, as many to finetune."""
    regulariser = METHODS[row](start=EPOCHS, epochs=EPOCHS)
    pruning = StructuralPruning(monitor="val_acc", latency_batches=(), report_file=None)
    trainer_of(3 * EPOCHS, regulariser, pruning).fit(model, Digits())
    accuracy = pruning.report.accuracy if pruning.report is not None else {}
    return [float(accuracy[stage] or 0.0) for stage in ("dense", "before", "after", "finetuned")]


def main() -> None:
    """Fill the table row by row."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    table = Table(title=f"Accuracy in percent, mean (worst) of {len(SEEDS)} seeds")
    for header in ("method", "optimiser", *COLUMNS):
        table.add_column(header)
    for row in [row for asked in sys.argv[1:] or [""] for row in TABLES.get(asked, (asked,))]:
        for optimizer in ("sgd", "adamw"):
            runs = []
            for seed in SEEDS:
                seed_everything(seed, verbose=False)
                model = Classifier(optimizer=optimizer, cycle=EPOCHS)
                runs.append(plain_l1(model) if row == "l1" else in_one_fit(model, row))
            stages = [[100 * value for value in stage] for stage in zip(*runs, strict=True)]
            table.add_row(row, optimizer, *(f"{statistics.mean(stage):.1f} ({min(stage):.1f})" for stage in stages))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
