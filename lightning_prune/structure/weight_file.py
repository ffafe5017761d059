"""Weights alone, as the bytes of a safetensors file; a digest tells one file from another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from safetensors.torch import load, save
from torch import Tensor


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """A file's content; equal tensors give equal bytes.

    >>> import torch
    >>> unpack(pack({"weight": torch.ones(2)}))
    {'weight': tensor([1., 1.])}
    """
    data: bytes = save({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()})
    return data


def unpack(data: bytes) -> dict[str, Tensor]:
    """The tensors in a file's content, on the CPU."""
    tensors: dict[str, Tensor] = load(data)
    return tensors


def digest_of(data: bytes) -> str:
    """Tells a file's content from any other.

    >>> digest_of(b"")[:12]
    'e3b0c44298fc'
    """
    return hashlib.sha256(data).hexdigest()
