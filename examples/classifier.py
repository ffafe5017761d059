"""A small residual network and how it is trained; nothing here knows about pruning."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from torchmetrics.classification import MulticlassAccuracy


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, images: Tensor) -> Tensor:
        """``(N, inputs, H, W)`` to ``(N, outputs, H / stride, W / stride)``."""
        hidden = F.relu(self.norm1(self.conv1(images)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(images))


class ResidualNet(nn.Module):
    """A stem, stages of residual blocks, and a linear classifier.

    Args:
        channels: of the images: 1 for grey, 3 for colour.
        width: channels of the first stage; every further one has half the resolution and twice the channels.
        stages: number of stages.
        blocks: residual blocks per stage.
        classes: number of classes.
    """

    def __init__(self, channels: int = 1, width: int = 32, stages: int = 2, blocks: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.Sequential()
        inputs = width
        for stage in range(stages):
            for block in range(blocks):
                outputs = width * 2**stage
                self.blocks.append(Block(inputs, outputs, stride=2 if stage > 0 and block == 0 else 1))
                inputs = outputs
        self.head = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(N, channels, H, W)`` to logits ``(N, classes)``."""
        return self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))


class Classifier(LightningModule):
    """Cross entropy, SGD or AdamW, cosine cycles of the learning rate.

    Args:
        channels: of the images.
        width: channels of the network's first stage.
        stages: of the network.
        blocks: per stage.
        optimizer: "sgd" with momentum 0.9, or "adamw".
        learning_rate: at the beginning of a cycle; by default 0.05 for SGD and 1e-3 for AdamW.
        cycle: epochs after which the learning rate has fallen to zero and starts anew.
    """

    def __init__(
        self,
        channels: int = 1,
        width: int = 32,
        stages: int = 2,
        blocks: int = 2,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        learning_rate: float | None = None,
        cycle: int = 12,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.optimizer = optimizer
        self.learning_rate = learning_rate if learning_rate is not None else {"sgd": 0.05, "adamw": 1e-3}[optimizer]
        self.cycle = cycle
        self.net = ResidualNet(channels, width, stages, blocks)
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, 10)``."""
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of one batch."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy over the whole validation set."""
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("val_acc", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """The optimiser, and one learning rate per epoch."""
        optimizer: torch.optim.Optimizer
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(self.parameters(), self.learning_rate, momentum=0.9, weight_decay=5e-4)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate, weight_decay=1e-2)
        return [optimizer], [CosineAnnealingWarmRestarts(optimizer, self.cycle)]
