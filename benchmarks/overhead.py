"""What a method adds to a training step, beside a plain restatement in Python loops, as the papers' code has them.

    python benchmarks/overhead.py                          # ResNet-56, batch 128, 32 x 32
    python benchmarks/overhead.py --network resnet50       # batch 32, 224 x 224
    python benchmarks/overhead.py --network vgg19 --minutes 9    # one method after another; call it again to go on

One fit per method. Its steps take turns: dense (the method's hooks taken out), the method, and the restatement (Python
loops over layers, clusters and pruned filters that add to ``.grad``), so that whatever else the machine does meets all
three alike. A ratio is the median over the turns of a step's time over what a dense step takes at that moment, between
the two beside it; in brackets the quartiles. Half as many steps follow that are looked into: the time in the callback's
hooks and in the penalty's backward pass, which shows less than the machine's noise. On a processor that is its time of
all threads, over the dense step's divided by their number: as if nothing of it ran in parallel. TPP's restatement has
part of its cost in autograd's graph, which only the whole step shows. What happens at an epoch's end (ASCP) is timed by
itself and spread over the steps of an epoch of the data set. All networks and devices share one file of results; what
it has is not measured again.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet50

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.networks import resnet56, vgg19
from benchmarks.pages import RESULTS
from benchmarks.pages import overhead as page
from lightning_prune import ASCP, TPP, ASCPSchedule, GReg1, GReg2, MaskSparsity
from lightning_prune.reports.latency import device_name


class Case(NamedTuple):
    """A network and its data set."""

    build: Callable[[], nn.Module]
    batch: int
    side: int
    classes: int
    steps_per_epoch: int


NETWORKS = {
    "resnet56": Case(resnet56, 128, 32, 10, 391),
    "resnet50": Case(resnet50, 32, 224, 1000, 40_037),
    "vgg19": Case(vgg19, 128, 32, 100, 391),
}
TARGETS = {
    **{"MaskSparsity": 1.01, "GReg1": 1.01, "GReg2": 1.01, "TPP": 1.03, "TPP, gram=0": 1.03},
    **{"ASCP": 1.02, "ASCP with final clusters": 1.02},
}
TURNS = ("dense", "ours", "loops")
INSIDE = ("ours, inside", "loops, inside")
HOOKS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
)
WARM = 4
"""Turns before those that count; after these every published strength is above zero."""


def methods() -> dict[str, Callable[[], Any]]:
    """Each in the middle of its work: the published constants, from the first step on."""
    return {
        "MaskSparsity": lambda: MaskSparsity(0.5, epochs=2, constants="imagenet"),
        "GReg1": lambda: GReg1(0.5, schedule="cifar"),
        "GReg2": lambda: GReg2(0.5, schedule="cifar"),
        "TPP": lambda: TPP(0.5, schedule="cifar"),
        "TPP, gram=0": lambda: TPP(0.5, schedule="cifar", gram=0.0),
        "ASCP": lambda: ASCP(0.5, epochs=3),
        "ASCP with final clusters": lambda: ASCP(0.5, schedule=ASCPSchedule(3, "const", freeze_after=0.3)),
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
    """Penalties of the same kind as the papers' code computes them: layer by layer, filter by filter, onto ``.grad``.

    They take the weights of every convolution that is not a bottleneck's last or a shortcut's; of MaskSparsity, the
    norms' scales. ASCP has no published code: its clusters are pulled at every step, or their gradients averaged.

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
        elif self.kind == "ASCP with final clusters":
            for cluster in self.clusters[name]:
                module.weight.grad[cluster] = module.weight.grad[cluster].mean(dim=0)
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


class Clock(Callback):
    """Stands in for a callback in the trainer's list, and times its hooks.

    Args:
        timed: the callback.
    """

    def __init__(self, timed: Callback) -> None:
        self.timed = timed
        self.took = 0.0
        for name in HOOKS:
            setattr(self, name, self.around(getattr(timed, name)))

    def around(self, hook: Callable[..., Any]) -> Callable[..., None]:
        """The same hook, on the clock."""

        def timed(*arguments: Any) -> None:
            began = _spent()
            hook(*arguments)
            self.took += _spent() - began

        return timed


