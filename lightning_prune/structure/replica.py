"""Copies of a model to try things on, and a quiet room to run them in."""

from __future__ import annotations

import copy
import random
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_prune.structure.copying import deep_copy
from lightning_prune.structure.plan import named_modules, named_tensors, original


def _moved(tensor: Tensor, device: torch.device | None) -> Tensor:
    if device is not None and device.type == "meta":
        return torch.empty_like(tensor, device=device, requires_grad=False)
    moved = tensor.detach().to(device) if device is not None else tensor.detach()
    return moved.clone() if moved.data_ptr() == tensor.data_ptr() else moved


class _CopyTensors(TorchFunctionMode):
    """Lets ``deepcopy`` pass over tensors that hang on a module as plain attributes, non-leaf ones included."""

    def __init__(self, device: torch.device | None) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            return memo.setdefault(id(tensor), _moved(tensor, self.device))
        return func(*args, **(kwargs or {}))


def replica(model: nn.Module, device: torch.device | str | None = None) -> nn.Module:
    """A deep copy whose tensors lie on ``device`` (on ``"meta"`` they take no memory); ties and flags are kept.

    Norms that are synchronised between ranks become local ones.
    """
    target = torch.device(device) if device is not None else None
    memo: dict[int, Any] = {}
    for tensor in named_tensors(model).values():
        moved = _moved(tensor, target)
        if isinstance(tensor, nn.Parameter):
            moved = nn.Parameter(moved, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = moved
    with torch.no_grad(), _CopyTensors(target):
        try:
            copied = deep_copy(model, dict(memo))
        except Exception:  # whatever the copy of an attribute asks for
            copied = deep_copy(model, {**memo, **_uncopyable(model)})
    for (_, module), (_, twin) in zip(named_modules(model), named_modules(copied), strict=True):
        _complete(module, twin)
        if isinstance(twin, nn.SyncBatchNorm):
            twin.__class__ = _LocalBatchNorm  # type: ignore[assignment]  # both are batch norms
    return copied


class _LocalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A synchronised norm on its own: a copy is tried on one rank, on any device, while the others may be elsewhere."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def _uncopyable(model: nn.Module) -> dict[int, Any]:
    """Attributes such as locks and open files can't be copied; a copy of their module shares them."""
    shared, seen = dict[int, Any](), set[int]()
    modules = {id(module): module for module in model.modules()}
    ahead: list[Any] = [module.__getstate__() for module in modules.values()]  # without what copies leave out
    for value in ahead:  # which grows
        if id(value) in seen or isinstance(value, (nn.Module, Tensor)):
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            ahead.extend(value.values())
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            ahead.extend(value)
        else:
            try:
                copy.deepcopy(value, dict(modules))
            except Exception:
                shared[id(value)] = value
    return shared


def _complete(module: nn.Module, twin: nn.Module) -> None:
    """Share what a module leaves out of its copies (a trainer, say), but nothing that runs or reports the original."""
    held = vars(twin)
    for name, value in vars(module).items():
        if value is not None and held.get(name) is None and not callable(value):
            held[name] = value
    forward = held.get("forward")
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)  # compiled: what it was made from
    if getattr(forward, "__self__", None) is module:
        del held["forward"]
    if "_trainer" in held and hasattr(twin, "log_dict"):  # a LightningModule: what is tried on its copy is no step
        held["log"] = unheard


def unheard(*_: Any, **__: Any) -> None:
    """Stands in for ``LightningModule.log``."""


def uncompiled(model: nn.Module) -> nn.Module:
    """The model itself, with every module that ``torch.compile`` has wrapped put back in its wrapper's place."""
    model = original(model)
    for name, child in model._modules.items():
        if child is not None:
            model._modules[name] = uncompiled(child)
    return model


def arguments(inputs: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How ``inputs`` are handed to a model: a tuple is its positional arguments, anything else the only one."""
    return (inputs if isinstance(inputs, tuple) else (inputs,)), dict(kwargs or {})


def to_device(tree: Any, device: torch.device | str | None) -> Any:
    """Every tensor of a nested structure on ``device`` (``None``: where it is), detached and copied."""
    target = torch.device(device) if device is not None else None

    def move(leaf: Any) -> Any:
        return _moved(leaf, target) if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(move, tree)


@contextmanager
def quiet_room() -> Iterator[None]:
    """Run something without gradients, warnings, fused fast paths or a trace in any random generator."""
    states = random.getstate(), np.random.get_state(), torch.backends.mha.get_fastpath_enabled()
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cuda), torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.backends.mha.set_fastpath_enabled(states[2])
