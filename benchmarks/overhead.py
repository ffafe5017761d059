"""What a method adds to a training step, beside a plain restatement of how the papers' code does it.

    python benchmarks/overhead.py                          # ResNet-56, batch 128, 32 x 32
    python benchmarks/overhead.py --network resnet50       # batch 32, 224 x 224
    python benchmarks/overhead.py --network vgg19

One fit per method. Its steps take turns: dense (the method's hooks taken out), the method, and the restatement (Python
loops over layers, clusters and pruned filters that add to ``.grad``), so that whatever else the machine does meets all
three alike. A ratio is the median over the turns of the times of neighbouring steps; in brackets the quartiles. What
happens at an epoch's end (ASCP) is timed by itself and spread over the steps of an epoch of the data set.
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
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet50

from lightning_prune import ASCP, TPP, GReg1, GReg2, MaskSparsity
from lightning_prune.reports.latency import device_name

sys.path.insert(0, str(Path(__file__).parent))
from networks import resnet56, vgg19

# network, samples of a batch, side of an image, classes, steps of an epoch of the data set
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int, int, int]] = {
    "resnet56": (resnet56, 128, 32, 10, 391),
    "resnet50": (resnet50, 32, 224, 1000, 40_037),
    "vgg19": (vgg19, 128, 32, 100, 391),
}
TARGETS = {"MaskSparsity": 1.01, "GReg1": 1.01, "GReg2": 1.01, "TPP": 1.03, "ASCP": 1.02}
TURNS = ("dense", "ours", "loops")
WARM = 2


def methods() -> dict[str, Callable[[], Any]]:
    """Each in the middle of its work: the published constants, from the first step on."""
    return {
        "MaskSparsity": lambda: MaskSparsity(0.5, epochs=2, constants="imagenet"),
        "GReg1": lambda: GReg1(0.5, schedule="cifar"),
        "GReg2": lambda: GReg2(0.5, schedule="cifar"),
        "TPP": lambda: TPP(0.5, schedule="cifar"),
        "ASCP": lambda: ASCP(0.5, epochs=3),
    }


class Net(LightningModule):
    """A network, cross entropy, SGD with momentum."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As in the papers."""
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)


class Loops(Callback):
    """The same penalties as the papers' code computes them: layer by layer, filter by filter, added to ``.grad``.

    Args:
        kind: name of the method.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.pruned: dict[str, list[int]] = {}
        self.clusters: dict[str, list[list[int]]] = {}

    def prepare(self, net: nn.Module) -> None:
        """Half of the filters of every 3x3 (or, in bottlenecks, 1x1) convolution, by L1 norm; pairs as clusters."""
        for name, module in net.named_modules():
            if isinstance(module, nn.Conv2d) and not name.endswith(("conv3", "downsample.0")):
                order = module.weight.detach().abs().mean(dim=(1, 2, 3)).argsort().tolist()
                self.pruned[name] = order[: len(order) // 2]
                self.clusters[name] = [order[k : k + 2] for k in range(0, len(order), 2)]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """TPP's decorrelation is part of the loss."""
        if self.kind == "TPP":
            for name, module in pl_module.net.named_modules():
                if name in self.pruned:
                    weight = module.weight.flatten(1)
                    target = (weight @ weight.t()).detach()
                    for filter_ in self.pruned[name]:
                        target[filter_, :] = 0
                        target[:, filter_] = 0
                    with torch.enable_grad():
                        loss.add_(1e-4 * F.mse_loss(weight @ weight.t(), target))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The rest is added to the gradients."""
        norm = None
        for name, module in reversed(list(pl_module.net.named_modules())):
            if isinstance(module, nn.BatchNorm2d):
                norm = module
            if name in self.pruned:
                self._layer(name, module, norm)

    @torch.no_grad()
    def _layer(self, name: str, module: nn.Module, norm: nn.Module | None) -> None:
        if self.kind == "ASCP":
            for cluster in self.clusters[name]:
                mean = module.weight[cluster].mean(dim=0)
                for filter_ in cluster:
                    module.weight.grad[filter_] += 1e-4 * (module.weight[filter_] - mean)
        elif self.kind == "MaskSparsity":
            if norm is not None:
                mask = torch.zeros_like(norm.weight)
                for filter_ in self.pruned[name]:
                    mask[filter_] = 1
                norm.weight.grad.add_(1e-4 * mask * norm.weight.sign())
        else:
            strength = torch.zeros(module.weight.shape[0], 1, 1, 1, device=module.weight.device)
            for filter_ in self.pruned[name]:
                strength[filter_] = 1e-4
            module.weight.grad += strength * module.weight


class Turns(Callback):
    """Times steps, and changes who takes part from one to the next.

    Args:
        ours: the method.
        loops: its restatement.
    """

    def __init__(self, ours: Callback, loops: Loops) -> None:
        self.ours = ours
        self.loops = loops
        self.times: dict[str, list[float]] = {turn: [] for turn in TURNS}
        self.epoch_end = 0.0
        self._batch = 0
        self._hooks: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._began = _now(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop the clock; the next one's turn."""
        took = _now(pl_module) - self._began
        turn = (self._batch - 1) % len(TURNS)
        if self._batch == 0:  # in the first batch the method traces the network
            self.loops.prepare(pl_module.net)
            self._hooks = trainer.optimizers[0]._optimizer_step_post_hooks
            began = _now(pl_module)
            with torch.no_grad():
                self.ours.end_epoch(1)  # from now on there are clusters
            self.epoch_end = _now(pl_module) - began
        else:
            self.times[TURNS[turn]].append(took)
        self._batch += 1
        who = TURNS[(self._batch - 1) % len(TURNS)]
        members = {"ours": [self.ours], "loops": [self.loops], "dense": []}[who]
        trainer.callbacks = [*members, self]  # a new list: the old one is being walked through
        trainer.optimizers[0]._optimizer_step_post_hooks = self._hooks if who == "ours" else OrderedDict()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enough; the method has to clean up."""
        trainer.callbacks = [self.ours, self]
        trainer.should_stop = True

    def ratio(self, turn: str) -> list[float]:
        """Quartiles of the steps' times over those of the dense steps beside them."""
        pairs = zip(self.times[turn][WARM:], self.times["dense"][WARM:], strict=False)
        return statistics.quantiles([step / dense for step, dense in pairs], n=4, method="inclusive")


