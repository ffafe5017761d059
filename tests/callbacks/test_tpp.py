"""TPP in a trainer: which layers it takes, and the constants that it derives for them."""

from __future__ import annotations

import logging
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn

from lightning_prune.callbacks.tpp import TPP
from lightning_prune.errors import ConfigurationError
from lightning_prune.schedules import TPPSchedule
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


def wide_net() -> nn.Module:
    """For a batch of 16 the products of its decorrelation are 16 times what training computes."""
    return nn.Sequential(nn.Linear(6, 640), nn.ReLU(), nn.Linear(640, 640), nn.ReLU(), nn.Linear(640, 4))


class Acts(Classifier):
    """Sees in which steps the decorrelation acts, and how strongly."""

    def __init__(self, net: nn.Module, regulariser: TPP) -> None:
        super().__init__(net)
        self.regulariser = regulariser
        self.seen: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        schedule = self.regulariser._schedule
        wanted = self.regulariser.strength * schedule.gram
        self.seen.append(round(self.regulariser._factor / wanted, 6) if wanted else 0.0)


@pytest.mark.filterwarnings("ignore:.*too few optimiser steps")
@pytest.mark.parametrize(
    ("make", "arguments", "every"),
    [
        (wide_net, {"epochs": 2}, 3),
        (wide_net, {"epochs": 2, "gram_every": 1}, 1),
        (wide_net, {"epochs": 2, "gram_every": 5}, 5),
        (wide_net, {"schedule": TPPSchedule(0.01, 0.5, 1, 45)}, 1),
        (wide_net, {"schedule": TPPSchedule(0.01, 0.5, 1, 45, gram_every=2)}, 2),
        (lambda: nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 4)), {"epochs": 2}, 1),
    ],
    ids=["derived", "published", "given", "published schedule", "given schedule", "narrow"],
)
def test_a_decorrelation_that_costs_as_much_as_training_is_lazy(
    make: Any, arguments: dict[str, Any], every: int, caplog: pytest.LogCaptureFixture
) -> None:
    regulariser = TPP(0.5, **arguments)
    module = Acts(seeded(make), regulariser)
    length = {"max_epochs": 2} if "epochs" in arguments else {"max_epochs": -1, "max_steps": 96}
    with caplog.at_level(logging.INFO):
        trainer(regulariser, **length).fit(module, feature_loader(batches=48))
    assert module.seen[0] == 0
    assert module.seen[1:] == [every if step % every == 0 else 0.0 for step in range(1, 96)]
    said = f"would add more than 1% to the multiply-adds of a step; it acts in one step of {every}, {every} times as"
    assert any(said in message for message in caplog.messages) is (every == 3)


@pytest.mark.filterwarnings("ignore:.*too few optimiser steps", "ignore:Checkpoint directory")
def test_a_resumed_decorrelation_stays_as_lazy_as_it_was(tmp_path: Any) -> None:
    regulariser = TPP(0.5, epochs=2)
    keeper = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    settings: dict[str, Any] = {"max_epochs": 2, "enable_checkpointing": True}
    trainer(regulariser, keeper, **settings).fit(Acts(seeded(wide_net), regulariser), feature_loader(batches=48))
    again = TPP(0.5, epochs=2)
    module = Acts(seeded(wide_net), again)
    path = tmp_path / "epoch=0.ckpt"
    trainer(again, keeper, **settings).fit(module, feature_loader(batches=48), ckpt_path=path)
    assert again._schedule == regulariser._schedule
    assert module.seen == [3.0 if step % 3 == 0 else 0.0 for step in range(48, 96)]


