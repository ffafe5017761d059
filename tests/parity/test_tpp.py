"""The TPP callback against a plain loop that restates the published procedure, in double precision."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_prune.callbacks.tpp import TPP
from lightning_prune.schedules import TPPSchedule
from tests.callbacks.nets import conv_net, feature_loader, image_loader, linear_net, seeded, trainer
from tests.parity.training import Module, sgd


class Restatement:
    """The procedure as published, layer by layer, with the zeros that ours adds: biases, and what the next layer reads.

    Args:
        layers: what is pruned: the layer, its norm if there is one, and the layer that reads it.
        schedule: the constants.
        every: the decorrelation takes part in one step of so many, as many times as strong.
    """

    def __init__(self, layers: list[tuple[Any, Any, Any]], schedule: TPPSchedule, every: int = 1) -> None:
        self.layers, self.schedule, self.every = layers, schedule, every
        self.pruned = []
        for layer, _, _ in layers:
            score = layer.weight.detach().abs().flatten(1).mean(1)
            self.pruned.append(score.argsort()[: min(math.ceil(0.5 * len(score)), len(score) - 1)])
        self.strength = 0.0
        self.held = -1

    def decorrelation(self, reduction: str) -> Tensor:
        """Distance of each Gram matrix to its detached copy, in which the pruned rows and columns are zero."""
        total = torch.zeros((), dtype=torch.float64)
        for (layer, _, _), rows in zip(self.layers, self.pruned, strict=True):
            filters = layer.weight.flatten(1)
            gram = filters @ filters.T
            target = gram.detach().clone()
            target[rows] = 0
            target[:, rows] = 0
            total = total + nn.functional.mse_loss(gram, target, reduction=reduction)
        return self.strength * self.schedule.gram * total

    def shrunk(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for (layer, norm, _), rows in zip(self.layers, self.pruned, strict=True):
            tensors = [layer.weight, layer.bias, *([norm.weight, norm.bias] if norm is not None else [])]
            yield from ((tensor, rows) for tensor in tensors if tensor is not None)

    @torch.no_grad()
    def zero(self, count: int) -> None:
        for (layer, norm, reader), rows in list(zip(self.layers, self.pruned, strict=True))[:count]:
            for tensor in (layer.weight, layer.bias, *([norm.weight, norm.bias] if norm is not None else [])):
                if tensor is not None:
                    tensor[rows] = 0
            reader.weight[:, rows] = 0

    def train(self, net: nn.Module, loader: Any, reduction: str) -> list[list[Tensor]]:
        diary, optimizer, step = [], sgd(net), 0
        while True:
            for inputs, labels in loader:
                diary.append([parameter.detach().clone() for parameter in net.parameters()])
                if self.held < 0 and step % self.schedule.update_every == 0:
                    self.strength = self.schedule.delta * step / self.schedule.update_every
                    self.held = 0 if self.strength >= self.schedule.ceiling - 1e-9 else -1
                loss = nn.functional.cross_entropy(net(inputs.double()), labels)
                if step % self.every == 0:
                    loss = loss + self.every * self.decorrelation(reduction)
                optimizer.zero_grad()
                loss.backward()
                for tensor, rows in self.shrunk():
                    tensor.grad[rows] += self.strength * tensor.detach()[rows]  # type: ignore[index]
                optimizer.step()
                if self.held >= 0:
                    is_last = self.held == self.schedule.hold
                    self.zero(len(self.layers) if is_last else self.held // self.schedule.zero_every)
                    if is_last:
                        return diary
                    self.held += 1
                step += 1


class Ready(Callback):
    """Ends the run at the step after which the channels may go."""

    def __init__(self, regulariser: TPP) -> None:
        self.regulariser = regulariser

    def on_train_batch_end(self, run: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        run.should_stop = run.should_stop or self.regulariser.ready


SCHEDULE = TPPSchedule(delta=0.05, ceiling=0.8, update_every=3, hold=17, gram=10.0, zero_every=5)
LAZY = TPPSchedule(delta=0.05, ceiling=0.8, update_every=3, hold=17, gram=3.0, zero_every=5)
CASES: dict[str, tuple[Any, Any, list[tuple[int, int | None, int]], str, TPPSchedule, int]] = {
    "with norms": (conv_net, image_loader, [(0, 1, 3), (3, 4, 8)], "mean", SCHEDULE, 1),
    "without norms": (linear_net, feature_loader, [(0, None, 2), (2, None, 4)], "mean", SCHEDULE, 1),
    "summed": (
        *(conv_net, image_loader, [(0, 1, 3), (3, 4, 8)], "sum"),
        TPPSchedule(delta=0.05, ceiling=0.8, update_every=3, hold=17, gram=0.05, zero_every=5),
        1,
    ),
    "all zeros at the end": (
        *(conv_net, image_loader, [(0, 1, 3), (3, 4, 8)], "mean"),
        TPPSchedule(delta=0.1, ceiling=0.8, update_every=2, hold=6, gram=10.0),
        1,
    ),
    "lazily": (conv_net, image_loader, [(0, 1, 3), (3, 4, 8)], "mean", LAZY, 4),
}


@pytest.mark.parametrize("name", CASES)
def test_the_weights_follow_the_published_procedure(name: str) -> None:
    build, load, places, reduction, schedule, every = CASES[name]
    net = seeded(build).double()
    twin, loader = copy.deepcopy(net), load(8)

    layers = [tuple(None if place is None else twin[place] for place in triple) for triple in places]
    reference = Restatement(layers, schedule, every)  # type: ignore[arg-type]
    diary = reference.train(twin, loader, reduction)
    assert len(diary) == schedule.length

    regulariser = TPP(0.5, schedule=schedule, coupled=False, reduction=reduction, gram_every=every)  # type: ignore[arg-type]
    module = Module(net)
    run = trainer(regulariser, Ready(regulariser), max_epochs=60, precision="64-true", min_epochs=0)
    run.fit(module, loader)

    assert regulariser.ready and len(module.diary) == schedule.length
    assert regulariser.removal() == {
        str(place[0]): tuple(sorted(pruned.tolist())) for place, pruned in zip(places, reference.pruned, strict=True)
    }
    farthest = max(
        (ours - theirs).abs().max().item()
        for page, other in zip(module.diary, diary, strict=True)
        for ours, theirs in zip(page, other, strict=True)
    )
    assert farthest < 1e-12
    for ours, theirs in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    assert (diary[-1][0] - diary[0][0]).abs().max() > 0.01
    assert not any(tensor[rows].any() for tensor, rows in reference.shrunk())
