"""Damaged or foreign plans, files and checkpoints, weights that are no numbers: one sentence, and nothing changed."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from lightning_prune import (
    PlanError,
    PruningError,
    PruningPlan,
    SlimFileError,
    choose,
    load_slim,
    prune_,
    save_slim,
    trace,
)
from lightning_prune.callbacks.checkpointing import KEY, adapt_
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.errors import ConfigurationError, ProofError
from tests.callbacks.nets import Classifier, image_loader, seeded, trainer
from tests.callbacks.slimming import Task
from tests.settings import SETTINGS

EXAMPLES = int(os.environ.get("LIGHTNING_PRUNE_BAD_INPUT", "50"))
"""Per kind of damage; six kinds."""

IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
FEW = settings(max_examples=EXAMPLES, deadline=None, derandomize=True)


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.Flatten())


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network and an optimiser with state."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(IMAGES).square().mean().backward()
    optimizer.step()
    return model, optimizer


PLAN = choose(trace(net(), IMAGES), ratio=0.5)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Any]:
    """All bytes, numbers and identities that a refusal must leave as they are."""
    tensors: list[Any] = [(name, id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()]
    state = [] if optimizer is None else [copy.deepcopy(optimizer.state_dict())]
    return [tensors, state, str(model)]


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def refuses(work: Callable[[], Any], kinds: type[Exception] | tuple[type[Exception], ...] = PruningError) -> None:
    """The work is refused by one sentence."""
    with pytest.raises(kinds) as caught:
        work()
    message = str(caught.value)
    assert isinstance(caught.value, PruningError) and isinstance(caught.value, (ValueError, TypeError))
    assert message and "\n" not in message and len(message) < 600


# Plans.

NUMBERS = st.one_of(st.integers(-3, 12), st.booleans(), st.floats(allow_nan=True), st.text(max_size=3), st.none())


@st.composite
def damaged_plans(draw: st.DrawFn) -> str:
    """A plan's JSON with one thing wrong."""
    whole = json.loads(PLAN.to_json())
    tensors = whole["tensors"]
    name = draw(st.sampled_from(sorted(tensors)))
    dim = draw(st.sampled_from(sorted(tensors[name])))
    cut = tensors[name][dim]
    kinds = ["cut", "dim", "drop", "empty", "range", "repeat", "size", "type", "unknown", "version"]
    kind = draw(st.sampled_from(kinds))
    if kind == "drop":
        del whole[draw(st.sampled_from(sorted(set(whole) - {"round_to"})))]  # older plans know none
    elif kind == "type":
        key, value = draw(st.sampled_from(sorted(set(whole) - {"signature"}))), draw(NUMBERS)
        assume(key != "round_to" or type(value) is not int or value < 1)
        whole[key] = value
    elif kind == "repeat":
        cut["kept"] = [*cut["kept"], draw(st.sampled_from(cut["kept"]))]
    elif kind == "range":
        cut["kept"] = [*cut["kept"][:-1], draw(st.one_of(st.integers(-9, -1), st.integers(cut["size"], 99)))]
    elif kind == "empty":
        cut["kept"] = []
    elif kind == "version":
        whole["version"] = draw(st.one_of(st.integers(2, 99), st.text(max_size=3), st.none()))
    elif kind == "unknown":
        tensors[draw(st.text("abc.", min_size=1, max_size=6))] = tensors.pop(name)
    elif kind == "dim":
        tensors[name][draw(st.sampled_from(["-1", "4", "x", "1.5"]))] = tensors[name].pop(dim)
    elif kind == "size":
        cut["size"] = draw(st.integers(cut["size"] + 1, 99))
    else:
        text = PLAN.to_json()
        return text[: draw(st.integers(0, len(text) - 1))]
    return json.dumps(whole)


@FEW
@given(damaged_plans())
def test_damaged_plans(text: str) -> None:
    model, optimizer = trained()
    before = everything(model, optimizer)
    refuses(lambda: prune_(model, PruningPlan.from_json(text), optimizer), PlanError)
    assert same(everything(model, optimizer), before)


@FEW
@given(st.sampled_from(["conv", "linear", "wide", "deep"]), st.integers(2, 9))
def test_plans_of_other_models(kind: str, width: int) -> None:
    others = {
        "conv": lambda: nn.Sequential(nn.Conv2d(3, width + 6, 3), nn.BatchNorm2d(width + 6), nn.Flatten()),
        "linear": lambda: nn.Sequential(nn.Linear(3, width)),
        "wide": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5 + width, 1)),
        "deep": lambda: nn.Sequential(*net(), nn.Linear(width, 2)),
    }
    model = others[kind]()
    before = everything(model)
    refuses(lambda: prune_(model, PLAN), PlanError)
    assert same(everything(model), before)


# Files.


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slim") / "slim.safetensors"
    model = net(seed=1)
    prune_(model, PLAN)
    save_slim(model, path, PLAN, accuracy=0.5)
    return path


