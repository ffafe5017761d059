"""An independent judge of any structural cut: it asks the tensors themselves which of their elements survived.

Before the cut the judge writes every element's own flat index into every parameter and buffer of a copy. After the cut
each surviving element says where it came from, whatever engine did the cutting. From that alone the judge builds the
masked dense network (all removed elements zero) and demands that the slim network computes the same, in float64.
It knows no graph, no plan and no rule of the library.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tests.structure.averages import HeardAverages, KeptAverages, match
from tests.structure.standardised import KeptFilters

Build = Callable[[], nn.Module]
Cut = Callable[[nn.Module], None]
Kept = tuple[Tensor, ...]  # per dim of one tensor: the dense coordinates that are still there

TOLERANCE = 1e-9  # relative, in float64


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the judge saw: the worst relative difference and the elements of all parameters before and after."""

    error: float
    before: int
    after: int

    @property
    def left(self) -> float:
        """Fraction of the parameters that is left, in ``(0, 1]``."""
        return self.after / self.before


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under all of its names, ties included."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    return found


def parameter_count(model: nn.Module) -> int:
    """Elements of all parameters, ties counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def replicate(model: nn.Module, build: Build) -> nn.Module:
    """A second model with the same weights; by ``build`` where Python cannot copy (old-style weight norm)."""
    try:
        return copy.deepcopy(model)
    except RuntimeError:
        twin = build()
    dtype = next((value.dtype for value in model.parameters()), torch.float64)
    twin.to(dtype)
    source = tensors(model)
    for name, value in tensors(twin).items():
        value.copy_(source[name])
        value.requires_grad_(source[name].requires_grad)
    for module, other in zip(twin.modules(), model.modules(), strict=True):
        module.training = other.training
    return twin


def switch_off_chance_(model: nn.Module) -> None:
    """Dropout and stochastic depth with probability zero: their draws depend on shapes."""
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(module.__dict__.get(name), float):
                setattr(module, name, 0.0)


@torch.no_grad()
def randomise_(model: nn.Module, seed: int) -> None:
    """Weights, biases and running statistics in general position, so that no mistake hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        vector = parameter.numel() == max(parameter.shape, default=1)
        if vector:
            low, high = (-0.5, 0.5) if "bias" in name.rpartition(".")[2] else (0.4, 1.4)
        else:
            high = math.sqrt(4.5 * parameter.shape[0] / parameter.numel())  # variance 1.5 over the fan-in
            low = -high
        parameter.uniform_(low, high, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.3, 0.3, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5, generator=generator)


@torch.no_grad()
def write_indices_(model: nn.Module) -> None:
    """Every element becomes its own flat index; booleans and small types grow to one that can hold it."""
    for module in model.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and not buffer.is_floating_point() and buffer.dtype != torch.int64:
                module._buffers[name] = buffer.to(torch.int64)
    for value in {id(value): value for value in tensors(model).values()}.values():
        if value.is_contiguous():
            torch.arange(value.numel(), dtype=value.dtype, out=value.view(-1))
        else:
            value.copy_(torch.arange(value.numel(), dtype=value.dtype).reshape(value.shape))


def ask(dense: nn.Module, copy_of_it: nn.Module, cut: Cut) -> dict[str, Kept]:
    """Tag the copy, cut it, and read what survived."""
    write_indices_(copy_of_it)
    cut(copy_of_it)
    return read_survivors(dense, copy_of_it)


def read_survivors(dense: nn.Module, tagged: nn.Module) -> dict[str, Kept]:
    """Which coordinates each tensor kept, per dim; they must form a grid in the dense order."""
    shapes = {name: value.shape for name, value in tensors(dense).items()}
    cut = tensors(tagged)
    assert shapes.keys() == cut.keys(), f"names changed: {sorted(shapes.keys() ^ cut.keys())}"
    return {name: _grid(name, cut[name].detach(), shape) for name, shape in shapes.items()}