def _now(pl_module: LightningModule) -> float:
    if pl_module.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(network: str, method: str, turns: int) -> dict[str, Any]:
    """One fit of so many turns."""
    build, batch, side, classes, per_epoch = NETWORKS[network]
    seed_everything(0, verbose=False)
    ours = methods()[method]()
    watch = Turns(ours, Loops(method))
    count = 1 + len(TURNS) * (turns + WARM)
    images, labels = torch.randn(batch, 3, side, side), torch.randint(classes, (batch,))
    loader = DataLoader(TensorDataset(images.repeat(2, 1, 1, 1), labels.repeat(2)), batch_size=batch)
    model = Net(build())
    trainer = Trainer(
        max_epochs=10_000,  # as long as the published schedules; it ends after the first
        callbacks=[ours, watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    epoch = _Epoch(loader, count)
    trainer.fit(model, epoch)
    found: dict[str, Any] = {
        "network": network,
        "method": method,
        "batch": batch,
        "turns": turns,
        "dense_ms": 1e3 * statistics.median(watch.times["dense"][WARM:]),
        **{turn: watch.ratio(turn) for turn in TURNS[1:]},
        "device": device_name(model),
        "target": TARGETS[method],
    }
    if method == "ASCP":
        found["epoch_end_ms"] = 1e3 * watch.epoch_end
        found["amortised"] = found["ours"][1] + found["epoch_end_ms"] / per_epoch / found["dense_ms"]
    return found


class _Epoch:
    """A loader as long as the whole measurement, so that no epoch ends within it."""

    def __init__(self, loader: DataLoader[Any], length: int) -> None:
        self._batch = next(iter(loader))
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Any:
        return iter([self._batch] * self._length)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet56")
    parser.add_argument("--methods", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = [measure(asked.network, method, asked.turns) for method in asked.methods]
    table = Table(title=f"Time of a training step, {asked.network}, batch {rows[0]['batch']}: times a dense step")
    for name in ("method", "dense, ms", "this library", "target", "loops"):
        table.add_column(name, justify="right" if name != "method" else "left")
    for row in rows:
        low, middle, high = row["ours"]
        shown = f"{row.get('amortised', middle):.3f} ({low:.3f}-{high:.3f})"
        loops = "{1:.2f} ({0:.2f}-{2:.2f})".format(*row["loops"])
        table.add_row(row["method"], f"{row['dense_ms']:.1f}", shown, f"{row['target']:.2f}", loops)
    Console().print(table)
    if asked.out:
        versions = {"torch": torch.__version__, "lightning": lightning.__version__, "python": platform.python_version()}
        whole = {"rows": rows, "versions": versions, "threads": asked.threads, "command": " ".join(sys.argv)}
        asked.out.write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
