"""Single weights that go, as data, and the only place where they are set to zero."""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.errors import PlanError
from lightning_prune.structure.bits import Bits
from lightning_prune.structure.plan import Member, PruningPlan, layer_of, named_tensors, signature

VERSION = 1


@dataclass(frozen=True)
class SparsityPlan:
    """Which single weights stay; the others are zero. Shapes don't change.

    Args:
        kept: parameter name -> the positions that stay in the flattened parameter.
        shapes: the same names -> shape of the parameter.
        signature: of the model that this plan fits, see :func:`~lightning_prune.structure.signature`.

    Raises:
        PlanError: a parameter keeps nothing, or its bitmap has another size.

    >>> kept = Bits.of(torch.tensor([True, False, False, False]))
    >>> plan = SparsityPlan({"0.weight": kept}, {"0.weight": (2, 2)}, "")
    >>> print(plan)
    0  4 -> 1
    >>> plan.sparsity(), SparsityPlan.from_json(plan.to_json()) == plan
    ({'0': 0.75}, True)
    """

    kept: Mapping[str, Bits]
    shapes: Mapping[str, tuple[int, ...]]
    signature: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", dict(sorted(self.kept.items())))
        shapes = {name: tuple(int(size) for size in shape) for name, shape in sorted(self.shapes.items())}
        object.__setattr__(self, "shapes", shapes)
        if self.kept.keys() != self.shapes.keys():
            raise PlanError("A sparsity plan needs the shape of exactly the parameters that it masks.")
        for name, bits in self.kept.items():
            if bits.size != math.prod(self.shapes[name]):
                raise PlanError(f"The bitmap of {name!r} has {bits.size} entries, its shape is {self.shapes[name]}.")
            if not len(bits):
                raise PlanError(f"The plan removes all {bits.size} weights of {name!r}; at least one must stay.")

    def weights(self) -> dict[str, tuple[int, int]]:
        """Layer (or parameter, where it isn't the layer's ``weight``) -> number of weights before and left."""
        return {label_of(name): (bits.size, len(bits)) for name, bits in self.kept.items()}

    def sparsity(self) -> dict[str, float]:
        """Layer -> fraction of its weights that is zero."""
        return {label: 1 - left / size for label, (size, left) in self.weights().items()}

    def lengths(self) -> dict[Member, int]:
        """As :meth:`PruningPlan.lengths`: no length changes."""
        return {}

    def masks(self, model: nn.Module) -> dict[nn.Parameter, Tensor]:
        """Parameter -> what stays, in its shape, on its device, in its memory layout; boolean."""
        check_masks(model, self)
        tensors, found = named_tensors(model), dict[nn.Parameter, Tensor]()
        for name, bits in self.kept.items():
            parameter: Any = tensors[name]
            mask = bits.mask(parameter.device).view(parameter.shape)
            found[parameter] = torch.empty_like(parameter, dtype=torch.bool, requires_grad=False).copy_(mask)
        return found

    def diff(self, other: SparsityPlan) -> str:
        """The layers whose weights differ, one a line; empty where the plans agree."""
        lines = []
        for name in sorted(self.kept.keys() | other.kept.keys()):
            mine, theirs = self.kept.get(name), other.kept.get(name)
            if mine is None or theirs is None or mine.size != theirs.size:
                lines.append(f"{name}: masked in one of them only")
            elif mine != theirs:
                apart = int((mine.mask() ^ theirs.mask()).sum())
                lines.append(f"{name}: {len(mine)} -> {len(theirs)} of {mine.size}, {apart} weights differ")
        return "\n".join(lines)

    def outline(self) -> dict[str, Any]:
        """All but the bitmaps, as plain values."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return {"version": VERSION, "signature": self.signature, "shapes": shapes}

    @classmethod
    def from_outline(cls, outline: Mapping[str, Any], packed: Mapping[str, bytes]) -> SparsityPlan:
        """The plan of an :meth:`outline` and the bitmaps that it lacks.

        Raises:
            PlanError: where they are no plan, or one of another version.
        """
        try:
            if type(outline["version"]) is not int or outline["version"] != VERSION:
                raise PlanError(f"This plan has version {outline['version']!r}; this library reads version {VERSION}.")
            if not isinstance(outline["signature"], str):
                raise PlanError(f"The signature of a sparsity plan must be text, not {outline['signature']!r}.")
            shapes = {name: tuple(shape) for name, shape in outline["shapes"].items()}
            kept = {name: Bits(math.prod(shape), packed[name]) for name, shape in shapes.items()}
            return cls(kept, shapes, outline["signature"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"This is not a sparsity plan: {type(error).__name__} {error}.") from error

    def to_json(self) -> str:
        """Sorted, versioned JSON; the bitmaps in base64."""
        kept = {name: base64.b64encode(bits.packed).decode() for name, bits in self.kept.items()}
        return json.dumps({**self.outline(), "bitmaps": kept}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> SparsityPlan:
        """Read what :meth:`to_json` wrote.

        Raises:
            PlanError: where the text is no sparsity plan, or one of another version.
        """
        try:
            whole = json.loads(text)
            packed = {name: base64.b64decode(bits, validate=True) for name, bits in whole["bitmaps"].items()}
        except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
            raise PlanError(f"This is not a sparsity plan: {type(error).__name__} {error}.") from error
        return cls.from_outline(whole, packed)

    def __hash__(self) -> int:
        return hash((*self.kept.items(), self.signature))

    def __str__(self) -> str:
        rows = self.weights()
        wide = max(map(len, rows), default=0)
        return "\n".join(f"{layer:<{wide}}  {before} -> {left}" for layer, (before, left) in rows.items())


Plan: TypeAlias = PruningPlan | SparsityPlan


def plan_from_json(text: str) -> Plan:
    """Read a plan of either kind.

    Raises:
        PlanError: where the text is none, or one of another version.
    """
    try:
        is_sparsity = "bitmaps" in json.loads(text)
    except (TypeError, ValueError):
        is_sparsity = False
    return SparsityPlan.from_json(text) if is_sparsity else PruningPlan.from_json(text)


def label_of(parameter: str) -> str:
    """The layer's name for its ``weight``; other parameters go by their own.

    >>> label_of("block.conv.weight"), label_of("attention.in_proj_weight"), label_of("weight")
    ('block.conv', 'attention.in_proj_weight', 'weight')
    """
    return layer_of(parameter) if parameter.endswith(".weight") else parameter


def check_masks(model: nn.Module, plan: SparsityPlan) -> None:
    """Raise :class:`PlanError`, naming the first parameter that does not fit, unless the plan is for such a model."""
    tensors = named_tensors(model)
    for name, shape in plan.shapes.items():
        if name not in tensors:
            raise PlanError(f"The plan masks {name!r}, which this {type(model).__name__} does not have.")
        found = tuple(tensors[name].shape)
        if found != shape:
            raise PlanError(f"The plan masks {name!r} in shape {shape}; here it has shape {found}.")
    if plan.signature and plan.signature != signature(model):
        raise PlanError(f"The plan was made for another model than this {type(model).__name__} (signatures differ).")


@torch.no_grad()
def mask_(model: nn.Module, plan: SparsityPlan, optimizers: Iterable[Optimizer] = ()) -> None:
    """Set to zero, in place, every weight that the plan does not keep, and its momenta and averages in optimisers.

    State of another shape than its parameter's (factored or blocked statistics) stays as it is.

    Raises:
        PlanError: where the plan belongs to a model of other names or shapes; nothing is changed.
    """
    optimizers = tuple(optimizers)
    for parameter, kept in plan.masks(model).items():
        state = [value for optimizer in optimizers for value in optimizer.state.get(parameter, {}).values()]
        held = [value for value in state if isinstance(value, Tensor) and value.shape == parameter.shape]
        for tensor in (parameter, *held):
            tensor.masked_fill_(~kept, 0)
