"""Hard cases of layers: what convolutions, norms, activations and raw tensors do to channels."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.structure.case_table import Head, block, case


@case(name="Grouped", groups=4)
@case(name="GroupedPairs", groups=2)
@case(name="Depthwise", groups=12)
class Grouped(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 12), block(12, 12, groups=groups), block(12, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(x))))


@case()
class GroupedResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 12), block(12, 12, 1), block(12, 12, groups=3), Head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(x + self.c(self.b(x)))


@case()
class GroupedToOtherWidth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 8), block(8, 12, groups=4), block(12, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(x))))


@case()
class MismatchedGroups(nn.Module):
    """Four groups and then three over the same twelve channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = block(3, 12), block(12, 12, groups=4), block(12, 12, groups=3)
        self.d, self.head = block(12, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.d(self.c(self.b(self.a(x)))))


@case()
class GroupedAfterCat(nn.Module):
    """The group border runs through one of the joined tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = block(3, 4), block(3, 8), block(12, 12, groups=2)
        self.d, self.head = block(12, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.d(self.c(torch.cat([self.a(x), self.b(x)], 1))))


@case()
class GroupedAfterChunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 16), block(8, 8, groups=2), block(8, 8, groups=4), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, 1)
        return self.head(self.b(left) + self.c(right))


@case()
class DepthMultiplierTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 6), block(6, 12, groups=6), block(12, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(x))))


@case()
class InvertedResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = block(3, 8), Head(8)
        self.expand, self.deep, self.project = block(8, 24, 1), block(24, 24, groups=24), nn.Conv2d(24, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(x + self.project(self.deep(self.expand(x))))


@case()
class DepthwiseOnInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 6, groups=3), block(6, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)))


@case()
class ConvTranspose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.norm = block(3, 8), nn.ConvTranspose2d(8, 12, 2, stride=2), nn.BatchNorm2d(12)
        self.out = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.up(self.a(x))).relu())


@case(name="ConvTransposeGrouped", groups=4, outputs=16)
@case(name="ConvTransposeDepthwise", groups=8, outputs=8)
class ConvTransposeGrouped(nn.Module):
    def __init__(self, groups: int, outputs: int) -> None:
        super().__init__()
        self.a, self.out = block(3, 8), nn.Conv2d(outputs, 2, 1)
        self.up = nn.ConvTranspose2d(8, outputs, 3, stride=2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.up(self.a(x)).relu())


@case(name="GroupNorm", groups=4)
@case(name="GroupNormOne", groups=1)
@case(name="GroupNormEach", groups=16)
class GroupNormed(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 16, 3), nn.GroupNorm(groups, 16), block(16, 8)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.norm(self.a(x)).relu()))


@case()
class GroupNormResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 12, 3), nn.GroupNorm(3, 12), nn.Conv2d(12, 12, 3, padding=1)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(x + self.b(self.norm(x).sigmoid()))


@case()
class GroupNormTwoGroupings(nn.Module):
    """The same stream under norms of two and of three groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.two, self.three = nn.Conv2d(3, 12, 3), nn.GroupNorm(2, 12), nn.GroupNorm(3, 12)
        self.b, self.head = block(12, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(self.two(x).relu() + self.three(x)))


@case()
class GroupNormAfterCat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 8, 3), nn.GroupNorm(3, 12)
        self.c, self.head = block(12, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.norm(torch.cat([self.a(x), self.b(x)], 1)).relu()))


@case()
class GroupNormWithoutWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12, affine=False)
        self.b, self.head = block(12, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.norm(self.a(x)).relu()))


@case((3, 5, 12))
class LayerNormWithoutWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 16), nn.Linear(16, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(self.b(F.layer_norm(x, x.shape[-1:])).relu())


@case((3, 5, 12))
class LayerNormMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.up = nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 32)
        self.down, self.last, self.out = nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.out(self.last(x))


