"""Hard cases of wiring: how channels are joined, split, moved and reused."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.structure.case_table import Head, block, case


@case()
class CatResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = block(3, 6), block(3, 10)
        self.mix, self.head = block(16, 16), Head(16)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.a(x), self.b(x)], 1)
        return self.head(joined + self.mix(joined))


@case()
class SameTensorTwiceInCat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(16, 12), Head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(torch.cat([x, x], dim=1)))


@case()
class SameTensorTwiceInCatResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(16, 16), Head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        twice = torch.cat([x, x], dim=1)
        return self.head(self.b(twice) + twice)


@case()
class ChunkAndSwap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 12), block(12, 10), Head(10)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, dim=1)
        return self.head(self.b(torch.cat([right, left], dim=1)))


@case()
class ChunkSwapResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 12), block(12, 12), Head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        left, right = x.chunk(2, dim=1)
        return self.head(self.b(x) + torch.cat([right, left], dim=1))


@case()
class ThreeChunks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 12), block(4, 10), Head(10)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.a(x).chunk(3, dim=1)
        return self.head(self.b(q * k.sigmoid() + v))


@case()
class UnevenSplit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 16), block(6, 8), block(10, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        small, large = self.a(x).split([6, 10], dim=1)
        return self.head(self.b(small) + self.c(large))


@case()
class UnevenSplitByRatio(nn.Module):
    """The sizes follow the tensor, so that some cuts run without an error and mean something else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 16), block(4, 8), block(12, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        quarter = x.shape[1] // 4
        small, large = x.split([quarter, x.shape[1] - quarter], dim=1)
        return self.head(self.b(small) + self.c(large))


@case()
class SplitOneTouched(nn.Module):
    """CSP and Res2Net manner: part of the channels is worked on, the rest passes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 16), block(8, 8), block(16, 12), Head(12)

    def forward(self, x: Tensor) -> Tensor:
        passed, worked = self.a(x).chunk(2, 1)
        return self.head(self.c(torch.cat([passed, self.b(worked)], 1)))


@case()
class Res2Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.head = block(3, 16), block(16, 12), Head(12)
        self.parts = nn.ModuleList(block(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.split(self.a(x), 4, 1)
        done = [pieces[0]]
        for piece, part in zip(pieces[1:], self.parts, strict=True):
            done.append(part(piece + done[-1]))
        return self.head(self.c(torch.cat(done, 1)))


@case()
class GatingByChunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3), block(8, 10), Head(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(F.glu(self.a(x), dim=1)))


@case()
class GatingByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3), block(8, 10), Head(10)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.a(x).chunk(2, dim=1)
        return self.head(self.b(value * torch.sigmoid(gate)))


@case((3, 12))
class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(12, 32), nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.out(x + self.down(F.silu(gate) * value))


@case()
class SliceFront(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 12), block(5, 8), block(12, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x[:, :5]) + self.c(x))


@case()
class SliceTail(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 12), block(11, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)[:, 1:]))


@case()
class SliceNegative(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 12), block(4, 8), block(10, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x[:, -4:]) + self.c(x[:, :-2]))


@case()
class SliceStrided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 12), block(6, 8), block(6, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x[:, ::2]) * self.c(x[:, 1::2]))


@case()
class SelectOneChannel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 12), block(12, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x) * x[:, 0].unsqueeze(1))


@case()
class UnbindChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 3), block(4, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        one, two, three, four = self.a(x).unbind(1)
        return self.head(self.b(torch.stack([four, one * two, three, one], 1)))


def shuffle(x: Tensor, groups: int) -> Tensor:
    """ShuffleNet's channel shuffle."""
    batch, channels, height, width = x.shape
    x = x.view(batch, groups, channels // groups, height, width)
    return x.transpose(1, 2).reshape(batch, channels, height, width)


@case(name="ChannelShuffle")
@case(name="ChannelShuffleModule", module=True)
class ChannelShuffle(nn.Module):
    def __init__(self, module: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 12), block(12, 10), Head(10)
        self.shuffle = nn.ChannelShuffle(3) if module else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(shuffle(x, 3) if self.shuffle is None else self.shuffle(x)))


@case()
class ChannelShuffleResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 12), block(12, 12), Head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(x + self.b(shuffle(x, 2)))


