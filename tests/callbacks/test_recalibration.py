"""Recalibration: which batches it counts, and that it leaves no trace in what else a network does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from lightning_prune.callbacks.ascp import ASCP
from lightning_prune.callbacks.recalibration import RecentCalls, recalibrate_
from tests.callbacks.nets import Classifier, conv_net, image_loader, seeded, trainer


class Speaking(LightningModule):
    """A network that logs by itself, through whatever ``log`` it has been given."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = seeded(conv_net)

    def forward(self, images: Tensor) -> Tensor:
        self.log("brightness", images.mean())
        return self.layers(images)  # type: ignore[no-any-return]


class Outer(Classifier):
    """Lets the network inside log as if it were itself."""

    def __init__(self) -> None:
        super().__init__(Speaking())
        self.net.log = self.log  # type: ignore[assignment]


def test_a_nested_module_goes_on_logging() -> None:
    outer, heard = Outer(), []

    class Hear(Callback):
        def on_train_epoch_end(self, run: Any, pl_module: Any) -> None:
            heard.append("brightness" in run.callback_metrics)

    trainer(ASCP(0.5, epochs=1), Hear(), max_epochs=2).fit(outer, image_loader(4))
    assert heard == [True, True]
    assert vars(outer.net)["log"] == outer.log and "log" not in vars(outer)


@pytest.mark.parametrize("given", [True, False])
def test_a_forward_that_fails_leaves_the_log_as_it_was(given: bool) -> None:
    network, calls, said = Speaking(), RecentCalls(8), []

    def log(*args: Any, **_: Any) -> None:
        said.append(args)

    if given:
        network.log = log  # type: ignore[method-assign]
    calls.keep(((torch.zeros(2, 5, 6, 6),), {}))  # five channels where three are wanted
    with pytest.raises(RuntimeError, match="channels"):
        recalibrate_(trainer(), network, calls)
    assert vars(network).get("log") is (log if given else None) and not said


class Shared(Classifier):
    """Two optimisers, each with a half of the network, step one after the other in every batch."""

    def __init__(self) -> None:
        super().__init__(seeded(conv_net))
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        halves = self.net[:3], self.net[3:]
        return [torch.optim.SGD(half.parameters(), lr=0.01) for half in halves]


def test_each_batch_counts_once_however_many_optimisers_step() -> None:
    kept: list[list[Tensor]] = []

    class Look(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            kept.append([args[0] for args, _ in method.memory()["calls"]])

    method = ASCP(0.5, epochs=1, recalibrate=48)
    trainer(Look(), method).fit(Shared(), image_loader(5))
    batches = [images for images, _ in image_loader(5)]
    assert [len(calls) for calls in kept] == [1, 2, 3, 3, 3]
    assert all(torch.equal(one, two) for one, two in zip(kept[-1], batches[2:], strict=True))
