"""Small networks, one loader and one trainer for the tests of the callbacks."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}


def conv_net(width: int = 8, classes: int = 4) -> nn.Module:
    """Conv, BN and ReLU twice, then a head: two groups."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, classes),
    )


def linear_net(width: int = 12, classes: int = 4) -> nn.Module:
    """Two hidden layers without normalisation, from 6 features."""
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, classes))


def image_loader(batches: int = 8, batch_size: int = 16, classes: int = 4) -> DataLoader[Any]:
    """Noisy images whose class is a pattern: learnable, and made without moving the global random state."""
    generator = torch.Generator().manual_seed(1)
    count = batches * batch_size
    labels = torch.randint(classes, (count,), generator=generator)
    patterns = torch.randn(classes, 3, 6, 6, generator=generator)
    images = patterns[labels] + 0.5 * torch.randn(count, 3, 6, 6, generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size)


def feature_loader(batches: int = 8, batch_size: int = 16, classes: int = 4) -> DataLoader[Any]:
    """Six features whose class is a cluster."""
    generator = torch.Generator().manual_seed(2)
    count = batches * batch_size
    labels = torch.randint(classes, (count,), generator=generator)
    centres = 2 * torch.randn(classes, 6, generator=generator)
    return DataLoader(
        TensorDataset(centres[labels] + 0.5 * torch.randn(count, 6, generator=generator), labels), batch_size=batch_size
    )


class Classifier(LightningModule):
    """A network in training, with nothing about pruning in it."""

    def __init__(self, net: nn.Module, optimizer: str = "sgd") -> None:
        super().__init__()
        self.net = net
        self.optimizer = optimizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.parameters())


def seeded(build: Any, *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    """What ``build`` returns, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(*args, **kwargs)


def trainer(*callbacks: Any, **kwargs: Any) -> Trainer:
    """A quiet trainer on the CPU."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return Trainer(callbacks=list(callbacks), **{**settings, **kwargs})
