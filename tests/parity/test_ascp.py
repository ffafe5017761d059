"""ASCP's formulas: the asymptotic rate, the pull to the mean, and what a merger of channels preserves."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.clusters import average, gram, kmeans, reconstruct, representatives
from lightning_prune.errors import ConfigurationError
from lightning_prune.penalties import cluster_pull
from lightning_prune.schedules import SHAPES, ASCPSchedule


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("epochs", "ramp"), [(1, 1.0), (7, 1.0), (40, 0.6), (200, 1.0)])
def test_the_rate_grows_from_nothing_to_all(shape: str, epochs: int, ramp: float) -> None:
    schedule = ASCPSchedule(epochs, shape, ramp=ramp)  # type: ignore[arg-type]
    shares = [schedule.share(epoch) for epoch in range(epochs + 3)]
    assert shares[0] == 0 and shares[epochs] == shares[-1] == 1
    assert all(before <= after for before, after in itertools.pairwise(shares))
    assert schedule.share(epochs * ramp) == 1
    counts = [schedule.clusters(epoch, 48, 0.37) for epoch in range(epochs + 1)]
    assert counts[0] == 48 and counts[-1] == 48 - math.floor(48 * 0.37)
    assert counts == sorted(counts, reverse=True)


def test_the_exponential_passes_its_points() -> None:
    schedule = ASCPSchedule(epochs=200)
    assert schedule.share(25) == pytest.approx(0.75, abs=1e-12)
    q = math.exp(-schedule.decay / 8)
    assert 3 * q**8 - 4 * q + 1 == pytest.approx(0, abs=1e-12)
    assert q == pytest.approx(0.2500114, abs=1e-7)
    assert schedule.decay == pytest.approx(11.08999, abs=1e-5)
    for early, reached in [(0.5, 0.51), (0.01, 0.99), (0.3, 0.9)]:
        other = ASCPSchedule(epochs=1000, early=early, reached=reached)
        assert other.share(1000 * early) == pytest.approx(reached, abs=1e-9)


def test_the_other_shapes_are_their_formulas() -> None:
    for epoch in range(1, 20):
        part = epoch / 20
        assert ASCPSchedule(20, "linear").share(epoch) == pytest.approx(part)
        assert ASCPSchedule(20, "cosine").share(epoch) == pytest.approx(0.5 * (1 - math.cos(math.pi * part)))
        assert ASCPSchedule(20, "poly3").share(epoch) == pytest.approx(1 - (1 - part) ** 3)
        assert ASCPSchedule(20, "const").share(epoch) == 1


def test_the_numbers_of_clusters_of_a_64_channel_layer() -> None:
    exp, linear = ASCPSchedule(200), ASCPSchedule(200, "linear")
    assert [exp.clusters(epoch, 64, 0.4) for epoch in (10, 25, 50, 100)] == [54, 45, 40, 39]
    # 64 - floor(64 * 0.4 * t / 200) for t = 10, 25, 50, 100
    assert [linear.clusters(epoch, 64, 0.4) for epoch in (10, 25, 50, 100)] == [63, 61, 58, 52]
    assert [exp.clusters(epoch, 64, 0.4, final=38) for epoch in (100, 199, 200)] == [39, 39, 38]
    assert [exp.clusters(200, 10, 0.3), exp.clusters(200, 16, 0.95), exp.clusters(200, 1, 0.9)] == [7, 1, 1]


def test_reconstructions_and_the_freeze() -> None:
    schedule = ASCPSchedule(10, "linear", ramp=0.6, interval=4, freeze_after=0.7)
    assert [epoch for epoch in range(12) if schedule.due(epoch)] == [4, 8, 10]
    assert schedule.freeze_epoch == 8
    assert ASCPSchedule(10, "linear").freeze_epoch == 10
    assert ASCPSchedule(1).freeze_epoch == 1
    for epochs in range(1, 70):
        derived = ASCPSchedule.derive(epochs)
        assert derived.share(epochs) == derived.share(derived.freeze_epoch) == 1 or epochs >= 50
        assert derived.freeze_epoch < epochs or epochs < 4


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0), ("shape", "sine"), ("ramp", 0.0), ("ramp", math.nan), ("early", 0.0), ("early", 0.8),
     ("reached", 1.0), ("interval", 0), ("freeze_after", 1.1)],
)  # fmt: skip
def test_impossible_schedules_are_told(field: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=field):
        ASCPSchedule(**{"epochs": 5, field: value})  # type: ignore[arg-type]


def weights_and_labels() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(9, 4, 3, 3), (9,), (5, 6)]
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    labels = [kmeans(gram(weight.reshape(1, len(weight), -1)), 3)[0] for weight in weights]
    return weights, labels


def pull(weight: Tensor, labels: Tensor) -> Tensor:
    """The formula with a materialised projection, for autograd."""
    one_hot = nn.functional.one_hot(labels).double()
    projection = one_hot @ torch.linalg.inv(one_hot.T @ one_hot) @ one_hot.T
    rows = weight.reshape(len(weight), -1)
    return 0.15 * (rows - projection @ rows).square().sum()


def test_the_pull_is_autograds() -> None:
    weights, labels = weights_and_labels()
    leaves = [weight.clone().requires_grad_() for weight in weights]
    plain = torch.stack([pull(*pair) for pair in zip(leaves, labels, strict=True)]).sum()
    averages = [average(leaf, own) for leaf, own in zip(leaves, labels, strict=True)]
    value, gradients = cluster_pull(leaves, averages, strength=0.3)
    assert not value.requires_grad and torch.allclose(value, plain.detach(), rtol=1e-12)
    for gradient, wanted in zip(gradients, torch.autograd.grad(plain, leaves), strict=True):
        assert gradient.abs().max() > 0
        assert torch.allclose(gradient, wanted, rtol=1e-12, atol=1e-14)


def test_the_pull_leaves_means_and_merged_channels_alone() -> None:
    weights, labels = weights_and_labels()
    for weight, own in zip(weights, labels, strict=True):
        _, (gradient,) = cluster_pull([weight], [average(weight, own)], strength=1.0)
        assert torch.allclose(average(gradient, own), torch.zeros_like(gradient), atol=1e-15)
        merged = reconstruct(weight, own)
        value, (gradient,) = cluster_pull([merged], [average(merged, own)], strength=1.0)
        assert value == 0 and not gradient.any()


def net(width: int = 12) -> nn.Sequential:
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 5, 3, padding=1)]
    return nn.Sequential(*layers).double()


def merge(dense: nn.Sequential, labels: Tensor, add: bool = True) -> nn.Sequential:
    """The slim network by hand: representatives of the producers, sums of the consumer's slices."""
    kept = representatives(labels).unique()
    count = len(kept)
    slim = net(count)
    state = dense.state_dict()
    for name in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        state[name] = state[name][kept]
    consumer = state["3.weight"]
    summed = torch.zeros(5, count, 3, 3, dtype=torch.float64).index_add_(1, labels, consumer)
    state["3.weight"] = summed if add else consumer[:, kept]
    slim.load_state_dict(state)
    return slim


