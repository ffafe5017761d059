"""Real images: scikit-learn's embedded digits, and CIFAR-10 from disk."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets, transforms


class Digits(LightningDataModule):
    """1,797 handwritten digits of 8x8 grey pixels, 1,297 to train and 500 to validate; nothing is downloaded.

    Args:
        batch_size: images per training batch.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Load and split; the split is always the same."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(images, labels, test_size=500, stratify=labels, random_state=0)
        train_images, val_images = ((torch.tensor(part).float() / 8 - 1).view(-1, 1, 8, 8) for part in parts[:2])
        train_labels, val_labels = (torch.tensor(part).long() for part in parts[2:])
        self.train, self.val = TensorDataset(train_images, train_labels), TensorDataset(val_images, val_labels)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """In order."""
        return DataLoader(self.val, batch_size=250)


class CIFAR10(LightningDataModule):
    """50,000 training images of 32x32 colour pixels, cropped and mirrored at random, and the 10,000 test images.

    No network is chosen by its accuracy on the test images here, so they may serve for validation.

    Args:
        root: folder that holds ``cifar-10-batches-py``.
        batch_size: images per training batch.
        workers: processes that prepare training images.
    """

    def __init__(self, root: str = "data", batch_size: int = 128, workers: int = 2) -> None:
        super().__init__()
        self.root = root
        self.batch_size = batch_size
        self.workers = workers

    def setup(self, stage: str) -> None:
        """Read the files; they are not downloaded."""
        plain = [transforms.ToTensor(), transforms.Normalize((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))]
        moved = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        self.train = datasets.CIFAR10(self.root, train=True, transform=transforms.Compose(moved + plain))
        self.val = datasets.CIFAR10(self.root, train=False, transform=transforms.Compose(plain))

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled."""
        alive = self.workers > 0
        return DataLoader(
            self.train,
            self.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=self.workers,
            persistent_workers=alive,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """In order."""
        return DataLoader(self.val, batch_size=250, num_workers=self.workers)