@case()
class LayerNormOverImage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.head = nn.Conv2d(3, 8, 3), nn.LayerNorm([8, 6, 6]), block(8, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.norm(self.a(x)).relu()))


@case()
class LayerNormAlongWidth(nn.Module):
    """The norm looks along an image row, never along channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.head = nn.Conv2d(3, 8, 3), nn.LayerNorm(6), block(8, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.norm(self.a(x)).relu()))


@case()
class ConvNeXtBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 12, 2, stride=2), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 12)
        self.scale, self.head = nn.Parameter(torch.full((12, 1, 1), 0.5)), Head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.deep(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)
        return self.head(x + self.scale * y)


@case()
class HandWrittenChannelNorm(nn.Module):
    """ConvNeXt's channels-first norm from mean, power and square root."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), block(8, 8), Head(8)
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.head(self.b(self.weight[:, None, None] * x + self.bias[:, None, None]))


@case((3, 5, 12), name="RMSNormModule", module=True)
@case((3, 5, 12), name="RMSNormByHand", module=False)
class RMSNormed(nn.Module):
    def __init__(self, module: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 16), nn.Linear(16, 10), nn.Linear(10, 4)
        self.norm = nn.RMSNorm(16) if module else None
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.norm is None:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        else:
            x = self.norm(x)
        return self.c(self.b(x).relu())


@case()
class GRN(nn.Module):
    """ConvNeXt-V2's global response normalisation divides by a mean over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), block(8, 8), Head(8)
        self.gamma, self.beta = nn.Parameter(torch.ones(1, 1, 1, 8)), nn.Parameter(torch.zeros(1, 1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).permute(0, 2, 3, 1)
        response = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        share = response / (response.mean(dim=-1, keepdim=True) + 1e-6)
        return self.head(self.b((self.gamma * (x * share) + self.beta + x).permute(0, 3, 1, 2)))


@case(name="InstanceNorm", affine=False)
@case(name="InstanceNormAffine", affine=True)
@case(name="InstanceNormTracking", affine=True, track_running_stats=True)
class InstanceNormed(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, **options), block(8, 8)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.norm(self.a(x)).sigmoid()))


@case(name="BatchNormWithoutWeights", affine=False)
@case(name="BatchNormWithoutStatistics", track_running_stats=False)
class BatchNormed(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, **options), block(8, 8)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.norm(self.a(x)).sigmoid()))


@case((4, 10))
class LinearBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(10, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 12), nn.BatchNorm1d(12),
            nn.LeakyReLU(), nn.Linear(12, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@case((4, 6, 10), name="BatchNormAcrossWidth", kind="batch")
@case((4, 6, 10), name="InstanceNormAcrossWidth", kind="instance")
@case((4, 6, 10), name="GroupNormAcrossWidth", kind="group")
class NormAcrossWidth(nn.Module):
    """What the norm takes for channels are tokens, and its statistics run along the width."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = nn.Linear(10, 8), nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)
        self.norm = {
            "batch": nn.BatchNorm1d(6), "instance": nn.InstanceNorm1d(6, affine=True), "group": nn.GroupNorm(2, 6)
        }[kind]  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.c(self.b(self.norm(self.a(x)).relu()).tanh()))


@case()
class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), Head(8)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms[:-1], self.convs, strict=True):
            x = x + conv(norm(x).relu())
        return self.head(self.norms[-1](x).relu())


@case(name="PReLUOne", channels=1)
@case(name="PReLUEach", channels=8)
class PReLUs(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.act, self.b, self.head = nn.Conv2d(3, 8, 3), nn.PReLU(channels), block(8, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.act(self.a(x))))


@case()
class PixelShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.b, self.head = block(3, 16), nn.PixelShuffle(2), block(4, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.up(self.a(x))))


@case()
class PixelUnshuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.b, self.head = block(3, 4), nn.PixelUnshuffle(2), block(16, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.down(self.a(x))))


@case()
class LSTMAfterConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.rnn, self.fc = block(3, 6), block(6, 6), nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x)).mean(-1).transpose(1, 2)
        return self.fc(self.rnn(x)[0][:, -1])


