"""Masked dense network == slim network, or a clear error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.errors import ProofError
from lightning_prune.structure.plan import NOWHERE, PruningPlan, layer_of, named_tensors, plain_name
from lightning_prune.structure.renormalising import Renormalising
from lightning_prune.structure.replica import arguments, quiet_room, replica
from lightning_prune.structure.rules.reduction import statistic
from lightning_prune.structure.surgery import check_fits, prune_
from lightning_prune.structure.watch import open_up, operator_name, rule_for, unknown

#: Largest departure allowed, relative to the largest output.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}


@dataclass(frozen=True)
class Proof:
    """How far the slim network departs from the masked dense one.

    Args:
        error: largest absolute difference over all outputs, divided by the largest absolute output.
        tolerance: what was allowed.
        outputs: number of values that were compared.
        modes: in which the networks ran, ``"eval"`` and, for a model in training mode, ``"train"`` (without dropout).
        precision: number format in which they ran.
    """

    error: float
    tolerance: float
    outputs: int
    modes: tuple[str, ...]
    precision: str


def masked_state(model: nn.Module, plan: PruningPlan) -> dict[str, Tensor]:
    """Copies of the parameters and buffers that the plan cuts, with zeros wherever it keeps nothing.

    Where the plan merges, what goes becomes instead a copy of what stands for it; whoever reads both stays as it is.
    Of a weight under weight normalisation only the length is set to zero: a direction of zeros would divide by zero.
    """
    tensors, directions = named_tensors(model), _directions(model)
    state: dict[str, Tensor] = {}
    with torch.no_grad():
        for (name, dim), positions in plan.kept.items():
            if directions.get(name) == dim:
                continue
            out = state[name] if name in state else tensors[name].detach().clone()
            gone = torch.ones(out.shape[dim], dtype=torch.bool, device=out.device)
            gone[torch.tensor(positions, device=out.device)] = False
            if (name, dim) in plan.merged:
                into = torch.tensor(plan.merged[name, dim], device=out.device)
                out = out if (name, dim) in plan.summed else out.index_select(dim, into.clamp_min(0))
                gone = into == NOWHERE
            state[name] = out.index_fill_(dim, gone.nonzero().flatten(), 0)
    return state


def _directions(model: nn.Module) -> dict[str, int]:
    """Weight-normalised directions -> the dim along which each has a length of its own."""
    found = {}
    for path, module in model.named_modules():
        prefix = f"{plain_name(path)}." if plain_name(path) else ""
        for name, steps in getattr(module, "parametrizations", {}).items():
            if isinstance(steps, nn.ModuleList) and isinstance(steps[0], _WeightNorm):
                found[f"{prefix}parametrizations.{name}.original1"] = steps[0].dim
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                found[f"{prefix}{hook.name}_v"] = hook.dim
    return found


def prove(
    model: nn.Module,
    plan: PruningPlan,
    inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
) -> Proof:
    """Run the masked dense network and the slim one on a real batch and compare all outputs.

    Both are copies; they run in double precision where the model can, without dropout. The model is left as it is.
    Statistics over channels that the plan names are taken over the kept channels in both.

    Args:
        model: the dense model.
        plan: what would go.
        inputs: a tuple is the forward's positional arguments; anything else is its only one.
        kwargs: the forward's keyword arguments.
        tolerance: largest relative departure allowed; by default 1e-8 in double and 1e-4 in single precision.

    Raises:
        ProofError: where they differ, naming the first module that departs.
        PlanError: where the plan does not fit the model.

    >>> from lightning_prune.structure import choose, trace
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    >>> proof = prove(net, choose(trace(net, torch.zeros(1, 4)), ratio=0.5), torch.randn(3, 4))
    >>> proof.error <= proof.tolerance, proof.outputs
    (True, 6)
    """
    check_fits(model, plan)
    args = arguments(inputs, kwargs)
    try:
        return _prove(model, plan, args, torch.float64, tolerance)
    except ProofError:
        raise
    except Exception:  # a model may insist on single precision in any words
        return _prove(model, plan, args, torch.float32, tolerance)


def _prove(model: nn.Module, plan: PruningPlan, args: Any, dtype: torch.dtype, tolerance: float | None) -> Proof:
    allowed = TOLERANCES[dtype] if tolerance is None else tolerance
    modes = ("eval", "train") if model.training else ("eval",)
    worst, count = 0.0, 0
    for mode in modes:
        masked, slim = _pair(model, plan, dtype, mode)
        outputs = _run(masked, args, dtype)
        try:
            slim_outputs = _run(slim, args, dtype)
        except Exception as error:
            message = " ".join(str(error).split())
            raise ProofError(f"The slim network does not run: {message[:300]}.") from error
        departure = _departures(outputs, slim_outputs)
        if not departure <= allowed and plan.renormalised:  # zeros alone do not tell channels from other dims
            masked, _ = _pair(model, plan, dtype, mode, slim.sizes)
            departure = _departures(_run(masked, args, dtype), slim_outputs)
        worst, count = max(worst, departure), count + sum(output.numel() for output in outputs)
        if not departure <= allowed:
            where = _first_departure(*_pair(model, plan, dtype, mode, slim.sizes), plan, args, dtype, allowed)
            raise ProofError(
                f"The slim network departs from the masked one by {departure:.1e} of its largest output "
                f"(allowed: {allowed:.0e}); {where}."
            )
    return Proof(worst, allowed, count, modes, str(dtype).removeprefix("torch."))


def _departures(outputs: list[Tensor], slim_outputs: list[Tensor]) -> float:
    """The largest departure of any output."""
    for dense, small in zip(outputs, slim_outputs, strict=True):
        if dense.shape != small.shape:
            raise ProofError(f"The slim network's output has shape {tuple(small.shape)}, not {tuple(dense.shape)}.")
    return max(map(_departure, outputs, slim_outputs), default=0.0)


def _pair(
    model: nn.Module, plan: PruningPlan, dtype: torch.dtype, mode: str, sizes: Iterable[torch.Size] = ()
) -> tuple[_Run, _Run]:
    """The masked and the slim network, ready to run.

    ``sizes``: of what the slim network takes statistics over, one after another, where that is known.
    """
    masked, slim = replica(model).to(dtype), replica(model).to(dtype)
    if mode == "eval":
        masked.eval(), slim.eval()
    tensors = named_tensors(masked)
    with torch.no_grad():
        for name, value in masked_state(masked, plan).items():
            tensors[name].copy_(value)
    prune_(slim, plan)
    return _Run(masked, Renormalising(plan, tensors, sizes)), _Run(slim, None)


@dataclass(frozen=True)
class _Run:
    network: nn.Module
    renormalising: Renormalising | None
    #: of what it takes statistics over, in the slim network
    sizes: list[torch.Size] = field(default_factory=list)


class _Fair(TorchDispatchMode):
    """No dropout, the same random numbers for the same shapes, and statistics over what stays."""

    def __init__(self, run: _Run) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.renormalising = run.renormalising
        self.sizes = run.sizes
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operator_name(func)
        if name.rstrip("_") in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"):
            return args[0]
        if name == "scaled_dot_product_attention" and len(args) > 4:
            args = (*args[:4], 0.0, *args[5:])
        if name == "scaled_dot_product_attention" and "dropout_p" in kwargs:
            kwargs = {**kwargs, "dropout_p": 0.0}
        if torch.Tag.nondeterministic_seeded in func.tags:
            torch.manual_seed(self.count)
            self.count += 1
        rule, anew = rule_for(func), self.renormalising
        if rule is None:
            opened = open_up(self, func, args, kwargs)
            if opened is not NotImplemented:
                return opened
        if anew is None and rule is statistic:
            self.sizes.append(args[0].shape)
        return func(*args, **kwargs) if anew is None else anew.run(func, name, rule or unknown, args, kwargs)


def _run(run: _Run, args: Any, dtype: torch.dtype) -> list[Tensor]:
    with _exact(), quiet_room(), _Fair(run):
        positional, named = _cast(args, dtype)
        output = run.network(*positional, **named)
    return [leaf.detach() for leaf in _leaves(output) if leaf.is_floating_point()]


def _leaves(output: Any) -> Iterator[Tensor]:
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, type)):
            yield from _leaves(vars(leaf))


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    def cast(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach().clone()
        return leaf.to(dtype) if leaf.is_floating_point() else leaf

    return pytree.tree_map(cast, tree)


@contextmanager
def _exact() -> Iterator[None]:
    """No shortened products on a GPU."""
    states = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    with torch.autocast(devices[-1], enabled=False), torch.autocast("cpu", enabled=False):
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = states


def _departure(masked: Tensor, slim: Tensor) -> float:
    """Largest difference relative to the largest value; infinite where either is not finite alone."""
    if masked.numel() == 0:
        return 0.0
    difference = (masked - slim).abs()
    same = torch.where(masked.isfinite() & slim.isfinite(), difference, torch.where(masked == slim, 0.0, torch.inf))
    scale = masked[masked.isfinite()].abs().max() if masked.isfinite().any() else masked.new_ones(())
    return float(same.max() / scale.clamp_min(torch.finfo(masked.dtype).tiny))


def _first_departure(masked: _Run, slim: _Run, plan: PruningPlan, args: Any, dtype: torch.dtype, allowed: float) -> str:
    """The first module in calling order whose kept outputs differ."""
    seen: list[list[tuple[str, Tensor]]] = [[], []]
    for run, log in zip((masked, slim), seen, strict=True):
        for name, module in run.network.named_modules():
            if name:
                module.register_forward_hook(_recorder(plain_name(name), log))
        _run(run, args, dtype)
    kept: dict[str, list[tuple[int, ...]]] = {}
    for (name, _), positions in plan.kept.items():
        kept.setdefault(layer_of(name), []).append(positions)
    for (name, dense), (_, small) in zip(*seen, strict=False):
        if (aligned := _aligned(dense, small, kept.get(name, []))) is not None and _departure(aligned, small) > allowed:
            return f"the first module that departs is {name!r}"
    return "the outputs of its modules agree where they can be compared"


def _recorder(name: str, log: list[tuple[str, Tensor]]) -> Callable[..., None]:
    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        for leaf in _leaves(output):
            if leaf.is_floating_point():
                log.append((name, leaf.detach().clone()))

    return record


def _aligned(dense: Tensor, small: Tensor, kept: list[tuple[int, ...]]) -> Tensor | None:
    """The dense output at the positions that the slim one has, where they are known."""
    apart = [dim for dim in range(dense.dim()) if dense.dim() == small.dim() and dense.shape[dim] != small.shape[dim]]
    if dense.shape == small.shape:
        return dense
    for positions in kept:
        if len(apart) == 1 and len(positions) == small.shape[apart[0]] and positions[-1] < dense.shape[apart[0]]:
            return dense.index_select(apart[0], torch.tensor(positions, device=dense.device))
    return None
