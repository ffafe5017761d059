"""The mean singular value of input-output Jacobians, against closed forms and autograd's own Jacobian."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.errors import ConfigurationError
from lightning_prune.reports import mean_jacobian_singular_value
from tests.reports.untouched import untouched


def by_autograd(model: nn.Module, inputs: Tensor) -> float:
    """One sample after the other, in evaluation mode, by ``torch.autograd.functional``."""
    model.eval()
    means = []
    for sample in inputs:
        jacobian: Any = torch.autograd.functional.jacobian(lambda x: model(x[None]).flatten(), sample)
        means.append(torch.linalg.svdvals(jacobian.flatten(1)).mean())
    return torch.stack(means).mean().item()


def linear(*widths: int) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(*pair) for pair in pairwise(widths)]).double()


def test_of_a_linear_network_it_is_that_of_the_product_of_the_weights() -> None:
    model = linear(7, 9, 5, 4)
    product = model[2].weight @ model[1].weight @ model[0].weight  # type: ignore[operator]
    expected = torch.linalg.svdvals(product).mean().item()
    images = torch.randn(40, 7, dtype=torch.float64)  # more than one chunk
    assert mean_jacobian_singular_value(model, images) == pytest.approx(expected, rel=1e-12)


def test_orthogonal_weights_have_only_ones() -> None:
    model = linear(6, 6, 6, 3)
    for layer in model:
        nn.init.orthogonal_(layer.weight)  # type: ignore[arg-type]
    assert mean_jacobian_singular_value(model, torch.randn(3, 6).double()) == pytest.approx(1, rel=1e-12)


def test_zeroed_neurons_count_like_removed_ones() -> None:
    model = linear(6, 8, 4)
    small = linear(6, 5, 4)
    with torch.no_grad():
        model[0].weight[5:] = 0
        model[1].weight[:, 5:] = 0
        small[0].weight.copy_(model[0].weight[:5])
        small[1].weight.copy_(model[1].weight[:, :5])
    images = torch.randn(3, 6).double()
    found = mean_jacobian_singular_value(small, images)
    assert mean_jacobian_singular_value(model, images) == pytest.approx(found, rel=1e-12)


class Branching(nn.Module):
    """Chooses by its data, which can't be vectorised, and leaves something behind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.linear(x) if x.sum() + self.seen[0].sum() * 0 > 0 else 2 * self.linear(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


class Counting(nn.Module):
    """Writes to a buffer in evaluation mode, too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.add_(x[0])  # type: ignore[operator]
        return x.pow(2)


def conv() -> nn.Module:
    """Batch norm with statistics of its own, dropout, and samples that differ."""
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Dropout(0.5)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)),
    ).double()
    model(torch.randn(8, 2, 6, 6).double())
    return model


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "vectorised": (conv, (2, 6, 6)),
    "branching": (lambda: Branching().double(), (5,)),
    "recurrent": (lambda: Recurrent().double(), (6, 4)),
    "counting": (lambda: Counting().double(), (5,)),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double(), (3, 8)),
    "statistics of the sample": (lambda: nn.BatchNorm2d(2, track_running_stats=False).double(), (2, 3, 3)),
    "frozen": (lambda: nn.Linear(4, 2).double().requires_grad_(False), (4,)),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_autograds_jacobian_sample_by_sample(name: str) -> None:
    build, shape = MODELS[name]
    model = build()
    images = torch.randn(3, *shape, dtype=torch.float64)
    found = mean_jacobian_singular_value(model.train(), images)
    assert found == pytest.approx(by_autograd(model, images), rel=1e-10)


def test_other_samples_have_no_part_in_it() -> None:
    model, images = conv().train(), torch.randn(4, 2, 6, 6).double()
    single = [mean_jacobian_singular_value(model, image[None]) for image in images]
    assert mean_jacobian_singular_value(model, images) == pytest.approx(sum(single) / 4, rel=1e-12)
    assert len({round(value, 9) for value in single}) == 4


def test_outputs_that_ignore_the_input_have_none() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones(len(x), 3) * float(x.detach().sum() > -1e9)

    assert mean_jacobian_singular_value(Constant(), torch.randn(2, 4)) == 0


@pytest.mark.parametrize("name", ["vectorised", "branching"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    build, shape = MODELS[name]
    model, images = build(), torch.randn(3, *shape, dtype=torch.float64)
    with untouched(model):
        mean_jacobian_singular_value(model, images)
    assert not images.requires_grad
    assert not getattr(model, "seen", [])


def test_gradients_that_are_there_stay_and_modes_do_not_matter() -> None:
    model = linear(4, 3)
    model(torch.randn(2, 4).double()).sum().backward()
    before = model[0].weight.grad.clone()  # type: ignore[union-attr,operator]
    found = [mean_jacobian_singular_value(model, torch.ones(2, 4).double())]
    with torch.no_grad():
        found.append(mean_jacobian_singular_value(model, torch.ones(2, 4).double()))
    with torch.inference_mode():
        found.append(mean_jacobian_singular_value(model, torch.ones(2, 4).double()))
    assert found[0] == found[1] == found[2] > 0
    assert torch.equal(model[0].weight.grad, before)  # type: ignore[arg-type]


def test_half_precision_is_decomposed_in_single() -> None:
    model = nn.Linear(6, 3).bfloat16()
    expected = torch.linalg.svdvals(model.weight.detach().float()).mean().item()
    assert mean_jacobian_singular_value(model, torch.randn(2, 6).bfloat16()) == pytest.approx(expected, rel=1e-6)


class Returning(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output(x)


@pytest.mark.parametrize(
    ("output", "inputs", "message"),
    [
        (lambda x: {"logits": x}, torch.randn(2, 3), "returns a dict"),
        (lambda x: (x, x), torch.randn(2, 3), "returns a tuple"),
        (lambda x: x.argmax(1), torch.randn(2, 3), "returns torch.int64"),
        (lambda x: x.sqrt(), torch.zeros(2, 3), "not finite"),
        (lambda x: x, torch.zeros(2, 3).long(), "of torch.int64"),
        (lambda x: x, torch.zeros(0, 3), r"shape \(0, 3\)"),
        (lambda x: x, torch.tensor(1.0), r"shape \(\)"),
        (lambda x: x, [torch.zeros(2, 3)], "is a list"),
    ],
)
def test_what_has_no_jacobian_is_told(output: Any, inputs: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        mean_jacobian_singular_value(Returning(output), inputs)


def test_a_models_own_error_is_told_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        mean_jacobian_singular_value(nn.Linear(4, 2), torch.randn(3, 5))
