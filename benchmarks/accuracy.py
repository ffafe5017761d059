"""Every method at an equal budget of epochs and equal multiply-adds: what is left of the accuracy.

    python benchmarks/accuracy.py --preset digits                            # minutes
    python benchmarks/accuracy.py --preset cpu --root DIR --minutes 60       # CIFAR-10; call it again to go on
    python benchmarks/accuracy.py --preset resnet56 --root DIR --minutes 9 --compile    # on a GPU
    python benchmarks/accuracy.py --preset cpu --latency                     # of one's own runs, in turns
    python benchmarks/accuracy.py --preset cpu --table                       # what one's own runs have shown so far
    python benchmarks/accuracy.py --preset cpu --table --results benchmarks/results/accuracy/cpu    # the committed ones

A run is dense training, the sparse stage and finetuning, each with a cosine cycle of its own; the dense stage is
trained once per seed and resumed by every method. Magnitude trains on densely instead of a sparse stage, so that all
have the same number of epochs. The presets for a GPU have the papers' networks and shares of multiply-adds, and one
recipe for every method. ``--minutes`` stops at the end of an epoch; checkpoints lie under ``--out``, and the next call
goes on from there. Results lie under ``--results``, in ``--out`` by default, and a run whose result is there is not
repeated; from ``benchmarks/results/accuracy/PRESET`` the page ``docs/benchmarks.md`` is made. Columns are last epochs,
never the best: dense, before surgery, right after it (which is what the masked network has), finetuned; multiply-adds
by fvcore. ``--root`` holds ``cifar-10-batches-py`` or ``cifar-100-python``.

The dense network is kept as ``dense-SEED.safetensors``; ``--dense FILE`` begins the runs with such a file instead of a
dense stage. On a GPU data and augmentation are there too; ``--compile`` compiles the network, and again after surgery.
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
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.images import Images
from benchmarks.pages import accuracy as page
from benchmarks.presets import PRESETS, Preset, judged_images
from benchmarks.speed import time_in_turns
from lightning_prune import (
    ASCP,
    TPP,
    GReg1,
    GReg2,
    Magnitude,
    MaskSparsity,
    StructuralPruning,
    load_from_checkpoint,
)
from lightning_prune.reports.latency import device_name

TURNS = 101
METHODS: dict[str, type[Any]] = {
    "Magnitude": Magnitude,
    "GReg1": GReg1,
    "GReg2": GReg2,
    "TPP": TPP,
    "MaskSparsity": MaskSparsity,
    "ASCP": ASCP,
}


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
        if preset.compiler is not None:
            self.net.compile(backend=preset.compiler, dynamic=False)  # other shapes after surgery: compiled anew

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
    if not preset.epochs[0]:
        load_model(model.net, preset.dense)
    data = Images(preset.data, asked.root, preset.batch, seed, asked.few)
    checkpoints = ModelCheckpoint(
        folder, filename="last", monitor=None, enable_version_counter=False, save_on_train_epoch_end=True
    )
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[*callbacks, checkpoints, Stop(asked.deadline)],
        precision=preset.precision,
        devices=1,
        benchmark=True,
        logger=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=math.gcd(*preset.epochs),  # each stage's last epoch
    )
    trainer.fit(model, data, ckpt_path=last if last.exists() else begin)
    return trainer.current_epoch >= epochs


def run(asked: argparse.Namespace, preset: Preset, method: str, share: float, seed: int) -> bool:
    """Go on with one run and write its result when it is complete; whether it is."""
    dense, sparse, _ = preset.epochs
    result = asked.results / f"{method}-{share:.3f}-{seed}.json"
    if result.exists():
        return True
    base = asked.out / f"dense-{seed}"
    if dense and not (base / "done").exists():
        if not fit(asked, preset, seed, base, dense, [], None):
            return False
        keep(preset, base)
    pruning = StructuralPruning(monitor="val_acc", latency_batches=[1] if asked.few else [1, 64])
    chosen = METHODS[method](budget={"macs": share}, start=dense, epochs=sparse)
    began = time.monotonic()
    begin = base / "last.ckpt" if dense else None
    if not fit(asked, preset, seed, asked.out / result.stem, sum(preset.epochs), [chosen, pruning], begin):
        return False
    report = pruning.report
    if report is None:
        raise RuntimeError(f"{result.stem} ended without surgery.")
    values = {
        "method": method,
        "share": share,
        "seed": seed,
        "epochs": preset.epochs,
        "few": asked.few,
        "report": json.loads(report.to_json()),
    }
    values |= {"seconds_of_the_last_piece": time.monotonic() - began, "versions": _versions(), "preset": asked.preset}
    values |= {"precision": preset.precision, "images": judged_images(preset, asked.few)}
    result.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    return True


def keep(preset: Preset, base: Path) -> None:
    """The dense network in a file of its own, and a mark that the stage is over."""
    model = Classifier(preset)
    model.load_state_dict(torch.load(base / "last.ckpt", map_location="cpu", weights_only=True)["state_dict"])
    save_model(model.net, str(base.with_suffix(".safetensors")))
    (base / "done").touch()


def time_again(asked: argparse.Namespace, preset: Preset, result: Path) -> None:
    """Latencies of a run's dense and slim network, in turns, by their checkpoints; they go into its result."""
    values = json.loads(result.read_text())
    shape = 3, *[8 if preset.data == "digits" else 32] * 2
    slim = load_from_checkpoint(Classifier, asked.out / result.stem / "last.ckpt", map_location="cpu", preset=preset)
    networks: dict[str, nn.Module] = {"dense": Classifier(preset).net.eval(), "slim": slim.net.eval()}
    rows = []
    for batch in (1, 64):
        images = torch.randn(batch, *shape).contiguous(memory_format=torch.channels_last)
        if torch.cuda.is_available():
            images, networks = images.cuda(), {name: network.cuda() for name, network in networks.items()}
        times = time_in_turns(networks, dict.fromkeys(networks, images), TURNS)
        rows.append({"batch": batch, **{f"{name}_ms": statistics.median(each) for name, each in times.items()}})
    values["latency"] = {"rows": rows, "threads": torch.get_num_threads(), "device": _versions()["device"]}
    result.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "device": device_name(nn.Linear(1, 1).to("cuda" if torch.cuda.is_available() else "cpu")),
    }


