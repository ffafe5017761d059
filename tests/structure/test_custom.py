"""Rules of a user's own: operators of torch.library, and modules that nobody can look into."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_prune.errors import ConfigurationError, ProofError
from lightning_prune.structure import Flow, RuleHandle, choose, prove, prune_, register_rule, trace
from lightning_prune.structure.rules import RULES, Axis, Call, couple, together
from tests.structure.oracle import judge


@torch.library.custom_op("prune_tests::rescaled", mutates_args=())
def rescaled(x: Tensor, scale: Tensor, slope: float = 0.1) -> Tensor:
    return torch.where(x > 0, x, slope * x) * scale[:, None, None]


@rescaled.register_fake
def _(x: Tensor, scale: Tensor, slope: float = 0.1) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("prune_tests::product", mutates_args=())
def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x @ weight.T if bias is None else x @ weight.T + bias


@torch.library.custom_op("prune_tests::rolled", mutates_args=())
def rolled(x: Tensor) -> Tensor:
    return x.roll(1, dims=1)


@torch.library.custom_op("prune_tests::gated", mutates_args=())
def gated(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two halves, one gating the other; and the gate."""
    a, b = x.chunk(2, dim=1)
    return a * b.sigmoid(), b.sigmoid()


@torch.library.custom_op("prune_tests::doubled_", mutates_args={"x"})
def doubled_(x: Tensor) -> None:
    x.mul_(2)


class Rescaling(nn.Module):
    """A convolution, the operator, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.ops.prune_tests.rescaled(self.first(x), self.scale, slope=0.2))


class Multiplied(nn.Module):
    """Two linear layers around one by the operator, with and without a bias."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(6, 3)
        self.weight = nn.Parameter(torch.randn(6, 8))
        self.bias = nn.Parameter(torch.randn(6)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.ops.prune_tests.product(self.first(x), self.weight, self.bias).relu())


class Rolling(nn.Module):
    """What stands between two layers is the operator's affair."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(4, 8), nn.Linear(8, 3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


class Gating(nn.Module):
    """The operator halves its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 16), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = torch.ops.prune_tests.gated(self.first(x))
        return self.last(x + gate)


class Kernel(nn.Module):
    """Computes in numpy, as a kernel of one's own would, with a size written down."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.randn(outputs))
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.detach().numpy(), self.bias.detach().numpy()
        return torch.from_numpy(x.detach().numpy() @ weight.T + bias).view(-1, self.outputs)


KERNEL = Flow({"x": "n in", "weight": "out in", "bias": "out"}, "n out", sizes={"outputs": "out"})


class Squared(torch.autograd.Function):
    """Forward and backward of one's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x * x * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, scale = ctx.saved_tensors
        return 2 * x * scale * gradients[0], (x * x * gradients[0]).sum(0)


class Squaring(nn.Module):
    """A module around an autograd function."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        return Squared.apply(x, self.scale)


class Otherwise(Kernel):
    """Another forward: the rule of its base is not about it."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias).flip(1)


def kernels() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), Kernel(8, 6), nn.ReLU(), nn.Linear(6, 3))


@pytest.fixture(autouse=True)
def _no_rule_is_left() -> Iterator[None]:
    before = dict(RULES)
    yield
    assert before == RULES


def left(build: Callable[[], nn.Module], inputs: Tensor) -> tuple[float, dict[str, int]]:
    """What is left of the parameters at ratio 0.5, after the judge has found the slim network exact; and the groups."""
    torch.manual_seed(0)
    graph = trace(build(), inputs)
    plan = choose(graph, 0.5, scope="all")
    found = judge(build, lambda model: prune_(model, plan), inputs)
    return found.left, {group.name: group.size for group in graph.groups}


