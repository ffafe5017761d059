"""How much of the speed-up on paper is one by the clock: a network at half of its multiply-adds.

    python benchmarks/speed.py                     # ResNet-50, batch 8, 224 x 224, widths in multiples of 8
    python benchmarks/speed.py --network resnet18 --batch 1 --round-to 1

Beside the network at half of the multiply-adds, and the same with any widths, stands the one that Torch-Pruning leaves
at equal multiply-adds, where it is installed. Forward passes in evaluation mode take turns, so that whatever else the
machine does meets all networks alike; medians over the turns. Variants are the same networks with channels last and
compiled. Efficiency is the speed-up by the clock over the speed-up on paper.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision import models

from lightning_prune import choose, prune_, trace
from lightning_prune.reports import count_cost
from lightning_prune.reports.latency import device_name

TARGET = 0.9


def slim_network(dense: nn.Module, images: Tensor, share: float, round_to: int) -> nn.Module:
    """What stays of the dense network at that share of its multiply-adds."""
    slim = copy.deepcopy(dense)
    graph = trace(slim, images[:1])
    prune_(slim, choose(graph, budget={"macs": share}, scope="all", round_to=round_to))
    return slim


def slim_by_torch_pruning(dense: nn.Module, images: Tensor, macs: float, round_to: int) -> nn.Module:
    """Torch-Pruning's magnitude pruner at the ratio that leaves as many multiply-adds, found by bisection."""
    import torch_pruning

    low, high, best = 0.0, 0.9, copy.deepcopy(dense)
    for _ in range(8):
        ratio, slim = (low + high) / 2, copy.deepcopy(dense)
        pruner = torch_pruning.pruner.MagnitudePruner(
            slim,
            images[:1],
            importance=torch_pruning.importance.MagnitudeImportance(p=1),
            pruning_ratio=ratio,
            round_to=round_to,
            ignored_layers=[layer for layer in slim.modules() if isinstance(layer, nn.Linear)],
        )
        pruner.step()
        if (count_cost(slim, images[:1]).macs or 0) > macs:
            low = ratio
        else:
            high, best = ratio, slim
    return best


def time_in_turns(networks: dict[str, nn.Module], inputs: dict[str, Tensor], turns: int) -> dict[str, list[float]]:
    """Milliseconds of a forward pass, one per turn; the first two turns warm up."""
    times: dict[str, list[float]] = {name: [] for name in networks}
    with torch.inference_mode():
        for turn in range(turns + 2):
            for name, network in networks.items():
                began = time.perf_counter()
                network(inputs[name])
                if inputs[name].is_cuda:
                    torch.cuda.synchronize()
                if turn >= 2:
                    times[name].append(1e3 * (time.perf_counter() - began))
    return times


def main(arguments: Sequence[str] | None = None) -> None:
    """Cut, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50", help="name of a torchvision classifier")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--share", type=float, default=0.5, help="of the multiply-adds that stays")
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--variants", action="store_true", help="channels last and torch.compile too")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    asked = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.randn(asked.batch, 3, asked.side, asked.side, device=device)
    dense = models.get_model(asked.network, weights=None).to(device).eval()
    networks = {"dense": dense, "slim": slim_network(dense, images, asked.share, asked.round_to)}
    networks["slim, any widths"] = slim_network(dense, images, asked.share, 1)
    macs = {name: count_cost(network, images[:1]).macs or 0 for name, network in networks.items()}
    if find_spec("torch_pruning"):
        networks["Torch-Pruning"] = slim_by_torch_pruning(dense, images, macs["slim"], asked.round_to)
        macs["Torch-Pruning"] = count_cost(networks["Torch-Pruning"], images[:1]).macs or 0
    inputs = dict.fromkeys(networks, images)
    if asked.variants:
        for name in ("dense", "slim"):
            last = f"{name}, channels last"
            networks[last] = copy.deepcopy(networks[name]).to(memory_format=torch.channels_last)
            networks[f"{name}, compiled"] = torch.compile(copy.deepcopy(networks[name]))  # type: ignore[assignment]
            inputs[last], inputs[f"{name}, compiled"] = images.to(memory_format=torch.channels_last), images
            macs[last] = macs[f"{name}, compiled"] = macs[name]
    times = time_in_turns(networks, inputs, asked.turns)
    rows = [_row(name, macs, times) for name in networks]
    _print(asked, rows)
    if asked.out:
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        whole: dict[str, Any] = {
            "rows": rows,
            "versions": versions,
            "threads": asked.threads,
            "device": device_name(dense),
            **{key: getattr(asked, key) for key in ("network", "batch", "side")},
        }
        whole["command"] = " ".join(["benchmarks/speed.py", *(sys.argv[1:] if arguments is None else arguments)])
        asked.out.write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")


def _row(name: str, macs: dict[str, int], times: dict[str, list[float]]) -> dict[str, Any]:
    """A variant is compared with the same variant of the dense network; the speed-up is the median over the turns."""
    variant = name.partition(", ")[2]
    base = f"dense, {variant}" if f"dense, {variant}" in times else "dense"
    paper = macs[base] / macs[name]
    clock = statistics.median(before / after for before, after in zip(times[base], times[name], strict=True))
    return {
        "network": name,
        "macs": macs[name],
        "ms": statistics.median(times[name]),
        "on_paper": paper,
        "by_the_clock": clock,
        "efficiency": clock / paper,
    }


def _print(asked: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{asked.network}, batch {asked.batch}, {asked.threads} thread(s); target {TARGET:.0%}")
    for name in ("network", "G MACs", "ms", "on paper", "by the clock", "efficiency"):
        table.add_column(name, justify="right" if name != "network" else "left")
    for row in rows:
        numbers = f"{row['macs'] / 1e9:.3f}", f"{row['ms']:.1f}", f"{row['on_paper']:.2f}x"
        table.add_row(row["network"], *numbers, f"{row['by_the_clock']:.2f}x", f"{row['efficiency']:.0%}")
    Console().print(table)


if __name__ == "__main__":
    main()
