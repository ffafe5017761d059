"""Every hand-written hard case: exact against the judge, left untouched by the trace, and explained."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from torch import nn

from lightning_prune.structure import ChannelGraph, PruningPlan, pick, prune_, trace
from tests.structure import case_table
from tests.structure.cases import CASES, ROOMS, Case
from tests.structure.oracle import Verdict, judge, tensors
from tests.structure.snapshot import Snapshot

SEEDS = range(4)
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@functools.cache
def watched(name: str) -> tuple[ChannelGraph, list[str]]:
    """The graph of a case in training mode, and what the trace changed about the model."""
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build()
    before = Snapshot.of(model)
    graph = trace(model, case.inputs(), case.kwargs())
    return graph, before.differences(Snapshot.of(model))


def unequal_plan(graph: ChannelGraph, seed: int) -> PruningPlan:
    """Random channels, and another ratio for every group."""
    if not graph.groups:
        return graph.plan({})
    chance = random.Random(seed)
    ratios = {group.name: chance.uniform(0.1, 0.85) for group in graph.groups}
    return graph.plan(pick(graph, 0.5, ratios=ratios, score="random", scope="all", renormalise=True, seed=seed))


def arbitrary_plan(graph: ChannelGraph, seed: int) -> PruningPlan:
    """Any set of channels of any group, without asking how they are chosen."""
    chance = random.Random(1000 + seed)
    sizes = {group.name: group.size for group in graph.groups}
    removed = {name: chance.sample(range(size), chance.randint(0, size - 1)) for name, size in sizes.items()}
    return graph.plan({name: tuple(sorted(channels)) for name, channels in removed.items()})


def verdict(case: Case, plan: PruningPlan, seed: int, modes: tuple[bool, ...] = (False, True)) -> Verdict:
    """What the judge says about a plan."""
    inputs, kwargs = case.inputs(seed), case.kwargs(seed)
    return judge(case.build, lambda model: prune_(model, plan), inputs, kwargs, seed=seed, modes=modes)


@pytest.mark.parametrize("seed", SEEDS)
@every_case
def test_unequal_ratios_are_exact(case: Case, seed: int) -> None:
    graph, _ = watched(case.name)
    found = verdict(case, unequal_plan(graph, seed), seed)
    assert case.shrinks is None or (found.left < 1) == case.shrinks, f"{found.left:.3f} of the parameters left"


@pytest.mark.parametrize("seed", SEEDS)
@every_case
def test_arbitrary_channels_are_exact(case: Case, seed: int) -> None:
    graph, _ = watched(case.name)
    verdict(case, arbitrary_plan(graph, seed), seed)


@every_case
def test_one_group_alone_is_exact(case: Case) -> None:
    """What hangs together is in one group: no group needs another one to be cut as well."""
    graph, _ = watched(case.name)
    for number, group in enumerate(graph.groups):
        removed = random.Random(number).sample(range(group.size), group.size // 2)
        verdict(case, graph.plan({group.name: tuple(sorted(removed))}), number)


@every_case
def test_trace_leaves_the_model_untouched(case: Case) -> None:
    _, changes = watched(case.name)
    assert changes == []


@every_case
def test_traced_in_evaluation_mode(case: Case) -> None:
    torch.manual_seed(0)
    model = case.build().eval()
    before = Snapshot.of(model)
    graph = trace(model, case.inputs(), case.kwargs())
    assert before.differences(Snapshot.of(model)) == []
    verdict(case, unequal_plan(graph, 5), 5, modes=(False,))


@every_case
def test_groups_do_not_depend_on_requires_grad(case: Case) -> None:
    graph, _ = watched(case.name)
    frozen = trace(case.build().requires_grad_(False), case.inputs(), case.kwargs())
    assert [(g.name, g.size, g.members) for g in frozen.groups] == [(g.name, g.size, g.members) for g in graph.groups]
    assert dict(frozen.pinned) == dict(graph.pinned)


@every_case
def test_every_layer_is_prunable_or_says_why_not(case: Case) -> None:
    graph, _ = watched(case.name)
    model = graph.model
    prunable = {name for group in graph.groups for name in group.producers}
    named = tensors(model)
    cut = {id(named[name]) for group in graph.groups for name, dim in group.members if dim == 0}
    for name, module in model.named_modules():
        if isinstance(module, LAYERS) and name not in prunable and name not in graph.pinned:
            assert cut & {id(parameter) for parameter in module.parameters()}, f"{name} is neither prunable nor pinned"
    unexplained = [name for name, reason in graph.pinned.items() if len(reason.split()) < 3 or "\n" in reason]
    assert not unexplained, f"no sentence for {unexplained}"


def test_the_table_is_complete() -> None:
    """At least as many cases as engine and opponents were measured on, and no class forgotten."""
    entered = {type(case.build()) for case in CASES.values()}
    written = {
        value
        for room in ROOMS
        for value in vars(room).values()
        if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == room.__name__
    }
    helpers = {kind.__name__ for kind in written - entered}
    convolutions = {"StandardConv", "BatchNormConv", "ScaledConv", "StepwiseConv", "RootConv"}
    assert helpers == {"Mlp", "Scripted", "JoinedByWidth", "ShapedScale", *convolutions}
    assert len(CASES) >= 180
    assert case_table.CASES is CASES