@pytest.mark.filterwarnings("ignore:.*too few optimiser steps")
def test_a_lazy_decorrelation_takes_its_share_of_the_multiply_adds() -> None:
    regulariser, found = TPP(0.5, epochs=1), []

    class Asked(Classifier):
        def on_train_batch_end(self, *_: Any) -> None:
            found.append([regulariser._affordable(steps) for steps in (31, 96, 10_000)])

    net = nn.Sequential(nn.Conv2d(3, 320, 1), nn.ReLU(), nn.Conv2d(320, 320, 3, padding=1), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(320, 4))
    trainer(regulariser).fit(Asked(nn.Sequential(*net, *head)), image_loader(batches=2, batch_size=64))
    # 160 of 320 filters of 2880 weights, and of 3; three passes over 64 pictures of 6 x 6
    products = 160 * (2880 + 3) * (960 - 160)
    training = 3 * 64 * (36 * 320 * (2880 + 3) + 320 * 4)
    assert found == [[1, 3, -(-100 * products // training)]] * 2
    assert 4 < found[0][2] < 16


@pytest.mark.filterwarnings("ignore:.*too few optimiser steps")
@pytest.mark.parametrize(
    ("arguments", "settings", "every"),
    [
        ({}, {}, 3),
        ({"gram": 0.5}, {}, 1),  # nobody bounds how steep it is
        ({}, {"gradient_clip_val": 1.0}, 1),  # a clipped step doesn't make up for those before it
    ],
)
def test_a_decorrelation_that_nothing_bounds_is_not_lazy(
    arguments: dict[str, Any], settings: dict[str, Any], every: int
) -> None:
    regulariser = TPP(0.5, epochs=2, **arguments)
    module = Classifier(seeded(wide_net))
    trainer(regulariser, max_epochs=2, **settings).fit(module, feature_loader(batches=48))
    assert regulariser._schedule.gram_every == every
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.filterwarnings("ignore:.*too few optimiser steps")
def test_a_decorrelation_that_acts_once_at_most_is_said() -> None:
    with pytest.warns(UserWarning, match="gram_every=9 lets the decorrelation act in fewer than 2 of the 16"):
        trainer(TPP(0.5, epochs=2, gram_every=9), max_epochs=2).fit(Classifier(seeded(conv_net)), image_loader())


@pytest.mark.filterwarnings("ignore:.*too few optimiser steps")
def test_a_layer_that_is_unfrozen_in_the_stage_is_penalised_from_then_on() -> None:
    class Thaws(Classifier):
        def on_train_epoch_start(self) -> None:
            self.net[0].weight.requires_grad_(self.current_epoch > 0)

        def on_train_batch_end(self, *_: Any) -> None:
            counts.append(len(regulariser._shrinking))

    counts: list[int] = []
    regulariser = TPP(0.5, epochs=2)
    trainer(regulariser, max_epochs=2).fit(Thaws(seeded(conv_net)), image_loader())
    assert set(counts[:8]) == {counts[-1] - 1}
    assert set(counts[8:]) == {counts[-1]}


@pytest.mark.filterwarnings("ignore:.*too few optimiser steps")
def test_weight_averages_lose_at_surgery_what_the_network_does() -> None:
    average = EMAWeightAveraging(decay=0.99)
    regulariser = TPP(0.5, epochs=2)
    module = Classifier(seeded(conv_net))
    trainer(regulariser, average, max_epochs=2).fit(module, image_loader())
    for name, gone in regulariser.removal().items():  # the averages have become the module's weights
        assert module.net.get_submodule(name).weight[list(gone)].abs().max() == 0


class Transposed(nn.Module):
    """A weight that makes its own inputs out of what it has made."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 8)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x).relu()
        logits: Tensor = self.head(nn.functional.linear(hidden, self.inner.weight.t()))
        return logits


@pytest.mark.filterwarnings("ignore:.*too few optimiser steps")
@pytest.mark.parametrize("coupled", [True, False])
def test_a_weight_that_is_read_back_transposed(coupled: bool) -> None:
    regulariser = TPP(0.5, epochs=2, coupled=coupled)
    module = Classifier(seeded(Transposed))
    trainer(regulariser, max_epochs=2).fit(module, feature_loader())
    (gone,) = regulariser.removal().values()
    assert module.net.inner.weight[list(gone)].abs().max() == 0
