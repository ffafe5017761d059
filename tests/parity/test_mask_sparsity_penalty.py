"""The masked L1 penalty against autograd and against the published update of the gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_prune.errors import ConfigurationError
from lightning_prune.penalties import masked_l1, soft_threshold_
from lightning_prune.schedules import MASK_SPARSITY, Dynamics, MaskSparsityStrength


def scales_and_strengths(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    scales = [torch.randn(size, generator=generator, dtype=dtype) for size in (5, 16, 7)]
    masks = [(torch.rand(len(scale), generator=generator) < 0.5).to(dtype) for scale in scales]
    return scales, [5e-2 * mask for mask in masks]


def test_value_and_gradient_are_autograds() -> None:
    scales, strengths = scales_and_strengths()
    leaves = [scale.clone().requires_grad_() for scale in scales]
    value, gradients = masked_l1(leaves, strengths)
    plain = sum((strength * leaf.abs()).sum() for leaf, strength in zip(leaves, strengths, strict=True))
    assert not value.requires_grad and value.dtype == torch.float64
    assert torch.allclose(value, plain.detach(), rtol=1e-14)
    for gradient, wanted in zip(gradients, torch.autograd.grad(plain, leaves), strict=True):
        assert torch.equal(gradient, wanted) and gradient.abs().max() > 0


def test_gradcheck() -> None:
    scales, strengths = scales_and_strengths()
    for scale, strength in zip(scales, strengths, strict=True):
        step = 1e-6
        for index in range(len(scale)):
            up, down = scale.clone(), scale.clone()
            up[index] += step
            down[index] -= step
            slope = (masked_l1([up], [strength])[0] - masked_l1([down], [strength])[0]) / (2 * step)
            assert torch.allclose(slope, masked_l1([scale], [strength])[1][0][index], atol=1e-8)


def test_scales_that_stay_are_untouched_to_the_bit() -> None:
    scales, strengths = scales_and_strengths(torch.float32)
    before = [torch.randn_like(scale) for scale in scales]
    _, gradients = masked_l1(scales, strengths)
    for scale, strength, old, gradient in zip(scales, strengths, before, gradients, strict=True):
        after = old + gradient
        assert torch.equal(after[strength == 0], old[strength == 0])
        assert torch.allclose((after - old)[strength > 0], 5e-2 * scale.sign()[strength > 0], rtol=1e-4)


def test_a_mask_of_ones_is_global_l1_and_of_zeros_is_nothing() -> None:
    scale = torch.randn(9)
    everywhere = masked_l1([scale], [torch.full((9,), 0.1)])
    assert torch.allclose(everywhere[0], 0.1 * scale.abs().sum())
    assert torch.equal(everywhere[1][0], 0.1 * scale.sign())
    value, (gradient,) = masked_l1([scale], [torch.zeros(9)])
    assert value == 0 and not gradient.any()


def test_a_scale_of_zero_is_not_pushed() -> None:
    value, (gradient,) = masked_l1([torch.zeros(3)], [torch.ones(3)])
    assert value == 0 and torch.equal(gradient, torch.zeros(3))


def test_half_precision_and_no_scales() -> None:
    value, (gradient,) = masked_l1([torch.ones(4, dtype=torch.bfloat16)], [torch.ones(4, dtype=torch.bfloat16)])
    assert value == 4 and value.dtype == torch.float32 and gradient.dtype == torch.bfloat16


def test_soft_threshold_is_the_proximal_operator() -> None:
    scales, strengths = scales_and_strengths()
    amounts = [10 * strength for strength in strengths]
    changed = [scale.clone().requires_grad_() for scale in scales]
    soft_threshold_(changed, amounts)
    for scale, amount, now in zip(scales, amounts, changed, strict=True):
        assert torch.allclose(now.detach(), scale.sign() * (scale.abs() - amount).clamp(min=0), atol=1e-15)
        assert torch.equal(now.detach()[amount == 0], scale[amount == 0])
        assert (now.detach()[(scale.abs() <= amount) & (amount > 0)] == 0).all()
        # 1/2 (x - scale)^2 + amount |x| is smallest there
        around = now.detach() + torch.linspace(-0.1, 0.1, 41, dtype=torch.float64).unsqueeze(1)
        cost = (around - scale).square() / 2 + amount * around.abs()
        assert torch.equal(cost.argmin(dim=0), torch.full((len(scale),), 20))


@pytest.mark.parametrize(("steps", "eta", "momentum"), [(600, 0.05, 0.9), (80, 0.01, 0.0), (40_000, 0.1, 0.9)])
def test_a_derived_strength_carries_a_scale_to_zero(steps: int, eta: float, momentum: float) -> None:
    dynamics = Dynamics(eta, momentum)
    schedule = MaskSparsityStrength.derive(steps, dynamics, largest=1.5)
    assert schedule.travel(steps, dynamics) >= 5 * 1.5 * (1 - 1e-12)
    assert schedule.strength >= 5e-4
    scale = torch.tensor([1.5, 1.5], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([scale], lr=eta, momentum=momentum)
    for _ in range(min(steps, 4000)):
        scale.grad = masked_l1([scale], [torch.tensor([schedule.strength, 0.0])])[1][0]
        optimizer.step()
    assert abs(scale[0].item()) <= max(schedule.swing(dynamics), 2 * eta * schedule.strength)
    assert scale[1] == 1.5


def test_a_derived_strength_beats_the_gradient_of_the_loss() -> None:
    dynamics = Dynamics(0.05, 0.9)
    assert MaskSparsityStrength.derive(1e6, dynamics, gradient=0.3).strength == 0.6
    assert MaskSparsityStrength.derive(1e6, dynamics) == MASK_SPARSITY
    decoupled = Dynamics(1e-3, decoupled=True)
    assert MaskSparsityStrength.derive(1e6, decoupled).strength == 2
    assert MaskSparsityStrength.derive(100, decoupled).travel(100, decoupled) == pytest.approx(5)
    assert MASK_SPARSITY.swing(decoupled) == 0


def test_the_travel_budgets_of_the_published_recipes() -> None:
    imagenet, cifar = 5004 * 3.331, 391 * 7.39
    for total, strength, wanted in [(imagenet, 5e-4, 83), (imagenet, 2e-4, 33), (cifar, 5e-4, 14), (cifar, 1e-4, 2.9)]:
        travel = MaskSparsityStrength(strength).travel(total / 0.1, Dynamics(0.1, 0.9))
        assert math.isclose(travel, wanted, rel_tol=0.04)


def test_a_slow_stage_is_corrected_by_doubling() -> None:
    schedule = MaskSparsityStrength(0.01)
    assert schedule.corrected(0.5).corrected(0.5) == MaskSparsityStrength(0.04)
    assert schedule.corrected(0.1) is schedule
    assert schedule.checks(2) == (1,) and schedule.checks(1) == ()


@pytest.mark.parametrize("field", ["strength", "global_strength", "threshold"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_impossible_constants_are_told(field: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=field):
        MaskSparsityStrength(**{field: value})
    with pytest.raises(ConfigurationError, match="at least 1 optimiser step"):
        MaskSparsityStrength.derive(0, Dynamics(0.1))
