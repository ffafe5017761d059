"""Which channels go: scores, ratios, patterns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_prune import scores
from lightning_prune.door import number, patterns, shares, switch, whole
from lightning_prune.errors import ConfigurationError
from lightning_prune.structure.bits import Bits
from lightning_prune.structure.budget import Budget
from lightning_prune.structure.graph import ChannelGraph, ChannelGroup
from lightning_prune.structure.multiples import fast_multiple
from lightning_prune.structure.plan import Member, PruningPlan, kept_channels, named_tensors, plain_name
from lightning_prune.structure.resolve import Resolution, resolve
from lightning_prune.structure.sparsity import SparsityPlan
from lightning_prune.structure.weights import WeightGraph, WeightGroup, weights_of

Score: TypeAlias = "str | Callable[[ChannelGroup, Mapping[str, Tensor]], Tensor]"
Graph: TypeAlias = ChannelGraph | WeightGraph
Group: TypeAlias = ChannelGroup | WeightGroup

SCORES = ("bn_scale", "l1", "l2", "random")
WEIGHT_SCORES = ("l1", "l2", "random")
SCOPES = ("inner", "all")

_BLOCK = 2**20
"""Bytes of a weight that are scored at a time, for scores make copies of what they read."""


def choose(
    graph: ChannelGraph,
    ratio: float | None = None,
    *,
    budget: Budget | Mapping[str, Any] | None = None,
    score: Score = "l1",
    ratios: Mapping[str, float] | None = None,
    ignore: Iterable[str] = (),
    scope: str = "inner",
    global_: bool = False,
    renormalise: bool | None = None,
    round_to: int | Literal["auto"] = 1,
    keep_at_least: int = 1,
    seed: int = 0,
) -> PruningPlan:
    """The plan by which the least valuable channels go, read from the traced model's weights as they are now.

    Of ``C`` channels ``ceil(ratio * C)`` go, at most ``C - keep_at_least``, fewer where ``round_to`` asks for it. With
    a budget the ratio is found: see :func:`~lightning_prune.structure.resolve.resolve`.

    Args:
        graph: from :func:`trace`.
        ratio: share of each group's channels that goes, in ``(0, 1)``; a half, where no budget is given.
        budget: instead of a ratio what may be left: ``{"macs": 0.5}``, ``{"params": "2.0M"}``, ``{"latency_ms": 4.0}``;
            see :class:`~lightning_prune.structure.budget.Budget`.
        score: ``"l1"`` (mean absolute weight of the producing filters), ``"l2"`` (root mean square), ``"bn_scale"``
            (absolute scale of the following norm), ``"random"``, or a function of (group, tensors by name) that
            gives one value per channel, shape ``(C,)``; the smallest go.
        ratios: layer name pattern -> ratio in ``[0, 1)``; 0 leaves the layer as it is. The first that matches counts.
            Beside a budget these hold as they are.
        ignore: patterns of layers that are left as they are.
        scope: ``"inner"`` for groups with one producer, ``"all"`` for residual streams too.
        global_: one threshold over all groups instead of one ratio each; ``ratios`` then only says what stays.
        renormalise: whether channels over which statistics are taken may go, by LayerNorm, GroupNorm or RMSNorm, by
            weights that are standardised, by averages (default: with ``scope="all"`` only). The slim network then takes
            them over the channels that stay.
        round_to: widths afterwards are multiples of this; ``"auto"`` measures what is fast where the model is, see
            :func:`~lightning_prune.structure.multiples.fast_multiple`. The plan has the number.
        keep_at_least: channels that stay in every group.
        seed: of ``score="random"``.

    Raises:
        ConfigurationError: for values out of range, patterns that match nothing, scores that can't be taken, budgets
            that can't be met.

    >>> from torch import nn
    >>> from lightning_prune.structure import trace
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> print(choose(trace(net, torch.zeros(1, 4)), ratio=0.25))
    0  8 -> 6
    >>> print(choose(trace(net, torch.zeros(1, 4)), budget={"params": 50}))
    0  8 -> 6
    """
    multiple = fast_multiple(graph.model) if round_to == "auto" else round_to
    picked = pick(
        graph,
        ratio,
        budget=budget,
        score=score,
        ratios=ratios,
        ignore=ignore,
        scope=scope,
        global_=global_,
        renormalise=renormalise,
        round_to=multiple,
        keep_at_least=keep_at_least,
        seed=seed,
    )
    return graph.plan(picked, round_to=multiple)


def pick(
    graph: ChannelGraph,
    ratio: float | None = None,
    *,
    budget: Budget | Mapping[str, Any] | None = None,
    score: Score = "l1",
    ratios: Mapping[str, float] | None = None,
    ignore: Iterable[str] = (),
    scope: str = "inner",
    global_: bool = False,
    renormalise: bool | None = None,
    round_to: int | Literal["auto"] = 1,
    keep_at_least: int = 1,
    seed: int = 0,
) -> dict[str, tuple[int, ...]]:
    """As :func:`choose`, but as numbers of channels by group name, ascending."""
    round_to = fast_multiple(graph.model) if round_to == "auto" else round_to
    switch("global_", global_)
    whole("round_to", round_to, least=1)
    whole("keep_at_least", keep_at_least, least=1)
    whole("seed", seed)
    asked = Budget.of(budget)
    if ratio is not None and asked is not None:
        raise ConfigurationError(f"Give a ratio or a budget, not both (ratio={ratio!r}, {asked}).")
    ratio = 0.5 if ratio is None else ratio
    share = select(graph, ratio, ratios=ratios, ignore=ignore, scope=scope, renormalise=renormalise)
    groups = [group for group in graph.groups if share.get(group.name, 0.0) > 0]
    tensors = named_tensors(graph.model)
    generator = torch.Generator().manual_seed(seed)
    values = {group.name: value_of(group, tensors, score, generator) for group in groups}
    if asked is not None:
        prices = {name: value.sort().values.tolist() for name, value in values.items()} if global_ else None
        own = {group.name: share[group.name] for group in groups}
        kept = spend(graph, asked, own, ratios, prices, round_to=round_to, keep_at_least=keep_at_least).kept
        share = {name: 1 - count / graph[name].size for name, count in kept.items()}
    elif global_:
        limit = _one_threshold(values, ratio, keep_at_least)
        share = {group.name: 1 - limit[group.name] / group.size for group in groups}
    return smallest(groups, share, values, round_to=round_to, keep_at_least=keep_at_least)


def smallest(
    groups: Iterable[ChannelGroup],
    share: Mapping[str, float],
    values: Mapping[str, Tensor],
    *,
    round_to: int = 1,
    keep_at_least: int = 1,
) -> dict[str, tuple[int, ...]]:
    """The channels of least value, a share of each group, by group name, ascending; no entry where none goes."""
    picked = {}
    for group in groups:
        limits = {"unit": group.unit, "round_to": round_to, "keep_at_least": keep_at_least}
        kept = kept_channels(group.size, share[group.name], **limits)
        order = values[group.name].argsort(stable=True)
        picked[group.name] = tuple(sorted(order[: group.size - kept].tolist()))
    return {name: numbers for name, numbers in picked.items() if numbers}


def spend(
    graph: ChannelGraph,
    budget: Budget,
    share: Mapping[str, float],
    ratios: Mapping[str, float] | None = None,
    prices: Mapping[str, Sequence[float]] | None = None,
    *,
    round_to: int = 1,
    keep_at_least: int = 1,
    progress: float = 1.0,
    recount: Callable[[nn.Module], int] | None = None,
) -> Resolution:
    """What a budget comes to for some groups of a graph, see :func:`~lightning_prune.structure.resolve.resolve`.

    Args:
        graph: of the dense network.
        budget: what may be left.
        share: the groups that take part, by name, with the share that goes of those that have one of their own.
        ratios: patterns of the layers that have.
        prices: of the others' channels; ``None`` for one ratio in all of them.
        round_to: widths are multiples of this.
        keep_at_least: channels that stay in every group.
        progress: of several parts of the way, at which one.
        recount: counts a slim network.
    """
    limits = {"round_to": round_to, "keep_at_least": keep_at_least}
    fixed, free = {}, {}
    for name, own in share.items():
        group = graph[name]
        if any(matches(graph, group, pattern) for pattern in ratios or {}):
            fixed[name] = kept_channels(group.size, own, unit=group.unit, **limits)
        else:
            free[name] = [number / group.size for number in range(group.size)] if prices is None else prices[name]
    return resolve(graph, budget, free, fixed=fixed, progress=progress, recount=recount, **limits)


def choose_weights(
    model: nn.Module,
    ratio: float = 0.5,
    *,
    score: str = "l1",
    ratios: Mapping[str, float] | None = None,
    ignore: Iterable[str] = (),
    seed: int = 0,
) -> SparsityPlan:
    """The plan by which the smallest single weights become zero, in every layer the same share of them.

    Of ``n`` weights ``ceil(ratio * n)`` go, at most ``n - 1``.

    Args:
        model: any module; it needs no input.
        ratio: share of each layer's weights that goes, in ``(0, 1)``.
        score: ``"l1"`` and ``"l2"`` (both absolute values here), or ``"random"``.
        ratios: name patterns to ratios in ``[0, 1)`` of their own; the first that matches counts.
        ignore: name patterns of layers that stay as they are.
        seed: of ``score="random"``.

    Raises:
        ConfigurationError: an argument is out of its range, or a pattern matches nothing.

    >>> layer = nn.Linear(2, 2)
    >>> _ = nn.init.constant_(layer.weight, 1.0)
    >>> print(choose_weights(nn.Sequential(layer), ratio=0.75))
    0  4 -> 1
    """
    graph = weights_of(model)
    return graph.plan(pick_weights(graph, ratio, score=score, ratios=ratios, ignore=ignore, seed=seed))


def pick_weights(
    graph: WeightGraph,
    ratio: float = 0.5,
    *,
    score: str = "l1",
    ratios: Mapping[str, float] | None = None,
    ignore: Iterable[str] = (),
    seed: int = 0,
) -> dict[str, Bits]:
    """As :func:`choose_weights`, but as positions that go by group name."""
    if score not in WEIGHT_SCORES:
        raise ConfigurationError(f"score of single weights must be one of {', '.join(WEIGHT_SCORES)}, not {score!r}.")
    whole("seed", seed)
    share = select(graph, ratio, ratios=ratios, ignore=ignore, scope="all")
    tensors = named_tensors(graph.model)
    generator = torch.Generator().manual_seed(seed)
    picked = {}
    for group in graph.groups:
        count = group.size - kept_channels(group.size, share.get(group.name, 0.0))
        if not count:
            continue
        weights = tensors[group.parameter].detach()
        values = scores.random(group.size, generator) if score == "random" else weights.abs().reshape(-1)
        if not values.isfinite().all():
            raise ConfigurationError(f"The weights of {group.name!r} are not all finite; they hold NaN or inf.")
        goes = torch.zeros(group.size, dtype=torch.bool, device=values.device)
        goes[values.argsort(stable=True)[:count]] = True
        picked[group.name] = Bits.of(goes)
    return picked


def select(
    graph: Graph,
    ratio: float = 0.5,
    *,
    ratios: Mapping[str, float] | None = None,
    ignore: Iterable[str] = (),
    scope: str = "inner",
    renormalise: bool | None = None,
) -> dict[str, float]:
    """The groups that take part, each with the share that goes (0 for one that is named, but left as it is).

    A pattern is matched against the names of a group and of its producers; it may be a name, a shell pattern
    (``layer1.*``) or the name of a module that contains the layer. Where the traced model is part of a larger module,
    names count from either.
    """
    number("ratio", ratio)
    if not 0 < ratio < 1:
        raise ConfigurationError(f"ratio must lie in (0, 1), not {ratio!r}; use `ignore` to leave layers as they are.")
    if scope not in SCOPES:
        raise ConfigurationError(f"scope must be one of {', '.join(SCOPES)}, not {scope!r}.")
    ratios = shares("ratios", ratios)
    ignore = patterns("ignore", [ignore] if isinstance(ignore, str) else ignore)
    _all_match(graph, [pattern for pattern, value in ratios.items() if value], ignored=False)
    _all_match(graph, [*ignore, *(pattern for pattern, value in ratios.items() if not value)], ignored=True)
    allowed = scope == "all" if renormalise is None else renormalise
    share: dict[str, float] = {}
    for group in graph.groups:
        if (scope == "inner" and len(group.producers) != 1) or (group.renormalised and not allowed):
            continue
        own = next((value for pattern, value in ratios.items() if matches(graph, group, pattern)), ratio)
        share[group.name] = 0.0 if any(matches(graph, group, pattern) for pattern in ignore) else own
    return share


def matches(graph: Graph, group: Group, pattern: str) -> bool:
    """Whether a pattern names the group, one of its producers, or a module around one."""
    names = [known for name in (group.name, *group.producers) for known in _names(graph, name)]
    return any(fnmatchcase(name, pattern) or name.startswith(f"{pattern}.") for name in names)


def _names(graph: Graph, name: str) -> tuple[str, ...]:
    """By which a layer is known: inside the traced model, and inside the larger module where there is one."""
    return (name, f"{graph.root}.{name}") if graph.root else (name,)


def _all_match(graph: Graph, patterns: Iterable[str], ignored: bool) -> None:
    """Every pattern names something: a layer that can shrink or, where it is to stay as it is, any module."""
    named = graph.model.named_modules() if ignored else ()
    modules = [known for name, _ in named for known in _names(graph, plain_name(name))]
    for pattern in patterns:
        if any(matches(graph, group, pattern) for group in graph.groups):
            continue
        if any(fnmatchcase(name, pattern) for name in modules):
            continue
        pinned = ((name, why) for layer, why in graph.pinned.items() for name in _names(graph, layer))
        held = next((why for name, why in pinned if fnmatchcase(name, pattern)), "")
        known = ", ".join(group.name for group in graph.groups[:8])
        why = f"a layer that can shrink ({held.rstrip('.')})" if held else "a layer"
        raise ConfigurationError(f"The pattern {pattern!r} does not match {why}; these can: {known or 'none'}.")


def value_of(group: ChannelGroup, tensors: Mapping[str, Tensor], score: Score, generator: torch.Generator) -> Tensor:
    """What each channel of a group is worth, shape ``(C,)``, on the CPU; the mean over what it is read from."""
    if callable(score):
        values = score(group, tensors)
        if tuple(values.shape) != (group.size,):
            shape = tuple(values.shape)
            raise ConfigurationError(f"The score of group {group.name!r} must have shape ({group.size},), not {shape}.")
    elif score == "random":
        values = scores.random(group.size, generator)
    elif score in ("l1", "l2"):
        function = scores.l1 if score == "l1" else scores.l2
        values = _mean_over(group, group.outputs or group.inputs, tensors, function)
    elif score == "bn_scale":
        if not group.scales:
            raise ConfigurationError(
                f"Group {group.name!r} has no norm whose scale could be its score; use score='l1'."
            )
        values = _mean_over(group, group.scales, tensors, scores.bn_scale)
    else:
        raise ConfigurationError(f"score must be one of {', '.join(SCORES)} or a function, not {score!r}.")
    values = values.detach().float().cpu()
    if not values.isfinite().all():
        raise ConfigurationError(f"The scores of group {group.name!r} are not all finite; its weights hold NaN or inf.")
    return values


def _mean_over(
    group: ChannelGroup, members: Iterable[Member], tensors: Mapping[str, Tensor], function: Callable[[Tensor], Tensor]
) -> Tensor:
    found = []
    for name, dim in members:
        weight = tensors[name].detach()
        rows = max(1, _BLOCK * weight.shape[dim] // max(1, weight.nbytes))
        values = torch.cat([function(block.float().movedim(dim, 0)) for block in weight.split(rows, dim)])
        found.append(values[group.index[name, dim].to(values.device)].mean(dim=1))
    return torch.stack(found).mean(dim=0)


def _one_threshold(values: Mapping[str, Tensor], ratio: float, keep_at_least: int) -> dict[str, int]:
    """How many channels of each group stay when the lowest of all go together."""
    everything = torch.cat(list(values.values())) if values else torch.empty(0)
    stay = kept_channels(len(everything), ratio) if len(everything) else 0
    order = everything.argsort(stable=True)
    goes = torch.zeros(len(everything), dtype=torch.bool)
    goes[order[: len(everything) - stay]] = True
    parts = goes.split([len(part) for part in values.values()])
    return {name: max(len(part) - int(part.sum()), keep_at_least) for name, part in zip(values, parts, strict=True)}
