"""Groups, choices and plans: what a user sees of the engine."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune.errors import ConfigurationError, PlanError, TraceError
from lightning_prune.structure import ChannelGroup, choose, pick, prune_, trace
from lightning_prune.structure.knowledge import Knowledge
from lightning_prune.structure.labels import Axis
from lightning_prune.structure.watch import Repeats
from tests.structure.test_surgery import Net, image


def test_groups_of_a_residual_network() -> None:
    graph = trace(Net(), image())
    named = {group.name: group for group in graph.groups}
    assert sorted(named) == ["inner.0", "stem.0"]
    inner, stream = named["inner.0"], named["stem.0"]
    assert (inner.size, inner.producers, inner.consumers) == (12, ("inner.0",), ("inner.3",))
    assert stream.producers == ("stem.0", "inner.3") and stream.consumers == ("inner.0", "head")
    assert inner.scales == (("inner.1.weight", 0),)
    assert set(inner.shifts) == {("inner.0.bias", 0), ("inner.1.bias", 0)}
    assert ("inner.1.running_var", 0) in inner.members
    assert inner.index["inner.3.weight", 1].shape == (12, 1)
    assert graph.pinned == {"head": "Its channels are the network's output."}
    assert ["inner.0", "12", "inner.3"] in [line.split() for line in str(graph).splitlines()]


def test_flattened_space_takes_several_columns_a_channel() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    (group,) = trace(net, image()).groups
    assert group.index["2.weight", 1].tolist() == [list(range(c * 36, (c + 1) * 36)) for c in range(4)]


def test_requires_grad_and_modes_make_no_difference() -> None:
    model = Net()
    open_ = [group.members for group in trace(model, image()).groups]
    frozen = [group.members for group in trace(model.requires_grad_(False).eval(), image()).groups]
    assert open_ == frozen


@pytest.mark.parametrize(
    ("ratio", "options", "kept"),
    [
        (0.5, {}, {"inner.0": 6}),
        (0.5, {"scope": "all"}, {"inner.0": 6, "stem.0": 4}),
        (0.07, {}, {"inner.0": 11}),
        (0.99, {}, {"inner.0": 1}),
        (0.99, {"keep_at_least": 3}, {"inner.0": 3}),
        (0.5, {"round_to": 8}, {"inner.0": 8}),
        (0.5, {"ratios": {"inner.0": 0.25}, "scope": "all"}, {"inner.0": 9, "stem.0": 4}),
        (0.5, {"ratios": {"inner.0": 0.0}, "scope": "all"}, {"stem.0": 4}),
        (0.5, {"ignore": ["stem"], "scope": "all"}, {"inner.0": 6}),
        (0.5, {"score": "bn_scale"}, {"inner.0": 6}),
        (0.5, {"score": "l2", "scope": "all", "global_": True}, None),
    ],
)
def test_how_many_stay(ratio: float, options: dict[str, object], kept: Mapping[str, int] | None) -> None:
    graph = trace(Net(), image())
    picked = pick(graph, ratio, **options)  # type: ignore[arg-type]
    found = {group.name: group.size - len(picked.get(group.name, ())) for group in graph.groups}
    if kept is None:
        assert sum(found.values()) == 10
    else:
        assert found == {"inner.0": 12, "stem.0": 8, **kept}


def test_the_smallest_go_as_the_weights_are_now() -> None:
    model = Net()
    graph = trace(model, image())
    with torch.no_grad():
        for c in range(12):
            model.inner[0].weight[c] = 0.1 * ((c * 5) % 12 + 1)
    assert pick(graph, 0.25)["inner.0"] == tuple(sorted(c for c in range(12) if (c * 5) % 12 < 3))

    def last(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> Tensor:
        return -torch.arange(group.size)

    assert pick(graph, 0.25, score=last)["inner.0"] == (9, 10, 11)
    assert pick(graph, 0.5, score="random", seed=1) == pick(graph, 0.5, score="random", seed=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "ratio must lie in"),
        ({"ratio": 1.0}, "ratio must lie in"),
        ({"ratios": {"inner": 1.0}}, r"\[0, 1\)"),
        ({"ratios": {"nothing*": 0.5}}, "'nothing\\*' does not match"),
        ({"ratios": {"head": 0.5}}, "network's output"),
        ({"ignore": ["nope"]}, "'nope' does not match"),
        ({"scope": "outer"}, "inner, all"),
        ({"score": "best"}, "bn_scale, l1, l2, random"),
        ({"round_to": 0}, "round_to"),
        ({"keep_at_least": 0}, "keep_at_least"),
        ({"score": lambda group, tensors: torch.zeros(3)}, r"shape \(12,\)"),
        ({"score": lambda group, tensors: torch.full((group.size,), torch.nan)}, "not all finite"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], message: str) -> None:
    graph = trace(Net(), image())
    with pytest.raises(ConfigurationError, match=message) as caught:
        choose(graph, **options)  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


def test_bad_removals_are_named() -> None:
    graph = trace(Net(), image())
    for removed, message in (
        ({"inner.0": range(12)}, "all 12 channels"),
        ({"inner.0": [12]}, r"0\.\.11"),
        ({"what": [0]}, "no group 'what'"),
    ):
        with pytest.raises(PlanError, match=message):
            graph.plan(removed)


def test_a_model_that_fails_is_told_by_its_statement() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.zeros(99, 1)

    with pytest.raises(
        TraceError, match=r"test_graph\.py:\d+ `return x @ torch\.zeros\(99, 1\)` raised RuntimeError"
    ) as caught:
        trace(Broken(), torch.zeros(1, 3))
    assert "\n" not in str(caught.value)


def test_layer_norm_asks_for_leave() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    graph = trace(net, torch.zeros(1, 4))
    assert graph["0"].renormalised
    assert not choose(graph, 0.5).kept
    assert choose(graph, 0.5, renormalise=True).renormalised == ("1.weight",)
    assert choose(graph, 0.5, scope="all") == choose(graph, 0.5, renormalise=True)


def test_numbers_without_a_tensor_follow() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.GroupNorm(8, 8, affine=False), nn.Conv2d(8, 2, 1))
    prune_(net, choose(trace(net, image()), 0.25))
    assert (net[1].num_features, net[2].num_groups, net[2].num_channels) == (6, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(image())


def test_what_can_not_be_copied_is_shared() -> None:
    """A lock on the module, an attribute left out of its pickles, a forward that is bound to the original."""

    class Odd(Net):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()
            self.owner = "somebody"

        def __getstate__(self) -> dict[str, object]:
            return {**vars(self), "owner": None}

        def forward(self, x: Tensor) -> Tensor:
            assert self.owner == "somebody"
            with self.lock:
                return super().forward(x)

    model = Odd()
    vars(model)["forward"] = model.forward
    graph = trace(model, image())
    assert sorted(group.name for group in graph.groups) == ["inner.0", "stem.0"]


def test_a_tensor_is_no_earlier_one_at_the_same_address() -> None:
    """One that was written in place must not be mistaken for what has got its memory since."""
    known, labels = Knowledge(nn.Module(), {}), np.arange(1, 5)
    for _ in range(20):
        tensor = torch.zeros(4)
        known.remember(tensor, (Axis(labels, vanishes=True),), from_data=True)
        assert known.axes(tensor) == (Axis(labels, vanishes=True),)
        known.remember(tensor, (Axis(labels, vanishes=False),), from_data=True)
        del tensor


class _Choosing(nn.Module):
    """Python looks at a value, so that a trace has to compute."""

    widths: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        if not inputs.is_meta:
            self.widths.append(self.layers[0].out_features)
        out: Tensor = self.layers(inputs)
        return out if float(out[0, 0]) > 0 else -out


@pytest.mark.parametrize(("room", "passes"), [(2**20, 1), (60, 1), (8, 2)])
def test_values_of_the_first_pass_are_used_again(monkeypatch: pytest.MonkeyPatch, room: int, passes: int) -> None:
    """Where they fit, no second pass of the dense network is needed; the graph is the same either way."""
    monkeypatch.setattr("lightning_prune.structure.watch.ROOM", room)
    monkeypatch.setattr(_Choosing, "widths", [])
    torch.manual_seed(0)
    graph = trace(_Choosing(), torch.ones(1, 6))
    assert [(group.name, group.size) for group in graph.groups] == [("layers.0", 16)]
    assert _Choosing.widths.count(16) == passes and len(_Choosing.widths) == passes + 3


class _Wide(nn.Module):
    """What a trace computes once has to be kept, the largest result of all, beside many that nobody asks for."""

    passes: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh(), nn.Sigmoid(), nn.Linear(12, 24)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        if not inputs.is_meta:
            self.passes.append(self.layers[0].out_features)
        out: Tensor = self.layers(inputs)
        return out.exp() if float(out[0, 0]) > 0 else out.cos()


@pytest.mark.parametrize(("room", "passes"), [(2**20, 1), (200, 1), (150, 1), (90, 2)])
def test_what_the_probe_will_not_ask_for_is_forgotten_first(
    monkeypatch: pytest.MonkeyPatch, room: int, passes: int
) -> None:
    monkeypatch.setattr("lightning_prune.structure.watch.ROOM", room)
    monkeypatch.setattr(_Wide, "passes", [])
    torch.manual_seed(0)
    graph = trace(_Wide(), torch.ones(1, 6))
    assert [(group.name, group.size) for group in graph.groups] == [("layers.0", 16), ("layers.2", 12)]
    assert _Wide.passes.count(16) == passes and len(_Wide.passes) == passes + 3


class _Counted:
    """An operator that counts its calls."""

    namespace = "torchvision"
    overloadpacket = SimpleNamespace(__name__="nms")

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, boxes: Tensor, scores: Tensor, limit: float) -> Tensor:
        self.calls += 1
        return torch.full((2,), self.calls)


def test_costly_operators_run_once_for_the_same_values() -> None:
    """Equal means bit for bit, shapes and numbers too; nobody gets the tensor that is kept."""
    repeats, operator = Repeats(), _Counted()
    boxes, scores = torch.arange(8.0).reshape(2, 4), torch.zeros(2)
    first = repeats.compute(operator, (boxes, scores, 0.5), {})
    first.zero_()
    assert repeats.compute(operator, (boxes.clone(), scores.clone(), 0.5), {}).tolist() == [1, 1]
    others = [(boxes + 1, scores, 0.5), (boxes, scores + 1, 0.5), (boxes, scores, 0.6), (boxes.T, scores, 0.5)]
    others += [(boxes, -scores, 0.5), (boxes.double(), scores, 0.5), (boxes, scores[:1], 0.5)]
    assert [repeats.compute(operator, other, {})[0].item() for other in others] == list(range(2, 9))
    assert operator.calls == 8
