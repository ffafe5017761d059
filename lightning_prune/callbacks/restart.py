"""Training begins anew from other weights, in the middle of a fit."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_prune.callbacks.neighbours import average_models
from lightning_prune.callbacks.targets import parameters_of
from lightning_prune.errors import ConfigurationError
from lightning_prune.structure.plan import plain_name
from lightning_prune.structure.weight_file import unpack


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a module's parameters and saved buffers, on the CPU."""
    return {name: value.to("cpu", copy=True) for name, value in saved_tensors(module).items()}


def read_weights(path: str, module: nn.Module, argument: str = "restart_from") -> dict[str, Tensor]:
    """The weights in a file, by the names that the module has for them.

    Args:
        path: of a Lightning checkpoint or of a saved ``state_dict`` (``torch.save`` or safetensors), of the module or
            of one of its submodules.
        module: has parameters and saved buffers of the same shapes.
        argument: that names the file, for the sentence of an error.

    Raises:
        ConfigurationError: the file can't be read, or holds something else.
    """
    try:
        content = _content(path)
    except Exception as error:
        first = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
        raise ConfigurationError(f"{argument}={path!r} is no file of weights that can be read ({first}).") from error
    found = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    found = found if isinstance(found, Mapping) else {}
    weights = {plain_name(str(name)): value for name, value in found.items() if isinstance(value, Tensor)}
    own = saved_tensors(module)
    prefix = _prefix(weights, own, module, f"{argument}={path!r}")
    for name, value in weights.items():
        if value.shape != own[prefix + name].shape:
            shapes = f"shape {tuple(value.shape)} there and {tuple(own[prefix + name].shape)} here"
            raise ConfigurationError(f"{argument}={path!r} does not fit: {prefix + name!r} has {shapes}.")
        if value.is_floating_point() and value.isnan().any():
            raise ConfigurationError(f"{argument}={path!r} holds numbers in {prefix + name!r} that are none (NaN).")
    return {prefix + name: value for name, value in weights.items()}


@torch.no_grad()
def restart_(trainer: Trainer, pl_module: LightningModule, weights: Mapping[str, Tensor]) -> None:
    """Give the module in training, and its weight averages, other weights; what optimisers know of the old ones goes.

    Args:
        trainer: between two steps.
        pl_module: in training.
        weights: by the module's own names.
    """
    for module in (pl_module, *average_models(trainer)):
        own = saved_tensors(module)
        for name, value in weights.items():
            own[name].copy_(value)
    others = {id(parameter) for name, parameter in parameters_of(pl_module).items() if name in weights}
    for optimizer in trainer.optimizers:
        for parameter in [parameter for group in optimizer.param_groups for parameter in group["params"]]:
            if id(parameter) in others:
                optimizer.state.pop(parameter, None)


def _content(path: str) -> Any:
    """Of any file system that Lightning reads checkpoints from."""
    data = get_filesystem(path).cat_file(path)
    if path.endswith(".safetensors"):
        return unpack(data)
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and saved buffers, by the names that they have without compilers."""
    state = {plain_name(name): value for name, value in module.state_dict().items()}
    return {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}


def _prefix(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], module: nn.Module, given: str) -> str:
    """The name, with its dot, of the submodule whose weights these are."""
    for name, _ in module.named_modules():
        prefix = f"{plain_name(name)}." if plain_name(name) else ""
        if weights and set(weights) == {key.removeprefix(prefix) for key in own if key.startswith(prefix)}:
            return prefix
    missing, unknown = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    what = f"lacks {missing[0]!r}" if missing else f"holds {unknown[0]!r}, which the module does not have"
    raise ConfigurationError(f"{given} does not fit: of {len(own)} tensors by their names it {what}.")
