"""The only place where shapes change."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim import LBFGS, Optimizer

from lightning_prune.errors import PlanError
from lightning_prune.structure.elastic import nests, outgrown
from lightning_prune.structure.parting import housed, is_alone, reorder_, spare_for, worth_parting
from lightning_prune.structure.plan import NOWHERE, PruningPlan, named_modules, named_tensors, signature, submodule
from lightning_prune.structure.sparsity import Plan, SparsityPlan, mask_


class Cut(NamedTuple):
    """Which positions are taken along one dim and, where others are added to them, which to which."""

    kept: Tensor
    into: Tensor | None


Cuts = dict[int, Cut]


def prune_(model: nn.Module, plan: Plan, optimizers: Optimizer | Iterable[Optimizer] = ()) -> None:
    """Remove what the plan does not keep, in place.

    Single weights become zero where they are, and nothing else changes. For channels:

    Parameter objects keep their identity, ``requires_grad`` and ties, so optimisers go on training them; their state
    (momenta and averages of the parameter's shape) is cut along; gradients of what is cut are dropped. LBFGS begins
    anew, with a warning. Modules' own numbers (``out_channels``, ``num_features``, ``normalized_shape``, ...) follow.
    All or nothing: after a failure everything is as it was (interrupted while it tidies up, everything is slim). On the
    processor this takes little more memory than the model and the optimisers' slim state: parameters in memory that
    nobody else sees are cut in that memory.

    Args:
        model: the dense model that the plan fits.
        plan: what stays.
        optimizers: those that hold the model's parameters.

    Raises:
        PlanError: where the plan belongs to a model of other names or shapes.

    >>> from lightning_prune.structure import choose, trace
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    >>> weight = net[0].weight
    >>> prune_(net, choose(trace(net, torch.zeros(1, 4)), ratio=0.5), optimizer)
    >>> net, net[0].weight is weight
    (Sequential(
      (0): Linear(in_features=4, out_features=4, bias=True)
      (1): ReLU()
      (2): Linear(in_features=4, out_features=2, bias=True)
    ), True)
    """
    optimizers = (optimizers,) if isinstance(optimizers, Optimizer) else tuple(optimizers)
    if isinstance(plan, SparsityPlan):
        mask_(model, plan, optimizers)
        return
    check_fits(model, plan)
    cuts: dict[str, Cuts] = {}
    taken: dict[int, Tensor] = {}
    for (name, dim), positions in plan.kept.items():
        if id(positions) not in taken:  # members of one group share a tuple
            taken[id(positions)] = torch.tensor(positions)
        into = torch.tensor(plan.merged[name, dim]) if (name, dim) in plan.summed else None
        cuts.setdefault(name, {})[dim] = Cut(taken[id(positions)], into)
    resize_(model, cuts, plan.numbers, plan.joined, optimizers, sparing=True)


def resize_(
    model: nn.Module,
    cuts: Mapping[str, Cuts],
    numbers: Mapping[str, int],
    joined: Iterable[str] = (),
    optimizers: Sequence[Optimizer] = (),
    sparing: bool = False,
) -> None:
    """Take, along some dims of some tensors, just the positions named (a trial may name some of them repeatedly).

    ``sparing``: with little memory, where each position is named once at most.
    """
    tensors = named_tensors(model)
    modules = [(module, _is_depthwise(module)) for _, module in named_modules(model)]
    parted = _to_part(tensors, cuts) if sparing else {}
    layouts = [(parameter, _layout(parameter)) for parameter in parted.values()]
    with torch.no_grad(), _all_or_nothing() as undo:
        slim = {name: _cut(tensors[name], cut, merging=True) for name, cut in cuts.items() if name not in parted}
        homes = _homes_of_buffers(module for module, _ in modules)
        flat = [each for each in optimizers if isinstance(each, LBFGS) and _holds(each, cuts, tensors)]
        others = [each for each in optimizers if each not in flat]
        states = [_slim_state(optimizer, tensors[name], cut) for name, cut in cuts.items() for optimizer in others]
        _part([(parameter, cuts[name]) for name, parameter in parted.items()], undo)
        for name, tensor in slim.items():
            _replace(tensors[name], tensor, homes, undo)
        for state, new in (pair for pairs in states for pair in pairs):
            _update(state, new, undo)
        for optimizer in flat:
            _restart(optimizer, undo)
        for module, depthwise in modules:
            _renumber(module, depthwise, undo)
        for name, number in numbers.items():
            _set_number(model, name, number, undo)
        for module, twin in list(outgrown(model, joined)):
            _set(module, "__class__", twin, undo)
        for module, _ in modules:
            if isinstance(module, nn.TransformerEncoder) and not nests(module):
                _set(module, "use_nested_tensor", False, undo)
    _tidy(reversed(layouts))


def check_fits(model: nn.Module, plan: PruningPlan) -> None:
    """Raise :class:`PlanError`, naming the first tensor that does not fit, unless the plan is for such a model."""
    if isinstance(plan, SparsityPlan):
        raise PlanError("A plan of single weights cuts no channel and needs no proof; prune_ applies it as it is.")
    tensors = named_tensors(model)
    for (name, dim), size in plan.sizes.items():
        if name not in tensors:
            raise PlanError(f"The plan cuts {name!r}, which this {type(model).__name__} does not have.")
        shape = tuple(tensors[name].shape)
        if not 0 <= dim < len(shape) or shape[dim] != size:
            raise PlanError(f"The plan expects length {size} along dim {dim} of {name!r}, which has shape {shape}.")
    if plan.signature and plan.signature != signature(model):
        raise PlanError(f"The plan was made for another model than this {type(model).__name__} (signatures differ).")


def _cut(tensor: Tensor, cuts: Cuts, merging: bool) -> Tensor:
    """The kept positions, in fresh contiguous memory of the tensor's own layout."""
    out, device = tensor.detach(), tensor.device
    if tensor.is_meta:
        sizes = [len(cuts[dim].kept) if dim in cuts else size for dim, size in enumerate(tensor.shape)]
        return torch.empty(sizes, dtype=tensor.dtype, device=device, memory_format=_layout(tensor))
    for dim, (kept, into) in cuts.items():
        if merging and into is not None:
            into = into.to(device)
            whence = (into != NOWHERE).nonzero().flatten()
            out = torch.zeros_like(out).index_add_(dim, into[whence], out.index_select(dim, whence))
        out = out.index_select(dim, kept.to(device))
    # an optimiser's state under sparse gradients is sparse, too
    return out.contiguous(memory_format=_layout(tensor)) if out.layout == torch.strided else out


def _layout(tensor: Tensor) -> torch.memory_format:
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


@contextmanager
def _all_or_nothing() -> Iterator[list[Callable[[], None]]]:
    undo: list[Callable[[], None]] = []
    try:
        yield undo
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    undo.clear()  # the dense tensors are let go


def _to_part(tensors: Mapping[str, Tensor], cuts: Mapping[str, Cuts]) -> dict[str, nn.Parameter]:
    """The parameters that are to be cut within the model's memory, largest first."""
    summed = {name for name, cut in cuts.items() if any(into is not None for _, into in cut.values())}
    found = {name: p for name in cuts if isinstance(p := tensors[name], nn.Parameter) and is_alone(p)}
    names = sorted(found.keys() - summed, key=lambda name: (-found[name].nbytes, name))
    shares = [math.prod(len(kept) / found[name].shape[dim] for dim, (kept, _) in cuts[name].items()) for name in names]
    sizes = [(found[name].nbytes, round(found[name].nbytes * share)) for name, share in zip(names, shares, strict=True)]
    return {name: found[name] for name in names[worth_parting(sizes)]}


def _part(cuts: Sequence[tuple[nn.Parameter, Cuts]], undo: list[Callable[[], None]]) -> None:
    """Make slim tensors that are views of the memory of others, and no copy; the largest dense one comes first."""
    if not cuts:
        return
    spare = spare_for(cuts[0][0])
    for parameter, cut in cuts:
        dense = parameter.data
        whole = housed(dense, spare)
        orders = {dim: _first(kept.cpu(), dense.shape[dim]) for dim, (kept, _) in cut.items()}
        reorder_(whole, dense, orders)
        undo.append(partial(reorder_, dense, whole, {dim: order.argsort() for dim, order in orders.items()}))
        slim = whole
        for dim, (kept, _) in cut.items():
            slim = slim.narrow(dim, 0, len(kept))
        _swap(parameter, slim, undo)
        spare = dense


def _first(kept: Tensor, size: int) -> Tensor:
    """All positions of a dim, those that stay first."""
    goes = torch.ones(size, dtype=torch.bool, device=kept.device)
    goes[kept] = False
    return torch.cat([kept, goes.nonzero().flatten()])


def _tidy(layouts: Iterable[tuple[nn.Parameter, torch.memory_format]]) -> None:
    """Give every slim tensor memory of its own, and that of the dense ones back, smallest first."""
    for parameter, layout in layouts:
        try:
            parameter.data = parameter.data.clone(memory_format=layout)
        except RuntimeError:  # no memory for copies: a view is as good, only too large
            return


Homes = dict[int, list[tuple[dict[str, Tensor | None], str]]]


def _homes_of_buffers(modules: Iterable[nn.Module]) -> Homes:
    """Where each buffer is registered; a tied one lives in several places."""
    homes: Homes = {}
    for module in modules:
        for key, buffer in module._buffers.items():
            homes.setdefault(id(buffer), []).append((module._buffers, key))
    return homes


def _replace(old: Tensor, new: Tensor, homes: Homes, undo: list[Callable[[], None]]) -> None:
    if isinstance(old, nn.Parameter):
        _swap(old, new, undo)
        return
    for buffers, key in homes[id(old)]:
        _put(buffers, key, new, undo)


def _swap(parameter: nn.Parameter, new: Tensor, undo: list[Callable[[], None]]) -> None:
    old, gradient = parameter.data, parameter.grad

    def put(data: Tensor, grad: Tensor | None) -> None:
        # A dummy of another type in between resets the node that accumulates gradients of the old shape.
        other = torch.float64 if parameter.dtype != torch.float64 else torch.float32
        parameter.grad = None
        parameter.data = torch.empty(0, dtype=other, device=data.device)
        parameter.data = data
        parameter.grad = grad

    undo.append(lambda: put(old, gradient))
    put(new, None)


def _put(mapping: dict[Any, Any], key: Any, value: Any, undo: list[Callable[[], None]]) -> None:
    old = mapping[key]
    undo.append(lambda: mapping.__setitem__(key, old))
    mapping[key] = value


def _set(module: nn.Module, attribute: str, value: Any, undo: list[Callable[[], None]]) -> None:
    old = getattr(module, attribute)
    if old != value:
        undo.append(lambda: setattr(module, attribute, old))
        setattr(module, attribute, value)


def _set_number(model: nn.Module, name: str, number: int, undo: list[Callable[[], None]]) -> None:
    path, _, attribute = name.rpartition(".")
    if attribute.isdigit():
        path, _, row = path.rpartition(".")
        numbers = getattr(submodule(model, path), row)
        place = int(attribute)
        _set(submodule(model, path), row, type(numbers)([*numbers[:place], number, *numbers[place + 1 :]]), undo)
    else:
        _set(submodule(model, path), attribute, number, undo)


def _slim_state(optimizer: Optimizer, parameter: Tensor, cut: Cuts) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The optimiser's state of one parameter with its new contents: what has the parameter's shape is cut along.

    Merged positions keep the state of the one that stands for them. State of another shape (factored or blocked
    statistics) can't be cut; the optimiser starts it anew.
    """
    state = optimizer.state.get(parameter)
    if not state:
        return []
    held = [value for value in state.values() if isinstance(value, Tensor) and value.dim()]
    if any(value.shape != parameter.shape for value in held):
        return [(state, {})]
    whole = {key: _cut(v, cut, merging=False) if isinstance(v, Tensor) and v.dim() else v for key, v in state.items()}
    return [(state, whole)]


def _update(state: dict[str, Any], new: dict[str, Any], undo: list[Callable[[], None]]) -> None:
    old = dict(state)

    def back() -> None:
        state.clear()
        state.update(old)

    undo.append(back)
    state.clear()
    state.update(new)


def _holds(optimizer: Optimizer, names: Iterable[str], tensors: Mapping[str, Tensor]) -> bool:
    """Whether an optimiser moves any of the named tensors."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return any(id(tensors[name]) in held for name in names)


def _restart(optimizer: LBFGS, undo: list[Callable[[], None]]) -> None:
    """Drop a history of flat vectors over all parameters, in which nobody can tell the channels apart."""
    state, count = dict(optimizer.state), optimizer._numel_cache

    def back() -> None:
        optimizer.state.update(state)
        optimizer._numel_cache = count

    undo.append(back)
    optimizer.state.clear()
    optimizer._numel_cache = None
    warnings.warn("LBFGS begins anew after surgery: its history can't be cut along.", stacklevel=4)


def _is_depthwise(module: nn.Module) -> bool:
    groups = getattr(module, "groups", 1)
    return isinstance(groups, int) and groups > 1 and groups == getattr(module, "in_channels", None)


def _renumber(module: nn.Module, depthwise: bool, undo: list[Callable[[], None]]) -> None:
    """Read a module's own numbers off its tensors."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):  # its weight is a plain attribute, made anew before each forward
            hook(module, None)
    numbers = next((numbers for kinds, numbers in NUMBERS if isinstance(module, kinds)), None)
    if numbers is not None:
        with _looking(module):
            for attribute, value in numbers(module, depthwise).items():
                _set(module, attribute, value, undo)
    if isinstance(module, nn.RNNBase):
        module.flatten_parameters()


@contextmanager
def _looking(module: nn.Module) -> Iterator[None]:
    """Parametrized weights are computed when they are read; in evaluation mode that leaves no trace."""
    parametrizations = module._modules.get("parametrizations")
    steps = [] if parametrizations is None else list(parametrizations.modules())
    modes = [step.training for step in steps]
    for step in steps:
        step.training = False
    try:
        yield
    finally:
        for step, mode in zip(steps, modes, strict=True):
            step.training = mode


def _convolution(module: Any, depthwise: bool) -> dict[str, Any]:
    first, second = module.weight.shape[:2]
    if module.transposed:
        groups = first if depthwise else module.groups
        return {"in_channels": first, "out_channels": second * groups, "groups": groups}
    groups = module.groups
    if depthwise:
        groups = first // (module.out_channels // module.in_channels)
    return {"in_channels": second * groups, "out_channels": first, "groups": groups}


def _batch_norm(module: Any, depthwise: bool) -> dict[str, Any]:
    for tensor in (module.weight, module.running_mean):
        if tensor is not None:
            return {"num_features": tensor.shape[0]}
    return {}


def _of_weight(attributes: dict[str, int]) -> Callable[[Any, bool], dict[str, Any]]:
    return lambda module, depthwise: {name: module.weight.shape[dim] for name, dim in attributes.items()}


def _normalized_shape(module: Any, depthwise: bool) -> dict[str, Any]:
    return {"normalized_shape": tuple(module.weight.shape)} if module.weight is not None else {}


def _group_norm(module: Any, depthwise: bool) -> dict[str, Any]:
    if module.weight is None:
        return {}
    channels = module.weight.shape[0]
    groups = channels if module.num_groups == module.num_channels else module.num_groups
    return {"num_channels": channels, "num_groups": groups}


def _attention(module: Any, depthwise: bool) -> dict[str, Any]:
    if module.in_proj_weight is None:
        queries, keys, values = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
        return {"embed_dim": queries.shape[1], "kdim": keys.shape[1], "vdim": values.shape[1]}
    return dict.fromkeys(("embed_dim", "kdim", "vdim"), module.in_proj_weight.shape[1])


def _recurrent(module: Any, depthwise: bool) -> dict[str, Any]:
    return {"input_size": module.weight_ih_l0.shape[1]}


#: Module types -> how their numbers follow from their tensors; subclasses are covered by their bases.
NUMBERS: tuple[tuple[tuple[type, ...], Callable[[Any, bool], dict[str, Any]]], ...] = (
    ((nn.modules.conv._ConvNd,), _convolution),
    ((nn.Linear,), _of_weight({"out_features": 0, "in_features": 1})),
    ((nn.modules.batchnorm._NormBase,), _batch_norm),
    ((nn.LayerNorm, nn.RMSNorm), _normalized_shape),
    ((nn.GroupNorm,), _group_norm),
    ((nn.Embedding, nn.EmbeddingBag), _of_weight({"num_embeddings": 0, "embedding_dim": 1})),
    ((nn.PReLU,), _of_weight({"num_parameters": 0})),
    ((nn.RNNBase,), _recurrent),
    ((nn.MultiheadAttention,), _attention),
)
