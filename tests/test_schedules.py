"""Schedules against the recursion they are the closed form of, and against the optimiser they promise something of."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from lightning_prune.errors import ConfigurationError
from lightning_prune.schedules import (
    ENOUGH,
    GREG1_CIFAR,
    GREG1_IMAGENET,
    GREG2_CIFAR,
    GREG2_IMAGENET,
    ASCPSchedule,
    Dynamics,
    GReg1Schedule,
    GReg2Schedule,
    MaskSparsityStrength,
    TPPSchedule,
)

SGD = Dynamics(0.05, momentum=0.9)
ADAMW = Dynamics(1e-3, decoupled=True)


def test_greg1_grows_event_by_event() -> None:
    schedule = GReg1Schedule(delta=0.25, ceiling=1.0, update_every=3, hold=5)
    strength, recursion = 0.0, []
    for step in range(schedule.length):
        if step % 3 == 0 and step <= schedule.last_event:
            strength += 0.25
        recursion.append(strength)
    assert [schedule.strength(step) for step in range(schedule.length)] == recursion
    assert (schedule.events, schedule.pick_step, schedule.last_event, schedule.length) == (4, 0, 9, 15)
    assert {schedule.kept_strength(step) for step in range(schedule.length)} == {0.0}


def test_greg2_grows_event_by_event() -> None:
    schedule = GReg2Schedule(
        pick_delta=0.125, pick_ceiling=0.25, delta=0.25, ceiling=1.0, update_every=2, hold=4, kept=-0.5
    )
    assert [schedule.strength(step) for step in range(0, 12, 2)] == [0.125, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert [schedule.kept_strength(step) for step in range(0, 8, 2)] == [0.125, 0.25, -0.5, -0.5]
    assert (schedule.pick_events, schedule.pick_step, schedule.growth_event) == (2, 2, 2)
    assert (schedule.events, schedule.last_event, schedule.length) == (5, 8, 13)


@pytest.mark.parametrize(
    ("schedule", "events", "last_event", "surgery"),
    [
        (GREG1_CIFAR, 10_000, 99_990, 109_990),
        (GREG1_IMAGENET, 10_000, 49_995, 89_995),
        (GREG2_CIFAR, 10_900, 108_990, 118_990),
        (GREG2_IMAGENET, 10_900, 54_495, 94_495),
    ],
)
def test_published_constants_last_as_long_as_published(
    schedule: Any, events: int, last_event: int, surgery: int
) -> None:
    assert (schedule.events, schedule.last_event) == (events, last_event)
    assert schedule.length - 1 == surgery  # the step after which the channels go
    assert schedule.strength(0) < schedule.strength(schedule.update_every)
    assert schedule.strength(schedule.last_event) == schedule.strength(10**9) == pytest.approx(1.0, abs=1e-12)


def test_ten_thousand_increments_leave_no_rounding() -> None:
    assert all(GREG1_CIFAR.strength(10 * event) == (event + 1) * 1e-4 for event in range(10_000))


def test_published_pick_is_at_one_thousand_events() -> None:
    assert (GREG2_CIFAR.pick_events, GREG2_CIFAR.pick_step) == (1000, 9990)
    assert GREG2_CIFAR.strength(9990) == GREG2_CIFAR.kept_strength(9999) == pytest.approx(0.01)
    assert GREG2_CIFAR.kept_strength(10_000) == -1e-4
    assert GREG2_CIFAR.strength(10_000) == pytest.approx(0.0101)


@pytest.mark.parametrize("dynamics", [SGD, ADAMW, Dynamics(1e-3, 0.9), Dynamics(0.5, 0.0), Dynamics(3.0, 0.99)])
@pytest.mark.parametrize("steps", [2, 3, 4, 7, 30, 100, 501, 2000, 33_333])
@pytest.mark.parametrize("kind", [GReg1Schedule, GReg2Schedule])
def test_derived_schedules_last_exactly_and_stay_stable(kind: Any, steps: int, dynamics: Dynamics) -> None:
    schedule = kind.derive(steps, dynamics)
    assert schedule.length == steps
    assert schedule.stop_ratio is None
    assert 0 <= schedule.pick_step < steps
    strengths = [schedule.strength(step) for step in range(0, steps, max(1, steps // 500))]
    assert all(a <= b + 1e-9 for a, b in pairwise(strengths))
    assert max(strengths) * dynamics.learning_rate < 1


@pytest.mark.parametrize("kind", [GReg1Schedule, GReg2Schedule])
@pytest.mark.parametrize("dynamics", [SGD, ADAMW, Dynamics(1e-3, 0.9)])
def test_derived_schedules_reach_the_exponent(kind: Any, dynamics: Dynamics) -> None:
    schedule = kind.derive(400, dynamics)
    naive = sum(dynamics.learning_rate * schedule.strength(step) for step in range(400)) / (1 - dynamics.momentum)
    assert schedule.exponent(dynamics) >= ENOUGH
    assert naive >= schedule.exponent(dynamics) * 0.999


def test_a_stage_too_short_for_momentum_is_known_to_be() -> None:
    assert GReg1Schedule.derive(50, SGD).exponent(SGD) < ENOUGH
    assert GReg1Schedule.derive(50, ADAMW).exponent(ADAMW) > ENOUGH


@pytest.mark.parametrize("steps", [300, 3000])
def test_the_exponent_is_what_sgd_does(steps: int) -> None:
    """A weight that no loss holds: torch's own SGD decays at least as far as promised."""
    schedule = GReg1Schedule.derive(steps, SGD)
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.05, momentum=0.9)
    largest = 0.0
    for step in range(steps):
        weight.grad = schedule.strength(step) * weight.detach()
        optimizer.step()
        largest = max(largest, abs(weight.item())) if step > steps - 20 else 0.0
    assert -math.log(largest) > 0.9 * schedule.exponent(SGD)


