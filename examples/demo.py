"""From dense to slim on real images: dense training, growing regularisation, surgery and finetuning in one ``fit``.

python examples/demo.py
python examples/demo.py --optimizer adamw --method greg2
python examples/demo.py --devices 2
python examples/demo.py --data cifar10 --root DIR --epochs 30
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from classifier import Classifier
from data import CIFAR10, Digits
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from rich.console import Console

from lightning_prune import (
    ASCP,
    TPP,
    GReg1,
    GReg2,
    Magnitude,
    MaskSparsity,
    PruningPlan,
    StructuralPruning,
    load_slim,
    save_slim,
)
from lightning_prune.reports import surgery_table
from lightning_prune.structure import masked_state, read_slim_header

METHODS: dict[str, type[Any]] = {
    **{"ascp": ASCP, "greg1": GReg1, "greg2": GReg2},
    **{"magnitude": Magnitude, "mask_sparsity": MaskSparsity, "tpp": TPP},
}
NETWORKS = {
    "digits": {"channels": 1, "width": 32, "stages": 2, "blocks": 2},
    "cifar10": {"channels": 3, "width": 16, "stages": 3, "blocks": 3},
}


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=sorted(NETWORKS), default="digits")
    parser.add_argument("--root", default="data", help="folder that holds cifar-10-batches-py")
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    parser.add_argument("--method", choices=sorted(METHODS), default="greg1")
    parser.add_argument("--ratio", type=float, default=0.6, help="fraction of channels to remove in each layer")
    parser.add_argument("--epochs", type=int, default=12, help="epochs of each of the three stages")
    parser.add_argument(
        "--coupled", action=argparse.BooleanOptionalAction, default=True, help="of GReg: see docs/methods/greg.md"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--devices", type=int, default=1, help="processes that share each batch (DDP)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; networks this small gain little from more")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the report and the slim file")
    parser.add_argument("--evaluate", type=Path, metavar="FILE", help="only load a slim file and say its accuracy")
    return parser.parse_args()


class Diary(Callback):
    """Prints one line per epoch, and keeps the dense weights as they were just before surgery."""

    def __init__(self, regulariser: Any, pruning: StructuralPruning) -> None:
        self.regulariser = regulariser
        self.pruning = pruning
        self.dense: dict[str, torch.Tensor] = {}
        self.is_slim = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs before the surgery's own hook: this callback is the first of the list."""
        if self.pruning.plan is None:
            self.dense = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Which epoch, which phase, how good."""
        if trainer.is_global_zero and not trainer.sanity_checking:
            is_first = self.pruning.plan is not None and not self.is_slim
            self.is_slim |= is_first
            when = "right after surgery" if is_first else f"epoch {trainer.current_epoch + 1:2d}  {self.phase:<9}"
            print(f"{when:<19}  val_acc {float(trainer.callback_metrics['val_acc']):.4f}", flush=True)

    @property
    def phase(self) -> str:
        """Of the regulariser, in words for the reader."""
        return {"wait": "dense", "done": "finetune"}.get(self.regulariser.phase, self.regulariser.phase)


def data_for(name: str, root: str, devices: int = 1) -> LightningDataModule:
    """The data of that name; every device takes its share of a batch."""
    data = Digits() if name == "digits" else CIFAR10(root)
    data.batch_size //= devices
    return data


def accuracy_of(model: LightningModule, data: LightningDataModule) -> float:
    """Over the whole validation set."""
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    return trainer.validate(model, data, verbose=False)[0]["val_acc"]


def evaluate(path: Path, root: str) -> float:
    """Accuracy of a slim file: the dense network is built anew, cut by the plan in the file, and filled."""
    metadata = read_slim_header(path)["metadata"]
    model = Classifier(**metadata["network"])
    load_slim(path, model)
    return accuracy_of(model, data_for(metadata["data"], root))


def masked_accuracy(dense: dict[str, torch.Tensor], plan: PruningPlan, network: dict[str, Any], args: Any) -> float:
    """Of the dense network with zeros in place of what surgery removed."""
    model = Classifier(**network)
    model.load_state_dict(dense)
    model.load_state_dict(masked_state(model, plan), strict=False)
    return accuracy_of(model, data_for(args.data, args.root))


def main() -> None:
    """Train, prune, finetune, save, load in a new process."""
    args = arguments()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    if args.evaluate:
        print(evaluate(args.evaluate, args.root))
        return

    seed_everything(args.seed, verbose=False)
    network = NETWORKS[args.data]
    model = Classifier(**network, optimizer=args.optimizer, cycle=args.epochs)
    own = {"coupled": args.coupled} if args.method.startswith("greg") else {}
    regulariser = METHODS[args.method](args.ratio, start=args.epochs, epochs=args.epochs, **own)
    pruning = StructuralPruning(monitor="val_acc", latency_batches=(1, 64))
    diary = Diary(regulariser, pruning)
    trainer = Trainer(
        max_epochs=3 * args.epochs,
        callbacks=[diary, regulariser, pruning],
        default_root_dir=args.out,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
        num_sanity_val_steps=0,
        devices=args.devices if args.devices > 1 else "auto",
        strategy="ddp" if args.devices > 1 else "auto",
    )
    start = time.perf_counter()
    trainer.fit(model, data_for(args.data, args.root, args.devices))
    seconds = time.perf_counter() - start
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # what follows is done by one process
    if not trainer.is_global_zero:
        return
    if pruning.plan is None or pruning.report is None:
        raise SystemExit("Nothing was pruned.")

    path = args.out / f"{args.data}-{args.method}-{args.optimizer}.safetensors"
    save_slim(model, path, pruning.plan, network=network, data=args.data, report=pruning.report)
    command = [sys.executable, __file__, "--evaluate", str(path), "--root", args.root, "--threads", str(args.threads)]
    reloaded = float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])
    masked = masked_accuracy(diary.dense, pruning.plan, network, args)

    print()
    Console().print(surgery_table(pruning.report))
    accuracy = pruning.report.accuracy
    rows = {
        "dense": accuracy["dense"],
        "just before surgery": accuracy["before"],
        "masked network": masked,
        "right after surgery": accuracy["after"],
        "finetuned": accuracy["finetuned"],
        "slim file, new process": reloaded,
    }
    print("Accuracy on the whole validation set:")
    for name, value in rows.items():
        print(f"  {name:<24}{value:.4f}")
    print(f"Slim file: {path}. Report: {(pruning.report_path or args.out / 'report.json').with_suffix('.html')}.")
    print(f"One fit of {trainer.max_epochs} epochs: {seconds:.0f} seconds.")


if __name__ == "__main__":
    main()
