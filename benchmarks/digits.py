"""Accuracy on scikit-learn's digits: GReg and TPP coupled and as published, and two forms of plain L1 for as long.

python benchmarks/digits.py                     all rows; each number is the mean (and the worst) of three seeds
python benchmarks/digits.py l1 greg1-coupled    some of them
python benchmarks/digits.py weights             single weights instead of channels
"""

from __future__ import annotations

import logging
import statistics
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table

from lightning_prune import TPP, GReg1, GReg2, Magnitude, StructuralPruning, choose, prune_, trace

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from classifier import Classifier
from data import Digits

EPOCHS, RATIO, SEEDS = 12, 0.6, (0, 1, 2)
METHODS = {"greg1": GReg1, "greg2": GReg2, "magnitude": Magnitude, "tpp": TPP}
ROWS = (
    *("l1", "magnitude", "greg1-coupled", "greg1-published", "greg2-coupled", "greg2-published"),
    *("tpp-coupled", "tpp-published"),
)
WEIGHTS, WEIGHT_RATIO = ("magnitude-weights", "greg1-weights", "greg2-weights"), 0.9
FORMS = {"": {}, "coupled": {"coupled": True}, "published": {"coupled": False}, "weights": {"granularity": "weight"}}
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
    name, _, form = row.partition("-")
    ratio = WEIGHT_RATIO if form == "weights" else RATIO
    regulariser = METHODS[name](ratio, start=EPOCHS, epochs=EPOCHS, **FORMS[form])
    pruning = StructuralPruning(monitor="val_acc", latency_batches=(), report_file=None)
    trainer_of(3 * EPOCHS, regulariser, pruning).fit(model, Digits())
    accuracy = pruning.report.accuracy if pruning.report is not None else {}
    return [float(accuracy[stage] or 0.0) for stage in ("dense", "before", "after", "finetuned")]


def main() -> None:
    """Fill the table row by row."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    single = sys.argv[1:] == ["weights"]
    what = f"{WEIGHT_RATIO:.0%} of every layer's weights" if single else f"{RATIO:.0%} of the inner channels"
    table = Table(title=f"Accuracy in percent, {what} removed: mean (worst) of {len(SEEDS)} seeds")
    for header in ("method", "optimiser", *COLUMNS):
        table.add_column(header)
    for row in WEIGHTS if single else sys.argv[1:] or ROWS:
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