def test_without_a_rule_an_operator_pins_and_says_so() -> None:
    graph = trace(Rescaling(), torch.randn(2, 3, 8, 8))
    assert not graph.groups
    reason = "pass through an operator that has no rule (prune_tests.rescaled in the model's own forward)."
    assert graph.pinned["first"].endswith(reason)
    assert reason in graph.explain("first")


def test_an_elementwise_operator_with_a_scale() -> None:
    with register_rule("prune_tests::rescaled", Flow({"x": "n c ...", "scale": "c"}, "n c ...", scales=["scale"])):
        found, groups = left(Rescaling, torch.randn(2, 3, 8, 8))
        graph = trace(Rescaling(), torch.randn(2, 3, 8, 8))
        assert graph["first"].scales == (("scale", 0),)
        assert "first (prune_tests.rescaled in the model's own forward)" in graph.explain("scale")
    assert found < 0.6 and groups == {"first": 8}
    assert not trace(Rescaling(), torch.randn(2, 3, 8, 8)).groups


@pytest.mark.parametrize("bias", [True, False])
def test_an_operator_that_multiplies_with_weights(bias: bool) -> None:
    flow = Flow({"x": "... in", "weight": "out in", "bias": "out"}, "... out")
    with register_rule("prune_tests::product", flow):
        found, groups = left(lambda: Multiplied(bias), torch.randn(4, 5))
        graph = trace(Multiplied(bias), torch.randn(4, 5))
    assert found < 0.55 and groups == {"first": 8, "weight": 6}
    assert graph["first"].inputs == (("weight", 1),) and graph["weight"].outputs == (("weight", 0),)
    assert graph["weight"].shifts == ((("bias", 0),) if bias else ())


def test_positions_that_stay_or_are_taken_together() -> None:
    for flow, why in (
        (Flow({"x": "n _"}, "n _"), "stay, as its rule says"),
        (Flow({"x": "n c"}, "n other"), "are taken together"),
    ):
        with register_rule("prune_tests::rolled", flow):
            graph = trace(Rolling(torch.ops.prune_tests.rolled), torch.randn(2, 4))
        assert not graph.groups and why in graph.pinned["first"]


def test_a_tensor_that_the_rule_does_not_name_stays() -> None:
    with register_rule("prune_tests::product", Flow({"weight": "out in"}, "n out")):
        graph = trace(Multiplied(False), torch.randn(4, 5))
    assert "are not named by the rule" in graph.pinned["first"]


def test_a_function_as_a_rule() -> None:
    def halves(call: Call) -> list[tuple[Axis | None, ...]]:
        rows, channels = call.axes(call.named("x"))
        if channels is None:
            return [(rows, None)] * 2
        half = Axis(couple(call, channels.labels, 2), vanishes=False)
        return [(rows, half), (rows, half)]

    with register_rule("prune_tests::gated", halves):
        found, groups = left(Gating, torch.randn(3, 4))
    assert found < 0.6 and groups == {"first": 8}


def test_a_module_that_nobody_can_look_into() -> None:
    with register_rule(Kernel, KERNEL):
        found, groups = left(kernels, torch.randn(4, 5))
        model = kernels()
        prune_(model, choose(trace(model, torch.randn(4, 5)), 0.5, scope="all"))
    assert found < 0.5 and groups == {"0": 8, "1": 6}
    assert model[1].outputs == 3 and model[1].weight.shape == (3, 4)


def test_a_module_with_a_fake_needs_no_values() -> None:
    devices: list[str] = []

    def fake(module: Kernel, x: Tensor) -> Tensor:
        devices.append(x.device.type)
        return x.new_empty(x.shape[0], module.weight.shape[0])

    with register_rule(Kernel, KERNEL, fake=fake):
        graph = trace(kernels(), torch.randn(4, 5))
    assert [group.name for group in graph.groups] == ["0", "1"] and set(devices) == {"meta"}


