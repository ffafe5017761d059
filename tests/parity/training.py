"""The training that callbacks and restatements share in the tests of parity."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

LEARNING_RATE, DECAY = 0.02, 5e-4


class Module(LightningModule):
    """Cross-entropy under SGD with momentum and weight decay, and a diary of all weights."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.diary: list[list[Tensor]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.diary.append([parameter.detach().clone() for parameter in self.net.parameters()])
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return sgd(self.net)


def sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=DECAY)
