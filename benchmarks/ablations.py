"""Choices by evidence: every option against its alternatives, at equal epochs and equal multiply-adds, over seeds.

    python -m benchmarks.ablations --preset digits                            # a quarter of an hour
    python -m benchmarks.ablations --preset digits --only finish schedules --seeds 0 1 2 3 4 5 6 7 8
    python -m benchmarks.ablations --preset cpu --root DIR --minutes 60       # CIFAR-10, hours; call it again to go on
    python -m benchmarks.ablations --only coupled same_set --seeds 0 1 2      # some of them

Data, network and stages are those of ``benchmarks/accuracy.py``: the dense stage is trained once per seed and resumed
by every variant; then come the sparse stage, surgery and the finetune stage. All inner layers lose the same share of
their channels. Accuracies are those of last epochs, never the best: dense, as the sparse stage leaves the network,
right after surgery (which the masked network's equals, by the proof), the same with running statistics taken anew from
1024 training images, finetuned. ``--minutes`` stops at the end of an epoch, and the next call goes on from there;
``benchmarks/results/ablations/PRESET.json`` then has what is known, and ``benchmarks.tables`` makes the page of it.
Other variants and seeds that the file has of the same epochs, precision, share and number of images stay in it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import math
import re
import shutil
import time
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.swa_utils import update_bn

from benchmarks.accuracy import fit
from benchmarks.images import Images
from benchmarks.machine import machine
from benchmarks.presets import PRESETS, Preset
from benchmarks.variants import ABLATIONS, VARIANTS, Stage
from lightning_prune import StructuralPruning

RESULTS = Path(__file__).parent / "results" / "ablations"
RATIOS = {"digits": 0.85, "cpu": 0.75}
SEEDS = (0, 1, 2)
SAMPLES = 1024


class Recalibrated(Callback):
    """Accuracy right after surgery of a copy whose running statistics are taken anew from training images.

    Args:
        pruning: does the surgery; stands before this one among the callbacks.
    """

    def __init__(self, pruning: StructuralPruning) -> None:
        self.pruning = pruning
        self.value: float | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In the epoch that surgery begins."""
        if self.pruning.plan is None or self.value is not None:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        net = copy.deepcopy(pl_module.net).train()
        update_bn(islice(data.train_dataloader(), math.ceil(SAMPLES / data.batch)), net)
        with torch.no_grad():
            hits = [(net.eval()(images).argmax(1) == labels).float() for images, labels in data.val_dataloader()]
        self.value = float(torch.cat(hits).mean())

    def state_dict(self) -> dict[str, Any]:
        """What has been measured."""
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A resumed run may be past the moment."""
        self.value = state_dict["value"]


def data_of(asked: argparse.Namespace, preset: Preset) -> Images:
    """The images of a preset, at hand."""
    data = Images(preset.data, asked.root, preset.batch, 0, asked.few)
    data.setup("fit")
    return data


def stage_of(asked: argparse.Namespace, preset: Preset) -> Stage:
    """The sparse stage of a preset."""
    dense, sparse, _ = preset.epochs
    steps = len(data_of(asked, preset).train_dataloader())
    return Stage(dense, sparse, steps, RATIOS[asked.preset], preset.later_rate, preset.weight_decay)


def run(asked: argparse.Namespace, preset: Preset, stage: Stage, name: str, seed: int) -> bool:
    """Go on with one variant and write its result when it is complete; whether it is."""
    result = asked.out / f"{short(name)}-{seed}.json"
    if result.exists():
        return True
    base, folder = asked.out / f"dense-{seed}", asked.out / result.stem
    if not (base / "done").exists():
        if not fit(asked, preset, seed, base, stage.start, [], None):
            return False
        (base / "done").touch()
    callbacks, options = VARIANTS[name](stage)
    pruning = StructuralPruning(monitor="val_acc", latency_batches=(), report_file=None, **options)
    anew = Recalibrated(pruning)
    began = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):  # a table of what surgery did, per run
        ended = fit(asked, preset, seed, folder, sum(preset.epochs), [*callbacks, pruning, anew], base / "last.ckpt")
    if not ended:
        return False
    if pruning.report is None or pruning.plan is None:
        raise RuntimeError(f"{name} ended without surgery.")
    cost, rows = pruning.report.cost_after, pruning.report.layers
    values = {
        "variant": name,
        "seed": seed,
        "accuracy": {**pruning.report.accuracy, "recalibrated": anew.value},
        "macs": cost.macs,
        "macs_left": (cost.macs or 0) / (pruning.report.cost_before.macs or 1),
        "parameters": cost.parameters,
        "layers": [list(row) for row in rows],
        "set": f"{zlib.crc32(pruning.plan.to_json().encode()):08x}",
        "seconds": time.process_time() - began,
    }
    result.write_text(json.dumps(values, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    return True


def seeds_of(asked: argparse.Namespace) -> Sequence[int]:
    """Those on the command line, or the preset's."""
    return tuple(asked.seeds or SEEDS)


