"""How many samples arguments hold, and the same arguments with another number of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_prune.errors import ConfigurationError


def sample_count(inputs: Any) -> int | None:
    """How many samples nested arguments hold: the leading dim of the first tensor that has one.

    Args:
        inputs: tensors in tuples, lists and dicts, beside other values.

    Returns:
        ``None`` where no tensor has a dim.

    >>> sample_count((("mean", torch.zeros(4, 3)), {}))
    4
    """
    leaves = pytree.tree_leaves(inputs)
    return next((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0), None)


def resized(inputs: Any, size: int) -> Any:
    """Nested arguments with ``size`` samples: the given ones, in order, and again from the first where they run out.

    The first tensor's leading dim is taken for the batch; so is that of every other tensor of the same length.

    Args:
        inputs: tensors in tuples, lists and dicts, beside other values, which stay as they are.
        size: number of samples wanted, at least 1.

    Raises:
        ConfigurationError: ``size`` is less than 1, or the given batch has no sample.

    >>> resized((torch.tensor([[1.0], [2.0]]), "mean"), 3)
    (tensor([[1.],
            [2.],
            [1.]]), 'mean')
    """
    if size < 1:
        raise ConfigurationError(f"A batch of {size} can't be made; it must be at least 1.")
    given = sample_count(inputs)
    if given is None:
        return inputs
    if given == 0:
        raise ConfigurationError("The example batch holds no sample; give at least one.")

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != given:
            return leaf
        return leaf.detach().index_select(0, torch.arange(size, device=leaf.device) % given)

    return pytree.tree_map(resize, inputs)
