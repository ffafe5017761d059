"""Fast copies and walks: the same as Python's and torch's own."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchvision import models

from lightning_prune.structure.copying import deep_copy
from lightning_prune.structure.plan import named_modules, named_parameters, named_tensors


class Shared(nn.Module):
    """One object under several names, a way back to the parent, tables, hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = nn.Sequential(self.first, nn.ReLU())
        self.tied = nn.Linear(2, 2)
        self.tied.weight = self.first.weight
        self.listed = [self.first, {"sizes": (1, 2), "deep": ([1], self)}]
        self.second.listed = self.listed
        self.table: OrderedDict[str, int] = OrderedDict()
        self.pair = (1, [2])
        self.table.note = "kept"  # type: ignore[attr-defined]
        self.sizes = self.second.sizes = {"hidden": [2]}
        self.seen: set[int] = set()
        self.second.seen = self.seen
        self.plain = torch.ones(2)
        self.first.register_forward_hook(_hook)


def _hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
    """Nothing."""


class Own(nn.Module):
    """Says itself how it is copied, and what of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.note = "dense"

    def __deepcopy__(self, memo: dict[int, Any]) -> Own:
        twin = Own()
        twin.inner, twin.note = copy.deepcopy(self.inner, memo), "copied"
        return twin


class Partial(nn.Module):
    """Leaves something out of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.note: str | None = "here"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "note": None}


def parametrized() -> nn.Module:
    """A weight that is computed."""
    net = nn.Sequential(nn.Linear(2, 2), nn.MultiheadAttention(4, 2))
    parametrize.register_parametrization(net[0], "weight", nn.Tanh())
    return net


BUILDS: list[Callable[[], nn.Module]] = [
    Shared,
    lambda: nn.Sequential(Own(), nn.ReLU()),
    lambda: nn.Sequential(Partial(), nn.Conv2d(2, 2, (1, 3), padding_mode="circular")),
    parametrized,
    lambda: models.mobilenet_v3_small(weights=None),
]


def told(value: Any, seen: dict[int, int]) -> Any:
    """An object in plain words: what it holds, and what it is that was told before."""
    if isinstance(value, (int, float, str, bool, type(None), torch.dtype, FunctionType, BuiltinFunctionType, type)):
        return repr(value)
    if id(value) in seen:
        return seen[id(value)]
    if not isinstance(value, tuple):
        seen[id(value)] = len(seen)
    kind = type(value).__qualname__
    if isinstance(value, Tensor):
        return kind, value.tolist(), value.requires_grad
    if isinstance(value, (list, tuple, set)):
        return kind, [told(each, seen) for each in value]
    tables = [value] if isinstance(value, dict) else []
    tables += [vars(value)] if hasattr(value, "__dict__") else []
    return kind, [[(told(key, seen), told(table[key], seen)) for key in table] for table in tables]


@pytest.mark.parametrize("build", BUILDS)
def test_a_deep_copy_is_what_python_makes(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build()
    mine, theirs = dict[int, int](), dict[int, int]()
    before, made, expected = told(model, mine), deep_copy(model, {}), copy.deepcopy(model)
    assert told(made, theirs) == told(expected, {})
    assert told(model, {}) == before and mine.keys().isdisjoint(theirs)


def test_what_is_given_is_not_copied() -> None:
    model = Shared()
    given = nn.Linear(2, 2)
    made = deep_copy(model, {id(model.first): given})
    assert made.first is given and made.second[0] is given and made.listed[0] is given


@pytest.mark.parametrize("build", BUILDS)
def test_walks_meet_what_those_of_torch_meet(build: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(build(), nn.ReLU())
    model.append(model[1])
    everything = dict([*model.named_parameters(), *model.named_buffers()])
    assert list(named_tensors(model)) == list(everything)
    assert all(named_tensors(model)[name] is tensor for name, tensor in everything.items())
    for every in (False, True):
        assert list(named_modules(model, every)) == list(model.named_modules(remove_duplicate=not every))
        assert [name for name, _ in named_parameters(model, every)] == [
            name for name, _ in model.named_parameters(remove_duplicate=not every)
        ]