@case()
class GRUBidirectional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = block(3, 6), block(6, 6)
        self.rnn = nn.GRU(6, 5, num_layers=2, bidirectional=True)
        self.fc = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(self.b(self.a(x)).mean(-1).permute(2, 0, 1))[0].mean(0))


@case((3, 2, 16))
class Conv1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(2, 8, 5), nn.BatchNorm1d(8), nn.GELU(), nn.MaxPool1d(2), nn.Conv1d(8, 12, 3), nn.ReLU()
        )
        self.fc = nn.Linear(12 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.net(x).flatten(1))


@case((3, 2, 4, 6, 6))
class Conv3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.Conv3d(6, 8, 3, groups=2)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(self.norm(self.a(x)).relu(), (1, 2, 2))
        return self.fc(self.b(x).relu().mean((2, 3, 4)))


@case()
class FlattenToLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = block(3, 6), block(6, 8), nn.Linear(8 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.max_pool2d(self.b(self.a(x)), 2).flatten(1))


@case()
class FlattenThroughNorm(nn.Module):
    """A batch norm and a second linear layer after the flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = block(3, 6), nn.BatchNorm1d(6 * 4 * 4)
        self.fc, self.out = nn.Linear(6 * 4 * 4, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self.a(x), 2)
        return self.out(self.fc(self.norm(torch.flatten(x, 1))).relu())


@case()
class FlattenTwoThenCat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = block(3, 6), block(3, 4), nn.Linear(6 * 16 + 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        left = F.max_pool2d(self.a(x), 2).flatten(1)
        right = F.adaptive_avg_pool2d(self.b(x), 2).flatten(1)
        return self.fc(torch.cat([left, right], 1))


@case()
class PermuteThenFlatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = block(3, 6), block(6, 5), nn.Linear(5 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.max_pool2d(self.b(self.a(x)), 2).permute(0, 2, 3, 1).flatten(1))


@case()
class FlattenAddFlatten(nn.Module):
    """Two orders of flattening meet in a sum: what hangs together is no longer a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc = block(3, 4), block(3, 4), block(3, 6), nn.Linear(16 + 6, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = F.adaptive_avg_pool2d(self.a(x), 2).flatten(1)
        b = F.adaptive_avg_pool2d(self.b(x), 2).permute(0, 2, 3, 1).flatten(1)
        return self.fc(torch.cat([a + b, self.c(x).mean((2, 3))], 1))


@case()
class RawScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), block(8, 8), Head(8)
        self.scale, self.shift = nn.Parameter(torch.ones(1, 8, 1, 1)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) * self.scale + self.shift.view(1, -1, 1, 1)
        return self.head(self.b(x.relu()))


@case()
class RawScalar(nn.Module):
    """ReZero: one number for all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(8, 8), Head(8)
        self.gate = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(x + self.gate * self.b(x))


@case()
class RawPosition(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), block(8, 8), Head(8)
        self.position = nn.Parameter(torch.randn(1, 8, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b((self.a(x) + self.position).tanh()))


@case()
class ClassToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.up, self.down = nn.Conv2d(3, 12, 4, stride=4), nn.Linear(12, 16), nn.Linear(16, 12)
        self.fc = nn.Linear(12, 3)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 12)), nn.Parameter(torch.randn(1, 5, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.fc((x + self.down(F.gelu(self.up(x))))[:, 0])


@case()
class RawMatmul(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.mix = block(3, 8), nn.Parameter(torch.randn(8, 10))
        self.out = nn.Parameter(torch.randn(10, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x).mean((2, 3)) @ self.mix).tanh() @ self.out


@case()
class RawMatmulFromTheLeft(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.mix, self.fc = block(3, 8), nn.Parameter(torch.randn(10, 8)), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.matmul(self.mix, self.a(x).flatten(2)).relu().mean(-1))


@case()
class BufferScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), block(8, 8), Head(8)
        self.register_buffer("scale", torch.linspace(0.5, 2.0, 8).reshape(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b((self.a(x) * self.scale).relu()))


@case()
class BufferNotPersistent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), block(8, 8), Head(8)
        self.register_buffer("position", torch.linspace(-1.0, 1.0, 8 * 36).reshape(1, 8, 6, 6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b((self.a(x) + self.position).relu()))


@case()
class BlurPool(nn.Module):
    """A fixed depthwise kernel, expanded to the channels at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(8, 8), Head(8)
        self.register_buffer("kernel", torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])[None, None] / 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = F.conv2d(x, self.kernel.expand(x.shape[1], -1, -1, -1), stride=2, padding=1, groups=x.shape[1])
        return self.head(self.b(x))


