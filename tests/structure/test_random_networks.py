"""Random small networks: whatever the wiring, the slim network is the masked one."""

from __future__ import annotations

import functools
import os
import random

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_prune.structure import prune_, trace
from tests.structure.oracle import judge
from tests.structure.random_networks import PARTS, Network, Recipe, recipes

FULL = os.environ.get("LIGHTNING_PRUNE_FULL") == "1"
PROFILE = settings(
    max_examples=2000 if FULL else 200,
    derandomize=not FULL,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
INPUTS = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@PROFILE
@given(recipe=recipes(), seed=st.integers(0, 2**16))
def test_masked_equals_slim(recipe: Recipe, seed: int) -> None:
    torch.manual_seed(seed)
    build = functools.partial(Network, recipe)
    graph = trace(build(), INPUTS)
    chance = random.Random(seed)
    removed = {
        group.name: tuple(sorted(chance.sample(range(group.size), chance.randint(0, group.size - 1))))
        for group in graph.groups
    }
    plan = graph.plan(removed)
    judge(build, lambda model: prune_(model, plan), INPUTS, seed=seed)
    assert graph.groups or recipe.head == 3, "only where the head looks across the channels everything may be pinned"


@PROFILE
@given(recipe=recipes())
def test_every_recipe_is_a_network(recipe: Recipe) -> None:
    """The generator itself: nothing is filtered out, every description runs."""
    torch.manual_seed(0)
    model = Network(recipe).eval()
    with torch.no_grad():
        model(INPUTS)


def test_the_generator_knows_its_parts() -> None:
    assert len(PARTS) >= 35
