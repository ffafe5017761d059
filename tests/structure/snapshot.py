"""Everything about a model that watching it must not change."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """State of a model, of its modules' attributes and of the random numbers."""

    tensors: dict[str, tuple[int, int, bool, Tensor]]
    attributes: dict[str, dict[str, Any]]
    random: Tensor

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """Take it."""
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        return cls(
            {name: (id(v), v._version, v.requires_grad, v.detach().clone()) for name, v in named},
            {name: {key: _freeze(v) for key, v in vars(module).items()} for name, module in model.named_modules()},
            torch.random.get_rng_state(),
        )

    def differences(self, later: Snapshot) -> list[str]:
        """What is no longer as it was, in words."""
        found = sorted(f"{name} came or went" for name in self.tensors.keys() ^ later.tensors.keys())
        for name in self.tensors.keys() & later.tensors.keys():
            old, new = self.tensors[name], later.tensors[name]
            words = ("object", "version", "requires_grad")
            found += [f"{name}: {what} changed" for what, a, b in zip(words, old[:3], new[:3], strict=True) if a != b]
            found += [] if torch.equal(old[3], new[3]) else [f"{name}: values changed"]
        found += sorted(f"module {name!r} came or went" for name in self.attributes.keys() ^ later.attributes.keys())
        for name in self.attributes.keys() & later.attributes.keys():
            old_values, new_values = self.attributes[name], later.attributes[name]
            keys = old_values.keys() | new_values.keys()
            found += [f"{name}.{key} changed" for key in sorted(keys) if old_values.get(key) != new_values.get(key)]
        return found + ([] if torch.equal(self.random, later.random) else ["the random number generator moved"])


def _freeze(value: Any) -> Any:
    """A value that compares equal as long as nothing in it was touched."""
    if isinstance(value, dict):
        return "dict", id(value), [(key, _freeze(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value).__name__, [_freeze(item) for item in value]
    if isinstance(value, Tensor):
        return "tensor", id(value), value._version, tuple(value.shape)
    if isinstance(value, (int, float, str, bool, type(None))):
        return value
    return "object", id(value)
