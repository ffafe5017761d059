"""TPP's decorrelation and schedule against the published forms, in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.errors import ConfigurationError
from lightning_prune.penalties import gram_decorrelation, spectral_norm
from lightning_prune.schedules import TPP_CIFAR, TPP_IMAGENET, Dynamics, TPPSchedule

SHAPES = [((8, 3, 3, 3), 5), ((8, 3, 3, 3), 5), ((8, 3, 3, 3), 2), ((6, 10), 3), ((4, 2, 5), 4), ((7, 3), 0)]


def layers(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape, _ in SHAPES]
    pruned = [torch.randperm(shape[0], generator=generator)[:count] for shape, count in SHAPES]
    return weights, pruned


def masked(weight: Tensor, rows: Tensor) -> Tensor:
    """The formula: squared entries of the Gram matrix in pruned rows or columns."""
    flat = weight.flatten(1)
    mask = torch.zeros(len(flat), len(flat), dtype=weight.dtype)
    mask[rows] = 1
    mask[:, rows] = 1
    return (mask * (flat @ flat.T) ** 2).sum()


def detached_target(weight: Tensor, rows: Tensor) -> Tensor:
    """The published code: mean squared error between the Gram matrix and its detached copy with zeroed entries."""
    flat = weight.flatten(1)
    product = flat @ flat.T
    target = product.detach().clone()
    target[rows] = 0
    target[:, rows] = 0
    return torch.nn.functional.mse_loss(product, target)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_value_and_gradients_are_autograds(reduction: str) -> None:
    weights, pruned = layers()
    value, gradients = gram_decorrelation(weights, pruned, reduction=reduction, strength=0.3)  # type: ignore[arg-type]
    parts = [
        masked(weight, rows) / (len(weight) ** 2 if reduction == "mean" else 1)
        for weight, rows in zip(weights, pruned, strict=True)
    ]
    plain = 0.3 * torch.stack(parts).sum()
    assert not value.requires_grad and torch.allclose(value, plain.detach(), rtol=1e-12)
    for weight, rows, gradient, wanted in zip(
        weights, pruned, gradients, torch.autograd.grad(plain, weights), strict=True
    ):
        assert gradient.shape == weight.shape and not gradient.requires_grad
        assert torch.allclose(gradient, wanted, rtol=1e-12, atol=1e-12)
        assert bool(gradient.any()) == bool(len(rows))


def test_the_published_code_with_its_detached_target_is_the_same() -> None:
    weights, pruned = layers()
    plain = torch.stack([detached_target(*pair) for pair in zip(weights, pruned, strict=True)]).sum()
    value, gradients = gram_decorrelation(weights, pruned)
    assert torch.allclose(value, plain.detach(), rtol=1e-12)
    for gradient, wanted in zip(gradients, torch.autograd.grad(plain, weights), strict=True):
        assert torch.allclose(gradient, wanted, rtol=1e-12, atol=1e-14)


class Decorrelation(torch.autograd.Function):
    """Value and gradient as one function, for gradcheck."""

    @staticmethod
    def forward(ctx, weight, rows):  # type: ignore[no-untyped-def]
        value, (gradient,) = gram_decorrelation([weight], [rows])
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx, outer):  # type: ignore[no-untyped-def]
        return outer * ctx.saved_tensors[0], None


def test_gradcheck() -> None:
    for weight, rows in zip(*layers(), strict=True):
        assert torch.autograd.gradcheck(Decorrelation.apply, (weight, rows))


def test_kept_filters_among_themselves_are_left_alone() -> None:
    weights, pruned = layers()
    for weight, rows in zip(weights, pruned, strict=True):
        gone = weight.detach().clone()
        gone[rows] = 0
        value, (gradient,) = gram_decorrelation([gone], [rows])
        assert value == 0 and not gradient.any()


def test_kept_rows_are_pulled_less_and_less_as_the_pruned_ones_vanish() -> None:
    weight = torch.randn(6, 9, dtype=torch.float64)
    sizes = []
    for factor in (1.0, 0.1, 0.01):
        scaled = weight.clone()
        scaled[:2] *= factor
        sizes.append(gram_decorrelation([scaled], [torch.tensor([0, 1])])[1][0][2:].norm())
    assert torch.allclose(sizes[1] / sizes[0], torch.tensor(0.01, dtype=torch.float64))
    assert torch.allclose(sizes[2] / sizes[1], torch.tensor(0.01, dtype=torch.float64))


def test_only_pruned_rows_are_computed_and_equal_shapes_together() -> None:
    weights = [torch.randn(64, 32, 3, 3) for _ in range(3)]
    rows = [torch.arange(place, place + 4) for place in range(3)]
    with FlopCounterMode(display=False) as counter:
        gram_decorrelation(weights, rows)
    # the products, the gradients of 4 filters and those of the other 60; a Gram matrix alone has 64 x 64 x 288
    assert counter.get_total_flops() == 3 * 2 * 4 * (64 + 64 + 60) * 288
    with torch.profiler.profile(acc_events=True) as profile:
        gram_decorrelation(weights, rows)
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::bmm") == 3


def test_single_precision_under_autocast_and_for_half_precision_weights() -> None:
    weights, pruned = layers(torch.float32)
    plain = gram_decorrelation(weights, pruned)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradients = gram_decorrelation(weights, pruned)
    assert torch.equal(value, plain[0])
    assert all(map(torch.equal, gradients, plain[1]))
    halves = [weight.detach().bfloat16() for weight in weights]
    value, gradients = gram_decorrelation(halves, pruned)
    assert value.dtype == torch.float32
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients)
    exact, exact_gradients = gram_decorrelation([half.double() for half in halves], pruned)
    assert torch.allclose(value.double(), exact, rtol=1e-5)
    for gradient, wanted in zip(gradients, exact_gradients, strict=True):
        assert torch.allclose(gradient.double(), wanted, rtol=1e-2, atol=1e-6)


def test_nothing_to_prune() -> None:
    value, (gradient,) = gram_decorrelation([torch.randn(3, 2)], [torch.tensor([], dtype=torch.int64)])
    assert value == 0 and torch.equal(gradient, torch.zeros(3, 2))


def test_weights_are_not_changed() -> None:
    weights, pruned = layers()
    before = [weight.detach().clone() for weight in weights]
    gram_decorrelation(weights, pruned)
    assert all(torch.equal(weight, old) and weight.grad is None for weight, old in zip(weights, before, strict=True))


def test_training_under_it_removes_the_correlation() -> None:
    weight = torch.randn(8, 6, dtype=torch.float64).requires_grad_()
    rows = torch.tensor([1, 4, 5])
    start = masked(weight, rows).item()
    for _ in range(3000):
        weight.grad = gram_decorrelation([weight], [rows])[1][0]
        torch.optim.SGD([weight], lr=0.1).step()
    assert masked(weight, rows) < 0.02 * start


def test_the_strength_is_the_published_loop() -> None:
    schedule = TPPSchedule(delta=0.01, ceiling=0.2, update_every=3, hold=7)
    strength, finished = 0.0, None
    for step in range(schedule.length):
        if finished is None and step % 3 == 0:
            strength = 0.01 * (step / 3)
            finished = step if strength >= 0.2 - 1e-12 else None
        assert schedule.strength(step) == pytest.approx(strength, abs=1e-15)
    assert finished == schedule.last_event == 60
    assert schedule.length == 60 + 7 + 1


def test_published_lengths() -> None:
    assert (TPP_CIFAR.last_event, TPP_CIFAR.length) == (100_000, 110_001)
    assert (TPP_IMAGENET.last_event, TPP_IMAGENET.length) == (50_000, 90_001)
    assert TPP_CIFAR.strength(0) == 0 and TPP_CIFAR.strength(10) == 1e-4 and TPP_CIFAR.strength(100_000) == 1


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0, 0.5])
def test_the_polynomial_form(power: float) -> None:
    schedule = TPPSchedule(delta=0.1, ceiling=2.0, update_every=5, hold=4, power=power)
    values = [schedule.strength(step) for step in range(schedule.length)]
    assert values[0] == 0 and values[100] == 2 and values == sorted(values)
    assert values[::5] == pytest.approx([2 * (min(step, 100) / 100) ** power for step in range(0, 105, 5)])


def test_layers_are_zeroed_one_after_the_other() -> None:
    assert [TPP_CIFAR.zeroed(100_000 + step, 56) for step in (-1, 0, 99, 100, 199, 200, 5_599, 5_600, 9_999)] == [
        *(0, 0, 0, 1, 1, 2),
        *(55, 56, 56),
    ]
    short = TPPSchedule(delta=0.5, ceiling=1.0, update_every=1, hold=3)
    assert [short.zeroed(step, 56) for step in range(short.length)] == [0, 0, 0, 0, 0, 56]


@pytest.mark.parametrize("steps", [2, 3, 10, 187, 2_000, 110_000])
@pytest.mark.parametrize("dynamics", [Dynamics(0.05, 0.9), Dynamics(1e-3, decoupled=True), Dynamics(1e-3, 0.9)])
def test_a_derived_schedule_is_as_long_as_asked(steps: int, dynamics: Dynamics) -> None:
    schedule = TPPSchedule.derive(steps, dynamics, layers=7, steepness=0.02)
    assert schedule.length == steps
    assert schedule.events <= 2001
    assert schedule.strength(steps - 1) == schedule.ceiling <= dynamics.strongest
    assert schedule.zeroed(steps - 1, 7) == 7
    if steps >= 500:
        assert schedule.exponent(dynamics) > 10
        assert schedule.zeroed(schedule.last_event + schedule.hold // 2, 7) == 7


@pytest.mark.parametrize("dynamics", [Dynamics(0.05, 0.9), Dynamics(1e-3, 0.9), Dynamics(0.03, 0.9)])
def test_a_derived_ceiling_is_no_higher_than_it_has_to_be(dynamics: Dynamics) -> None:
    schedules = [TPPSchedule.derive(steps, dynamics) for steps in (300, 600, 1_200, 2_400, 200_000)]
    assert [one.ceiling for one in schedules] == sorted((one.ceiling for one in schedules), reverse=True)
    assert all(
        one.exponent(dynamics) == pytest.approx(12, rel=1e-3) or (one.ceiling == 0.05 and one.exponent(dynamics) > 12)
        for one in schedules[1:]
    )
    assert schedules[-1].ceiling == 0.05


def test_adaptive_optimisers_get_a_ceiling_that_they_cannot_resist() -> None:
    dynamics = Dynamics(1e-3, decoupled=True)
    assert [TPPSchedule.derive(steps, dynamics).ceiling for steps in (600, 200_000)] == [200.0, 200.0]


@pytest.mark.parametrize("dynamics", [Dynamics(0.05, 0.9), Dynamics(1e-3, decoupled=True)])
@pytest.mark.parametrize("steepness", [1e-6, 0.02, 40.0])
def test_the_decorrelation_is_no_steeper_than_the_penalty(dynamics: Dynamics, steepness: float) -> None:
    schedule = TPPSchedule.derive(600, dynamics, steepness=steepness)
    assert schedule.gram == pytest.approx(min(1000.0, 1 / steepness))
    pull = dynamics.learning_rate * schedule.ceiling * schedule.gram * steepness
    assert pull <= 0.5 * (1 + 1e-9)  # so that no step overshoots
    assert TPPSchedule.derive(600, dynamics).gram == 1000


@pytest.mark.parametrize("every", [1, 4, 16, 64, 256])
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
@pytest.mark.parametrize("rate", [0.01, 0.3])
def test_a_lazy_decorrelation_never_leaves_more_than_there_was(every: int, momentum: float, rate: float) -> None:
    """A weight along the steepest direction, in a stage so short that the ceiling is high."""
    dynamics = Dynamics(rate, momentum=momentum)
    schedule = TPPSchedule.derive(600, dynamics, steepness=0.02, gram_every=every)
    weight, velocity, largest = 1.0, 0.0, 0.0
    for step in range(4 * schedule.length):
        pull = schedule.ceiling * schedule.gram * 0.02 * every * weight if step % every == 0 else 0.0
        velocity = momentum * velocity + pull
        weight -= rate * velocity
        largest = max(largest, abs(weight))
    assert largest <= 1.0 and abs(weight) < 1.0


def test_what_stays_shrinks_by_half_the_steepness_however_long_the_stage() -> None:
    """A filter along one that goes: its logarithm falls by half the factor times the steepness, and no further."""
    for ceiling, steps in ((0.1, 4_000), (0.4, 1_000), (0.02, 20_000)):
        weight = torch.tensor([[1.0, 0.0], [1e-3, 0.0]], dtype=torch.float64)
        for step in range(steps):
            _, (pull,) = gram_decorrelation([weight], [torch.tensor([0])], strength=ceiling * step / steps)
            pull[0] = ceiling * step / steps * weight[0]  # alone with the penalty
            weight -= 0.05 * pull
        assert weight[0].norm() < 1e-4
        # steepness 4 / N^2 = 1
        assert -(weight[1, 0] / 1e-3).log().item() == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize(
    ("field", "value"),
    [("delta", 0.0), ("delta", 2.0), ("ceiling", float("nan")), ("update_every", 0), ("hold", -1), ("power", 0.0),
     ("gram", -1.0), ("zero_every", 0)],
)  # fmt: skip
def test_impossible_constants_are_told(field: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=field):
        TPPSchedule(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="at least 2 optimiser steps"):
        TPPSchedule.derive(1, Dynamics(0.1))


@pytest.mark.parametrize(("shape", "within"), [((8, 27), 1e-6), ((32, 5), 1e-6), ((64, 90), 1e-4), ((400, 300), 1e-2)])
def test_the_spectral_norm_is_that_of_a_decomposition(shape: tuple[int, int], within: float) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    expected = torch.linalg.matrix_norm(matrix, ord=2)
    torch.testing.assert_close(spectral_norm(matrix), expected, rtol=within, atol=0.0)
    assert spectral_norm(matrix) <= expected * (1 + 1e-12)
    rows = torch.cat([matrix[:1], torch.zeros_like(matrix)])
    torch.testing.assert_close(spectral_norm(rows), matrix[0].norm(), rtol=1e-12, atol=0.0)
    assert spectral_norm(torch.zeros(shape)) == 0
