"""Every method at an equal budget of epochs and equal multiply-adds: what is left of the accuracy.

    python benchmarks/accuracy.py --preset digits                            # minutes
    python benchmarks/accuracy.py --preset cpu --root DIR --minutes 60       # CIFAR-10; call it again to go on
    python benchmarks/accuracy.py --preset resnet56 --root DIR --minutes 9   # the papers' table, on a GPU
    python benchmarks/accuracy.py --preset cpu --table                       # what is known so far

A run is dense training, the sparse stage and finetuning, each with a cosine cycle of its own; the dense stage is
trained once per seed and resumed by every method. Magnitude trains on densely instead of a sparse stage, so that all
have the same number of epochs. ``--minutes`` stops at the end of an epoch; checkpoints and results lie under ``--out``,
and the next call goes on from there. Columns are last epochs, never the best: dense, masked network just before
surgery, right after it, finetuned; multiply-adds by fvcore. ``--root`` holds ``cifar-10-batches-py``.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import ASCP, TPP, GReg1, GReg2, Magnitude, MaskSparsity, StructuralPruning
from lightning_prune.reports.latency import device_name

sys.path.insert(0, str(Path(__file__).parent))
from networks import cifar_resnet, resnet56, vgg19

METHODS: dict[str, type[Any]] = {
    "Magnitude": Magnitude,
    "GReg1": GReg1,
    "GReg2": GReg2,
    "TPP": TPP,
    "MaskSparsity": MaskSparsity,
    "ASCP": ASCP,
}


@dataclass(frozen=True)
class Preset:
    """What is trained, and how long.

    Args:
        data: "digits", "cifar10" or "cifar100".
        build: makes the network.
        epochs: of the dense stage, the sparse stage and the finetune stage.
        learning_rate: at the beginning of the dense stage; of the others a tenth in the papers, here as given.
        later_rate: at the beginning of the sparse and of the finetune stage.
        weight_decay: of everything.
        batch: images.
        runs: share of the multiply-adds that stays, and the seeds.
        precision: of the Trainer.
    """

    data: str
    build: Callable[[], nn.Module]
    epochs: tuple[int, int, int]
    learning_rate: float
    later_rate: float
    weight_decay: float
    batch: int
    runs: tuple[tuple[float, int], ...]
    precision: Any = "32-true"


_CPU_RUNS = ((0.5, 0), (0.25, 0), (0.5, 1), (0.5, 2))
_PAPER_RUNS = ((1 / 2.55, 0), (1 / 11.4, 0), (1 / 3.59, 0), (1 / 1.99, 0))
PRESETS = {
    "digits": Preset("digits", lambda: cifar_resnet(1), (12, 12, 12), 0.05, 0.05, 5e-4, 64, _CPU_RUNS),
    "cpu": Preset("cifar10", lambda: cifar_resnet(1), (6, 6, 6), 0.1, 0.1, 5e-4, 128, _CPU_RUNS),
    "resnet56": Preset("cifar10", resnet56, (200, 60, 120), 0.1, 0.01, 5e-4, 128, _PAPER_RUNS, "bf16-mixed"),
    "resnet110": Preset(
        "cifar10", lambda: cifar_resnet(18), (200, 60, 120), 0.1, 0.01, 5e-4, 128, ((0.37, 0),), "bf16-mixed"
    ),
    "vgg19": Preset("cifar100", vgg19, (200, 60, 120), 0.1, 0.01, 5e-4, 128, ((1 / 8.8, 0),), "bf16-mixed"),
}


class Images(LightningDataModule):
    """Images in memory, on the device; the order and the crops of an epoch depend on seed and epoch alone.

    Args:
        data: see :class:`Preset`.
        root: folder of the data set.
        batch: images.
        seed: of the order.
        few: only so many images, for a miniature.
    """

    def __init__(self, data: str, root: str, batch: int, seed: int, few: int | None = None) -> None:
        super().__init__()
        self.source, self.root, self.batch, self.seed, self.few = data, root, batch, seed, few
        self.parts: list[tuple[Tensor, Tensor]] = []

    def setup(self, stage: str) -> None:
        """Read everything, once."""
        if not self.parts:
            parts = _digits() if self.source == "digits" else _cifar(self.source, self.root)
            self.parts = [(images[: self.few], labels[: self.few]) for images, labels in parts]

    def train_dataloader(self) -> _Batches:
        """In another order each epoch."""
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        device = "cpu" if self.trainer is None else self.trainer.strategy.root_device
        generator = torch.Generator().manual_seed(100_003 * self.seed + epoch)
        images, labels = (each.to(device) for each in self.parts[0])
        order = torch.randperm(len(images), generator=generator)[: len(images) // self.batch * self.batch]
        return _Batches(images, labels, order.to(device), self.batch, generator)

    def val_dataloader(self) -> _Batches:
        """In order."""
        device = "cpu" if self.trainer is None else self.trainer.strategy.root_device
        images, labels = (each.to(device) for each in self.parts[1])
        return _Batches(images, labels, torch.arange(len(images), device=device), 500, None)


class _Batches:
    """Batches in the given order; with a generator cropped and mirrored at random, unless they are tiny."""

    def __init__(self, images: Tensor, labels: Tensor, order: Tensor, batch: int, generator: Any) -> None:
        self.images, self.labels, self.parts, self.generator = images, labels, order.split(batch), generator

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for part in self.parts:
            images = self.images[part]
            if self.generator is not None and images.shape[-1] >= 32:
                images = _augmented(images, self.generator)
            yield images.contiguous(memory_format=torch.channels_last), self.labels[part]


def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted by up to four pixels and mirrored half of the time."""
    count, side, device = len(images), images.shape[-1], images.device
    shift = torch.randint(0, 9, (2, count, 1), generator=generator).to(device) + torch.arange(side, device=device)
    mirrored = (torch.rand(count, 1, generator=generator) < 0.5).to(device)
    columns = torch.where(mirrored, shift[1].flip(1), shift[1])
    padded = F.pad(images, (4, 4, 4, 4))
    which = torch.arange(count, device=device)[:, None, None]
    return padded[which, :, shift[0][:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _digits() -> list[tuple[Tensor, Tensor]]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=500, stratify=labels, random_state=0)
    pixels = [(torch.tensor(part).float() / 8 - 1).view(-1, 1, 8, 8).expand(-1, 3, -1, -1) for part in parts[:2]]
    return list(zip(pixels, [torch.tensor(part).long() for part in parts[2:]], strict=True))


def _cifar(data: str, root: str) -> list[tuple[Tensor, Tensor]]:
    from torchvision import datasets

    source = datasets.CIFAR10 if data == "cifar10" else datasets.CIFAR100
    mean, deviation = torch.tensor([0.491, 0.482, 0.447]), torch.tensor([0.247, 0.243, 0.262])
    found = []
    for train in (True, False):
        whole = source(root, train=train)
        images = (torch.from_numpy(whole.data).float() / 255 - mean) / deviation
        found.append((images.permute(0, 3, 1, 2).contiguous(), torch.tensor(whole.targets)))
    return found


class Classifier(LightningModule):
    """Cross entropy, SGD with momentum 0.9, a cosine cycle per stage.

    Args:
        preset: of the run.
        steps: of an epoch.
    """

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.preset = preset
        self.net = preset.build().to(memory_format=torch.channels_last)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy."""
        hits = (self.net(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val_acc", hits, batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        """The rate begins anew with each stage; it moves once an epoch."""
        preset = self.preset
        optimizer = torch.optim.SGD(
            self.parameters(), lr=preset.learning_rate, momentum=0.9, weight_decay=preset.weight_decay
        )
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, rates(preset))]


def rates(preset: Preset) -> Callable[[int], float]:
    """Epoch to its share of the first learning rate: a cosine from each stage's rate towards zero."""
    shares = 1.0, *[preset.later_rate / preset.learning_rate] * 2

    def share(epoch: int) -> float:
        first = 0
        for length, rate in zip(preset.epochs, shares, strict=True):
            if epoch < first + length:
                return rate * (1 + math.cos(math.pi * (epoch - first) / length)) / 2
            first += length
        return 0.0

    return share


class Stop(Callback):
    """Ends the fit at the end of the epoch in which the time is up.

    Args:
        deadline: by ``time.monotonic``.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the clock."""
        if time.monotonic() > self.deadline:
            trainer.should_stop = True


def fit(
    asked: argparse.Namespace,
    preset: Preset,
    seed: int,
    folder: Path,
    epochs: int,
    callbacks: list[Callback],
    begin: Any,
) -> bool:
    """Go on with one run; whether it has reached its end."""
    last = folder / "last.ckpt"
    seed_everything(seed, verbose=False)
    model = Classifier(preset)
    data = Images(preset.data, asked.root, preset.batch, seed, asked.few)
    keep = ModelCheckpoint(folder, filename="last", save_top_k=1, monitor=None, enable_version_counter=False)
    keep._save_on_train_epoch_end = True
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[*callbacks, keep, Stop(asked.deadline)],
        precision=preset.precision,
        logger=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=1 if asked.few or preset.data == "digits" else max(1, sum(preset.epochs) // 18),
    )
    trainer.fit(model, data, ckpt_path=last if last.exists() else begin)
    return trainer.current_epoch >= epochs


def run(asked: argparse.Namespace, preset: Preset, method: str, share: float, seed: int) -> bool:
    """Go on with one run and write its result when it is complete; whether it is."""
    dense, sparse, _ = preset.epochs
    result = asked.out / f"{method}-{share:.3f}-{seed}.json"
    if result.exists():
        return True
    base = asked.out / f"dense-{seed}"
    if not (base / "done").exists():
        if not fit(asked, preset, seed, base, dense, [], None):
            return False
        (base / "done").touch()
    pruning = StructuralPruning(monitor="val_acc", latency_batches=[1, 64])
    chosen = METHODS[method](budget={"macs": share}, start=dense, epochs=sparse)
    began = time.monotonic()
    folder = asked.out / result.stem
    if not fit(asked, preset, seed, folder, sum(preset.epochs), [chosen, pruning], base / "last.ckpt"):
        return False
    report = pruning.report
    if report is None:
        raise RuntimeError(f"{result.stem} ended without surgery.")
    values = {
        "method": method,
        "share": share,
        "seed": seed,
        "epochs": preset.epochs,
        "report": json.loads(report.to_json()),
    }
    values |= {"seconds_of_the_last_piece": time.monotonic() - began, "versions": _versions(), "preset": asked.preset}
    result.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    return True


def _versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "device": device_name(nn.Linear(1, 1).to("cuda" if torch.cuda.is_available() else "cpu")),
    }