def show(asked: argparse.Namespace) -> None:
    """The tables of the results that are complete."""
    found = [json.loads(path.read_text()) for path in sorted(asked.results.glob("*.json"))]
    nothing = f"No run of {asked.preset} is complete yet in {asked.results}; --results names another folder."
    print("\n".join(page.section(asked.preset).body(found)) if found else nothing)


def main(arguments: Sequence[str] | None = None) -> None:
    """Go on until everything is complete or the time is up, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--root", default="data", help="folder that holds cifar-10-batches-py or cifar-100-python")
    parser.add_argument("--out", type=Path, help="checkpoints (runs/accuracy/PRESET)")
    parser.add_argument("--results", type=Path, help="one JSON file per run (as --out)")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop at the end of the epoch in which they are up")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--runs", type=int, help="only the first so many pairs of share and seed")
    parser.add_argument("--dense", help="begin with this dense network, a safetensors file, instead of a dense stage")
    parser.add_argument("--compile", nargs="?", const="inductor", help="torch.compile, with this backend (inductor)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--few", type=int, help="only so many images: a miniature")
    parser.add_argument("--epochs", type=int, nargs=3, help="of the three stages, instead of the preset's")
    parser.add_argument("--batch", type=int, help="images, instead of the preset's")
    parser.add_argument("--latency", action="store_true", help="only time the networks of complete runs, in turns")
    parser.add_argument("--table", action="store_true", help="only print what is known so far")
    asked = parser.parse_args(arguments)
    asked.deadline = time.monotonic() + 60 * asked.minutes
    asked.out = asked.out or Path("runs/accuracy") / asked.preset
    asked.results = asked.results or asked.out
    for folder in (asked.out, asked.results):
        folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(asked.threads)
    preset = preset_of(asked)
    runs = [(method, share, seed) for share, seed in preset.runs[: asked.runs] for method in asked.methods]
    for each in () if asked.table or asked.latency else runs:
        if not run(asked, preset, *each):
            break
    for result in sorted(asked.results.glob("*.json")) if asked.latency else ():
        time_again(asked, preset, result)
    show(asked)


def preset_of(asked: argparse.Namespace) -> Preset:
    """The preset with what the command line changes."""
    preset = PRESETS[asked.preset]
    epochs = tuple(asked.epochs or preset.epochs)
    if asked.dense is not None:
        epochs = 0, *epochs[1:]
    batch = asked.batch or preset.batch
    return replace(preset, epochs=epochs, batch=batch, compiler=asked.compile, dense=asked.dense or "")


if __name__ == "__main__":
    main()
