"""What is trained in the benchmarks of accuracy, and how long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from benchmarks.images import VALIDATION
from benchmarks.networks import cifar_resnet, resnet56, vgg19


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
        compiler: backend of ``torch.compile``; ``None`` runs the network as it is written.
        dense: file of the network to begin with, where there is no dense stage.
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
    compiler: str | None = None
    dense: str = ""


_CPU_RUNS = ((0.5, 0), (0.25, 0), (0.5, 1), (0.5, 2))
_PAPER_RUNS = ((1 / 2.55, 0), (1 / 11.4, 0), (1 / 3.59, 0), (1 / 1.99, 0))
PRESETS = {
    "digits": Preset("digits", lambda: cifar_resnet(1), (12, 12, 12), 0.05, 0.05, 5e-4, 64, _CPU_RUNS),
    "cpu": Preset("cifar10", lambda: cifar_resnet(1), (6, 6, 6), 0.1, 0.1, 5e-4, 128, _CPU_RUNS, "bf16-mixed"),
    "resnet56": Preset("cifar10", resnet56, (200, 60, 120), 0.1, 0.01, 5e-4, 128, _PAPER_RUNS, "bf16-mixed"),
    "resnet110": Preset(
        "cifar10", lambda: cifar_resnet(18), (200, 60, 120), 0.1, 0.01, 5e-4, 128, ((0.37, 0),), "bf16-mixed"
    ),
    "vgg19": Preset("cifar100", vgg19, (200, 60, 120), 0.1, 0.01, 5e-4, 128, ((1 / 8.8, 0),), "bf16-mixed"),
}


def judged_images(preset: Preset, few: int | None = None) -> int:
    """How many images an accuracy is measured on.

    >>> judged_images(PRESETS["digits"]), judged_images(PRESETS["cpu"]), judged_images(PRESETS["cpu"], few=16)
    (500, 10000, 16)
    """
    return min(VALIDATION[preset.data], few or VALIDATION[preset.data])
