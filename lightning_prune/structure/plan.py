"""What goes, as data: a plan can be printed, compared, written to JSON and applied to a fresh dense model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import lt
from typing import Any

from torch import Tensor, nn

from lightning_prune.errors import PlanError

VERSION = 1

#: Stands in ``PruningPlan.merged`` for a position that goes without another standing for it.
NOWHERE = -1

Member = tuple[str, int]

_COMPILED = "_orig_mod"


def plain_name(name: str) -> str:
    """A parameter's or module's name without the wrappers that ``torch.compile`` puts around modules.

    >>> plain_name("net._orig_mod.conv.weight")
    'net.conv.weight'
    """
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def original(module: nn.Module) -> nn.Module:
    """The module itself where ``torch.compile`` has wrapped it."""
    inner = module._modules.get(_COMPILED)
    return module if inner is None else inner


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The module of that :func:`plain_name`, wrapped or not.

    Raises:
        AttributeError: there is none.
    """
    module = original(model)
    for part in name.split(".") if name else ():
        module = original(module.get_submodule(part))
    return module


def number_of(model: nn.Module, name: str) -> int:
    """A number that a module keeps, by path: ``"block.width"``, or ``"block.splits.0"`` for one in a row of them.

    >>> number_of(nn.Sequential(nn.Linear(2, 3)), "0.out_features")
    3
    """
    path, _, attribute = name.rpartition(".")
    if attribute.isdigit():
        path, _, row = path.rpartition(".")
        return int(getattr(submodule(model, path), row)[int(attribute)])
    return int(getattr(submodule(model, path), attribute))


