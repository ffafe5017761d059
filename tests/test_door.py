"""Arguments of another kind than was meant are refused in one sentence, whichever door they come to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from torch import nn

from lightning_prune import (
    ASCP,
    TPP,
    ASCPSchedule,
    Budget,
    GReg1,
    GReg1Schedule,
    GReg2,
    GReg2Schedule,
    LoadPruned,
    Magnitude,
    MaskSparsity,
    PruningMonitor,
    StructuralPruning,
    TPPSchedule,
    choose,
    choose_weights,
    trace,
)
from lightning_prune.errors import ConfigurationError

METHODS: tuple[Callable[..., Any], ...] = (ASCP, GReg1, GReg2, Magnitude, MaskSparsity, TPP)


def said(call: Callable[..., Any], **arguments: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        call(**arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "wrong",
    [
        {"ratio": True},
        {"ratio": [0.5]},
        {"ratios": [("net", 0.5)]},
        {"ratios": {1: 0.5}},
        {"ratios": {"net": True}},
        {"ratios": {"net": float("nan")}},
        {"ignore": "net"},
        {"ignore": None},
        {"ignore": 3},
        {"ignore": [1]},
        {"ignore": {"net": 1}},
        {"round_to": True},
        {"round_to": [8]},
        {"start": True},
        {"epochs": True},
        {"module": 4},
        {"name": 4},
        {"scope": ["inner"]},
        {"ratio": None, "budget": {"latency_ms": 1.0, "device": 3}},
    ],
    ids=str,
)
def test_what_all_methods_take(method: Callable[..., Any], wrong: dict[str, Any]) -> None:
    sentence = said(method, **{"ratio": 0.5, "epochs": 2, **wrong})
    *_, (name, value) = wrong.items()
    assert name in sentence and (repr(value) in sentence or isinstance(value, (dict, list)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"at_epoch": "3"},
        {"at_epoch": 2.5},
        {"safe_change": None},
        {"tolerance": "small"},
        {"monitor": 3},
        {"module": ["net"]},
        {"report_file": 3},
        {"report_file": ""},
        {"latency_batches": 4},
        {"latency_batches": None},
        {"latency_batches": "1,2"},
        {"latency_batches": [1.5]},
        {"latency_batches": [True]},
        {"latency_variants": 3},
        {"latency_variants": None},
        {"latency_variants": [["eager"]]},
    ],
    ids=str,
)
def test_what_surgery_takes(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    assert f"{name}={value!r}" in said(StructuralPruning, **wrong)


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        (PruningMonitor, {"monitor": 3}),
        (PruningMonitor, {"every_n_epochs": "1"}),
        (PruningMonitor, {"every_n_epochs": True}),
        (LoadPruned, {"path": None}),
        (LoadPruned, {"path": "slim.safetensors", "module": None}),
        (GReg1, {"ratio": 0.5, "epochs": 2, "granularity": ["weight"]}),
        (GReg1, {"ratio": 0.5, "epochs": 2, "coupled": "False"}),
        (TPP, {"ratio": 0.5, "epochs": 2, "gram": "x"}),
        (TPP, {"ratio": 0.5, "epochs": 2, "gram_every": 0}),
        (TPP, {"ratio": 0.5, "epochs": 2, "gram_every": 2.0}),
        (Magnitude, {"ratio": 0.5, "epochs": 2, "steps": "x"}),
        (Magnitude, {"ratio": 0.5, "epochs": 2, "seed": 0.5}),
        (MaskSparsity, {"ratio": 0.5, "epochs": 4, "global_epochs": None}),
        (MaskSparsity, {"ratio": 0.5, "epochs": 4, "passes": True}),
        (MaskSparsity, {"ratio": 0.5, "epochs": 4, "mask_at": 2}),
        (MaskSparsity, {"ratio": 0.5, "epochs": None}),
        (MaskSparsity, {"epochs": 4, "threshold": "0.1"}),
        (MaskSparsity, {"epochs": 4, "threshold": True}),
        (ASCP, {"ratio": 0.5, "epochs": 2, "pull": "x"}),
        (ASCP, {"ratio": 0.5, "epochs": 2, "recalibrate": None}),
        (Budget, {"macs": True}),
    ],
)
def test_the_other_doors(call: Callable[..., Any], wrong: dict[str, Any]) -> None:
    *_, (name, value) = wrong.items()
    assert f"{name}={value!r}" in said(call, **wrong)


@pytest.mark.parametrize(
    ("method", "kind"), [(ASCP, ASCPSchedule), (GReg1, GReg1Schedule), (GReg2, GReg2Schedule), (TPP, TPPSchedule)]
)
@pytest.mark.parametrize(
    "wrong",
    [
        ASCPSchedule(3),
        GReg1Schedule(),
        GReg2Schedule(),
        TPPSchedule(),
        GReg1Schedule,
        {"delta": 0.1},
        {"epochs": 3},
        ["cifar"],
        "mnist",
        5,
        0,
        False,
        "",
    ],
    ids=str,
)
def test_each_method_takes_a_schedule_of_its_own_kind_alone(method: Callable[..., Any], kind: Any, wrong: Any) -> None:
    if isinstance(wrong, kind):
        assert method(0.5, schedule=wrong).schedule is wrong
    else:
        sentence = said(method, ratio=0.5, schedule=wrong)
        assert f"schedule={wrong!r}" in sentence and kind.__name__ in sentence


@pytest.mark.parametrize(
    ("method", "given", "built"),
    [
        ("ASCP", {"epochs": 3}, ASCPSchedule(3)),
        ("GReg1", {"delta": 0.1, "hold": 3}, GReg1Schedule(delta=0.1, hold=3)),
        ("GReg2", {"kept": 0.0}, GReg2Schedule(kept=0.0)),
        ("TPP", {"gram_every": 2}, TPPSchedule(gram_every=2)),
        ("TPP", "cifar", "cifar"),
    ],
)
def test_a_schedule_in_a_config_file_is_built_before_it_comes_to_the_door(method: str, given: Any, built: Any) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=Callback)
    init_args = {"ratio": 0.5, "schedule": given}
    config = parser.parse_object({"callback": {"class_path": f"lightning_prune.{method}", "init_args": init_args}})
    instantiate = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    assert instantiate(config).callback.schedule == built


def test_a_schedule_may_be_of_a_kind_derived_from_the_published_one() -> None:
    class Own(GReg1Schedule):
        pass

    assert isinstance(GReg1(0.5, schedule=Own(hold=3)).schedule, Own)


@pytest.mark.parametrize(
    "wrong",
    [
        {"ratio": "half"},
        {"ratio": [0.5]},
        {"ratios": "0"},
        {"ratios": [("0", 0.5)]},
        {"ratios": {0: 0.5}},
        {"ratios": {"0": "half"}},
        {"ignore": None},
        {"ignore": 3},
        {"ignore": [0]},
        {"seed": "now"},
    ],
    ids=str,
)
def test_a_choice_without_lightning(wrong: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    graph = trace(net, torch.zeros(2, 4))
    ((name, _),) = wrong.items()
    assert name in said(lambda **options: choose(graph, **options), **wrong)
    assert name in said(lambda **options: choose_weights(net, **options), **wrong)