def show(out: Path) -> None:
    """One line per method and share of multiply-adds, over the seeds that are complete."""
    found: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for path in sorted(out.glob("*.json")):
        values = json.loads(path.read_text())
        found.setdefault((values["share"], values["method"]), []).append(values["report"])
    table = Table(title=f"{out.name}: validation accuracy in percent, mean (deviation) of so many seeds, last epochs")
    for name in ("MACs left", "method", "seeds", "dense", "before", "right after", "finetuned", "M MACs", "parameters"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for name in ("ms, batch 1", "ms, batch 64"):
        table.add_column(name, justify="right")
    for (share, method), reports in sorted(
        found.items(), key=lambda each: (-each[0][0], list(METHODS).index(each[0][1]))
    ):
        accuracy = [_mean([100 * report["accuracy"][stage] for report in reports]) for stage in _STAGES]
        cost = reports[0]["cost_after"]
        times = [
            " -> ".join(f"{report[k]['median_ms']:.3g}" for report in (reports[0][side] for side in _SIDES))
            for k in (0, 1)
        ]
        numbers = f"{cost['macs'] / 1e6:.2f}", f"{cost['parameters']:,}"
        table.add_row(f"{share:.3f}", method, str(len(reports)), *accuracy, *numbers, *times)
    Console(width=150).print(table)


_STAGES = ("dense", "before", "after", "finetuned")
_SIDES = ("latency_before", "latency_after")


def _mean(values: list[float]) -> str:
    spread = f" ({statistics.stdev(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def main() -> None:
    """Go on until everything is complete or the time is up, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--root", default="data", help="folder that holds cifar-10-batches-py")
    parser.add_argument("--out", type=Path, help="checkpoints and results (runs/accuracy/PRESET)")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop at the end of the epoch in which they are up")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--few", type=int, help="only so many images: a miniature")
    parser.add_argument("--table", action="store_true", help="only print what is known so far")
    asked = parser.parse_args()
    asked.deadline = time.monotonic() + 60 * asked.minutes
    asked.out = asked.out or Path("runs/accuracy") / asked.preset
    asked.out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(asked.threads)
    preset = PRESETS[asked.preset]
    for share, seed in () if asked.table else preset.runs:
        for method in asked.methods:
            if time.monotonic() < asked.deadline and not run(asked, preset, method, share, seed):
                break
    show(asked.out)


if __name__ == "__main__":
    main()
