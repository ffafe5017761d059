"""The papers' ImageNet recipes through LightningCLI: images in folders, DDP, mixed precision.

cd examples/imagenet
python train.py fit -c base.yaml -c resnet50_greg1.yaml --data.root DIR

DIR holds train/CLASS/*.JPEG and val/CLASS/*.JPEG. Every value can be given behind the files, such as
--trainer.devices 8 or --method.init_args.ratio 0.5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from torchvision import datasets, models, transforms

from lightning_prune import StructuralPruning, save_slim


class Classifier(LightningModule):
    """A torchvision classifier, cross entropy, SGD with momentum 0.9.

    Args:
        network: its name in torchvision.
        weights: name of torchvision's weights to begin with, or a file with a ``state_dict``; ``None`` begins anew.
        classes: number of classes; torchvision's weights have 1000.
        learning_rates: first epoch to the rate that holds from then on.
        weight_decay: of everything.
        nesterov: Nesterov's momentum.
    """

    def __init__(
        self,
        learning_rates: dict[int, float],
        network: str = "resnet50",
        weights: str | None = None,
        classes: int = 1000,
        weight_decay: float = 1e-4,
        nesterov: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rates = learning_rates
        self.weight_decay, self.nesterov = weight_decay, nesterov
        is_file = weights is not None and Path(weights).is_file()
        net = models.get_model(network, weights=None if is_file else weights, num_classes=classes)
        if is_file:
            net.load_state_dict(torch.load(str(weights), map_location="cpu", weights_only=True))
        self.net = net.to(memory_format=torch.channels_last)
        self.accuracy = MulticlassAccuracy(num_classes=classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, classes)``."""
        logits: Tensor = self.net(images.contiguous(memory_format=torch.channels_last))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of one batch."""
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy over the whole validation set."""
        self.accuracy(self(batch[0]), batch[1])
        self.log("val_acc", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """The optimiser, and one learning rate per epoch."""
        first = at(self.learning_rates, 0)
        optimizer = torch.optim.SGD(
            self.parameters(), first, momentum=0.9, weight_decay=self.weight_decay, nesterov=self.nesterov
        )
        share = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: at(self.learning_rates, epoch) / first)
        return [optimizer], [share]


class Folders(LightningDataModule):
    """Images in ``train/CLASS`` and ``val/CLASS``: random crops that are mirrored at random, and centre crops.

    Args:
        root: folder that holds ``train`` and ``val``.
        batch_sizes: first epoch to the images of a batch from then on, those of all processes together.
        workers: processes per device that prepare images.
        side: of the crops, in pixels.
    """

    def __init__(self, batch_sizes: dict[int, int], root: str = "data/imagenet", workers: int = 8, side: int = 224):
        super().__init__()
        self.root, self.batch_sizes, self.workers, self.side = root, batch_sizes, workers, side

    def setup(self, stage: str) -> None:
        """Look what is there."""
        plain = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
        moved = [transforms.RandomResizedCrop(self.side), transforms.RandomHorizontalFlip()]
        still = [transforms.Resize(self.side * 8 // 7), transforms.CenterCrop(self.side)]
        self.train = datasets.ImageFolder(Path(self.root) / "train", transforms.Compose(moved + plain))
        self.val = datasets.ImageFolder(Path(self.root) / "val", transforms.Compose(still + plain))

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled; asked for anew in every epoch."""
        return self._loader(self.train, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """In order."""
        return self._loader(self.val)

    def _loader(self, data: datasets.ImageFolder, **options: Any) -> DataLoader[Any]:
        epoch, count = (self.trainer.current_epoch, self.trainer.world_size) if self.trainer else (0, 1)
        size = at(self.batch_sizes, epoch) // count
        return DataLoader(data, size, num_workers=self.workers, pin_memory=torch.cuda.is_available(), **options)


def at(values: dict[int, Any], epoch: int) -> Any:
    """The value that holds in an epoch."""
    return values[max(first for first in values if first <= epoch)]


class CLI(LightningCLI):
    """LightningCLI with a method and its surgery, which saves what is left."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Names of their own, so that the command line reaches them."""
        parser.add_lightning_class_args(Callback, "method", subclass_mode=True)
        parser.add_lightning_class_args(StructuralPruning, "pruning")

    def after_fit(self) -> None:
        """One file for deployment."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            is_done = isinstance(callback, StructuralPruning) and callback.plan is not None
            if is_done and self.trainer.is_global_zero:
                folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
                save_slim(self.model, folder / "slim.safetensors", callback.plan, report=callback.report)


def main(args: ArgsType = None) -> None:
    """Run what the command line, or ``args``, says."""
    CLI(Classifier, Folders, args=args)


if __name__ == "__main__":
    main()
