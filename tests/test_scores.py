"""Scores against their definitions, in double precision."""

from __future__ import annotations

import pytest
import torch

from lightning_prune import scores

WEIGHT = torch.randn(5, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_l1_is_the_mean_absolute_weight() -> None:
    assert torch.allclose(scores.l1(WEIGHT), torch.stack([row.abs().sum() / 12 for row in WEIGHT]), atol=1e-15)


def test_l2_is_the_root_mean_square() -> None:
    assert torch.allclose(scores.l2(WEIGHT), torch.stack([row.norm() / 12**0.5 for row in WEIGHT]), atol=1e-15)


@pytest.mark.parametrize("score", [scores.l1, scores.l2, scores.bn_scale])
def test_a_vector_is_one_weight_per_channel(score: object) -> None:
    vector = torch.tensor([-2.0, 0.5, 0.0])
    assert torch.equal(score(vector), vector.abs())  # type: ignore[operator]


def test_scores_build_no_graph_and_read_any_layout() -> None:
    weight = WEIGHT.clone().to(memory_format=torch.channels_last).requires_grad_()
    assert not scores.l1(weight).requires_grad
    assert torch.allclose(scores.l1(weight), scores.l1(WEIGHT))


def test_random_moves_no_global_state() -> None:
    before = torch.get_rng_state()
    first = scores.random(4, torch.Generator().manual_seed(3))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, scores.random(4, torch.Generator().manual_seed(3)))
