"""The torchvision networks: exact against the judge, and really smaller."""

from __future__ import annotations

import dataclasses
import os
import random

import pytest
import torch

from lightning_prune.structure import ChannelGraph, choose, pick, prune_, trace
from tests.structure.oracle import judge, parameter_count, replicate
from tests.structure.snapshot import Snapshot
from tests.structure.zoo import ATTENTION, CONVOLUTIONAL, ZOO, Entry

FULL = os.environ.get("LIGHTNING_PRUNE_FULL") == "1"


def seeds(name: str) -> range:
    """Four for every network, fewer for the heavy ones unless the whole test is asked for."""
    return range(4 if FULL or not ZOO[name].heavy else 2)


@dataclasses.dataclass(frozen=True)
class Watched:
    """A network of the zoo, its graph, and what the trace changed about it."""

    entry: Entry
    graph: ChannelGraph
    changes: list[str]


@pytest.fixture(scope="module")
def watched(request: pytest.FixtureRequest) -> Watched:
    """One network at a time: the tests of a network run together, so that the next one finds the memory free."""
    entry = ZOO[request.param]
    torch.manual_seed(0)
    model = entry.build()
    before = Snapshot.of(model)
    graph = trace(model, entry.inputs())
    return Watched(entry, graph, before.differences(Snapshot.of(model)))


every_network = pytest.mark.parametrize("watched", ZOO, indirect=True, scope="module")
every_seed = pytest.mark.parametrize(
    ("watched", "seed"), [(name, seed) for name in ZOO for seed in seeds(name)], indirect=["watched"], scope="module"
)


@every_seed
def test_exact_at_half(watched: Watched, seed: int) -> None:
    """Half of every group on even seeds, another ratio for each group on odd ones."""
    graph, entry = watched.graph, watched.entry
    chance = random.Random(seed)
    ratios = {group.name: chance.uniform(0.1, 0.9) for group in graph.groups} if seed % 2 else None
    removed = pick(graph, 0.5, ratios=ratios, score="random", scope="all", renormalise=True, seed=seed)
    plan = graph.plan(removed)
    verdict = judge(entry.build, lambda model: prune_(model, plan), entry.inputs(seed), seed=seed)
    assert verdict.left < 1


@every_network
def test_trace_leaves_the_network_untouched(watched: Watched) -> None:
    assert watched.changes == []


@every_network
def test_parameters_left(watched: Watched) -> None:
    """At ratio 0.5 and scope "all", with the scores a user gets by default."""
    model = replicate(watched.graph.model, watched.entry.build)
    prune_(model, choose(watched.graph, 0.5, scope="all"))
    left = parameter_count(model) / parameter_count(watched.graph.model)
    assert left <= watched.entry.ceiling
    assert left < 1


@every_network
def test_every_pinned_layer_says_why(watched: Watched) -> None:
    assert all(len(reason.split()) >= 3 for reason in watched.graph.pinned.values())


def test_the_list_is_whole() -> None:
    assert len(CONVOLUTIONAL) == 25
    assert len(ATTENTION) == 4
    published = {"resnet50": 0.31, "vgg11_bn": 0.31, "densenet121": 0.31, "convnext_tiny": 0.31}
    published |= {"mobilenet_v2": 0.37, "shufflenet_v2_x1_0": 0.44}
    assert {name: entry.ceiling for name, entry in CONVOLUTIONAL.items() if entry.ceiling != 0.5} == published
