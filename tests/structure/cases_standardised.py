"""Hard cases: filters that are standardised, each in its author's words, and norms whose scale is made of a weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.structure.case_table import Head, block, case


class StandardConv(nn.Conv2d):
    """Weight standardisation."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        mean = weight.mean(dim=(1, 2, 3), keepdim=True)
        deviation = weight.std(dim=(1, 2, 3), keepdim=True)
        weight = (weight - mean) / (deviation + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)


class BatchNormConv(nn.Conv2d):
    """By way of a batch norm over the filters."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)


class ScaledConv(nn.Conv2d):
    """The same with a gain for each filter, and a scale that was worked out of the fan-in once and for all."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.eps, self.scale = 1e-6, self.weight[0].numel() ** -0.5
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        flat, gain = self.weight.reshape(1, self.out_channels, -1), (self.gain * self.scale).view(-1)
        weight = F.batch_norm(flat, None, None, gain, training=True, momentum=0.0, eps=self.eps)
        weight = weight.reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)


class StepwiseConv(nn.Conv2d):
    """As its authors wrote it down: mean by mean, and the deviation of flat filters."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean(1, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
        weight = self.weight - mean
        deviation = weight.view(len(weight), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        weight = weight / deviation.expand_as(weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)


class RootConv(nn.Conv2d):
    """By the root of a variance, in place, on filters that were turned around."""

    def forward(self, x: Tensor) -> Tensor:
        turned = self.weight.permute(1, 2, 3, 0).flatten(0, 2)
        variance, mean = torch.var_mean(turned, 0, keepdim=True, unbiased=False)
        weight = (turned - mean).mul_((variance + 1e-5).rsqrt())
        weight = weight.view(*self.weight.shape[1:], -1).permute(3, 0, 1, 2)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)


@case(name="WeightStandardisation", kind=StandardConv)
@case(name="WeightStandardisationBatchNorm", kind=BatchNormConv)
@case(name="WeightStandardisationScaled", kind=ScaledConv)
@case(name="WeightStandardisationStepwise", kind=StepwiseConv)
@case(name="WeightStandardisationByRoot", kind=RootConv)
class WeightStandardised(nn.Module):
    def __init__(self, kind: type[nn.Conv2d]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = kind(3, 8, 3), kind(8, 10, 3), block(10, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(x).relu()).relu()))


@case(name="WeightStandardisationBiased", kind=StandardConv)
@case(name="WeightStandardisationBiasedByRoot", kind=RootConv)
class StandardisedResidual(nn.Module):
    """A stream with groups, whose activation is not zero at zero."""

    def __init__(self, kind: type[nn.Conv2d]) -> None:
        super().__init__()
        self.stem, self.inner = kind(3, 8, 3, padding=1), kind(8, 12, 3, padding=1, groups=2)
        self.depthwise, self.outer = kind(12, 12, 3, padding=1, groups=12), kind(12, 8, 3, padding=1)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).sigmoid()
        return self.head(x + self.outer(self.depthwise(self.inner(x).sigmoid()).sigmoid()))


NORMS = {
    "layer": lambda x, scale, shift: F.layer_norm(x, scale.shape, scale, shift),
    "rms": lambda x, scale, shift: F.rms_norm(x, scale.shape, scale) + shift,
    "group": lambda x, scale, shift: F.group_norm(x.transpose(1, 2), 2, scale, shift).transpose(1, 2),
}


@case((3, 5, 12), name="ScaleFromOneLayerNorm", norm="layer")
@case((3, 5, 12), name="ScaleFromOneRMSNorm", norm="rms")
@case((3, 5, 12), name="ScaleFromOneGroupNorm", norm="group")
class ScaleFromOne(nn.Module):
    """A norm that is multiplied with one more than its weight."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.norm = NORMS[norm]
        self.a, self.b, self.c = nn.Linear(12, 16), nn.Linear(16, 10), nn.Linear(10, 4)
        self.scale, self.shift = nn.Parameter(torch.zeros(16)), nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x), 1 + self.scale, self.shift)
        return self.c(self.b(x).sigmoid())
