"""Penalties against autograd, in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_prune.penalties import distillation, slices, weighted_l2


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


LOGITS = {"samples": ((6, 5), 1), "pixels": ((2, 5, 3, 4), 1), "words": ((2, 7, 5), -1), "wide": ((3, 1000), 1)}


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("case", LOGITS)
def test_distillation_is_the_divergence_of_torch(case: str, temperature: float) -> None:
    shape, dim = LOGITS[case]
    student, teacher = (3 * torch.randn(shape, dtype=torch.float64) for _ in range(2))
    leaf = student.clone().requires_grad_()
    soft, hard = ((each / temperature).movedim(dim, -1).reshape(-1, shape[dim]) for each in (leaf, teacher))
    wanted = nn.functional.kl_div(soft.log_softmax(1), hard.softmax(1), reduction="batchmean") * temperature**2
    value, gradient = distillation(student, teacher, temperature, dim)
    assert torch.allclose(value, wanted.detach(), rtol=1e-12) and not value.requires_grad
    assert torch.allclose(gradient, torch.autograd.grad(wanted, leaf)[0], rtol=1e-10, atol=1e-16)


def test_distillation_of_one_logit_is_that_of_two_classes() -> None:
    student, teacher = torch.randn(2, 8, 1, dtype=torch.float64)
    pair = [torch.cat([each, torch.zeros(8, 1)], 1) for each in (student, teacher)]
    value, gradient = distillation(pair[0], pair[1], 3.0)
    for shape in ((8, 1), (8,)):
        found = distillation(student.reshape(shape), teacher.reshape(shape), 3.0)
        assert torch.allclose(found[0], value) and found[1].shape == shape
        assert torch.allclose(found[1].flatten(), gradient[:, 0])


def test_distillation_vanishes_where_both_agree_and_counts_no_impossible_class() -> None:
    logits = torch.randn(4, 5).index_fill_(1, torch.tensor([2]), -torch.inf)
    value, gradient = distillation(logits, logits.clone(), 4.0)
    assert value == 0 and not gradient.any()
    value, gradient = distillation(torch.randn(4, 5), logits, 4.0)
    assert value.isfinite() and value > 0 and gradient.isfinite().all()
    assert distillation(torch.full((1, 2), torch.nan), torch.zeros(1, 2), 4.0)[0].isnan()


def test_distillation_of_half_precision_logits_is_in_single_precision() -> None:
    student, teacher = torch.randn(2, 4, 5).bfloat16()
    found = distillation(student, teacher, 2.0)
    wanted = distillation(student.float(), teacher.float(), 2.0)
    assert all(one.dtype == torch.float32 and torch.equal(one, two) for one, two in zip(found, wanted, strict=True))
