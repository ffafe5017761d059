"""Hard cases of numbers of channels that become values, places or kernels, and leave every shape as it is."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.structure.case_table import Head, block, case

TOKENS = (3, 5, 12)


def _as_tensor(width: int, like: Tensor) -> Tensor:
    return torch.sqrt(torch.tensor(width))


def _on_device(width: int, like: Tensor) -> Tensor:
    return torch.tensor(float(width), dtype=like.dtype, device=like.device)


def _as_list(width: int, like: Tensor) -> Tensor:
    return torch.as_tensor([width], dtype=like.dtype, device=like.device)


def _new_tensor(width: int, like: Tensor) -> Tensor:
    return like.new_tensor(width)


def _full(width: int, like: Tensor) -> Tensor:
    return torch.full((1,), width, dtype=like.dtype, device=like.device)


def _new_full(width: int, like: Tensor) -> Tensor:
    return like.new_full((), width)


def _filled(width: int, like: Tensor) -> Tensor:
    return torch.empty(1, dtype=like.dtype, device=like.device).fill_(width)


def _range(width: int, like: Tensor) -> Tensor:
    return torch.arange(width, width + 1, dtype=like.dtype, device=like.device)


@case(TOKENS, name="WidthAsTensor", constant=_as_tensor)
@case(TOKENS, name="WidthOnDevice", constant=_on_device)
@case(TOKENS, name="WidthAsList", constant=_as_list)
@case(TOKENS, name="WidthAsNewTensor", constant=_new_tensor)
@case(TOKENS, name="WidthFull", constant=_full)
@case(TOKENS, name="WidthNewFull", constant=_new_full)
@case(TOKENS, name="WidthFilled", constant=_filled)
@case(TOKENS, name="WidthRange", constant=_range)
class ScaledByWidth(nn.Module):
    """Scores of an attention over a tensor that holds the width: queries and keys stay, values may go."""

    def __init__(self, constant: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__()
        self.constant = constant
        self.q, self.k, self.v, self.proj = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        scores = q @ k.transpose(1, 2) / self.constant(k.size(-1), k)
        return self.proj(scores.softmax(-1) @ v)


@case(TOKENS)
class ConstantTensors(nn.Module):
    """Constants that have nothing to do with any width keep nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x).masked_fill(x.mean(-1, keepdim=True) > 9, float("nan"))
        offset = torch.as_tensor(torch.tensor([0.5, float("inf")], device=x.device), device=x.device)[0]
        return self.fc2((h * h.new_tensor([2.0]) + offset).relu())


def _rolled(x: Tensor, width: int) -> Tensor:
    return torch.roll(x, width, 1)


def _triangle(x: Tensor, width: int) -> Tensor:
    return x.tril(width - 4)


def _selected(x: Tensor, width: int) -> Tensor:
    return x[:, width : width + 1]


def _picked(x: Tensor, width: int) -> Tensor:
    return x[:, width, None]


def _pooled(x: Tensor, width: int) -> Tensor:
    return F.avg_pool1d(x, 2 * width - 1, 1, width - 1)


def _raised(x: Tensor, width: int) -> Tensor:
    return torch.addbmm(x[0], x, x.transpose(1, 2) @ x, alpha=width)


@case(TOKENS, name="WidthRolls", shrinks=None, use=_rolled)
@case(TOKENS, name="WidthCutsTriangle", shrinks=None, use=_triangle)
@case(TOKENS, name="WidthSlices", shrinks=None, use=_selected)
@case(TOKENS, name="WidthPicks", shrinks=None, use=_picked)
@case(TOKENS, name="WidthPools", shrinks=None, use=_pooled)
@case(TOKENS, name="WidthMultiplies", shrinks=None, use=_raised)
class CountsTwice(nn.Module):
    """The number that says where channels are cut says something else about the positions."""

    def __init__(self, use: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.use, self.split_dim = use, 3
        self.fc, self.left, self.right = nn.Linear(12, 8), nn.Linear(3, 12), nn.Linear(5, 12)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x).relu()
        out = self.left(h[..., : self.split_dim]) + self.right(h[..., self.split_dim :])
        return out + self.use(x, self.split_dim)


@case((2, 6, 4, 4), name="GroupsByWidth", shrinks=False)
@case((2, 6, 4, 4), name="GroupsWrittenDown", groups=4)
class GroupsByWidth(nn.Module):
    """A norm with a group for every four channels: with fewer channels it would have fewer groups."""

    def __init__(self, groups: int | None = None) -> None:
        super().__init__()
        self.conv, self.head, self.groups = nn.Conv2d(6, 16, 1), nn.Conv2d(16, 3, 1), groups
        self.weight, self.bias = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return self.head(F.group_norm(h, self.groups or h.shape[1] // 4, self.weight, self.bias).relu())


class ShapedScale(nn.Module):
    """Keeps the shape in which its scale is used."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shape = (channels, 1, 1)
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(self.shape)


@case()
class ScaledByShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.scale, self.b, self.head = block(3, 8), ShapedScale(8), block(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.scale(self.a(x))))


@case((3, 16, 12))
class CountTakenFromAnother(nn.Module):
    """What a convolution makes is cut by the number of channels that it read, as in attention that looks at less."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fewer = nn.Linear(12, 8), nn.Conv2d(8, 8, 2, stride=2)
        self.norm, self.mixed, self.out = nn.LayerNorm(8), nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, _, channels = x.shape
        x = x.permute(0, 2, 1).reshape(batch, channels, 4, 4)
        x = self.fewer(x).reshape(batch, channels, -1).permute(0, 2, 1)
        return self.out(self.mixed(self.norm(x)).relu())


@case((3, 6, 12))
class KernelOfOne(nn.Module):
    """A convolution that takes each channel by itself, over what three layers say of it."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(12, 8) for _ in range(3))
        self.weighed, self.out = nn.Conv1d(3, 2, 1, bias=bias), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([layer(x).mean(1) for layer in (self.a, self.b, self.c)], 1)
        return self.out(self.weighed(x).relu())
