"""Slim models on disk: safetensors with plan and metadata as JSON in the header; no pickle.

Of a weight with single weights at zero the file holds the kept values under its name, in their order, and under
``name`` + ``":bitmap"`` eight entries a byte, the first in the highest bit.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_prune.errors import PlanError, SlimFileError
from lightning_prune.structure.drafts import draft_of
from lightning_prune.structure.plan import Member, PruningPlan, named_tensors, plain_name, signature
from lightning_prune.structure.sparsity import Plan, SparsityPlan, check_masks
from lightning_prune.structure.surgery import check_fits, prune_

KEY = "lightning_prune"
BITMAP = ":bitmap"
VERSION = 1


def save_slim(model: nn.Module, path: str | os.PathLike[str], plan: Plan, /, **metadata: Any) -> None:
    """Write a slim model's weights together with the plan that made it, in one safetensors file.

    The file appears under its name when it is complete, not before.

    Args:
        model: the slim model.
        path: of the file.
        plan: that turned the dense model into this one, by channels or by single weights.
        metadata: anything that JSON can hold, such as accuracies, or that has a ``to_json``: a report, say, with the
            error of the proof and the metrics.

    Raises:
        SlimFileError: where the model is not what the plan leaves, the metadata can't be written as JSON, or the disk
            is full or not writable; what stood under the name before stands there still.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _stored(model).items()}
    if isinstance(plan, SparsityPlan):
        tensors |= _packed(model, tensors, plan)
    else:
        _check_lengths(model, tensors, plan)
    header = {
        "version": VERSION,
        "plan": plan.outline() if isinstance(plan, SparsityPlan) else json.loads(plan.to_json()),
        "signature": signature(model),
        "versions": {"torch": torch.__version__, "safetensors": safetensors.__version__},
        "metadata": {name: _plain(value) for name, value in metadata.items()},
    }
    try:
        header = json.loads(json.dumps(header))  # with keys as a reader will see them
        text = json.dumps({**header, "digest": _digest(header, tensors)}, sort_keys=True)
    except TypeError as error:
        raise SlimFileError(f"The metadata must be what JSON can hold: {error}.") from error
    folder = os.path.dirname(os.fspath(path)) or "."
    if not os.path.isdir(folder):
        raise SlimFileError(f"The slim file can't be written to {os.fspath(path)}: there is no folder {folder}.")
    try:
        with draft_of(path) as draft:
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, draft, metadata={KEY: text})
    except (OSError, SafetensorError) as error:
        raise SlimFileError(f"The slim file can't be written to {os.fspath(path)}: {error}.") from error


def stored_bytes(model: nn.Module, plan: Plan | None = None) -> int:
    """Bytes that a model's weights take in a slim file, its header left out.

    Args:
        model: dense or slim.
        plan: of single weights that are zero; of them bitmap and kept values are stored.

    >>> stored_bytes(nn.Linear(8, 4))
    144
    """
    tensors = _stored(model)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if isinstance(plan, SparsityPlan):
        for name, bits in plan.kept.items():
            total += len(bits.packed) - (bits.size - len(bits)) * tensors[name].element_size()
    return total


def read_slim_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Plan, signature, versions and metadata of a slim file, without its weights.

    Raises:
        SlimFileError: where the file is damaged or not one of ours.
    """
    return _read(path)[0]


def read_slim_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan of a slim file.

    Raises:
        SlimFileError: where the file is damaged or not one of ours.
    """
    return read_slim(path).plan


class SlimFile(NamedTuple):
    """What a slim file holds, read and found to be whole.

    Args:
        path: where it was.
        header: plan, signature, versions and metadata.
        tensors: by their names in the file.
        plan: by which a dense model becomes the slim one.
    """

    path: str
    header: dict[str, Any]
    tensors: dict[str, Tensor]
    plan: Plan

    def fill_(self, model: nn.Module) -> None:
        """Turn a dense model into the slim one, see :func:`load_slim`."""
        plan, tensors = self.plan, self.tensors
        try:
            if isinstance(plan, SparsityPlan):
                check_masks(model, plan)
                tensors = _unpacked(tensors, plan)
            else:
                check_fits(model, plan)
        except (KeyError, PlanError) as error:
            raise SlimFileError(f"{self.path} does not fit this {type(model).__name__}: {error}") from error
        _check_tensors(self.path, _stored(model), tensors, plan.lengths())
        prune_(model, plan)
        with torch.no_grad():
            for name, tensor in _stored(model).items():
                tensor.copy_(tensors[name])


def read_slim(path: str | os.PathLike[str]) -> SlimFile:
    """Everything that a slim file holds, by reading it once.

    Raises:
        SlimFileError: where the file is damaged or not one of ours.
    """
    header, tensors = _read(path)
    return SlimFile(os.fspath(path), header, tensors, _plan_of(path, header, tensors))


