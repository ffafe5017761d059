"""Plans as data, proofs, and slim files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_prune.errors import PlanError, ProofError, PruningError, SlimFileError
from lightning_prune.structure import PruningPlan, choose, load_slim, masked_state, prove, prune_, save_slim, trace
from lightning_prune.structure.slim_file import read_slim_header
from tests.structure.test_surgery import Net, image


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def plan_of(model: nn.Module, **options: Any) -> PruningPlan:
    return choose(trace(model, image()), **{"ratio": 0.5, "scope": "all", **options})


def test_a_plan_survives_json_and_fits_a_fresh_model(model: Net) -> None:
    plan = plan_of(model)
    read = PruningPlan.from_json(plan.to_json())
    assert read == plan and hash(read) == hash(plan) and read.to_json() == plan.to_json()
    fresh = Net()
    fresh.load_state_dict(model.state_dict())
    prune_(fresh, read)
    prune_(model, plan)
    assert torch.equal(fresh.eval()(image()), model(image()))


def test_a_plan_prints_the_widths_of_layers(model: Net) -> None:
    assert str(plan_of(model)).splitlines() == ["inner.0  12 -> 6", "inner.3  8 -> 4", "stem.0   8 -> 4"]


def test_plans_differ_by_channels(model: Net) -> None:
    a, b = plan_of(model), plan_of(model, ratio=0.25)
    assert a.diff(a) == "" and "stem.0.weight dim 0: 4 -> 6 of 8" in a.diff(b)
    assert a != b


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ((), "at least one"),
        ((1, 0), "ascending"),
        ((0, 0), "ascending"),
        ((0, 3), r"0\.\.2"),
        ((-1,), r"0\.\.2"),
        ((0.5,), "whole"),
    ],
)
def test_malformed_plans_are_refused(kept: tuple[Any, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PruningPlan({("a", 0): kept}, {("a", 0): 3}, "")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 2}', '{"version": 1}', "null", '{"version": 1, "tensors": 3}']
)
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError):
        PruningPlan.from_json(text)


def test_masked_state_zeroes_what_goes_and_nothing_else(model: Net) -> None:
    plan = plan_of(model, scope="inner")
    state = masked_state(model, plan)
    weight = state["inner.3.weight"]
    kept = torch.tensor(plan.kept["inner.3.weight", 1])
    assert torch.equal(weight[:, kept], model.inner[3].weight[:, kept])
    assert weight.count_nonzero() == 8 * 6 and model.inner[3].weight.count_nonzero() == 8 * 12


@pytest.mark.parametrize("training", [False, True])
def test_a_sound_plan_is_proved(model: Net, training: bool) -> None:
    model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    proof = prove(model, plan_of(model), image())
    assert proof.error <= 1e-12 and proof.precision == "float64" and proof.modes[0] == "eval"
    assert len(proof.modes) == 1 + training and model.training is training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_an_unsound_plan_names_the_first_module_that_departs(model: Net) -> None:
    """Producer and consumer lose different channels: shapes fit, values don't."""
    plan = plan_of(model, scope="inner")
    kept = dict(plan.kept)
    kept["inner.3.weight", 1] = tuple(sorted(set(range(12)) - set(kept["inner.3.weight", 1])))
    wrong = PruningPlan(kept, plan.sizes, plan.signature)
    with pytest.raises(ProofError, match=r"the first module that departs is 'inner\.3'"):
        prove(model, wrong, image())
    assert model.inner[0].out_channels == 12


def test_a_plan_that_breaks_the_network_is_no_proof(model: Net) -> None:
    plan = plan_of(model, scope="inner")
    kept, sizes = dict(plan.kept), dict(plan.sizes)
    del kept["inner.3.weight", 1], sizes["inner.3.weight", 1]
    with pytest.raises(ProofError, match=r"does not run"):
        prove(model, PruningPlan(kept, sizes, plan.signature), image())


def test_a_slim_file_holds_everything(model: Net, tmp_path: Path) -> None:
    plan = plan_of(model)
    prune_(model, plan)
    save_slim(model, tmp_path / "net.safetensors", plan, accuracy=0.97)
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]
    fresh = Net().eval()
    assert load_slim(tmp_path / "net.safetensors", fresh) == plan
    assert torch.equal(fresh(image()), model(image()))
    header = read_slim_header(tmp_path / "net.safetensors")
    assert header["metadata"] == {"accuracy": 0.97} and header["versions"]["torch"] == torch.__version__


