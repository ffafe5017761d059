"""What the tests of surgery share: a residual network, its task, a regulariser that only picks, and a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune.callbacks.base import Regulariser
from lightning_prune.callbacks.structural import StructuralPruning
from tests.callbacks.nets import image_loader, seeded
from tests.callbacks.nets import trainer as quiet_trainer

BATCHES = 6
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}


class Residual(nn.Module):
    """Stem, one residual block, head; the block's inner convolution is the only group with one producer."""

    def __init__(self, width: int = 8, classes: int = 4, as_dict: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)
        self.as_dict = as_dict

    def forward(self, images: Tensor) -> Any:
        hidden = self.norm(self.stem(images)).relu()
        hidden = (hidden + self.norm2(self.conv2(self.norm1(self.conv1(hidden)).relu()))).relu()
        logits = self.head(hidden.mean(dim=(2, 3)))
        return {"logits": logits, "hidden": hidden} if self.as_dict else logits


class Task(LightningModule):
    """A classifier with nothing about pruning in it."""

    def __init__(self, optimizer: str = "sgd", schedule: str | None = None, as_dict: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Residual(as_dict=as_dict)
        self.accuracy = MulticlassAccuracy(4)
        self.losses: list[float] = []

    def logits(self, images: Tensor) -> Tensor:
        output = self.net(images)
        return output["logits"] if self.hparams["as_dict"] else output

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.logits(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        logits = self.logits(batch[0])
        self.accuracy(logits, batch[1])
        self.log("val_acc", self.accuracy)
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self.logits(batch[0]), batch[1]))

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return self.logits(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.hparams["optimizer"]](self.parameters())
        if self.hparams["schedule"] == "step":
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]
        if self.hparams["schedule"] == "remaining":
            length = self.trainer.estimated_stepping_batches
            scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, int(length))
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]
        return optimizer


@dataclass(frozen=True)
class Still:
    """A schedule in which nothing grows."""

    pick_step: int = 0
    last_event: int = 0
    hold: int = 0
    ceiling: float = 0.0
    length: int = 1

    def strength(self, step: int) -> float:
        return 0.0

    def exponent(self, dynamics: Any) -> float:
        return 100.0


class Picker(Regulariser):
    """Picks the smallest channels and leaves them alone; ready after ``steps`` optimiser steps or ``epochs`` epochs."""

    schedule_type = Still
    collapses = False

    def __init__(self, ratio: float = 0.5, *, steps: int | None = None, **kwargs: Any) -> None:
        super().__init__(ratio, **kwargs)
        self.steps = steps

    def begin(self, steps: int | None, dynamics: Any) -> Still:
        return Still(length=steps or self.steps or 1)

    def reach(self, group: Any) -> Any:
        return group.members

    def update(self, step: int) -> None:
        pass

    def done(self, steps: int) -> bool:
        return self.steps is not None and steps >= self.steps

    def penalty(self) -> None:
        return None

    def memory(self) -> dict[str, Any]:
        return {}

    def remember(self, memory: dict[str, Any]) -> None:
        pass


class Watch(Callback):
    """What happens when: hooks with epoch and step, learning rates, and the width of the pruned layer at each batch."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.widths: list[int] = []
        self.validations: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.widths.append(pl_module.get_submodule("net.conv1").weight.shape[0])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validations.append((trainer.current_epoch, trainer.global_step))


class Run(NamedTuple):
    """A finished fit."""

    trainer: Trainer
    task: Task
    surgery: StructuralPruning
    watch: Watch


def run(
    folder: Path,
    *callbacks: Callback,
    task: Task | None = None,
    surgery: StructuralPruning | None = None,
    picker: Regulariser | None = None,
    ckpt_path: Any = None,
    train: Any = None,
    **settings: Any,
) -> Run:
    """Fits a task with surgery after epoch 2 of 4, unless told otherwise."""
    surgery = StructuralPruning(latency_batches=()) if surgery is None else surgery
    watch = Watch()
    task = seeded(Task) if task is None else task
    own = (surgery, Picker(epochs=2) if picker is None else picker)
    trainer = quiet_trainer(
        *own, *callbacks, watch, **{"max_epochs": 4, "default_root_dir": folder, "log_every_n_steps": 1, **settings}
    )
    loader = image_loader(BATCHES) if train is None else train
    trainer.fit(task, loader, image_loader(3), ckpt_path=ckpt_path)
    return Run(trainer, task, surgery, watch)


def weights(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, copied."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different
