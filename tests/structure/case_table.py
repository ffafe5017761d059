"""What a hand-written hard case is, and the decorator that enters one into the table."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

CASES: dict[str, Case] = {}


@dataclasses.dataclass(frozen=True)
class Case:
    """A small network and what it is called with.

    Args:
        name: unique.
        build: makes the network.
        shapes: of the positional arguments, drawn from a normal distribution.
        keywords: shapes of the keyword arguments; what is not a tuple is handed over as it is.
        shrinks: whether parameters must go; ``None`` where pinning everything is right too.
        pack: makes the example inputs of the drawn tensors, where they are not the positional arguments.
    """

    name: str
    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    keywords: Mapping[str, Any]
    shrinks: bool | None
    pack: Callable[..., Any] | None = None

    def inputs(self, seed: int = 0) -> Any:
        """A tuple of positional arguments, or the only one."""
        generator = torch.Generator().manual_seed(seed)
        drawn = tuple(torch.randn(shape, generator=generator) for shape in self.shapes)
        return drawn if self.pack is None else self.pack(*drawn)

    def kwargs(self, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments."""
        generator = torch.Generator().manual_seed(seed + 1)
        return {
            name: torch.randn(given, generator=generator) if isinstance(given, tuple) else given
            for name, given in self.keywords.items()
        }


def case(
    *shapes: tuple[int, ...],
    name: str = "",
    shrinks: bool | None = True,
    keywords: Mapping[str, Any] | None = None,
    pack: Callable[..., Any] | None = None,
    **arguments: Any,
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Enter a class into the table, built with ``arguments``; a class may be entered several times."""

    def enter(kind: type[nn.Module]) -> type[nn.Module]:
        label = name or kind.__name__
        if label in CASES:
            raise ValueError(f"Two cases are called {label!r}.")
        build = functools.partial(kind, **arguments)
        CASES[label] = Case(label, build, shapes or (IMAGE,), dict(keywords or {}), shrinks, pack)
        return kind

    return enter


IMAGE = (3, 3, 8, 8)


def block(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **options), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Head(nn.Module):
    """Global average pooling and a linear layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(2).mean(-1))