def _grid(name: str, tags: Tensor, shape: torch.Size) -> Kept:
    assert tags.dim() == len(shape), f"{name}: {tuple(shape)} became {tuple(tags.shape)}"
    if not shape:
        return ()
    assert tags.numel() > 0, f"{name}: nothing is left of {tuple(shape)}, only {tuple(tags.shape)}"
    coordinates = torch.unravel_index(tags.to(torch.int64), shape)
    kept = []
    for dim, coordinate in enumerate(coordinates):
        line = coordinate.movedim(dim, 0).reshape(tags.shape[dim], -1)[:, 0]
        view = [1] * tags.dim()
        view[dim] = -1
        assert torch.equal(coordinate, line.reshape(view).expand_as(coordinate)), f"{name}: dim {dim} is no grid"
        assert bool((line.diff() > 0).all()), f"{name}: dim {dim} is not in the dense order: {line.tolist()}"
        kept.append(line)
    return tuple(kept)


def gather(value: Tensor, kept: Kept) -> Tensor:
    """The sub-grid of a tensor."""
    for dim, index in enumerate(kept):
        if len(index) < value.shape[dim]:
            value = value.index_select(dim, index)
    return value


def lines(shape: torch.Size, kept: Kept) -> list[Tensor]:
    """One vector per dim, broadcastable to the tensor: one where a coordinate survives, zero elsewhere."""
    found = []
    for dim, index in enumerate(kept):
        line = torch.zeros(shape[dim], dtype=torch.float64)
        line[index] = 1.0
        found.append(line.reshape([-1 if d == dim else 1 for d in range(len(shape))]))
    return found


@torch.no_grad()
def mask_(model: nn.Module, kept: Mapping[str, Kept]) -> None:
    """Zero every removed element, but no row of a weight-norm direction: only its length may be zero (else 0/0)."""
    named = tensors(model)
    for name, value in named.items():
        if value.dim() and value.is_floating_point():
            length = _weight_norm_length(name, named)
            for dim, line in enumerate(lines(value.shape, kept[name])):
                if not line.all() and (length is None or length.shape[dim] == 1):
                    value.mul_(line.to(value.dtype))


def _weight_norm_length(name: str, named: Mapping[str, Tensor]) -> Tensor | None:
    for direction, length in (("original1", "original0"), ("_v", "_g")):
        partner = name.removesuffix(direction) + length
        if name.endswith(direction) and partner in named:
            return named[partner]
    return None


NORMS = {
    nn.functional.layer_norm: "layer",
    torch.layer_norm: "layer",
    nn.functional.group_norm: "group",
    torch.group_norm: "group",
    nn.functional.rms_norm: "rms",
    torch.rms_norm: "rms",
}


