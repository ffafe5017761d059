"""TPP in a trainer: which layers it takes, and the constants that it derives for them."""

from __future__ import annotations

import logging
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.callbacks.tpp import TPP
from lightning_prune.errors import ConfigurationError
from tests.callbacks.nets import OPTIMIZERS, Classifier, conv_net, feature_loader, image_loader, seeded, trainer


class Scaled(nn.Module):
    """Channels of "scale" are made by a vector of parameters, those of "hidden" by a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.hidden(x.mean(1, keepdim=True) * self.scale).relu()
        return self.head(hidden)


@pytest.mark.filterwarnings("ignore:.*too few optimiser steps")
def test_channels_that_no_weights_produce_are_left_alone_and_named(caplog: pytest.LogCaptureFixture) -> None:
    regulariser = TPP(0.5, epochs=1, scope="all")
    with caplog.at_level(logging.INFO):
        trainer(regulariser).fit(Classifier(seeded(Scaled)), feature_loader())
    assert set(regulariser.removal()) == {"hidden"}
    said = "1 of 2 layers stay as they are without weights that produce channels: scale."
    assert any(said in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ignore": ["hidden"]}, r"none of the 1 layers .*\(scale\) has weights that produce"),
        ({"ratios": {"scale": 0.5}}, r"ratios\['scale'\] asks for scale, which lacks weights that produce"),
    ],
)
def test_asking_for_such_channels_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        trainer(TPP(0.5, epochs=1, scope="all", **arguments)).fit(Classifier(seeded(Scaled)), feature_loader())


@pytest.mark.filterwarnings("ignore:.*too few optimiser steps")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_derived_decorrelation_is_as_steep_as_the_penalty(
    optimizer: str, reduction: Literal["mean", "sum"]
) -> None:
    net = seeded(conv_net)
    with torch.no_grad():
        net[0].weight *= 5
    norm = torch.linalg.matrix_norm(net[0].weight.detach().flatten(1), ord=2).item()
    steepness = 4 * norm**2 / (64 if reduction == "mean" else 1)
    factors = []

    class Watched(Classifier):
        def on_train_batch_end(self, *_: Any) -> None:
            factors.append(regulariser._factor / regulariser.strength if regulariser.strength else None)

    regulariser = TPP(0.5, epochs=2, reduction=reduction)
    trainer(regulariser, max_epochs=2).fit(Watched(net, optimizer), image_loader())
    assert factors[0] is None
    assert factors[1:] == pytest.approx([1 / steepness] * 15, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*too few optimiser steps")
@pytest.mark.parametrize("arguments", [{"epochs": 2, "gram": 3.0}, {"schedule": "cifar", "gram": 3.0}])
def test_a_factor_of_ones_own_is_taken_as_it_is(arguments: dict[str, Any]) -> None:
    regulariser = TPP(0.5, **arguments)
    limit = {} if "epochs" in arguments else {"max_epochs": -1, "max_steps": -1}
    schedule = regulariser._constants
    assert schedule is None or schedule.gram == 1000
    seen = []

    class Watched(Classifier):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append((regulariser._factor, regulariser.strength))
            self.trainer.should_stop = len(seen) == 12

    trainer(regulariser, **{"max_epochs": 2, "min_epochs": 0, **limit}).fit(Watched(seeded(conv_net)), image_loader())
    assert all(factor == pytest.approx(3 * strength) for factor, strength in seen)
    assert seen[-1][0] > 0
