"""GReg-1 and GReg-2 against a plain loop that restates the published procedure, in double precision."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from lightning_prune.callbacks.greg import GReg1, GReg2
from lightning_prune.schedules import GReg1Schedule, GReg2Schedule
from tests.callbacks.nets import conv_net, image_loader, linear_net, seeded, trainer
from tests.parity.training import DECAY, LEARNING_RATE, Module, sgd


class Restatement:
    """The procedure as published, layer by layer: grow, watch the ratio, stop, hold, stop for surgery."""

    def __init__(self, layers: list[nn.Module], ratio: float, schedule: Any, two: bool) -> None:
        self.layers, self.ratio, self.schedule, self.two = layers, ratio, schedule, two
        self.strength = [torch.zeros(len(layer.weight), dtype=torch.float64) for layer in layers]  # type: ignore[arg-type]
        self.pruned = [None if two else self.smallest(layer) for layer in layers]
        self.running: dict[int, float] = {}
        self.over: set[int] = set()
        self.hold_from: int | None = None

    def smallest(self, layer: nn.Module) -> Tensor:
        score = layer.weight.detach().abs().flatten(1).mean(1)  # type: ignore[operator,union-attr]
        return score.argsort()[: min(math.ceil(self.ratio * len(score)), len(score) - 1)]

    def event(self, step: int) -> None:
        schedule = self.schedule
        for number, layer in enumerate(self.layers):
            if number in self.over:
                continue
            pruned, strength = self.pruned[number], self.strength[number]
            if pruned is None:
                strength += schedule.pick_delta
                if strength.max() >= schedule.pick_ceiling - 1e-12:
                    self.pruned[number] = self.smallest(layer)
                continue
            kept = torch.ones(len(strength), dtype=torch.bool)
            kept[pruned] = False
            strength[pruned] += schedule.delta
            if self.two:
                strength[kept] = schedule.kept
            size = layer.weight.detach().abs().flatten(1).mean(1)  # type: ignore[operator,union-attr]
            now = (size[kept].mean() / size[pruned].mean()).item()
            self.running[number] = 0.9 * self.running.get(number, now) + 0.1 * now
            at_ceiling = strength.max() >= schedule.ceiling - 1e-12
            if at_ceiling or (self.two and self.running[number] >= schedule.stop_ratio):
                self.over.add(number)
        everyone = len(self.running) == len(self.layers)
        if not self.two and everyone and min(self.running.values()) >= schedule.stop_ratio:
            self.over = set(range(len(self.layers)))
        if len(self.over) == len(self.layers):
            self.hold_from = step

    def train(self, net: nn.Module, loader: Any, steps: int) -> tuple[list[list[Tensor]], int]:
        diary, optimizer, step = [], sgd(net), 0
        while True:
            for images, labels in loader:
                diary.append([parameter.detach().clone() for parameter in net.parameters()])
                loss = nn.functional.cross_entropy(net(images.double()), labels)
                if self.hold_from is None and step % self.schedule.update_every == 0:
                    self.event(step)
                optimizer.zero_grad()
                loss.backward()
                for layer, strength in zip(self.layers, self.strength, strict=True):
                    weight: Any = layer.weight
                    weight.grad += strength.view(-1, *[1] * (weight.dim() - 1)) * weight.detach()
                optimizer.step()
                if self.hold_from is not None and step - self.hold_from == self.schedule.hold:
                    return diary, step
                step += 1
                assert step < steps


class Ready(Callback):
    """Ends the run at the step after which the channels may go."""

    def __init__(self, regulariser: Any) -> None:
        self.regulariser = regulariser
        self.step: int | None = None

    def on_train_batch_end(self, run: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.regulariser.ready and self.step is None:
            self.step = run.global_step - 1
            run.should_stop = True


GREG1 = GReg1Schedule(delta=0.05, ceiling=1.0, update_every=3, hold=17, check_every=1)
GREG2 = GReg2Schedule(
    pick_delta=0.01, pick_ceiling=0.05, delta=0.05, ceiling=1.05, update_every=3, hold=17, kept=-0.01, check_every=1
)
SCHEDULES = {
    "greg1": GREG1,
    "greg1 stops early": GReg1Schedule(0.05, 1.0, 3, 17, stop_ratio=2.0, check_every=1),
    "greg2": GREG2,
    "greg2 stops early": GReg2Schedule(0.01, 0.05, 0.05, 1.05, 3, 17, -0.01, stop_ratio=4.0, check_every=1),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_weights_follow_the_published_procedure(name: str) -> None:
    schedule, two = SCHEDULES[name], "greg2" in name
    net = seeded(conv_net).double()
    twin = copy.deepcopy(net)
    loader = image_loader(8)

    reference = Restatement([twin[0], twin[3]], 0.5, schedule, two)
    diary, surgery = reference.train(twin, loader, 400)
    assert (surgery < schedule.length - 1) == ("early" in name)

    regulariser = (GReg2 if two else GReg1)(0.5, schedule=schedule, coupled=False)
    module, ready = Module(net), Ready(regulariser)
    run = trainer(regulariser, ready, max_epochs=60, precision="64-true", min_epochs=0)
    run.fit(module, loader)

    assert ready.step == surgery
    assert regulariser.removal() == {
        layer: tuple(sorted(pruned.tolist()))  # type: ignore[union-attr]
        for layer, pruned in zip(("0", "3"), reference.pruned, strict=True)
    }
    farthest = max(
        (ours - theirs).abs().max().item()
        for page, other in zip(module.diary[: surgery + 1], diary, strict=True)
        for ours, theirs in zip(page, other, strict=True)
    )
    assert farthest < 1e-12
    assert (diary[-1][0] - diary[0][0]).abs().max() > 0.01


class Quadratic(LightningModule):
    """Eight weights, each in its own parabola; the network around them only says which belong together."""

    curvature = torch.tensor([5, 0.02, 3, 0.05, 2, 0.1, 1, 0.2], dtype=torch.float64)
    minimum = torch.linspace(1, 1.35, 8, dtype=torch.float64)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 8, bias=False), nn.Linear(8, 1, bias=False)).double()
        with torch.no_grad():
            self.net[0].weight.copy_(self.minimum[:, None])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        weight = self.net[0].weight[:, 0]
        return (self.curvature / 2 * (weight - self.minimum) ** 2).sum() + 0 * self.net(batch[0][:, :1]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[0].parameters(), lr=0.05, momentum=0.9)


def quadratic_run(regulariser: Any, steps: int) -> Tensor:
    module = Quadratic()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.zeros(steps, 1, dtype=torch.float64)), batch_size=1
    )
    trainer(regulariser, precision="64-true").fit(module, loader)
    return module.net[0].weight.detach()[:, 0]


def test_greg2_picks_by_curvature_where_greg1_picks_by_size() -> None:
    schedule = GReg2Schedule(1e-3, 0.1, 1e-3, 0.101, update_every=30, hold=0, kept=0.0, stop_ratio=None)
    second = GReg2(0.5, schedule=schedule, coupled=False)
    quadratic_run(second, schedule.length)
    assert second.removal() == {"0": (1, 3, 5, 7)}
    constant = GReg1Schedule(delta=0.1, ceiling=0.1, update_every=1, hold=10)
    first = GReg1(0.5, schedule=constant, coupled=False)
    quadratic_run(first, constant.length)
    assert first.removal() == {"0": (0, 1, 2, 3)}


def test_weights_of_a_quadratic_go_where_the_theory_says() -> None:
    r"""Under strength d a weight rests at h w* / (h + d)."""
    schedule = GReg2Schedule(0.01, 0.1, 1e-9, 0.1 + 1e-9, update_every=200, hold=1000, kept=0.1, stop_ratio=None)
    weight = quadratic_run(GReg2(0.5, schedule=schedule, coupled=False), schedule.length)
    theory = Quadratic.curvature / (Quadratic.curvature + 0.1) * Quadratic.minimum
    assert (weight - theory).abs().max() < 1e-3


def test_penalty_alone_follows_the_scalar_recursion() -> None:
    """Where the loss is flat, every doomed weight is a heavy ball on its penalty, bit for bit up to rounding."""
    schedule = GReg1Schedule(delta=0.01, ceiling=0.2, update_every=5, hold=40, stop_ratio=None)
    net = seeded(linear_net).double()
    before = net[2].weight.detach().clone()

    class Flat(Module):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return 0 * self.net(torch.ones(2, 6, dtype=torch.float64)).sum()

    regulariser = GReg1(0.5, schedule=schedule, coupled=False)
    trainer(regulariser, precision="64-true", max_epochs=100, max_steps=schedule.length).fit(Flat(net), image_loader(8))
    weight, momentum = 1.0, 0.0
    for step in range(schedule.length):
        momentum = 0.9 * momentum + (DECAY + schedule.strength(step)) * weight
        weight -= LEARNING_RATE * momentum
    doomed = list(regulariser.removal()["2"])
    assert torch.allclose(net[2].weight.detach()[doomed], before[doomed] * weight, rtol=1e-12)