def named_modules(model: nn.Module, every: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Modules by :func:`plain_name`, parents first, each once, or under ``every`` name that it has.

    >>> relu = nn.ReLU()
    >>> [name for name, _ in named_modules(nn.Sequential(relu, relu))]
    ['', '0']
    """
    seen, ahead = set[int](), [("", model)]
    while ahead:
        path, module = ahead.pop()
        if every or id(module) not in seen:
            seen.add(id(module))
            yield path, module
            if module._modules:
                below = [(_below(path, key), child) for key, child in module._modules.items() if child is not None]
                ahead += below[::-1]


def _below(path: str, key: str) -> str:
    return path if key == _COMPILED else f"{path}.{key}" if path else key


def named_parameters(model: nn.Module, every: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by :func:`plain_name`, each once, or under ``every`` name that it has."""
    return _named("_parameters", named_modules(model, every), every)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by :func:`plain_name`, each once; of tied ones the first name counts."""
    modules = list(named_modules(model))
    return {name: tensor for kind in ("_parameters", "_buffers") for name, tensor in _named(kind, modules)}


def _named(kind: str, modules: Iterable[tuple[str, nn.Module]], every: bool = False) -> Iterator[tuple[str, Any]]:
    seen = set[int]()
    for path, module in modules:
        for key, tensor in getattr(module, kind).items():
            if tensor is not None and (every or id(tensor) not in seen):
                seen.add(id(tensor))
                yield _below(path, key), tensor


def signature(model: nn.Module) -> str:
    """Short hash of the names and shapes of a model's parameters and buffers.

    >>> signature(nn.Linear(2, 3)) == signature(nn.Linear(2, 3))
    True
    """
    shapes = sorted((name, tuple(tensor.shape)) for name, tensor in named_tensors(model).items())
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def layer_of(name: str) -> str:
    """The layer that a parameter belongs to.

    >>> layer_of("block.conv.weight"), layer_of("fc.parametrizations.weight.original0"), layer_of("scale")
    ('block.conv', 'fc', 'scale')
    """
    return name.split(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0] or name


@dataclass(frozen=True)
class PruningPlan:
    """Which positions stay along which dims of which parameters and buffers.

    Args:
        kept: ``(parameter or buffer name, dim)`` -> the positions that stay, ascending.
        sizes: the same keys -> length of that dim in the dense model.
        signature: of the dense model that this plan fits, see :func:`signature`.
        outputs: those keys that are a layer's output channels, for printing.
        numbers: module attributes that no tensor of the module tells -> their new value; see :func:`number_of`.
        renormalised: where statistics are taken over fewer channels afterwards: scales of norms, standardised weights,
            and of other averages what makes these channels.
        merged: for keys whose positions go into others instead of nowhere: for every dense position the one that
            stands for it afterwards (itself, where it stays; -1 where it just goes).
        summed: those keys of ``merged`` that are a layer's input channels; there a position that goes is added to the
            one that stands for it. Along the other keys both are taken to be alike.
        joined: modules whose reshapes take, in their last dim, what is left; see :class:`elastic.Joined`.
        round_to: what the widths that were cut are multiples of; of ``"auto"`` what was found on the device.

    Raises:
        PlanError: for positions that are out of range, repeated, not ascending or none at all, or ``round_to`` below 1.

    >>> sizes = {("0.weight", 0): 3, ("1.weight", 1): 3}
    >>> plan = PruningPlan(dict.fromkeys(sizes, (0, 2)), sizes, "", outputs=(("0.weight", 0),))
    >>> print(plan)
    0  3 -> 2
    >>> PruningPlan.from_json(plan.to_json()) == plan
    True
    """

    kept: Mapping[Member, tuple[int, ...]]
    sizes: Mapping[Member, int]
    signature: str
    outputs: tuple[Member, ...] = ()
    numbers: Mapping[str, int] = field(default_factory=dict)
    renormalised: tuple[str, ...] = ()
    merged: Mapping[Member, tuple[int, ...]] = field(default_factory=dict)
    summed: tuple[Member, ...] = ()
    joined: tuple[str, ...] = ()
    round_to: int = 1

    def __post_init__(self) -> None:
        for name in ("kept", "sizes", "numbers", "merged"):
            object.__setattr__(self, name, dict(sorted(getattr(self, name).items())))
        for name in ("outputs", "renormalised", "summed", "joined"):
            object.__setattr__(self, name, tuple(sorted(getattr(self, name))))
        if type(self.round_to) is not int or self.round_to < 1:
            raise PlanError(f"The round_to of a plan must be a whole number of at least 1, not {self.round_to!r}.")
        if self.kept.keys() != self.sizes.keys():
            raise PlanError("A plan needs the dense size of exactly the dims that it cuts.")
        if not {*self.outputs, *self.merged} <= self.kept.keys() or not set(self.summed) <= self.merged.keys():
            raise PlanError("A plan can print, merge or sum along no other dims than those that it cuts.")
        sound = set[tuple[int, int]]()
        for member, positions in self.kept.items():
            if (key := (id(positions), self.sizes[member])) not in sound:  # members of one group share a tuple
                _check(member, positions, self.sizes[member])
                sound.add(key)
        for member, targets in self.merged.items():
            _check_targets(member, targets, self.kept[member], self.sizes[member])

    def widths(self) -> dict[str, tuple[int, int]]:
        """Layer -> number of output channels before and after."""
        return {layer_of(name): (self.sizes[name, dim], len(self.kept[name, dim])) for name, dim in self.outputs}

    def lengths(self) -> dict[Member, int]:
        """``(parameter or buffer name, dim)`` -> its length afterwards, where that changes."""
        return {member: len(positions) for member, positions in self.kept.items()}

    def diff(self, other: PruningPlan) -> str:
        """The layers whose widths or channels differ, one a line, and ``round_to``; empty where the plans agree.

        >>> a = PruningPlan({("0.weight", 0): (0, 2)}, {("0.weight", 0): 3}, "")
        >>> b = PruningPlan({("0.weight", 0): (0, 1)}, {("0.weight", 0): 3}, "")
        >>> print(a.diff(b))
        0.weight dim 0: 2 -> 2 of 3, 1 channels differ
        """
        lines = [f"round_to: {self.round_to} -> {other.round_to}"] if self.round_to != other.round_to else []
        for member in sorted(self.kept.keys() | other.kept.keys()):
            size = self.sizes.get(member, other.sizes.get(member, 0))
            mine, theirs = (set(plan.kept.get(member, range(size))) for plan in (self, other))
            if mine != theirs:
                apart = len(mine - theirs) or len(theirs - mine)
                lines.append(
                    f"{member[0]} dim {member[1]}: {len(mine)} -> {len(theirs)} of {size}, {apart} channels differ"
                )
        return "\n".join(lines)

    def to_json(self) -> str:
        """Sorted, versioned JSON."""
        tensors: dict[str, dict[str, Any]] = {}
        for (name, dim), positions in self.kept.items():
            tensors.setdefault(name, {})[str(dim)] = {"size": self.sizes[name, dim], "kept": list(positions)}
        whole = {
            "version": VERSION,
            "signature": self.signature,
            "tensors": tensors,
            "outputs": [list(member) for member in self.outputs],
            "numbers": dict(self.numbers),
            "renormalised": list(self.renormalised),
            "merged": [[*member, list(targets)] for member, targets in self.merged.items()],
            "summed": [list(member) for member in self.summed],
            "joined": list(self.joined),
            "round_to": self.round_to,
        }
        return json.dumps(whole, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Read what :meth:`to_json` wrote.

        Raises:
            PlanError: where the text is no plan, or one of another version.
        """
        try:
            whole = {"joined": [], "round_to": 1, **json.loads(text)}
            if type(whole["version"]) is not int or whole["version"] != VERSION:
                raise PlanError(f"This plan has version {whole['version']!r}; this library reads version {VERSION}.")
            _check_kinds(whole)
            entries = [(name, int(dim), cut) for name, cuts in whole["tensors"].items() for dim, cut in cuts.items()]
            kept = {(name, dim): tuple(cut["kept"]) for name, dim, cut in entries}
            sizes = {(name, dim): cut["size"] for name, dim, cut in entries}
            outputs = tuple((name, dim) for name, dim in whole["outputs"])
            merged = {(name, dim): tuple(targets) for name, dim, targets in whole["merged"]}
            summed = tuple((name, dim) for name, dim in whole["summed"])
            rest = (
                whole["numbers"],
                tuple(whole["renormalised"]),
                merged,
                summed,
                tuple(whole["joined"]),
                whole["round_to"],
            )
            return cls(kept, sizes, whole["signature"], outputs, *rest)
        except PlanError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"This is not a pruning plan: {type(error).__name__} {error}.") from error

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __str__(self) -> str:
        rows = self.widths()
        wide = max(map(len, rows), default=0)
        return "\n".join(f"{layer:<{wide}}  {before} -> {after}" for layer, (before, after) in rows.items())