def load_slim(path: str | os.PathLike[str], model: nn.Module) -> Plan:
    """Turn a fresh dense model into the slim one of a file: first the plan, then the weights, in place.

    Everything is checked before the model is touched.

    Args:
        path: of a file that :func:`save_slim` wrote.
        model: built as the dense model was.

    Returns:
        The plan.

    Raises:
        SlimFileError: where the file is damaged, foreign, or belongs to another model.
    """
    found = read_slim(path)
    found.fill_(model)
    return found.plan


def _plan_of(path: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, Tensor]) -> Plan:
    try:
        if "shapes" in header["plan"]:
            bitmaps = {name: tensors[name + BITMAP].numpy().tobytes() for name in header["plan"]["shapes"]}
            return SparsityPlan.from_outline(header["plan"], bitmaps)
        return PruningPlan.from_json(json.dumps(header["plan"]))
    except (KeyError, TypeError, PlanError) as error:
        raise SlimFileError(f"The plan in {os.fspath(path)} is damaged: {error}") from error


def _check_lengths(model: nn.Module, tensors: dict[str, Tensor], plan: PruningPlan) -> None:
    known = named_tensors(model)
    for (name, dim), want in plan.lengths().items():
        if name not in known:
            raise SlimFileError(f"The plan cuts {name!r}, which this {type(model).__name__} does not have.")
        if name in tensors and tensors[name].shape[dim] != want:
            found = tensors[name].shape[dim]
            raise SlimFileError(f"{name!r} has length {found} along dim {dim} where the plan leaves {want}.")


def _packed(model: nn.Module, tensors: dict[str, Tensor], plan: SparsityPlan) -> dict[str, Tensor]:
    """Kept values and bitmaps, by the names that they have in the file."""
    try:
        check_masks(model, plan)
    except PlanError as error:
        raise SlimFileError(str(error)) from error
    packed = {}
    for name, bits in plan.kept.items():
        flat, kept = tensors[name].reshape(-1), bits.mask()
        if flat[~kept].any():
            count = int(flat[~kept].count_nonzero())
            raise SlimFileError(f"{count} weights of {name!r} are not zero, though the plan masks them.")
        packed[name], packed[name + BITMAP] = flat[kept], bits.to_plain()["bits"]
    return packed


def _unpacked(tensors: dict[str, Tensor], plan: SparsityPlan) -> dict[str, Tensor]:
    """All tensors in their shapes again, without the bitmaps."""
    bitmaps = {name + BITMAP for name in plan.kept}
    whole = {name: tensor for name, tensor in tensors.items() if name not in bitmaps}
    for name, bits in plan.kept.items():
        values = tensors[name]
        if tuple(values.shape) != (len(bits),):
            raise PlanError(f"{name!r} has shape {tuple(values.shape)}, but its bitmap keeps {len(bits)} weights.")
        flat = values.new_zeros(bits.size)
        flat[bits.mask()] = values
        whole[name] = flat.view(plan.shapes[name])
    return whole


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    name = os.fspath(path)
    try:
        with safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no iterator
    except (SafetensorError, OSError) as error:
        raise SlimFileError(f"{name} can't be read as a slim file: {error}.") from error
    if KEY not in metadata:
        raise SlimFileError(f"{name} is a safetensors file, but not one that save_slim wrote.")
    try:
        header: dict[str, Any] = json.loads(metadata[KEY])
        version, digest = header["version"], header.pop("digest")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise SlimFileError(f"The header of {name} is damaged: {error}.") from error
    if version != VERSION:
        raise SlimFileError(f"{name} has version {version!r}; this library reads version {VERSION}.")
    if digest != _digest(header, tensors):
        raise SlimFileError(f"The contents of {name} are not those that were written; the file is damaged.")
    return header, tensors


def _check_tensors(path: Any, dense: dict[str, Tensor], found: dict[str, Tensor], lengths: dict[Member, int]) -> None:
    for name in sorted(dense.keys() ^ found.keys()):
        missing = "lacks" if name in dense else "holds a tensor that this model does not have:"
        raise SlimFileError(f"{os.fspath(path)} {missing} {name!r}.")
    for name, tensor in dense.items():
        shape = [lengths.get((name, dim), size) for dim, size in enumerate(tensor.shape)]
        if list(found[name].shape) != shape:
            raise SlimFileError(
                f"{name!r} has shape {tuple(found[name].shape)} in {os.fspath(path)}, not {tuple(shape)}."
            )


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each once."""
    names = set(map(plain_name, model.state_dict(keep_vars=True)))
    return {name: tensor for name, tensor in named_tensors(model).items() if name in names}


def _plain(value: Any) -> Any:
    return json.loads(value.to_json()) if hasattr(value, "to_json") else value


def _digest(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Of everything in the file: header, names, shapes, types and bytes."""
    whole = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        whole.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        whole.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