def test_a_module_around_an_autograd_function() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), Squaring(8), nn.Linear(8, 2))

    with register_rule(Squaring, Flow({"x": "... c", "scale": "c"}, "... c")):
        found, groups = left(build, torch.randn(3, 4))
        model = build()
        prune_(model, choose(trace(model, torch.randn(3, 4)), 0.5))
    assert found < 0.6 and groups == {"0": 8}
    model(torch.randn(3, 4)).sum().backward()
    assert model[1].scale.grad.shape == (4,)


def test_modules_with_a_rule_inside_one_another_and_parametrized() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Kernel(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    outer = Flow({"x": "n in", "inner.weight": "out in", "inner.bias": "out"}, "n out")
    with register_rule(Kernel, KERNEL), register_rule(Outer, outer):
        graph = trace(nn.Sequential(nn.Linear(5, 8), Outer(), nn.Linear(6, 3)), torch.randn(4, 5))
        assert "module.Outer (1)" in graph.pinned["0"]  # the inner size is written down
        model = kernels()
        parametrize.register_parametrization(model[1], "weight", Halved())
        graph = trace(model, torch.randn(4, 5))
    assert {group.name: group.size for group in graph.groups} == {"0": 8, "1": 6}


def test_a_subclass_with_another_forward_is_watched() -> None:
    with register_rule(Kernel, KERNEL):
        graph = trace(nn.Sequential(nn.Linear(5, 8), Otherwise(8, 6), nn.Linear(6, 3)), torch.randn(4, 5))
    assert {record.operator for record in graph.notes.records} == {"linear", "flip"}  # type: ignore[union-attr]


def test_a_wrong_rule_is_caught_by_the_proof() -> None:
    model, inputs = Rolling(torch.ops.prune_tests.rolled), torch.randn(3, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with register_rule("prune_tests::rolled", Flow({"x": "... c"}, "... c")):
        plan = choose(trace(model, inputs), 0.5)
    assert plan.widths() == {"first": (8, 4)}
    with pytest.raises(ProofError, match="departs from the masked one"):
        prove(model, plan, inputs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_wrong_rule_of_a_module_is_caught_by_the_proof() -> None:
    class Shares(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.softmax(1)

    model, inputs = Rolling(Shares()), torch.randn(3, 4)
    with register_rule(Shares, Flow({"x": "... c"}, "... c")):
        plan = choose(trace(model, inputs), 0.5)
    with pytest.raises(ProofError, match="departs from the masked one"):
        prove(model, plan, inputs)


def test_a_size_that_is_written_down_is_found_by_the_trials() -> None:
    with register_rule(Kernel, Flow({"x": "n in", "weight": "out in", "bias": "out"}, "n out")):
        graph = trace(kernels(), torch.randn(4, 5))
    assert not graph.groups and "module.Kernel (1) fails with another number" in graph.pinned["1"]


FLOW = Flow({"x": "n c"}, "n c")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Flow({}, "n c"), "at least one operand"),
        (lambda: Flow({"x": "n c!"}, "n"), "'c!', which is neither"),
        (lambda: Flow({"x": "n c c"}, "n"), "'c' twice"),
        (lambda: Flow({"x": 3}, "n"), "must be a text"),  # type: ignore[dict-item]
        (lambda: Flow({"x": "n c"}, "... c"), "'...' that no operand has"),
        (lambda: Flow({"x": "n c"}, "n c", scales=["y"]), "The scale 'y' of a Flow must be one of its operands 'x'"),
        (lambda: Flow({"x": "n c"}, "n c", sizes={"width": "d"}), "'width' of a Flow counts 'd'"),
        (lambda: register_rule("prune_tests::nothing", FLOW), "torch knows no operator 'prune_tests::nothing'"),
        (lambda: register_rule("relu", FLOW), "a name looks like 'mylib::op'"),
        (lambda: register_rule("aten::relu", FLOW), "'aten::relu' has a rule already"),
        (lambda: register_rule("prune_tests::doubled_", FLOW), "writes into its arguments"),
        (lambda: register_rule("prune_tests::rolled", Flow({"y": "n c"}, "n c")), "no argument 'y'; it has x"),
        (lambda: register_rule("prune_tests::rolled", Flow({"x": "n c"}, "n c", sizes={"a": "c"})), "Only modules"),
        (lambda: register_rule("prune_tests::rolled", FLOW, fake=torch.empty_like), "torch.library.register_fake"),
        (lambda: register_rule("prune_tests::rolled", "n c -> n c"), "must be a Flow or a function"),  # type: ignore[arg-type]
        (lambda: register_rule(Tensor, FLOW), "an operator's name or a module class"),  # type: ignore[arg-type]
    ],
)
def test_bad_rules_are_refused(act: Callable[[], RuleHandle], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message.replace(".", r"\.")) as caught:
        act()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Flow({"x": "n c h"}, "n c h"), "names 3 dims (n c h) for 'x' of 'prune_tests.rolled', which has 2"),
        (Flow({"x": "c"}, "c"), "names 1 dims"),
        (Flow({"x": "n c"}, ["n c", "n c"]), "has 2 results; the operator has 1"),
        (Flow({"x": "n c"}, "c n"), "foretells 8 positions along 'c' of its result; there are 2"),
        (lambda call: [], "speaks of 0 results"),
        (lambda call: [call.axes(call.named("x"))[:1]], "for a result of (2, 8)"),
    ],
)
def test_rules_that_do_not_fit_their_operator(rule: Any, message: str) -> None:
    with register_rule("prune_tests::rolled", rule), pytest.raises(ConfigurationError) as caught:
        trace(Rolling(torch.ops.prune_tests.rolled), torch.randn(2, 4))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_operands_that_do_not_fit() -> None:
    with (
        register_rule("prune_tests::product", Flow({"x": "n c", "weight": "c out"}, "n out")),
        pytest.raises(ConfigurationError, match="one word, 'c', to dims of"),
    ):
        trace(Multiplied(False), torch.randn(4, 5))
    with (
        register_rule("prune_tests::rescaled", Flow({"x": "n c ...", "slope": "c"}, "n c ...")),
        pytest.raises(ConfigurationError, match="has dims for 'slope', which is a float"),
    ):
        trace(Rescaling(), torch.randn(2, 3, 8, 8))
    with (
        register_rule(Kernel, Flow({"x": "n in", "filters": "out in"}, "n out")),
        pytest.raises(ConfigurationError, match="Kernel has no argument, parameter or buffer 'filters'"),
    ):
        trace(kernels(), torch.randn(4, 5))