class Turns(Callback):
    """Times steps, and changes who takes part from one to the next.

    Args:
        ours: the method.
        loops: its restatement.
        turns: of whole steps; half as many follow that are looked into.
    """

    def __init__(self, ours: Callback, loops: Loops, turns: int) -> None:
        self.members = {"ours": ours, "loops": loops}
        self.times: dict[str, list[float]] = {turn: [] for turn in (*TURNS, *INSIDE)}
        self.spent: list[float] = []
        self.epoch_end = 0.0
        self.roles = [*TURNS * (turns + WARM), "dense", *INSIDE * (max(2, turns // 2) + WARM)]
        self._clocks = {who: Clock(member) for who, member in self.members.items()}
        self._batch = 0
        self._hooks: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._began, self._first = _now(), _spent()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In a step that is looked into, the backward pass of the penalty alone, onto the gradients that are there."""
        who, _, inside = self._role().partition(", ")
        if inside:
            alone = torch.zeros((), device=pl_module.device, requires_grad=True).clone()
            self.members[who].on_before_backward(trainer, pl_module, alone)
            self._clocks[who].around(alone.backward)()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop the clock; the next one's turn."""
        took, spent, role = _now() - self._began, _spent() - self._first, self._role()
        if self._batch == 0:  # in the first batch the method traces the network
            self.members["loops"].prepare(pl_module.net)
            self._hooks = trainer.optimizers[0]._optimizer_step_post_hooks
            began = _spent()
            with torch.no_grad():
                self.members["ours"].end_epoch(1)  # from now on there are clusters
            self.epoch_end = _spent() - began
        else:
            who, _, inside = role.partition(", ")
            self.times[role].append(self._clocks[who].took if inside else took)
            self.spent += [spent] if role == "dense" else []
        self._batch += 1
        for clock in self._clocks.values():
            clock.took = 0.0
        self._cast(trainer, self._role())

    def _role(self) -> str:
        """Of this batch; the first one's is nobody's."""
        return self.roles[self._batch - 1] if 0 < self._batch <= len(self.roles) else "dense"

    def _cast(self, trainer: Trainer, role: str) -> None:
        """Only who has the role takes part in the next step."""
        who, _, inside = role.partition(", ")
        members = [] if who == "dense" else [self._clocks[who] if inside else self.members[who]]
        trainer.callbacks = [*members, self]  # a new list: the old one is being walked through
        hooks = self._hooks if who == "ours" else {}
        around = self._clocks["ours"].around if inside else lambda hook: hook
        found = OrderedDict((number, around(hook)) for number, hook in hooks.items())
        trainer.optimizers[0]._optimizer_step_post_hooks = found

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enough; the method has to clean up."""
        trainer.callbacks = [self.members["ours"], self]
        trainer.optimizers[0]._optimizer_step_post_hooks = self._hooks
        trainer.should_stop = True

    def ratio(self, turn: str) -> list[float]:
        """Quartiles of the steps' times over what a dense step takes in between: by the dense steps around it."""
        dense, place = self.times["dense"][WARM:], TURNS.index(turn) / len(TURNS)
        between = [(1 - place) * first + place * second for first, second in pairwise(dense)]
        return _quartiles(step / base for step, base in zip(self.times[turn][WARM:], between, strict=False))

    def inside(self, turn: str) -> list[float]:
        """Quartiles of 1 plus the own time over a dense step's."""
        return _quartiles(1 + own / self.dense for own in self.times[turn][WARM:])

    @property
    def dense(self) -> float:
        """Seconds of a dense step, as own times count: on a processor all its threads' time over their number."""
        shared = 1 if torch.cuda.is_available() else torch.get_num_threads()
        return statistics.median(self.spent[WARM:]) / shared


def _quartiles(values: Iterable[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _spent() -> float:
    """Seconds of the processor, whatever else it does; of the GPU those of the clock."""
    return _now() if torch.cuda.is_available() else time.process_time()


def measure(network: str, method: str, turns: int) -> dict[str, Any]:
    """One fit of so many turns."""
    case = NETWORKS[network]
    seed_everything(0, verbose=False)
    ours = methods()[method]()
    watch = Turns(ours, Loops(method), turns)
    images = torch.randn(case.batch, 3, case.side, case.side)
    model = Net(case.build())
    trainer = Trainer(
        max_epochs=10_000,  # as long as the published schedules; it ends after the first
        callbacks=[ours, watch],
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, _Epoch((images, torch.randint(case.classes, (case.batch,))), 1 + len(watch.roles)))
    found: dict[str, Any] = {
        "network": network,
        "method": method,
        "batch": case.batch,
        "turns": turns,
        "dense_ms": 1e3 * statistics.median(watch.times["dense"][WARM:]),
        "ours": watch.ratio("ours"),
        "loops": watch.ratio("loops"),
        "own": watch.inside("ours, inside"),
        "own_loops": watch.inside("loops, inside"),
        "device": device_name(model),
        "threads": torch.get_num_threads(),
        "target": TARGETS[method],
        "versions": _versions(),
    }
    if method == "ASCP":
        found["epoch_end"] = watch.epoch_end / watch.dense / case.steps_per_epoch
    return found


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "lightning": lightning.__version__, "python": platform.python_version()}


class _Epoch:
    """One batch, as often as the whole measurement takes, so that no epoch ends within it."""

    def __init__(self, batch: tuple[Tensor, Tensor], length: int) -> None:
        self._batch, self._length = batch, length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([self._batch] * self._length)


def same(row: dict[str, Any], network: str, method: str, device: str) -> bool:
    """Whether a row of the file is of this network, method, device and number of threads."""
    who = row["network"], row["method"], row["device"], row["threads"]
    return who == (network, method, device, torch.get_num_threads())


def place(row: dict[str, Any]) -> tuple[str, int, int]:
    """Of a row in the file: by device, network and method."""
    return row["device"], list(NETWORKS).index(row["network"]), list(TARGETS).index(row["method"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is not known yet, write after each method, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet56")
    parser.add_argument("--methods", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no other method when they are up")
    parser.add_argument("--again", action="store_true", help="measure again what the file has")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS / "overhead.json", help="the numbers, of all networks")
    asked = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * asked.minutes
    torch.set_num_threads(asked.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    device = device_name(nn.Linear(1, 1).to("cuda" if torch.cuda.is_available() else "cpu"))
    rows: list[dict[str, Any]] = json.loads(asked.out.read_text())["rows"] if asked.out.exists() else []
    for method in asked.methods:
        known = [row for row in rows if same(row, asked.network, method, device)]
        if any("own" in row for row in known) and not asked.again:
            continue
        rows = [row for row in rows if row not in known] + [measure(asked.network, method, asked.turns)]
        rows.sort(key=place)
        asked.out.write_text(json.dumps({"rows": rows}, indent=2, sort_keys=True) + "\n")
        if time.monotonic() > deadline:
            break
    print("\n".join(page.body([{"rows": [row for row in rows if row["network"] == asked.network]}])))


if __name__ == "__main__":
    main()
