"""A network for other runtimes, compared with the original before it gets its name."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from lightning_prune.errors import ConfigurationError, ExportError
from lightning_prune.reports.exported import Export
from lightning_prune.reports.files import add_export, read_report
from lightning_prune.reports.silence import silence
from lightning_prune.structure.batches import resized, sample_count
from lightning_prune.structure.replica import arguments, quiet_room, replica, to_device, uncompiled

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Runner = Callable[[Inputs], list[Tensor]]
Writer = Callable[[nn.Module, Inputs, Any, Path], tuple[Runner, dict[str, str], int | None]]


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    format: str = "onnx",
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
    report: str | os.PathLike[str] | None = None,
) -> Export:
    """Write a model in evaluation mode as ONNX or as a ``torch.export`` archive, run the file, and compare.

    The file appears under its name when it has been compared, not before. Works on a copy on the CPU.

    Args:
        model: any module that ``torch.export`` can capture.
        path: of the file.
        example_inputs: a tuple is the forward's positional arguments; anything else is its only one. ``None`` takes
            the LightningModule's ``example_input_array``.
        kwargs: the forward's keyword arguments.
        format: ``"onnx"`` (run by onnxruntime for the comparison), or ``"torch_export"``.
        dynamic_batch: whether the file takes any number of samples. It is compared with the given number (at least
            two) and with one more then; without, with the given number only.
        tolerance: largest difference that is allowed, relative to the largest output.
        report: the ``report.json`` of the run that made the model, as in ``StructuralPruning.report_path``: the result
            is named there and on the page beside it.

    Raises:
        ConfigurationError: an unknown format, no example input, no such report, or a package that is missing.
        ExportError: the model can't be captured, or the file computes something else; nothing is written.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     exported = export(nn.Linear(8, 4), f"{folder}/a.pt2", torch.zeros(2, 8), format="torch_export")
    >>> exported.batches, exported.error < exported.tolerance
    ((2, 3), True)
    """
    if format not in _WRITERS:
        raise ConfigurationError(f"format={format!r} must be one of {', '.join(_WRITERS)}.")
    if not tolerance > 0:
        raise ConfigurationError(f"tolerance={tolerance} must be positive.")
    if report is not None:
        read_report(report)
    inputs = _inputs_of(model, example_inputs, kwargs)
    samples = _samples(inputs)
    batches: tuple[int, ...] = (samples,)
    if dynamic_batch:
        samples = max(samples, 2)  # a batch of one is taken for a constant
        inputs, batches = resized(inputs, samples), (samples, samples + 1)
    network = uncompiled(replica(model, "cpu")).eval()
    target = Path(path)
    if not target.parent.is_dir():
        raise ExportError(f"The {format} file can't be written to {target}: there is no folder {target.parent}.")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        draft = Path(folder) / target.name
        with quiet_room(), torch.no_grad(), silence("torch.onnx"), silence("onnxscript"):
            try:
                shapes = _dynamic_shapes(network, inputs) if dynamic_batch else None
                run, versions, opset = _WRITERS[format](network, inputs, shapes, draft)
                error = max(_error(network, run, resized(inputs, size)) for size in batches)
            except ConfigurationError:
                raise
            except Exception as failure:  # whatever the exporter says, in one line
                raise ExportError(_sentence(network, format, failure, dynamic_batch)) from failure
        if not error <= tolerance:
            raise ExportError(
                f"The {format} file departs from the model by {error:.1e} of the largest output, more than"
                f" tolerance={tolerance:g}; it was not written."
            )
        size = draft.stat().st_size
        draft.replace(target)
    exported = Export(format, target.name, size, error, tolerance, batches, versions, opset)
    if report is not None:
        add_export(report, exported)
    return exported


def _sentence(network: nn.Module, format: str, failure: Exception, dynamic_batch: bool) -> str:
    lines = [line.strip().rstrip(".") for line in str(failure).splitlines() if line.strip()]
    said = f"{type(failure).__name__}: {(lines or ['no reason given'])[0][:200]}"
    hint = "; dynamic_batch=False keeps the number of samples" if dynamic_batch else ""
    return f"{type(network).__name__} can't be written as {format}: {said}{hint}."


def _write_onnx(
    network: nn.Module, inputs: Inputs, shapes: Any, draft: Path
) -> tuple[Runner, dict[str, str], int | None]:
    _require("onnx", "onnxruntime", "onnxscript")
    import onnxruntime

    args, kwargs = inputs
    program = torch.onnx.export(
        network, args, draft, kwargs=kwargs, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(draft), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(inputs: Inputs) -> list[Tensor]:
        values = (tensor.numpy() for tensor in _tensors(_bound(network, inputs)))
        return [torch.as_tensor(each) for each in session.run(None, dict(zip(names, values, strict=True)))]

    opset = None if program is None else program.model.opset_imports.get("")
    return run, _versions("torch", "onnx", "onnxruntime", "onnxscript"), opset


def _write_torch_export(
    network: nn.Module, inputs: Inputs, shapes: Any, draft: Path
) -> tuple[Runner, dict[str, str], int | None]:
    args, kwargs = inputs
    torch.export.save(torch.export.export(network, args, kwargs, dynamic_shapes=shapes), draft)
    loaded = torch.export.load(draft).module()

    def run(inputs: Inputs) -> list[Tensor]:
        return _tensors(loaded(*inputs[0], **inputs[1]))

    return run, _versions("torch"), None


_WRITERS: dict[str, Writer] = {"onnx": _write_onnx, "torch_export": _write_torch_export}


def _inputs_of(model: nn.Module, example_inputs: Any, kwargs: Mapping[str, Any] | None) -> Inputs:
    if example_inputs is None and not kwargs:
        example_inputs = getattr(model, "example_input_array", None)
        if example_inputs is None:
            raise ConfigurationError(
                f"Give example_inputs: this {type(model).__name__} has no example_input_array to fall back on."
            )
        if isinstance(example_inputs, Mapping):
            example_inputs, kwargs = (), dict(example_inputs)
    inputs: Inputs = to_device(arguments(() if example_inputs is None else example_inputs, kwargs), "cpu")
    return inputs


def _samples(inputs: Inputs) -> int:
    found = sample_count(inputs)
    if found is None:
        raise ConfigurationError("The example inputs hold no tensor with samples along its first dim.")
    return found


def _bound(network: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The forward's arguments by their names, in its own order."""
    bound: dict[str, Any] = inspect.signature(network.forward).bind(*inputs[0], **inputs[1]).arguments
    return bound