@case()
class ShuffleUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = block(3, 16), Head(16)
        self.units = nn.ModuleList(
            nn.Sequential(block(8, 8, 1), block(8, 8, groups=8), block(8, 8, 1)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        for unit in self.units:
            left, right = x.chunk(2, 1)
            x = shuffle(torch.cat([left, unit(right)], 1), 2)
        return self.head(x)


@case()
class ConvCalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(8, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.b(self.a(x))))


@case((3, 3, 8, 8), (3, 3, 6, 6))
class ConvOnTwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(16, 8), Head(8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        small = F.adaptive_avg_pool2d(self.a(x), 4)
        return self.head(self.b(torch.cat([small, F.adaptive_avg_pool2d(self.a(y), 4)], 1)))


@case()
class WeightUsedFunctionallyTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.conv, self.head = block(3, 8), nn.Conv2d(8, 8, 3, padding=1), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.a(x), self.conv.weight, self.conv.bias, padding=1)
        return self.head(F.conv2d(x.relu(), self.conv.weight, None, padding=2, dilation=2))


@case()
class TiedTransposedConv(nn.Module):
    """The decoder uses the encoder's weight the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        x = F.conv_transpose2d(x, self.b.weight).relu()
        return F.conv_transpose2d(x, self.a.weight)


@case((3, 10))
class TiedLinearAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(10, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        code = self.b(self.a(x).relu()).tanh()
        return F.linear(F.linear(code, self.b.weight.t()).tanh(), self.a.weight.t())


@case()
class TiedParameters(nn.Module):
    """Two modules hold one Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 8), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), Head(8)
        self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(x)).relu()).relu())


@case()
class SharedBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.c, self.head = block(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.norm(self.b(self.norm(self.a(x)).relu()))))


@case()
class SpaceToDepth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 6), block(24, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        batch, channels, height, width = x.shape
        x = x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 3, 5, 1, 2, 4)
        return self.head(self.b(x.reshape(batch, channels * 4, height // 2, width // 2)))


@case()
class FocusSlicing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 6), block(24, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        parts = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return self.head(self.b(torch.cat(parts, 1)))


@case()
class BroadcastOneChannel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.b, self.head = block(3, 12), nn.Conv2d(12, 1, 1), block(12, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x * self.gate(x).sigmoid() + self.gate(x)))


@case()
class BroadcastGroupsOfChannels(nn.Module):
    """Four gates, each for three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.b, self.head = block(3, 12), nn.Conv2d(12, 4, 1), block(12, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = self.gate(x).sigmoid().repeat_interleave(3, dim=1)
        return self.head(self.b(x * gate))


@case()
class RepeatChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 5), block(3, 10), block(10, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.a(x).repeat(1, 2, 1, 1) + self.b(x)))


@case()
class ResidualWithInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 12), nn.Conv2d(12, 3, 3, padding=1), Head(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.b(self.a(x)))


@case()
class CatWithInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 12), block(15, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(torch.cat([x, self.a(x)], 1)))


@case()
class PaddedShortcut(nn.Module):
    """Option A of the CIFAR ResNets: subsample, and pad the channels with zeros on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 8), block(8, 16, stride=2), block(16, 16), Head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = (self.b(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))).relu()
        return self.head(x + self.c(x))


@case()
class ZerosInCat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 8), block(3, 12), block(12, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        short = self.a(x)
        return self.head(self.c(self.b(x) + torch.cat([short, torch.zeros_like(short[:, :4])], 1)))


@case()
class IndexSelect(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 8), block(6, 8), block(8, 6), Head(6)
        self.register_buffer("order", torch.tensor([7, 1, 4, 4, 0, 2]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.c(x + self.b(torch.index_select(x, 1, self.order))))


@case()
class IndexByList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(4, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)[:, [6, 0, 3, 5]]))


@case()
class FlipChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x * x.flip(1)))


@case()
class RollChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(torch.roll(self.a(x), 2, dims=1)))


@case()
class TemporalShift(nn.Module):
    """Part of the channels is moved in space by assignment to slices."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 12), block(12, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        moved = torch.zeros_like(x)
        moved[:, :4, 1:] = x[:, :4, :-1]
        moved[:, 4:8, :-1] = x[:, 4:8, 1:]
        moved[:, 8:] = x[:, 8:]
        return self.head(self.b(moved))


@case()
class InPlaceSpatialAssignment(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 8), block(3, 8), block(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        base = self.a(x).clone()
        base[:, :, 2:4] = self.b(x)[:, :, 2:4]
        base.mul_(0.5).add_(self.b(x), alpha=2)
        return self.head(self.c(base))


@case()
class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = block(3, 8), block(8, 12)
        self.up, self.out = block(20, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down(x)
        deep = self.deep(F.max_pool2d(fine, 2))
        deep = F.interpolate(deep, scale_factor=2, mode="bilinear", align_corners=False)
        return self.out(self.up(torch.cat([fine, deep], 1)))


@case()
class DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = block(3, 6), Head(18)
        self.layers = nn.ModuleList(block(6 + 4 * index, 4) for index in range(3))

    def forward(self, x: Tensor) -> Tensor:
        found = [self.stem(x)]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)))
        return self.head(torch.cat(found, 1))


@case()
class ThreeWayAddition(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = block(3, 8), block(3, 8), block(3, 16)
        self.d, self.head = block(16, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        return self.head(self.d(torch.cat([a + b, b], 1) - self.c(x)) + a)


@case()
class OverlappingSlices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 12), block(8, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x[:, :8] + x[:, 4:]))


@case()
class Maxout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 12, 3), nn.Conv2d(6, 8, 3), Head(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.maximum(*self.a(x).chunk(2, 1))
        x = self.b(x)
        return self.head(x.view(len(x), 4, 2, *x.shape[2:]).amax(2))