class Listening(TorchFunctionMode):
    """Keeps the inputs of every layer norm and group norm, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[tuple[Tensor, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in NORMS:
            given = _arguments(func, args, kwargs)
            self.inputs.append((given["input"].detach(), given.get("num_groups")))
            with torch._C.DisableTorchFunction():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _arguments(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    second = "num_groups" if NORMS[func] == "group" else "normalized_shape"
    names = ("input", second, "weight", *(() if NORMS[func] == "rms" else ("bias",)), "eps")
    return {**dict(zip(names, args, strict=False)), **(kwargs or {})}


class KeptNorms(TorchFunctionMode):
    """Layer norm and group norm take mean and variance over the kept channels alone.

    Which channels were kept is read from the norm's own weight. A norm without weights compares the values that the
    slim network saw at the same call with its own.
    """

    def __init__(self, model: nn.Module, kept: Mapping[str, Kept], heard: Sequence[tuple[Tensor, Any]]) -> None:
        super().__init__()
        named = tensors(model)
        self.kept = {id(value): (value.shape, kept[name]) for name, value in named.items()}
        self.heard: Iterator[tuple[Tensor, Any]] = iter(heard)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in NORMS:
            return func(*args, **(kwargs or {}))
        slim, slim_groups = next(self.heard)
        with torch._C.DisableTorchFunction():
            return self._norm(NORMS[func], _arguments(func, args, kwargs), slim, slim_groups)

    def _norm(self, kind: str, given: dict[str, Any], slim: Tensor, slim_groups: Any) -> Tensor:
        value, weight, bias = given["input"], given.get("weight"), given.get("bias")
        eps = given.get("eps", 1e-5)
        mask = None
        if id(weight) in self.kept:
            shape, index = self.kept[id(weight)]
            mask = math.prod(lines(shape, index), start=torch.ones(shape, dtype=torch.float64))
        if kind == "rms":
            mask = match(value, slim, [value.dim() - 1]).reshape(-1) if mask is None else mask
            assert len(mask) == value.shape[-1]
            eps = torch.finfo(value.dtype).eps if eps is None else eps
            squares = (value.square() * mask).sum(-1, keepdim=True) / mask.sum()
            return value / (squares + eps).sqrt() * weight
        if kind == "layer":
            dims = len(given["normalized_shape"])
            if mask is None:
                mask = match(value, slim, range(value.dim() - dims, value.dim()))
                mask = mask.reshape(mask.shape[-dims:])
            scaled = _standardise(value, mask.expand(value.shape[-dims:]), tuple(range(-dims, 0)), eps)
            scaled = scaled if weight is None else scaled * weight
            return scaled if bias is None else scaled + bias
        groups = given["num_groups"]
        mask = (match(value, slim, [1], groups if groups == slim_groups else 1) if mask is None else mask).reshape(-1)
        grouped = value.reshape(len(value), groups, value.shape[1] // groups, -1)
        spread = mask.reshape(1, groups, -1, 1).expand_as(grouped)
        scaled = _standardise(grouped, spread, (2, 3), eps).reshape(value.shape)
        shape = [-1 if dim == 1 else 1 for dim in range(value.dim())]
        scaled = scaled if weight is None else scaled * weight.reshape(shape)
        return scaled if bias is None else scaled + bias.reshape(shape)


def _standardise(value: Tensor, mask: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    count = mask.sum(dims, keepdim=True).clamp(min=1)
    mean = (value * mask).sum(dims, keepdim=True) / count
    variance = ((value - mean).square() * mask).sum(dims, keepdim=True) / count
    return (value - mean) / (variance + eps).sqrt()


def leaves(output: Any) -> list[Tensor]:
    """All tensors of an output, however it is nested; dataclasses are looked into."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf.detach())
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += leaves([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
    return found


def difference(expected: Any, actual: Any) -> float:
    """Worst relative difference over all output tensors; shapes must agree and values be finite and alive."""
    wanted, found = leaves(expected), leaves(actual)
    assert wanted and len(wanted) == len(found), f"{len(wanted)} outputs became {len(found)}"
    worst = 0.0
    for left, right in zip(wanted, found, strict=True):
        assert left.shape == right.shape, f"output {tuple(left.shape)} became {tuple(right.shape)}"
        left, right = left.to(torch.float64), right.to(torch.float64)
        scale = float(left.abs().max())
        assert math.isfinite(scale) and scale > 0, f"the masked network's output has magnitude {scale}"
        worst = max(worst, float((left - right).abs().max()) / scale)
        assert math.isfinite(worst), "the slim network's output is not finite"
    return worst


def as_double(inputs: Any) -> Any:
    """The same inputs with every float in float64, each tensor a copy of its own."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().clone().to(torch.float64 if leaf.is_floating_point() else leaf.dtype)
        return leaf

    return pytree.tree_map(convert, inputs)


class InDouble(TorchFunctionMode):
    """What a model casts to single precision by itself is cast to double precision instead."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (Tensor.double if func is Tensor.float else func)(*args, **(kwargs or {}))


def run(model: nn.Module, inputs: Any, kwargs: Mapping[str, Any] | None) -> Any:
    """One forward pass; a tuple holds positional arguments, anything else is the only one."""
    inputs = as_double(inputs if isinstance(inputs, tuple) else (inputs,))
    with InDouble():
        return model(*inputs, **as_double(dict(kwargs or {})))


def check_numbers(model: nn.Module) -> None:
    """The numbers that modules say about themselves agree with their weights."""
    for name, module in model.named_modules():
        said, real = _numbers(module)
        assert said == real, f"{name}: {type(module).__name__} says {said}, its weights say {real}"


def _numbers(module: nn.Module) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    if isinstance(module, nn.modules.conv._ConvNd):
        said = (module.out_channels, module.in_channels)
        first, second = module.weight.shape[:2]
        swapped = (second * module.groups, first)
        return said, swapped if module.transposed else (first, second * module.groups)
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features), tuple(module.weight.shape)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        held = module.weight if module.weight is not None else module.running_mean
        return ((), ()) if held is None else ((module.num_features,), tuple(held.shape))
    if isinstance(module, nn.LayerNorm) and module.weight is not None:
        return tuple(module.normalized_shape), tuple(module.weight.shape)
    if isinstance(module, nn.GroupNorm) and module.weight is not None:
        return (module.num_channels, 0), (len(module.weight), module.num_channels % module.num_groups)
    if isinstance(module, nn.MultiheadAttention):
        first = module.q_proj_weight if module.in_proj_weight is None else module.in_proj_weight
        said = (module.embed_dim, module.num_heads * module.head_dim)
        return said, (first.shape[1], module.out_proj.weight.shape[1])
    if isinstance(module, nn.PReLU):
        return (module.num_parameters,), tuple(module.weight.shape)
    return (), ()


def check_identity(model: nn.Module, cut: Cut) -> None:
    """Cut, and see that every Parameter object, every tie and every ``requires_grad`` is still there."""
    before = {name: (id(value), value.requires_grad) for name, value in model.named_parameters(remove_duplicate=False)}
    cut(model)
    after = {name: (id(value), value.requires_grad) for name, value in model.named_parameters(remove_duplicate=False)}
    changed = [name for name in before if before[name] != after.get(name)]
    assert before == after, f"other Parameter objects after the cut: {changed or sorted(after.keys() - before.keys())}"


def _just_cut(model: nn.Module, cut: Cut) -> None:
    cut(model)


def judge(
    build: Build,
    cut: Cut,
    inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    modes: Sequence[bool] = (False, True),
    tolerance: float = TOLERANCE,
    objects: bool = True,
) -> Verdict:
    """Cut a model and demand that the slim network equals the masked dense one.

    Args:
        build: makes a fresh dense model; all weights are drawn anew.
        cut: cuts a model of that kind in place, always in the same way.
        inputs: a tuple of positional arguments, or the only one; batch size at least 2 for training mode.
        kwargs: keyword arguments.
        seed: of the weights.
        modes: values of ``training`` to run in, in this order.
        tolerance: relative, per output tensor.
        objects: whether Parameters must be the same objects as before.

    Returns:
        Worst difference and parameter counts.

    Raises:
        AssertionError: naming what went wrong.
    """
    dense = build().double()
    randomise_(dense, seed)
    switch_off_chance_(dense)
    shapes = {name: value.shape for name, value in dense.named_buffers()}
    kept = ask(dense, replicate(dense, build), cut)
    slim = replicate(dense, build)
    (check_identity if objects else _just_cut)(slim, cut)
    _check_values(dense, slim, kept)
    before, after = parameter_count(dense), parameter_count(slim)
    mask_(dense, kept)
    worst = 0.0
    for training in modes:
        worst = max(worst, _departure(dense.train(training), slim.train(training), kept, inputs, kwargs))
    assert worst <= tolerance, f"the slim network departs from the masked one by {worst:.3g} of the output's magnitude"
    _check_buffers(dense, slim, kept, shapes, tolerance)
    check_numbers(slim)
    return Verdict(worst, before, after)


def _departure(dense: nn.Module, slim: nn.Module, kept: Mapping[str, Kept], inputs: Any, kwargs: Any) -> float:
    state = torch.random.get_rng_state()
    with Listening() as heard, HeardAverages() as averages:
        actual = run(slim, inputs, kwargs)
    torch.random.set_rng_state(state)
    with KeptNorms(dense, kept, heard.inputs), KeptAverages(averages.inputs), KeptFilters(dense, kept):
        expected = run(dense, inputs, kwargs)
    return difference(expected, actual)


def _check_values(dense: nn.Module, slim: nn.Module, kept: Mapping[str, Kept]) -> None:
    cut = tensors(slim)
    for name, value in tensors(dense).items():
        same = torch.equal(gather(value.detach(), kept[name]), cut[name].detach())
        assert same, f"{name}: other values after the cut"


def _check_buffers(
    dense: nn.Module, slim: nn.Module, kept: Mapping[str, Kept], shapes: Mapping[str, torch.Size], tolerance: float
) -> None:
    """Running statistics that training mode moved must have moved alike; and what a pass has made anew is whole."""
    cut = dict(slim.named_buffers())
    for name, value in dense.named_buffers():
        if value.is_floating_point() and value.numel():
            expected = gather(value, kept[name]) if value.shape == shapes[name] else value
            assert cut[name].shape == expected.shape, f"{name}: shape {tuple(cut[name].shape)}"
            limit = tolerance * max(1.0, float(expected.abs().max()))
            error = float((expected - cut[name]).abs().max())
            assert error <= limit, f"{name}: running statistics depart by {error:.3g}"