def test_a_rule_is_taken_back_once() -> None:
    first = register_rule("prune_tests::rolled", FLOW)
    with pytest.raises(ConfigurationError, match="has a rule already"):
        register_rule("prune_tests::rolled", FLOW)
    first.remove()
    second = register_rule("prune_tests::rolled", FLOW)
    first.remove()
    assert "prune_tests.rolled" in RULES
    second.remove()
    with register_rule(Kernel, KERNEL), pytest.raises(ConfigurationError, match="Kernel has a rule already"):
        register_rule(Kernel, KERNEL)


def test_an_operator_that_combines_two_tensors() -> None:
    """The vocabulary of rules: dims that several tensors share live and die together."""

    def both(call: Call) -> list[tuple[Axis | None, ...]]:
        (rows, columns), (scale,) = call.axes(call.named("x")), call.axes(call.named("scale"))
        return [(rows, together(call, [columns, scale], vanishes=False, why="meet positions that are fixed"))]

    class Pair(nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return x * scale

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.pair = nn.Linear(4, 8), nn.Linear(8, 2), Pair()
            self.scale = nn.Parameter(torch.rand(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.pair(self.first(x), scale=self.scale))

    with register_rule(Pair, both):
        found, groups = left(Net, torch.randn(3, 4))
    assert found < 0.6 and groups == {"first": 8}