def test_a_slow_ramp_decays_by_the_papers_formula() -> None:
    schedule = GReg1Schedule(delta=1e-4, ceiling=0.02, update_every=10, hold=0)
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=1e-2, momentum=0.9, weight_decay=5e-4)
    total = 0.0
    for step in range(schedule.length):
        weight.grad = schedule.strength(step) * weight.detach()
        optimizer.step()
        total += 5e-4 + schedule.strength(step)
    assert math.log(weight.item()) == pytest.approx(-1e-2 / 0.1 * total, rel=0.02)


@pytest.mark.parametrize(
    "arguments",
    [
        {"delta": 0.0},
        {"delta": 2.0},
        {"delta": math.nan},
        {"ceiling": -1.0},
        {"update_every": 0},
        {"hold": -1},
        {"stop_ratio": 0.5},
        {"smoothing": 1.0},
        {"check_every": 0},
    ],
)
@pytest.mark.parametrize("kind", [GReg1Schedule, GReg2Schedule])
def test_constants_out_of_range_are_refused_in_one_line(kind: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        kind(**arguments)
    assert "\n" not in str(caught.value)


COUNTED = {
    GReg1Schedule: ["update_every", "hold", "check_every"],
    GReg2Schedule: ["update_every", "hold", "check_every"],
    TPPSchedule: ["update_every", "hold", "zero_every", "gram_every"],
    ASCPSchedule: ["epochs", "interval"],
}
MEASURED = {
    GReg1Schedule: ["delta", "ceiling", "stop_ratio", "smoothing"],
    GReg2Schedule: ["pick_delta", "pick_ceiling", "delta", "ceiling", "kept", "stop_ratio", "smoothing"],
    TPPSchedule: ["delta", "ceiling", "power", "gram"],
    ASCPSchedule: ["ramp", "early", "reached", "freeze_after"],
    MaskSparsityStrength: ["strength", "global_strength", "threshold"],
}


def refusal(kind: Any, name: str, value: Any) -> str:
    needed = {"epochs": 3} if kind is ASCPSchedule else {}
    with pytest.raises(ConfigurationError) as caught:
        kind(**{**needed, name: value})
    return str(caught.value)


@pytest.mark.parametrize("value", ["2", 2.5, 10.0, True, None, [2], math.inf])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in COUNTED.items() for name in names])
def test_what_counts_must_be_a_whole_number(kind: Any, name: str, value: Any) -> None:
    assert refusal(kind, name, value) == f"{name}={value!r} must be a whole number."


@pytest.mark.parametrize("value", ["0.1", True, [0.1], None, math.inf, math.nan])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in MEASURED.items() for name in names])
def test_what_measures_must_be_a_finite_number(kind: Any, name: str, value: Any) -> None:
    if name == "stop_ratio" and value is None:
        assert kind(stop_ratio=None).stop_ratio is None
    else:
        finite = "finite " if isinstance(value, float) else ""
        assert refusal(kind, name, value) == f"{name}={value!r} must be a {finite}number."


def test_a_pick_above_the_ceiling_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="pick_ceiling"):
        GReg2Schedule(pick_ceiling=2.0)
    with pytest.raises(ConfigurationError, match="at least 2 optimiser steps"):
        GReg2Schedule.derive(1, SGD)


def test_records_are_frozen_and_comparable() -> None:
    with pytest.raises(FrozenInstanceError):
        GREG1_CIFAR.delta = 1.0  # type: ignore[misc]
    assert replace(GREG1_CIFAR, hold=5) == GReg1Schedule(hold=5)
