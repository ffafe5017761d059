"""Images in memory, on the device: digits, CIFAR-10 and CIFAR-100."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn import functional as F

PAD = 4
VALIDATION = {"digits": 500, "cifar10": 10_000, "cifar100": 10_000}
"""Images that accuracies are measured on; of CIFAR the test set."""


class Images(LightningDataModule):
    """Images in memory, on the device; the order and the crops of an epoch depend on seed and epoch alone.

    Args:
        data: "digits", "cifar10" or "cifar100".
        root: folder of the data set.
        batch: images.
        seed: of the order.
        few: only so many images, for a miniature.
    """

    def __init__(self, data: str, root: str, batch: int, seed: int, few: int | None = None) -> None:
        super().__init__()
        self.source, self.root, self.batch, self.seed, self.few = data, root, batch, seed, few
        self.parts: list[tuple[Tensor, Tensor]] = []

    def setup(self, stage: str) -> None:
        """Read everything, once."""
        if not self.parts:
            parts = _digits() if self.source == "digits" else _cifar(self.source, self.root)
            device = "cpu" if self.trainer is None else self.trainer.strategy.root_device
            self.parts = [(images[: self.few].to(device), labels[: self.few].to(device)) for images, labels in parts]

    def train_dataloader(self) -> Batches:
        """In another order each epoch."""
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        generator = torch.Generator().manual_seed(100_003 * self.seed + epoch)
        images, labels = self.parts[0]
        order = torch.randperm(len(images), generator=generator)[: len(images) // self.batch * self.batch]
        return Batches(images, labels, order, self.batch, generator)

    def val_dataloader(self) -> Batches:
        """In order."""
        images, labels = self.parts[1]
        return Batches(images, labels, torch.arange(len(images)), 500, None)


class Batches:
    """Batches in the given order; with a generator cropped and mirrored at random, unless they are tiny.

    All of an epoch's order and chance goes to the device at once, so that no step waits for the processor.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, order: Tensor, batch: int, generator: torch.Generator | None
    ) -> None:
        parts = order.split(batch)
        self.images, self.labels, self.parts = images, labels, order.to(images.device).split(batch)
        self.chances: tuple[tuple[Tensor, Tensor], ...] | None = None
        if generator is not None and images.shape[-1] >= 32 and parts:
            drawn = [_chance(len(part), generator) for part in parts]
            shifts = torch.cat([shift for shift, _ in drawn], 1).to(images.device).split(batch, 1)
            mirrored = torch.cat([mirror for _, mirror in drawn]).to(images.device).split(batch)
            self.chances = tuple(zip(shifts, mirrored, strict=True))

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, part in enumerate(self.parts):
            images = self.images[part]
            if self.chances is not None:
                images = _augmented(images, *self.chances[number])
            yield images.contiguous(memory_format=torch.channels_last), self.labels[part]


def _chance(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Shifts along both sides ``(2, count, 1)``, and who is mirrored ``(count, 1)``."""
    shift = torch.randint(0, 2 * PAD + 1, (2, count, 1), generator=generator)
    return shift, torch.rand(count, 1, generator=generator) < 0.5


def _augmented(images: Tensor, shift: Tensor, mirrored: Tensor) -> Tensor:
    """Shifted by up to four pixels and mirrored half of the time."""
    rows, columns = shift + torch.arange(images.shape[-1], device=images.device)
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, (PAD,) * 4)
    which = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _digits() -> list[tuple[Tensor, Tensor]]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=VALIDATION["digits"], stratify=labels, random_state=0)
    pixels = [(torch.tensor(part).float() / 8 - 1).view(-1, 1, 8, 8).expand(-1, 3, -1, -1) for part in parts[:2]]
    return list(zip(pixels, [torch.tensor(part).long() for part in parts[2:]], strict=True))


def _cifar(data: str, root: str) -> list[tuple[Tensor, Tensor]]:
    from torchvision import datasets

    source = datasets.CIFAR10 if data == "cifar10" else datasets.CIFAR100
    mean, deviation = torch.tensor([0.491, 0.482, 0.447]), torch.tensor([0.247, 0.243, 0.262])
    found = []
    for train in (True, False):
        whole = source(root, train=train)
        images = (torch.from_numpy(whole.data).float() / 255 - mean) / deviation
        found.append((images.permute(0, 3, 1, 2).contiguous(), torch.tensor(whole.targets)))
    return found