@FEW
@given(st.data())
def test_damaged_files(file: Path, data: st.DataObject) -> None:
    """Cut off anywhere, one bit flipped anywhere, or something else altogether."""
    whole = file.read_bytes()
    kind = data.draw(st.sampled_from(["cut", "flip", "flip", "flip", "foreign"]))
    if kind == "cut":
        content = whole[: data.draw(st.integers(0, len(whole) - 1))]
    elif kind == "flip":
        place, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
        content = whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :]
    else:
        content = data.draw(st.binary(max_size=200))
    broken = file.with_name("broken.safetensors")
    broken.write_bytes(content)
    model = net()
    before = everything(model)
    refuses(lambda: load_slim(broken, model), SlimFileError)
    assert same(everything(model), before)


# Checkpoints.


@FEW
@given(
    st.one_of(
        st.fixed_dictionaries({"version": st.sampled_from([0, 2, "1", None]), "plans": st.just([])}),
        st.fixed_dictionaries({"version": st.just(1), "plans": st.one_of(st.integers(), st.none(), st.just([1]))}),
        st.fixed_dictionaries(
            {
                "version": st.just(1),
                "plans": st.lists(
                    st.fixed_dictionaries({"module": st.text(max_size=4), "plan": damaged_plans()}), min_size=1
                ),
            }
        ),
        st.text(max_size=5),
        st.integers(),
    )
)
def test_damaged_checkpoints(record: Any) -> None:
    task = Task()
    before = everything(task)
    refuses(lambda: adapt_(task, {"state_dict": {}, KEY: record}), PlanError)
    assert same(everything(task), before)


class Memory(Callback):
    """What a callback remembers after a dozen steps."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback
        self.state: dict[str, Any] = {}

    def on_train_batch_end(self, run: Trainer, *_: Any) -> None:
        if run.global_step == 12:
            self.state = copy.deepcopy(self.callback.state_dict())


ROWS = ["ascp", "greg1", "greg2", "mask_sparsity", "tpp", "greg1 on weights"]


@pytest.fixture(scope="module")
def states() -> dict[str, tuple[Any, dict[str, Any]]]:
    """A callback of every method, and what it remembers in the middle of its stage."""
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    for row in ROWS:
        callback = SETTINGS[row].build()
        memory = Memory(callback)
        trainer(callback, memory, max_epochs=3).fit(Classifier(seeded(SETTINGS[row].net)), image_loader(7))
        found[row] = callback, memory.state
    return found


@FEW
@given(st.data())
def test_callback_states_that_lack_something(states: Any, data: st.DataObject) -> None:
    row = data.draw(st.sampled_from(ROWS))
    callback, state = states[row][0], copy.deepcopy(states[row][1])
    whole = st.sampled_from(sorted(state))
    part = data.draw(st.sampled_from(["whole", "method", "kind", "schedule"]))
    if part == "whole":
        del state[data.draw(whole)]
    elif part == "method" and state["method"]:
        del state["method"][data.draw(st.sampled_from(sorted(state["method"])))]
    elif part == "schedule" and state["schedule"]:
        state["schedule"] = {**state["schedule"], data.draw(st.text("abc", min_size=1, max_size=3)): 1}
    else:
        state = data.draw(st.sampled_from([None, 7, [], "state", {}]))
    refuses(lambda: SETTINGS[row].build().load_state_dict(state), PlanError)
    assert callback.phase != "wait"


# Weights.


@FEW
@given(
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    st.integers(0, 5),
    st.sampled_from(["l1", "l2", "bn_scale"]),
)
def test_scores_that_are_no_numbers(value: float, channel: int, score: str) -> None:
    model = net()
    weight: Any = model[1].weight if score == "bn_scale" else model[0].weight  # type: ignore[index]
    with torch.no_grad():
        weight[channel] = value
    graph, before = trace(model, IMAGES), everything(model)
    refuses(lambda: choose(graph, score=score), ConfigurationError)
    first, second = everything(model), before
    assert str(first) == str(second)  # NaN is no NaN's equal


@pytest.mark.parametrize("row", SETTINGS)
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.filterwarnings("ignore:.*energy was left", "ignore:.*can't be folded")
def test_every_method_refuses_weights_that_are_no_numbers(row: str, layer: int) -> None:
    """Filters, or the scales of a norm: when it looks at them, at the latest in the proof before surgery."""
    network: Any = seeded(SETTINGS[row].net)
    with torch.no_grad():
        network[layer].weight[2] = float("nan")
    task = Classifier(network)
    run = trainer(SETTINGS[row].build(), StructuralPruning(latency_batches=(), report_file=None), max_epochs=4)
    with pytest.raises((ConfigurationError, ProofError)) as caught:
        run.fit(task, image_loader(7))
    assert "\n" not in str(caught.value)
    assert network[0].out_channels == 8 and network[3].in_channels == 8