def test_tied_and_transient_tensors_go_through_a_slim_file(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
        net[2].weight = net[1].weight
        net.register_buffer("scratch", torch.zeros(3), persistent=False)
        return net

    net = build()
    plan = choose(trace(net, torch.zeros(1, 4)), 0.5, scope="all")
    prune_(net, plan)
    save_slim(net, tmp_path / "x.safetensors", plan)
    fresh = build()
    load_slim(tmp_path / "x.safetensors", fresh)
    x = torch.randn(2, 4)
    assert torch.equal(fresh(x), net(x)) and fresh[2].weight is fresh[1].weight


def test_damaged_and_foreign_files_change_nothing(model: Net, tmp_path: Path) -> None:
    plan = plan_of(model)
    slim = Net()
    prune_(slim, plan)
    path = tmp_path / "good.safetensors"
    save_slim(slim, path, plan)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    bad = {
        "cut": whole[: len(whole) // 2],
        "flipped": bytes(flipped),
        "empty": b"",
        "text": b"hello",
        "missing": None,
    }
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, content in bad.items():
        if content is not None:
            (tmp_path / f"{name}.safetensors").write_bytes(content)
    for name in (*bad, "foreign"):
        with pytest.raises(SlimFileError) as caught:
            load_slim(tmp_path / f"{name}.safetensors", model)
        assert isinstance(caught.value, PruningError) and "\n" not in str(caught.value)
    with pytest.raises(SlimFileError, match="does not fit this Linear"):
        load_slim(path, nn.Linear(2, 2))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_can_not_be_saved_leaves_no_file(model: Net, tmp_path: Path) -> None:
    plan = plan_of(model)
    with pytest.raises(SlimFileError, match="where the plan leaves"):
        save_slim(model, tmp_path / "x.safetensors", plan)
    prune_(model, plan)
    with pytest.raises(SlimFileError, match="does not have"):
        save_slim(model, tmp_path / "x.safetensors", PruningPlan({("a", 0): (0,)}, {("a", 0): 2}, ""))
    with pytest.raises(SlimFileError, match="JSON"):
        save_slim(model, tmp_path / "x.safetensors", plan, model=model)
    assert not list(tmp_path.iterdir())
    assert json.loads(plan.to_json())["version"] == 1


def test_channels_that_are_merged_are_added_where_they_are_read(model: Net) -> None:
    """With alike channels in each cluster the slim network computes what the dense one does; the optimiser goes on."""
    graph = trace(model, image())
    clusters = {"inner.0": {0: 3, 1: 3, 7: 2}, "stem.0": {5: 0}}
    with torch.no_grad():
        for name, into in clusters.items():
            for (member, dim), index in graph[name].index.items():
                if (member, dim) not in graph[name].inputs:
                    tensor = model.state_dict(keep_vars=True)[member]
                    for gone, stays in into.items():
                        tensor.index_copy_(dim, index[gone], tensor.index_select(dim, index[stays]))
    plan = graph.plan({name: list(into) for name, into in clusters.items()}, clusters)
    assert PruningPlan.from_json(plan.to_json()) == plan
    want = model(image())
    assert prove(model.train(), plan, image()).error < 1e-12
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    prune_(model.eval(), plan, optimizer)
    assert model.inner[0].out_channels == 9 and model.head.in_features == 7
    torch.testing.assert_close(model(image()), want)


def test_one_group_may_merge_where_another_just_loses_channels() -> None:
    """A consumer of concatenated channels: some of its columns are added up, others dropped."""

    class Cat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 5), nn.Linear(11, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], 1).sigmoid())

    net, x = Cat(), torch.randn(2, 4)
    graph = trace(net, x)
    plan = graph.plan({"a": [1, 2], "b": [0]}, {"a": {1: 0, 2: 5}})
    assert plan.merged["c.weight", 1] == (0, 0, 5, 3, 4, 5, -1, 7, 8, 9, 10)
    assert prove(net, plan, x).error < 1e-12
    prune_(net, plan)
    assert net.c.in_features == 8


def test_merges_that_can_not_be_are_refused(model: Net) -> None:
    graph = trace(model, image())
    for into in ({0: 1}, {0: 1, 1: 2}, {}):
        with pytest.raises(PlanError, match="must be merged into one that stays"):
            graph.plan({"inner.0": [0, 1]}, {"inner.0": into})
    norm = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    with pytest.raises(PlanError, match="reads them all together"):
        trace(norm, torch.zeros(1, 4)).plan({"0": [0]}, {"0": {0: 1}})
    with pytest.raises(PlanError, match="merged into one that stays"):
        PruningPlan({("a", 0): (0, 1)}, {("a", 0): 3}, "", merged={("a", 0): (0, 1, 2)})


def test_a_plan_knows_what_its_widths_are_multiples_of() -> None:
    """Plans of before, which didn't, are of any width."""
    plan = replace(PruningPlan({("a", 0): (0, 1)}, {("a", 0): 3}, ""), round_to=2)
    assert PruningPlan.from_json(plan.to_json()) == plan and json.loads(plan.to_json())["round_to"] == 2
    older = json.loads(plan.to_json())
    del older["round_to"]
    assert PruningPlan.from_json(json.dumps(older)) == replace(plan, round_to=1)
    assert plan.diff(replace(plan, round_to=1)) == "round_to: 2 -> 1" and plan.diff(plan) == ""
    for wrong in (0, "auto", 1.5, True):
        with pytest.raises(PlanError, match="round_to of a plan must be a whole number of at least 1"):
            PruningPlan.from_json(json.dumps({**older, "round_to": wrong}))
