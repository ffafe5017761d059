"""Dense models by name, with weights from files."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_prune.errors import ConfigurationError


def dense_model(asked: argparse.Namespace) -> nn.Module:
    """What ``--model``, ``--model-args`` and ``--weights`` say, in evaluation mode.

    Raises:
        ConfigurationError: there is no such name, it makes no module, or the weights don't fit.
    """
    make = named(asked.model)
    try:
        model = make(**asked.model_args)
    except TypeError as error:
        raise ConfigurationError(f"{asked.model} can't be called with {asked.model_args}: {error}.") from error
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"{asked.model} makes a {type(model).__name__}, not a torch.nn.Module.")
    if asked.weights:
        state = weights_at(asked.weights)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            first = str(error).splitlines()[1:2] or [str(error)]
            raise ConfigurationError(f"{asked.weights} does not fit {asked.model}: {first[0].strip()}") from error
    return model.eval()


def named(name: str) -> Any:
    """What a dotted name stands for, also in the working directory.

    Raises:
        ConfigurationError: nothing.

    >>> named("torch.nn.Linear").__name__
    'Linear'
    """
    parts = name.split(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for end in range(len(parts) - 1, 0, -1):
        try:
            found = import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
            continue
        for part in parts[end:]:
            found = getattr(found, part, None)  # type: ignore[assignment]
        if callable(found):
            return found
    raise ConfigurationError(f"There is nothing to call under the name {name!r}; write package.module.Class.")


def weights_at(path: str) -> dict[str, Tensor]:
    """The state dict in a safetensors file, a checkpoint or a file of ``torch.save``; nothing is unpickled.

    Raises:
        ConfigurationError: the file holds none.
    """
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise ConfigurationError(f"{path} can't be read: {error}") from error
    except Exception as error:  # what torch's unpickler refuses
        raise ConfigurationError(f"{path} holds more than weights: {str(error).splitlines()[0]}") from error
    state = found.get("state_dict", found) if isinstance(found, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigurationError(f"{path} holds no state dict.")
    return state