def _dynamic_shapes(network: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Which dims may vary: the first of all tensors that hold as many samples as the first tensor."""
    samples = _samples(inputs)

    def free(leaf: Any) -> Any:
        has_samples = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == samples
        return {0: Dim.DYNAMIC} if has_samples else None

    return {name: pytree.tree_map(free, value) for name, value in _bound(network, inputs).items()}


def _error(network: nn.Module, run: Runner, inputs: Inputs) -> float:
    """Largest difference over all outputs, relative to the largest value; infinite where they don't match at all."""
    wanted, found = _tensors(network(*inputs[0], **inputs[1])), run(inputs)
    if [tensor.shape for tensor in wanted] != [tensor.shape for tensor in found]:
        return float("inf")
    a, b = (torch.cat([torch.zeros(1).double(), *(each.double().flatten() for each in x)]) for x in (wanted, found))
    apart = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(torch.inf).norm(torch.inf)
    largest = torch.where(a.isfinite(), a, 0.0).norm(torch.inf)
    return float(apart / largest) if largest else float(apart)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _require(*packages: str) -> None:
    import importlib.util

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"ONNX needs {', '.join(missing)}, which is not installed: pip install 'lightning-prune[export]'."
        )


def _versions(*packages: str) -> dict[str, str]:
    return {name: version(name) for name in packages}
