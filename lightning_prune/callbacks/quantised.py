"""Quantised layers: their weights are packed or tied to scales of their own, so no slice of them can go."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_prune.errors import ConfigurationError
from lightning_prune.structure.plan import plain_name

_HOMES = ("torch.ao.nn.", "torch.ao.quantization", "torch.nn.quantized", "torch.nn.qat", "torchao.", "bitsandbytes.")
_PACKED = (torch.int8, torch.uint8, torch.int16, torch.int32)
"""What weights are packed into; 64 bits are positions, booleans are masks."""


def quantised_part(module: nn.Module) -> tuple[str, str] | None:
    """Name and kind of the first quantised layer inside a module, observers and fake quantisation included.

    >>> quantised_part(nn.Linear(2, 2)) is None
    True
    >>> from torch.ao.quantization import FakeQuantize
    >>> quantised_part(nn.Sequential(nn.ReLU(), FakeQuantize()))
    ('1', 'FakeQuantize')
    """
    for name, part in module.named_modules():
        if type(part).__module__.startswith(_HOMES):
            return plain_name(name), type(part).__name__
        for tensor in part.parameters(recurse=False):
            if _is_packed(tensor):
                return plain_name(name), f"{type(part).__name__} of {_kind(tensor)}"
    return None


def refuse_quantised(module: nn.Module, whole: str = "") -> None:
    """Refuse a module with a quantised layer.

    Args:
        module: that is to be pruned.
        whole: its name in the LightningModule.

    Raises:
        ConfigurationError: names the layer.
    """
    found = quantised_part(module)
    if found is not None:
        name = ".".join(filter(None, (whole, found[0])))
        raise ConfigurationError(
            f"{name!r} is quantised ({found[1]}), so nothing can be removed from it; prune first, then quantise."
        )


def refuse_all_quantised(module: nn.Module) -> None:
    """Refuse a module before its forward pass is known: where every child that has anything to train is quantised.

    Raises:
        ConfigurationError: names the first quantised layer.
    """
    children = [child for child in module.children() if quantised_part(child) or any(True for _ in child.parameters())]
    if children and all(map(quantised_part, children)):
        refuse_quantised(module)


def _is_packed(tensor: Tensor) -> bool:
    return tensor.is_quantized or is_traceable_wrapper_subclass(tensor) or tensor.dtype in _PACKED


def _kind(tensor: Tensor) -> str:
    plain = (Tensor, nn.Parameter)
    return str(tensor.dtype).removeprefix("torch.") if type(tensor) in plain else type(tensor).__name__
