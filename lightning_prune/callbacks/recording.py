"""What is written down of a run as it goes on: how the methods stand, and what they were told."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lightning_prune.callbacks.base import Reading, Regulariser
from lightning_prune.reports.history import Moment, Validation

NUMBERS = ("penalty", "energy", "separation")
"""What of a reading lies on the device, in the order of a :class:`Moment`'s fields."""

_TRAINER = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision", "world_size")


MOST = 512
"""Validations that are remembered; where there are more, every second one is dropped."""


class Diary:
    """The sparse stage epoch by epoch, and the metric of validations; plain values that a checkpoint can hold."""

    def __init__(self) -> None:
        self.moments: list[Moment] = []
        self.validations: list[Validation] = []

    def note_epoch(self, trainer: Trainer, regularisers: Iterable[Regulariser]) -> None:
        """Write down how the methods stand at the end of this epoch, once; waits for the device once."""
        noted = {moment.method for moment in self.moments if moment.epoch == trainer.current_epoch}
        readings = [each.reading() for each in regularisers if each.phase not in ("wait", "done")]
        readings = [reading for reading in readings if reading.label not in noted]
        for reading, found in zip(readings, numbers_of(readings), strict=True):
            where = (reading.label, trainer.current_epoch, trainer.global_step, reading.phase, reading.strength)
            self.moments.append(Moment(*where, *(found[name] for name in NUMBERS)))

    def note_validation(self, trainer: Trainer, value: float | None, slim: bool) -> None:
        """Write down the metric of a validation."""
        self.validations.append(Validation(trainer.current_epoch, trainer.global_step, value, slim))
        if len(self.validations) > MOST:
            self.validations = thinned(self.validations)

    def plain(self) -> dict[str, list[dict[str, Any]]]:
        """Everything in values that torch loads with ``weights_only=True``."""
        return {"moments": list(map(asdict, self.moments)), "validations": list(map(asdict, self.validations))}

    def restore(self, values: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Read what :meth:`plain` gave."""
        self.moments = [Moment(**each) for each in values.get("moments", ())]
        self.validations = [Validation(**each) for each in values.get("validations", ())]


def thinned(validations: Sequence[Validation]) -> list[Validation]:
    """Every second one, from the last one back; beside them the first one, and those on both sides of surgery.

    >>> [each.step for each in thinned([Validation(0, step, 0.5, slim=step > 3) for step in range(10)])]
    [0, 1, 3, 4, 5, 7, 9]
    """
    last = len(validations) - 1
    slim = sum(each.slim for each in validations)
    kept = {0, *range(last, -1, -2), last - slim, last - slim + 1}
    return [each for number, each in enumerate(validations) if number in kept]


def numbers_of(readings: Sequence[Reading]) -> list[dict[str, float | None]]:
    """Energy, penalty and separation of each reading; all of them in one transfer from the device."""
    known = [(at, name, getattr(reading, name)) for at, reading in enumerate(readings) for name in NUMBERS]
    known = [(at, name, value) for at, name, value in known if value is not None]
    found: list[dict[str, float | None]] = [dict.fromkeys(NUMBERS) for _ in readings]
    if known:
        device = next((value.device for _, _, value in known if value.device.type != "cpu"), torch.device("cpu"))
        values = torch.stack([value.detach().to(device, torch.float32).reshape(()) for _, _, value in known])
        for (at, name, _), value in zip(known, values.tolist(), strict=True):
            found[at][name] = value
    return found


def configuration(trainer: Trainer, callbacks: Iterable[Callback]) -> dict[str, dict[str, Any]]:
    """What the callbacks, the trainer and its optimisers were told, by class name, as values that JSON can hold."""
    found: dict[str, dict[str, Any]] = {}

    def add(kind: str, arguments: dict[str, Any]) -> None:
        number = sum(name.partition(" ")[0] == kind for name in found) + 1
        found[kind if number == 1 else f"{kind} {number}"] = arguments

    for callback in callbacks:
        names = [name for name in signature(type(callback)).parameters if hasattr(callback, name)]
        add(type(callback).__name__, {name: plain(getattr(callback, name)) for name in names})
    for optimizer in trainer.optimizers:
        told = {name: plain(value) for name, value in optimizer.defaults.items()}
        add(type(optimizer).__name__, told)
    add("Trainer", {name: plain(getattr(trainer, name)) for name in _TRAINER})
    return found


def plain(value: Any) -> Any:
    """A value that JSON can hold and that says the same: records with their fields, other objects by name.

    >>> plain({"lr": 0.1, "betas": (0.9, 0.99), "build": torch.optim.SGD})
    {'lr': 0.1, 'betas': [0.9, 0.99], 'build': 'SGD'}
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Tensor):
        return plain(value.item()) if value.numel() == 1 else f"tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(each) for each in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {
            "class": type(value).__name__,
            **{each.name: plain(getattr(value, each.name)) for each in fields(value)},
        }
    if isinstance(value, partial):
        return {"call": plain(value.func), **plain(value.keywords)}
    if isinstance(value, (type, Callable)):  # type: ignore[arg-type]  # an abstract base class serves as well
        return getattr(value, "__name__", type(value).__name__)
    return type(value).__name__