#: What the parts of a plan's JSON are.
_KINDS = {"signature": str, "tensors": dict, "outputs": list, "numbers": dict, "renormalised": list}
_KINDS |= {"merged": list, "summed": list, "joined": list}


def _check_kinds(whole: Mapping[str, Any]) -> None:
    for name, kind in _KINDS.items():
        if not isinstance(whole[name], kind):
            raise PlanError(f"The {name!r} of a pruning plan must be a {kind.__name__}, not {whole[name]!r}.")
    for name, number in whole["numbers"].items():
        if type(number) is not int:
            raise PlanError(f"The number {name!r} of a pruning plan must be whole, not {number!r}.")
    for name in (*whole["renormalised"], *whole["joined"]):
        if not isinstance(name, str):
            raise PlanError(f"The layers that a pruning plan renormalises or joins must be names, not {name!r}.")


def _check(member: Member, positions: Sequence[int], size: int) -> None:
    where = f"dim {member[1]} of {member[0]!r}"
    if set(map(type, (*positions, size))) - {int}:
        raise PlanError(f"The positions kept along {where} must be whole numbers.")
    if not positions:
        raise PlanError(f"The plan removes all {size} positions along {where}; at least one must stay.")
    if not all(map(lt, positions, positions[1:])):
        raise PlanError(f"The positions kept along {where} must be ascending, each once.")
    if positions[0] < 0 or positions[-1] >= size:
        outermost = f"{positions[0]}..{positions[-1]}"
        raise PlanError(f"The positions kept along {where} must lie in 0..{size - 1}, not {outermost}.")


def _check_targets(member: Member, targets: Sequence[int], kept: Sequence[int], size: int) -> None:
    stays = set(kept)
    if len(targets) != size or not set(targets) <= {*stays, NOWHERE} or any(targets[i] != i for i in kept):
        raise PlanError(f"Every position along dim {member[1]} of {member[0]!r} must be merged into one that stays.")


def kept_channels(size: int, ratio: float, *, unit: int = 1, round_to: int = 1, keep_at_least: int = 1) -> int:
    """How many of ``size`` channels stay: ``size - ceil(ratio * size)``, rounded up to whole blocks of ``round_to``.

    Args:
        size: channels of the group.
        ratio: share that goes, in ``[0, 1)``.
        unit: how many positions of the layer one channel of the group stands for (more than one for grouped layers).
        round_to: the layer's width afterwards is a multiple of this, or as wide as before.
        keep_at_least: lower bound.

    >>> kept_channels(64, 0.5), kept_channels(10, 0.07), kept_channels(16, 0.95), kept_channels(64, 0.7, round_to=8)
    (32, 9, 1, 24)
    """
    removed = math.ceil(ratio * size - 1e-9)
    kept = max(size - removed, min(keep_at_least, size))
    while kept < size and (kept * unit) % round_to:
        kept += 1
    return kept
