"""Penalties against autograd, in double precision."""

from __future__ import annotations

import torch

from lightning_prune.penalties import slices, weighted_l2


def weights_and_strengths() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [((4, 3, 2, 2), (4, 1, 1, 1)), ((5, 4), (5, 4)), ((6,), (6,)), ((4, 3), (1, 3))]
    weights = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape, _ in shapes]
    strengths = [torch.rand(shape, dtype=torch.float64, generator=generator) - 0.2 for _, shape in shapes]
    return weights, strengths


def test_weighted_l2_value_and_gradient_are_autograds() -> None:
    weights, strengths = weights_and_strengths()
    leaves = [weight.clone().requires_grad_() for weight in weights]
    expected = sum((strength / 2 * leaf**2).sum() for leaf, strength in zip(leaves, strengths, strict=True))
    value, gradients = weighted_l2(leaves, strengths)
    assert not value.requires_grad and value.dtype == torch.float64
    assert torch.allclose(value, expected.detach(), rtol=1e-13)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
        assert gradient.abs().max() > 0
        assert torch.allclose(gradient, wanted, rtol=1e-14, atol=0)


def test_weighted_l2_leaves_other_entries_alone() -> None:
    weight = torch.ones(3, 2)
    _, (gradient,) = weighted_l2([weight], [torch.tensor([[0.0], [2.0], [0.0]])])
    assert torch.equal(gradient, torch.tensor([[0.0, 0.0], [2.0, 2.0], [0.0, 0.0]]))


def test_weighted_l2_of_half_precision_weights_stays_in_range() -> None:
    value, (gradient,) = weighted_l2([torch.full((8, 8), 2.0, dtype=torch.bfloat16)], [torch.ones(8, 1).bfloat16()])
    assert value == 128 and gradient.dtype == torch.bfloat16


def test_slices_broadcasts_along_any_dimension() -> None:
    weight = torch.zeros(4, 3, 2)
    for dim in range(3):
        mask = slices(weight, dim, torch.tensor([[0], [1]]))
        assert mask.expand(weight.shape).sum() == weight.numel() / weight.shape[dim] * 2
        assert torch.equal(mask, slices(weight, dim - 3, torch.tensor([1, 0])))
