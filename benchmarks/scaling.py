"""How the cost of every stage grows with the network and with the number of ranks.

    python -m benchmarks.scaling                               # a network after the other, then 1, 2 and 4 ranks
    python -m benchmarks.scaling --models resnet18 vgg11_bn    # some of them; the others keep what they have
    python -m benchmarks.scaling --plot                        # only the pictures, from the results

Every network in a process of its own, one thread, one picture of 224 x 224. *trace*: from the network to its channel
groups; *proof*: masked and slim network side by side in double precision; *surgery*: with SGD's momentum for every
parameter. *penalty*: what GReg-1, TPP and MaskSparsity compute in one step of a live fit; *clusters*: what ASCP does at
an epoch's end there, from the weights to the reconstructed channels. Half of the channels, streams left alone.
Processor seconds, the least of the repeats, for those are disturbed least.

Ranks: live fits of an 8-layer residual network over gloo; the least of the repeats, of the rank that took longest.
Surgery there wraps the network in DDP anew.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import io
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models

from benchmarks.machine import machine
from benchmarks.networks import cifar_resnet
from lightning_prune import ASCP, TPP, GReg1, MaskSparsity, StructuralPruning, choose, prove, prune_, trace
from lightning_prune.callbacks import structural
from lightning_prune.errors import ConfigurationError
from lightning_prune.reports.cost import count_cost

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
IMAGES = ROOT / "docs" / "images"
FAMILIES = {
    "ResNet": ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    "VGG": ("vgg11_bn", "vgg16_bn", "vgg19_bn"),
    "ViT": ("vit_b_16", "vit_l_16"),
}
MODELS = tuple(name for family in FAMILIES.values() for name in family)
TINY = {"tiny8": 8}
RANKS = (1, 2, 4)
STEPS, REPEATS = 3, 3
QUANTITIES = ("trace", "proof", "surgery", "penalty: GReg1", "penalty: TPP", "penalty: MaskSparsity", "clusters: ASCP")
STAGES = {
    "pick": "pick, agreed on",
    "decide": "plan, agreed on",
    "proof": "proof",
    "surgery": "surgery",
    "handover": "all of the hand-over",
}


class Clock:
    """Processor and clock seconds of calls."""

    def __init__(self) -> None:
        self.taken: list[tuple[float, float]] = []

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose calls are noted."""

        @functools.wraps(function)
        def noted(*args: Any, **kwargs: Any) -> Any:
            clock, processor = time.perf_counter(), time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.taken.append((time.process_time() - processor, time.perf_counter() - clock))

        return noted

    def least(self) -> dict[str, float]:
        """Least processor seconds of a call, and least clock seconds."""
        return {"processor": min(each[0] for each in self.taken), "clock": min(each[1] for each in self.taken)}


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A network in evaluation mode and one picture for it."""
    torch.manual_seed(0)
    if name in TINY:
        return cifar_resnet(1, TINY[name]).eval(), torch.randn(1, 3, 16, 16)
    return getattr(models, name)(weights=None).eval(), torch.randn(1, 3, 224, 224)


# One network.


class Net(LightningModule):
    """A network and SGD. Its steps cost next to nothing: after the first, which is traced, the loss is a constant."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.is_traced = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """One pass through the network, once."""
        if not self.is_traced:
            self.is_traced = True
            with torch.no_grad():
                self.net(batch[0])
        return next(self.net.parameters()).sum() * 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Without momentum."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def quiet(**settings: Any) -> Trainer:
    """A trainer that says nothing and writes nothing."""
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )


def step_cost(net: nn.Module, picture: Tensor, method: Any) -> dict[str, float]:
    """Of a method in a live fit: strength and penalty of a late step, for at first nothing may be pulled at."""
    update, penalty = Clock(), Clock()
    method.update, method.penalty = update.around(method.update), penalty.around(method.penalty)
    trainer = quiet(max_epochs=2, limit_train_batches=STEPS, callbacks=[method])
    trainer.fit(Net(net), DataLoader(TensorDataset(picture.repeat(STEPS, 1, 1, 1)), 1))
    for clock in (update, penalty):
        clock.taken = clock.taken[-2:]
    return {key: update.least()[key] + penalty.least()[key] for key in ("processor", "clock")}


def cluster_cost(net: nn.Module, picture: Tensor) -> dict[str, float]:
    """Of ASCP in a live fit: the end of its only epoch, whose clusters begin from nothing."""
    method, ends = ASCP(0.5, epochs=1, rate="const", recalibrate=0), Clock()
    method.end_epoch = ends.around(method.end_epoch)  # type: ignore[method-assign]
    trainer = quiet(max_epochs=1, limit_train_batches=1, callbacks=[method])
    trainer.fit(Net(net), DataLoader(TensorDataset(picture), 1))
    return ends.least()


def measure(name: str) -> list[dict[str, Any]]:
    """All quantities of one network."""
    model, picture = network(name)
    found: list[dict[str, Any]] = []
    cost = count_cost(model, (picture,))
    facts: dict[str, Any] = {"model": name, "parameters": cost.parameters, "macs": cost.macs}
    facts["layers"] = sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules())

    def note(quantity: str, seconds: dict[str, float]) -> None:
        found.append({**facts, "quantity": quantity, **seconds})

    tracing, proving, cutting = Clock(), Clock(), Clock()
    graph = None
    for _ in range(REPEATS + 1):  # the first warms up
        graph = tracing.around(trace)(model, picture)
    plan = choose(graph, 0.5)
    del graph
    note("trace", tracing.least())
    for _ in range(2):
        proving.around(prove)(model, plan, picture)
    note("proof", proving.least())
    for _ in range(REPEATS):
        fresh = copy.deepcopy(model)
        optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1, momentum=0.9)
        for parameter in fresh.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        gc.collect()
        cutting.around(prune_)(fresh, plan, optimizer)
        del fresh, optimizer
    note("surgery", cutting.least())
    model.train()
    for kind in (GReg1, TPP, MaskSparsity):
        try:
            note(f"penalty: {kind.__name__}", step_cost(model, picture, kind(0.5, epochs=2)))
        except ConfigurationError:  # no norms with scales behind the layers
            continue
    note("clusters: ASCP", cluster_cost(model, picture))
    return found


# Ranks.


class Task(LightningModule):
    """A small residual network on random pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.net = cifar_resnet(1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def live(ranks: int, out: Path) -> None:
    """Fits on so many ranks; every rank writes its own seconds."""
    clocks = {stage: Clock() for stage in STAGES}
    structural.operate_ = clocks["surgery"].around(structural.operate_)
    for _ in range(REPEATS + 1):
        seed_everything(0, verbose=False)
        method, pruning = GReg1(0.5, epochs=2), StructuralPruning(latency_batches=(), report_file=None)
        method._pick = clocks["pick"].around(method._pick)  # type: ignore[method-assign]
        for stage, question in (("decide", "_decide_together"), ("proof", "_examine"), ("handover", "_operate")):
            setattr(pruning, question, clocks[stage].around(getattr(pruning, question)))
        data = TensorDataset(torch.randn(16 * ranks, 3, 16, 16), torch.randint(10, (16 * ranks,)))
        trainer = quiet(max_epochs=3, strategy="ddp", devices=ranks, callbacks=[method, pruning])
        with redirect_stdout(io.StringIO()):
            trainer.fit(Task(), DataLoader(data, 4))
    for clock in clocks.values():
        clock.taken = clock.taken[1:]  # the first warms up
    rank = os.environ.get("LOCAL_RANK", "0")
    facts = {stage: clock.least() for stage, clock in clocks.items()}
    (out / f"{rank}.json").write_text(json.dumps(facts))


def by_ranks(ranks: int) -> list[dict[str, Any]]:
    """The stages of the hand-over on so many ranks: the longest rank's seconds."""
    with tempfile.TemporaryDirectory() as folder:
        child("ranks", str(ranks), folder)
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    return [
        {"ranks": ranks, "stage": stage, **{key: max(each[stage][key] for each in found) for key in found[0][stage]}}
        for stage in STAGES
    ]


def child(*arguments: str) -> str:
    """What a process of its own says."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.scaling", "--child", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr.strip()[-2000:]}")
    return done.stdout


# What follows from the numbers.


def slope(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Exponent ``b`` of ``seconds = a * size ** b`` by least squares of the logarithms, and its standard error.

    >>> "{:.2f} {:.2f}".format(*slope([(1.0, 2.0), (10.0, 20.0), (100.0, 200.0)]))
    '1.00 0.00'
    """
    logs = [(math.log(size), math.log(seconds)) for size, seconds in points]
    mean = [sum(values) / len(logs) for values in zip(*logs, strict=True)]
    square = sum((x - mean[0]) ** 2 for x, _ in logs)
    found = sum((x - mean[0]) * (y - mean[1]) for x, y in logs) / square
    rest = sum((y - mean[1] - found * (x - mean[0])) ** 2 for x, y in logs)
    return found, math.sqrt(rest / max(1, len(logs) - 2) / square)


def points(
    rows: Sequence[dict[str, Any]], quantity: str, models: Sequence[str], size: str
) -> list[tuple[float, float]]:
    """Size and processor seconds of each network."""
    own = [row for row in rows if row["quantity"] == quantity and row["model"] in models]
    return [(row[size], row["processor"]) for row in own]


def plot(whole: dict[str, Any], folder: Path = IMAGES) -> None:
    """Draw ``scaling.svg`` and ``scaling_ranks.svg``; the same numbers give the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    settings = {"svg.hashsalt": "lightning_prune", "svg.fonttype": "none", "font.size": 8}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9.6, 4.8), layout="constrained")
        axes = figure.subplots(2, 4, sharex=True).flatten()
        for place, quantity in zip(axes, QUANTITIES, strict=False):
            _panel(place, whole["rows"], quantity)
        axes[len(QUANTITIES)].axis("off")
        axes[len(QUANTITIES)].legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="center")
        figure.supxlabel("millions of parameters")
        figure.supylabel("processor seconds")
        figure.savefig(folder / "scaling.svg", metadata={"Date": None, "Creator": None})
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        place = figure.subplots()
        for stage, label in STAGES.items():
            own = [(row["ranks"], row["processor"]) for row in whole["ranks"] if row["stage"] == stage]
            place.plot(*zip(*own, strict=True), marker="o", label=label) if own else None
        place.set(xlabel="ranks", ylabel="processor seconds of a rank", yscale="log", xticks=RANKS)
        figure.legend(frameon=False, loc="outside right center")
        figure.savefig(folder / "scaling_ranks.svg", metadata={"Date": None, "Creator": None})


def _panel(place: Any, rows: Sequence[dict[str, Any]], quantity: str) -> None:
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    known = [(x / 1e6, y) for x, y in points(rows, quantity, MODELS, "parameters")]
    for marker, (family, names) in zip("os^", FAMILIES.items(), strict=True):
        own = [(x / 1e6, y) for x, y in points(rows, quantity, names, "parameters")]
        if own:
            place.plot([x for x, _ in own], [y for _, y in own], marker, label=family, markersize=4)
    if len(known) > 1:
        middle = math.exp(sum(math.log(y / x) for x, y in known) / len(known))
        ends = [min(x for x, _ in known), max(x for x, _ in known)]
        place.plot(ends, [middle * x for x in ends], color="0.6", linewidth=1, label="as the parameters")
        place.set(xscale="log", yscale="log")
        for axis in (place.xaxis, place.yaxis):
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(FormatStrFormatter("%g"))
            axis.set_minor_formatter(NullFormatter())
    place.set_title(quantity)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--models", nargs="*", choices=(*MODELS, *TINY), default=MODELS)
    parser.add_argument("--ranks", nargs="*", type=int, default=RANKS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--images", type=Path, default=IMAGES)
    parser.add_argument("--plot", action="store_true", help="only draw")
    asked = parser.parse_args(arguments)
    if asked.child:
        torch.set_num_threads(1)
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        job, first, *rest = asked.child
        if job == "model":
            print("\n" + json.dumps(measure(first)))
        else:
            live(int(first), Path(rest[0]))
        return
    whole: dict[str, Any] = json.loads(asked.out.read_text()) if asked.out.exists() else {"rows": [], "ranks": []}
    for name in () if asked.plot else asked.models:
        fresh = json.loads(child("model", name).splitlines()[-1])
        rows = [row for row in whole["rows"] if row["model"] != name] + fresh
        order = (*MODELS, *TINY)
        whole["rows"] = sorted(rows, key=lambda row: (order.index(row["model"]), QUANTITIES.index(row["quantity"])))
        _write(asked.out, whole)
        print(name, {row["quantity"]: round(row["processor"], 4) for row in fresh}, flush=True)
    for ranks in () if asked.plot else asked.ranks:
        rows = [row for row in whole["ranks"] if row["ranks"] != ranks] + by_ranks(ranks)
        whole["ranks"] = sorted(rows, key=lambda row: (row["ranks"], list(STAGES).index(row["stage"])))
        _write(asked.out, whole)
        print(ranks, {row["stage"]: round(row["processor"], 4) for row in rows if row["ranks"] == ranks}, flush=True)
    plot(whole, asked.images)


def _write(out: Path, whole: dict[str, Any]) -> None:
    out.write_text(json.dumps({**whole, "machine": machine("torch", "lightning")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
