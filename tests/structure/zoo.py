"""The torchvision networks that the engine must cut exactly, small inputs, no downloads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import segmentation


@dataclasses.dataclass(frozen=True)
class Entry:
    """One network.

    Args:
        build: makes it, without pretrained weights.
        ceiling: largest fraction of parameters that may be left at ratio 0.5, scope "all".
        size: side of the square input, pixels.
        heavy: tested with fewer seeds unless the whole test is asked for.
    """

    build: Callable[[], nn.Module]
    ceiling: float = 0.5
    size: int = 64
    heavy: bool = False

    def inputs(self, seed: int = 0) -> Tensor:
        """A batch of two images."""
        return torch.randn(2, 3, self.size, self.size, generator=torch.Generator().manual_seed(seed))


def _net(name: str, **options: Any) -> Callable[[], nn.Module]:
    return functools.partial(getattr(models, name), weights=None, **options)


def _segmentation(name: str, **options: Any) -> Callable[[], nn.Module]:
    return functools.partial(getattr(segmentation, name), weights=None, weights_backbone=None, **options)


CONVOLUTIONAL = {
    "resnet18": Entry(_net("resnet18")),
    "resnet50": Entry(_net("resnet50"), 0.31),
    "resnext50_32x4d": Entry(_net("resnext50_32x4d")),
    "wide_resnet50_2": Entry(_net("wide_resnet50_2"), heavy=True),
    "vgg11": Entry(_net("vgg11", init_weights=False), heavy=True),
    "vgg11_bn": Entry(_net("vgg11_bn", init_weights=False), 0.31, heavy=True),
    "alexnet": Entry(_net("alexnet")),
    "squeezenet1_0": Entry(_net("squeezenet1_0")),
    "squeezenet1_1": Entry(_net("squeezenet1_1")),
    "densenet121": Entry(_net("densenet121"), 0.31),
    "googlenet": Entry(_net("googlenet", init_weights=False, aux_logits=True)),
    "inception_v3": Entry(_net("inception_v3", init_weights=False, aux_logits=True), size=299, heavy=True),
    "mobilenet_v2": Entry(_net("mobilenet_v2"), 0.37),
    "mobilenet_v3_small": Entry(_net("mobilenet_v3_small")),
    "mobilenet_v3_large": Entry(_net("mobilenet_v3_large")),
    "mnasnet1_0": Entry(_net("mnasnet1_0")),
    "shufflenet_v2_x1_0": Entry(_net("shufflenet_v2_x1_0"), 0.44),
    "efficientnet_b0": Entry(_net("efficientnet_b0")),
    "efficientnet_v2_s": Entry(_net("efficientnet_v2_s"), heavy=True),
    "regnet_x_400mf": Entry(_net("regnet_x_400mf")),
    "regnet_y_400mf": Entry(_net("regnet_y_400mf")),
    "convnext_tiny": Entry(_net("convnext_tiny"), 0.31),
    "deeplabv3_resnet50": Entry(_segmentation("deeplabv3_resnet50", aux_loss=True), heavy=True),
    "fcn_resnet50": Entry(_segmentation("fcn_resnet50", aux_loss=True), heavy=True),
    "lraspp_mobilenet_v3_large": Entry(_segmentation("lraspp_mobilenet_v3_large")),
}

ATTENTION = {
    "vit_b_16": Entry(_net("vit_b_16", image_size=64), 0.27, heavy=True),
    "swin_t": Entry(_net("swin_t"), 0.27),
    "swin_v2_t": Entry(_net("swin_v2_t"), 0.27),
    "maxvit_t": Entry(_net("maxvit_t", input_size=(224, 224)), 0.27, size=224, heavy=True),
}

ZOO = {**CONVOLUTIONAL, **ATTENTION}