@case()
class BlurPoolStored(nn.Module):
    """A fixed depthwise kernel, stored for every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(8, 8), Head(8)
        self.register_buffer("kernel", torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).repeat(8, 1, 1, 1) / 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), self.kernel, groups=x.shape[1])))


@case()
class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 12), block(12, 8), Head(8)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = self.excite(self.squeeze(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
        return self.head(self.b(x * gate))


@case()
class SqueezeExciteLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 12), block(12, 8), Head(8)
        self.squeeze, self.excite = nn.Linear(12, 4), nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        batch, channels, _, _ = x.size()
        gate = self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid().view(batch, channels, 1, 1)
        return self.head(self.b(x * gate.expand_as(x)))


@case()
class ECA(nn.Module):
    """A one-dimensional convolution that slides along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 12), block(12, 8), Head(8)
        self.slide = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = self.slide(x.mean((2, 3)).unsqueeze(1)).sigmoid().squeeze(1)
        return self.head(self.b(x * gate[..., None, None]))


@case()
class SpatialAttention(nn.Module):
    """CBAM: mean and maximum over channels gate the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.b, self.head = block(3, 12), nn.Conv2d(2, 1, 3, padding=1), block(12, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return self.head(self.b(x * self.gate(seen).sigmoid()))


@case()
class ChannelSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(1, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).sigmoid().sum(1, keepdim=True)))


@case()
class ChannelMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(9, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(torch.cat([x, x.mean(1, keepdim=True)], 1)))


@case()
class ChannelSoftmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), block(8, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).softmax(1)))


@case()
class ChannelMaximum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), block(9, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(torch.cat([x, x.max(1, keepdim=True).values], 1)))


@case()
class ChannelNormalize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), block(8, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(F.normalize(self.a(x), dim=1)))


@case()
class ChannelDistance(nn.Module):
    """Local response norm mixes neighbouring channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), block(8, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(F.local_response_norm(self.a(x), 3)))


@case()
class ChannelCumulated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), block(8, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).cumsum(1)))


@case()
class ChannelSorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), block(8, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).sort(1).values))


@case(name="WeightNorm", old=False)
@case(name="WeightNormOldStyle", old=True)
class WeightNormed(nn.Module):
    def __init__(self, old: bool) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            norm: Any = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
            self.a, self.b = norm(nn.Conv2d(3, 8, 3)), norm(nn.Conv2d(8, 10, 3))
        self.head = Head(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu()).relu())


@case()
class ScaledFilters(nn.Module):
    """A weight times a per-channel parameter, then used: RepVGG and LoRA manner."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.conv, self.head = block(3, 8), nn.Conv2d(8, 10, 3), Head(10)
        self.scale = nn.Parameter(torch.ones(10, 1, 1, 1))
        self.down, self.up = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(10, 2))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight * self.scale + (self.up @ self.down)[:, :, None, None]
        return self.head(F.conv2d(self.a(x), weight, self.conv.bias).relu())


@case((3, 4, 6))
class BilinearLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.pair = nn.Linear(6, 8), nn.Linear(6, 7), nn.Bilinear(8, 7, 5)
        self.c, self.d = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.pair(self.a(x), self.b(x))).relu())