def test_channel_addition_is_exact_where_members_are_alike() -> None:
    dense, images = net(), torch.randn(16, 3, 6, 6, dtype=torch.float64)
    nn.init.normal_(dense[1].weight)  # type: ignore[arg-type]
    nn.init.normal_(dense[1].bias)  # type: ignore[arg-type]
    labels = kmeans(gram(dense[0].weight.flatten(1).unsqueeze(0)), 5)[0]  # type: ignore[union-attr,operator]
    with torch.no_grad():
        for value in itertools.islice(dense.parameters(), 4):
            value.copy_(reconstruct(value, labels))
    for training in (True, False):
        merged = merge(dense, labels)
        assert torch.allclose(dense.train(training)(images), merged.train(training)(images), atol=1e-12)
    assert not torch.allclose(dense(images), merge(dense, labels, add=False).eval()(images), rtol=1e-2)


def test_the_gradient_of_a_merged_channel_is_the_sum_of_its_members() -> None:
    dense, images = net(), torch.randn(16, 3, 6, 6, dtype=torch.float64)
    labels = kmeans(gram(dense[0].weight.flatten(1).unsqueeze(0)), 5)[0]  # type: ignore[union-attr,operator]
    with torch.no_grad():
        for value in itertools.islice(dense.parameters(), 4):
            value.copy_(reconstruct(value, labels))
    slim = merge(dense, labels)
    for network in (dense, slim):
        network(images).square().sum().backward()
    for (name, value), merged in zip(dense.named_parameters(), slim.parameters(), strict=True):
        assert value.grad is not None and merged.grad is not None
        if name in ("0.weight", "0.bias", "1.weight", "1.bias"):
            wanted = torch.zeros_like(merged).index_add_(0, labels, value.grad)
            assert torch.allclose(merged.grad, wanted, rtol=1e-9, atol=1e-9)
        elif name == "3.weight":
            assert torch.allclose(merged.grad[:, labels], value.grad, rtol=1e-9, atol=1e-9)


def test_averaged_gradients_keep_members_identical() -> None:
    weight = torch.randn(9, 4).requires_grad_()
    labels = kmeans(gram(weight.detach().unsqueeze(0)), 4)[0]
    with torch.no_grad():
        weight.copy_(reconstruct(weight, labels))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=1e-2)
    target = torch.randn(9, 4)
    for _ in range(50):
        optimizer.zero_grad()
        (weight - target).pow(2).sum().backward()
        assert weight.grad is not None
        weight.grad = average(weight.grad, labels)
        optimizer.step()
    assert torch.equal(weight.detach(), weight.detach()[representatives(labels)])
    assert len(weight.detach().unique(dim=0)) == 4
