"""The networks of the papers' CIFAR tables."""

from __future__ import annotations

from torch import nn
from torchvision.models.resnet import BasicBlock


def cifar_resnet(blocks: int, width: int = 16, classes: int = 10) -> nn.Module:
    """Three stages of so many basic blocks, with projection shortcuts: ``6 * blocks + 2`` layers."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for outputs in (width, 2 * width, 4 * width):
        for _ in range(blocks):
            shortcut, stride = None, 1
            if outputs != inputs:
                stride = 2
                shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            layers.append(BasicBlock(inputs, outputs, stride, shortcut))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def resnet56() -> nn.Module:
    """The network of most CIFAR-10 tables: 0.85 M parameters, 127 M multiply-adds."""
    return cifar_resnet(9)


def vgg19(classes: int = 100) -> nn.Module:
    """VGG-19 with batch norms and one linear layer, for images of 32 x 32."""
    layers: list[nn.Module] = []
    inputs = 3
    for widths in ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4):
        for outputs in widths:
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs, classes))