def short(name: str) -> str:
    """A name for a file."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


def collect(asked: argparse.Namespace, preset: Preset) -> None:
    """Join the results into the file that the page is made from, beside what it has of other variants and seeds."""
    found = [json.loads(path.read_text()) for path in sorted(asked.out.glob("*.json"))]
    rows = [{key: value for key, value in row.items() if key != "layers"} for row in found]
    setting = {
        "preset": asked.preset,
        "epochs": preset.epochs,
        "precision": preset.precision,
        "ratio": RATIOS[asked.preset],
        "few": asked.few,
        "images": len(data_of(asked, preset).parts[1][1]),
    }
    here, path = machine("torch", "lightning"), asked.results / f"{asked.preset}.json"
    measured = {(row["variant"], row["seed"]): row for row in rows if row["seed"] in seeds_of(asked)}
    joined = {**kept(path, setting, here), **measured}
    order = list(VARIANTS)
    names = sorted((who for who in joined if who[0] in order), key=lambda who: (order.index(who[0]), who[1]))
    whole = {**setting, "machine": here, "threads": asked.threads, "rows": [joined[who] for who in names]}
    asked.results.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1) + "\n")


def kept(path: Path, setting: dict[str, Any], here: dict[str, str]) -> dict[tuple[str, int], dict[str, Any]]:
    """Rows of a file of results, by variant and seed, if it is of the same setting; with their machine, if another."""
    whole = json.loads(path.read_text()) if path.exists() else {"rows": []}
    if any(whole.get(key) != value for key, value in json.loads(json.dumps(setting)).items()):
        return {}
    rows = ({"machine": whole["machine"], **row} for row in whole["rows"])
    own = ({key: value for key, value in row.items() if key != "machine" or value != here} for row in rows)
    return {(row["variant"], row["seed"]): row for row in own}


def main(arguments: Sequence[str] | None = None) -> None:
    """Go on until everything is complete or the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=RATIOS, default="digits")
    parser.add_argument("--root", default="data", help="folder that holds cifar-10-batches-py")
    parser.add_argument("--out", type=Path, help="checkpoints and single results (runs/ablations/PRESET)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the joined results go")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop at the end of the epoch in which they are up")
    parser.add_argument("--only", nargs="+", choices=ABLATIONS, default=list(ABLATIONS))
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the preset's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--few", type=int, help="only so many images: a miniature")
    parser.add_argument("--epochs", type=int, nargs=3, help="of the three stages, instead of the preset's")
    asked = parser.parse_args(arguments)
    asked.deadline = time.monotonic() + 60 * asked.minutes
    asked.out = asked.out or Path("runs/ablations") / asked.preset
    asked.out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(asked.threads)
    preset = replace(PRESETS[asked.preset], epochs=tuple(asked.epochs or PRESETS[asked.preset].epochs))
    stage = stage_of(asked, preset)
    names = dict.fromkeys(name for key in asked.only for name in ABLATIONS[key].variants)
    left = [(seed, name) for seed in seeds_of(asked) for name in names]
    for seed, name in left:
        if time.monotonic() > asked.deadline or not run(asked, preset, stage, name, seed):
            break
    collect(asked, preset)
    done = sum((asked.out / f"{short(name)}-{seed}.json").exists() for seed, name in left)
    print(f"{done} of {len(left)} runs are complete; {asked.results / asked.preset}.json has what is known.")


if __name__ == "__main__":
    main()
