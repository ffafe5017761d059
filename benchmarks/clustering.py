"""Seconds and inertia of clustering all inner layers of a network, beside scikit-learn in the same run.

    python benchmarks/clustering.py

Inner layers are those whose output stays inside a residual block: 27 of the CIFAR ResNet-56, 32 of ResNet-50. One CPU
thread; every time is the median over the repeats, of everything from the weights to the labels of all layers. The
inertia of both is computed from their labels by the same function in double precision.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import sklearn
import torch
from rich.console import Console
from rich.table import Table
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torchvision.models import resnet50

from lightning_prune import clusters

sys.path.insert(0, str(Path(__file__).parent))
from networks import resnet56

# seconds, times faster than scikit-learn
TARGETS = {"ResNet-56": (0.15, 2.5), "ResNet-50": (2.0, 10.0)}
MOST_INERTIA = 1.02


def train_(net: nn.Module, side: int, steps: int, batch: int) -> None:
    """A few optimiser steps on handwritten digits, so that the weights are no longer independent numbers."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1).expand(-1, 3, -1, -1) / 8 - 1
    labels = torch.tensor(digits.target)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(images), (batch,), generator=generator)
        batch_images = nn.functional.interpolate(images[chosen], (side, side))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(batch_images), labels[chosen]).backward()
        optimizer.step()


def inner_weights(net: nn.Module, names: Sequence[str]) -> list[Tensor]:
    """Weights of the convolutions inside the residual blocks."""
    return [
        module.weight.detach().clone()
        for path, module in net.named_modules()
        if "." in path and path.rpartition(".")[2] in names and isinstance(module, nn.Conv2d)
    ]


def cluster(weights: Sequence[Tensor], rate: float, method: clusters.Method) -> list[Tensor]:
    """Labels of every layer; layers with equally many channels are clustered together."""
    by_channels: dict[int, list[int]] = {}
    for place, weight in enumerate(weights):
        by_channels.setdefault(len(weight), []).append(place)
    labels: dict[int, Tensor] = {}
    for channels, places in by_channels.items():
        products = torch.stack([clusters.gram(clusters.features([weights[place]])) for place in places])
        found = clusters.partition(products, channels - int(channels * rate), method)
        labels.update(zip(places, found.unbind(), strict=True))
    return [labels[place] for place in range(len(weights))]


def cluster_with_sklearn(weights: Sequence[Tensor], rate: float) -> list[Tensor]:
    """Labels of every layer by k-means as most people would call it."""
    labels = []
    for weight in weights:
        count = len(weight) - int(len(weight) * rate)
        labels.append(
            torch.tensor(KMeans(count, n_init=1, random_state=0).fit_predict(weight.flatten(1).numpy())).long()
        )
    return labels


def inertias(weights: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """One number per layer, in double precision."""
    pairs = zip(weights, labels, strict=True)
    return torch.cat([clusters.inertia(clusters.gram(one.flatten(1))[None], own[None]) for one, own in pairs])


def timed(run: Callable[[], list[Tensor]], repeats: int) -> tuple[float, float, list[Tensor]]:
    """Median wall-clock and processor seconds of a run, and what it returned."""
    wall, processor = [], []
    for _ in range(repeats):
        starts = time.perf_counter(), time.process_time()
        labels = run()
        wall.append(time.perf_counter() - starts[0])
        processor.append(time.process_time() - starts[1])
    return median(wall), median(processor), labels


def measure(name: str, state: str, weights: list[Tensor], rate: float, repeats: int) -> dict[str, Any]:
    """One row: our k-means, scikit-learn's, and Ward's method on the same weights."""
    cluster(weights[:1], rate, "kmeans")
    ours, busy, labels = timed(lambda: cluster(weights, rate, "kmeans"), repeats)
    theirs, their_busy, their_labels = timed(
        lambda: cluster_with_sklearn(weights, rate), repeats if name == "ResNet-56" else 1
    )
    ward, _, ward_labels = timed(lambda: cluster(weights, rate, "ward"), 1)
    reference = inertias(weights, their_labels)
    ratios = inertias(weights, labels) / reference
    limit, factor = TARGETS[name]
    ratio = (inertias(weights, labels).sum() / reference.sum()).item()
    return {
        "network": name,
        "weights": state,
        "layers": len(weights),
        "rate": rate,
        "seconds": ours,
        "sklearn_seconds": theirs,
        "processor_seconds": busy,
        "sklearn_processor_seconds": their_busy,
        "times_faster": theirs / ours,
        "inertia_ratio": ratio,
        "worst_layer_inertia_ratio": ratios.max().item(),
        "ward_seconds": ward,
        "ward_inertia_ratio": (inertias(weights, ward_labels).sum() / reference.sum()).item(),
        "targets_met": ours <= limit and theirs / ours >= factor and ratios.max().item() <= MOST_INERTIA,
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """What the terminal shows."""
    view = Table(title="Clustering all inner layers, one CPU thread")
    for column in (
        *("network", "weights", "layers", "k-means, s", "scikit-learn, s", "times faster", "inertia / sklearn's"),
        *("worst layer", "Ward, s", "its inertia", "targets met"),
    ):
        view.add_column(column, justify="right")
    for row in rows:
        view.add_row(
            *(row["network"], row["weights"], str(row["layers"])),
            *(f"{row['seconds']:.4f}", f"{row['sklearn_seconds']:.3f}", f"{row['times_faster']:.1f}"),
            *(f"{row['inertia_ratio']:.4f}", f"{row['worst_layer_inertia_ratio']:.4f}"),
            *(f"{row['ward_seconds']:.4f}", f"{row['ward_inertia_ratio']:.4f}", str(row["targets_met"])),
        )
    return view


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/clustering.json"), help="where the numbers go, as JSON"
    )
    parser.add_argument("--rate", type=float, default=0.4, help="share of the channels that goes, in (0, 1)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs; scikit-learn on ResNet-50 has one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    networks = [
        ("ResNet-56", resnet56, ("conv1",), 8, 60),
        ("ResNet-50", resnet50, ("conv1", "conv2"), 32, 12),
    ]
    with threadpool_limits(1):
        for name, build, inner, side, steps in networks:
            net = build()
            rows.append(measure(name, "random", inner_weights(net, inner), options.rate, options.repeats))
            train_(net, side, steps, batch=32)
            rows.append(measure(name, f"{steps} steps", inner_weights(net, inner), options.rate, options.repeats))
    versions = {"torch": torch.__version__, "scikit-learn": sklearn.__version__, "python": platform.python_version()}
    report = {"device": f"CPU, 1 thread, {platform.machine()}", "versions": versions, "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    Console(width=160).print(table(rows))
    print(f"Rate {options.rate}; float64 Gram matrices; {report['device']}; {versions}; written to {options.output}.")


if __name__ == "__main__":
    main()
