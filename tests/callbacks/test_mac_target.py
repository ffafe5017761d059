"""A share of the MACs: reached, never missed, and no further than one channel away."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.callbacks.mac_target import fewest, macs_left
from lightning_prune.callbacks.mask_sparsity import MaskSparsity
from lightning_prune.callbacks.masks import ranked
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.errors import ConfigurationError
from lightning_prune.reports.cost import count_cost
from lightning_prune.structure import prune_, trace
from tests.callbacks.nets import Classifier, conv_net, image_loader, seeded, trainer
from tests.callbacks.slimming import Residual

IMAGES = torch.zeros(2, 3, 6, 6)


def net(build: Any, width: int = 16) -> nn.Module:
    """A network whose scales all differ."""
    built: nn.Module = seeded(build, width)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in built.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.rand(width, generator=generator) + 0.5)
    return built


def scales(model: nn.Module) -> list[Tensor]:
    return [norm.weight.detach().clone() for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)]


def picked(model: nn.Module, **arguments: Any) -> dict[str, tuple[int, ...]]:
    """What goes, by the scales as they are."""
    method = MaskSparsity(epochs=1, **arguments)
    trainer(method, limit_train_batches=1).fit(Classifier(model), image_loader(1))
    return method.removal()


def share(model: nn.Module, removal: Any) -> float:
    graph, dense = trace(model, IMAGES), count_cost(model, IMAGES).macs
    prune_(model, graph.plan(removal))
    return count_cost(model, IMAGES).macs / dense


@pytest.mark.parametrize("target", [0.2, 0.35, 0.5, 0.8, 0.97])
def test_one_threshold_for_all_layers_reaches_the_share(target: float) -> None:
    model = net(conv_net)
    first, second = scales(model)
    gone = picked(model, macs=target)
    reached = share(seeded(conv_net, 16), gone)
    assert reached <= target
    # all of the smallest scales, and without the largest of them it would not have been enough
    values = {("0", c): float(first[c]) for c in range(16)} | {("3", c): float(second[c]) for c in range(16)}
    order = sorted(values, key=lambda key: values[key])
    mine = {(name, channel) for name, channels in gone.items() for channel in channels}
    assert mine == set(order[: len(mine)])
    name, channel = order[len(mine) - 1]
    fewer = {key: [c for c in channels if (key, c) != (name, channel)] for key, channels in gone.items()}
    assert share(seeded(conv_net, 16), fewer) > target


@pytest.mark.parametrize("rule", ["mean", "vote"])
def test_residual_streams_count_too(rule: Any) -> None:
    gone = picked(net(Residual), macs=0.4, scope="all", group_rule=rule)
    reached = share(seeded(Residual, 16), gone)
    assert 0.4 - 0.11 < reached <= 0.4  # one channel of the stream is up to a tenth
    assert set(gone) == {"stem", "conv1"}


def test_widths_ratios_and_what_is_ignored_hold() -> None:
    gone = picked(net(conv_net), macs=0.55, round_to=4)
    assert {len(channels) % 4 for channels in gone.values()} == {0}
    assert share(seeded(conv_net, 16), gone) <= 0.55
    gone = picked(net(conv_net), macs=0.5, ignore=["3"])
    assert set(gone) == {"0"} and share(seeded(conv_net, 16), gone) <= 0.5
    gone = picked(net(conv_net), macs=0.5, ratios={"3": 0.25})
    assert len(gone["3"]) == 4 and share(seeded(conv_net, 16), gone) <= 0.5
    gone = picked(net(conv_net), macs=0.5, ratios={"3": 0.75})
    assert len(gone["3"]) == 12 and "0" not in gone  # that alone is enough


def test_equal_scales_are_told_apart() -> None:
    gone = picked(seeded(conv_net, 16), macs=0.7)
    assert 0.6 < share(seeded(conv_net, 16), gone) <= 0.7


def test_a_share_that_cannot_be_reached_is_refused_with_the_smallest() -> None:
    model = net(conv_net)
    least = share(seeded(conv_net, 16), {"3": range(1, 16)})
    with pytest.raises(ConfigurationError, match=r"macs=0\.05 can't be reached") as caught:
        picked(model, macs=0.05, ignore=["0"])
    assert f"{least:.4g} of the network's MACs are left, the smallest share there is" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert share(seeded(conv_net, 16), picked(model, macs=least + 1e-9, ignore=["0"])) == least


def test_the_report_of_surgery_counts_the_same(caplog: pytest.LogCaptureFixture) -> None:
    pruning = StructuralPruning(latency_batches=(), report_file=None)
    method = MaskSparsity(macs=0.5, epochs=2, global_epochs=1)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        trainer(method, pruning, max_epochs=3).fit(Classifier(net(conv_net)), image_loader(2))
    assert pruning.report is not None
    reached = pruning.report.cost_after.macs / pruning.report.cost_before.macs
    assert 0.4 < reached <= 0.5
    assert any(f"of 32 channels {reached:.4g} of the network's MACs are left" in said for said in caplog.messages)


def test_a_network_that_cannot_be_counted_is_refused() -> None:
    graph = trace(seeded(conv_net), IMAGES)
    with pytest.raises(ConfigurationError, match=r"could not be counted .*; give a ratio"):
        macs_left(graph, ((torch.zeros(2, 5, 6, 6),), {}))
    graph = trace(nn.Sequential(nn.ReLU()), IMAGES)
    with pytest.raises(ConfigurationError, match="None of the network's operators"):
        macs_left(graph, ((IMAGES,), {}))


def test_bisection_finds_what_counting_up_finds_and_asks_seldom() -> None:
    generator = torch.Generator().manual_seed(0)

    def left(values: list[float], asked: list[int], number: int) -> float:
        asked.append(number)
        return values[number]

    for most in (1, 2, 3, 17, 1000):
        values = [1.0, *(1 - torch.rand(most, generator=generator).sort().values).tolist()]
        for target in (0.02, 0.3, 0.77, 0.999):
            asked: list[int] = []
            found = fewest(partial(left, values, asked), most, target)
            assert found == next((n for n, value in enumerate(values) if value <= target), None)
            assert len(asked) <= 3 + most.bit_length()
    assert fewest(lambda number: 0.1, 5, 0.5) == 0
    wavy = [1.0, 0.7, 0.9, 0.4, 0.6, 0.3]
    found = fewest(wavy.__getitem__, 5, 0.5)
    assert found is not None and wavy[found] <= 0.5 < wavy[found - 1]


def test_ranks_are_one_order_over_all_layers() -> None:
    tables = {"a": torch.tensor([[0.3, 0.1], [0.3, 0.7]]), "b": torch.tensor([[0.2]])}
    mean = ranked(tables, "mean")
    assert mean["a"].tolist() == [[1.0, 2.0]] and mean["b"].tolist() == [[0.0]]
    vote = ranked(tables, "vote")
    assert vote["a"].tolist() == [[2.0, 0.0], [3.0, 4.0]] and vote["b"].tolist() == [[1.0]]
    assert ranked({}, "mean") == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"macs": 0.0}, r"macs=0\.0 must be a number strictly between 0 and 1"),
        ({"macs": "0.5"}, r"macs='0\.5'"),
        ({"macs": 1.0}, "macs=1.0"),
        ({"macs": float("nan")}, "macs=nan"),
        ({"macs": 0.5, "ratio": 0.5}, "exactly one of ratio=..., threshold=... and macs="),
        ({"macs": 0.5, "threshold": 0.5}, "exactly one"),
        ({}, "exactly one"),
    ],
)
def test_bad_targets_are_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        MaskSparsity(epochs=4, **arguments)
    assert "\n" not in str(caught.value)
