"""GReg-1 and GReg-2 on single weights against a plain loop that restates the published form, in double precision.

One flat vector of strengths per layer, no early stop, and a mask that is multiplied into the weights at the end of the
hold and after every step from then on.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.callbacks.greg import GReg1, GReg2
from lightning_prune.callbacks.structural import StructuralPruning
from lightning_prune.schedules import GReg1Schedule, GReg2Schedule
from lightning_prune.structure import SparsityPlan
from tests.callbacks.nets import conv_net, image_loader, seeded, trainer
from tests.parity.training import Module, sgd

LAYERS, RATIO, STEPS = ("0", "3", "8"), 0.827, 8
SCHEDULES: dict[str, Any] = {
    "greg1": GReg1Schedule(delta=0.05, ceiling=1.0, update_every=3, hold=17, check_every=1),
    "greg2": GReg2Schedule(0.01, 0.05, 0.05, 1.05, update_every=3, hold=17, kept=-0.01, check_every=1),
}


def smallest(weight: Tensor) -> Tensor:
    """True at the weights that go."""
    flat = weight.detach().abs().flatten()
    goes = torch.zeros(len(flat), dtype=torch.bool)
    goes[flat.sort().indices[: min(math.ceil(RATIO * len(flat)), len(flat) - 1)]] = True
    return goes


def restated(net: Any, schedule: Any, two: bool, surgery: int, steps: int) -> tuple[list[list[Tensor]], list[Tensor]]:
    """The weights before every step, and which of them go.

    Args:
        net: trained in place.
        schedule: the constants.
        two: GReg-2, which picks after a while.
        surgery: step before which the mask becomes permanent.
        steps: in all.
    """
    layers = [net.get_submodule(name).weight for name in LAYERS]
    strength = [torch.zeros(weight.numel(), dtype=torch.float64) for weight in layers]
    goes = [None if two else smallest(weight) for weight in layers]
    finished = [False] * len(layers)
    diary, optimizer, batches = [], sgd(net), list(image_loader(STEPS))
    for step in range(steps):
        images, labels = batches[step % STEPS]
        if step == surgery:
            for number, weight in enumerate(layers):
                weight.data[goes[number].view(weight.shape)] = 0  # type: ignore[union-attr]
                optimizer.state[weight]["momentum_buffer"][goes[number].view(weight.shape)] = 0  # type: ignore[union-attr]
        diary.append([parameter.detach().clone() for parameter in net.parameters()])
        loss = nn.functional.cross_entropy(net(images.double()), labels)
        for number, weight in enumerate(layers):
            if step % schedule.update_every or finished[number]:
                continue
            chosen = goes[number]
            if chosen is None:
                strength[number] += schedule.pick_delta
                if strength[number].max() >= schedule.pick_ceiling - 1e-12:
                    goes[number] = smallest(weight)
                continue
            strength[number][chosen] += schedule.delta
            if two:
                strength[number][~chosen] = schedule.kept
            finished[number] = bool(strength[number].max() >= schedule.ceiling - 1e-12)
        optimizer.zero_grad()
        loss.backward()
        if step < surgery:
            for weight, flat in zip(layers, strength, strict=True):
                weight.grad += flat.view(weight.shape) * weight.detach()
        optimizer.step()
        if step >= surgery:
            for number, weight in enumerate(layers):
                weight.data.mul_((~goes[number]).view(weight.shape))  # type: ignore[operator]
    assert all(finished)
    return diary, [chosen for chosen in goes if chosen is not None]


@pytest.mark.filterwarnings("ignore:.*of the energy was left in the weights")
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_weight_follows_the_published_procedure(name: str) -> None:
    schedule, two = SCHEDULES[name], name == "greg2"
    net = seeded(conv_net).double()
    twin = copy.deepcopy(net)
    # the mask becomes permanent at the first epoch start after the hold
    surgery = STEPS * math.ceil(schedule.length / STEPS)
    pruning = StructuralPruning(latency_batches=(), report_file=None)
    regulariser = (GReg2 if two else GReg1)(RATIO, schedule=schedule, granularity="weight")
    module = Module(net)
    run = trainer(regulariser, pruning, max_epochs=surgery // STEPS + 2, precision="64-true")
    run.fit(module, image_loader(STEPS))

    diary, goes = restated(twin, schedule, two, surgery, surgery + 2 * STEPS)
    assert isinstance(pruning.plan, SparsityPlan)
    for layer, chosen in zip(LAYERS, goes, strict=True):
        assert torch.equal(pruning.plan.kept[f"net.{layer}.weight"].mask(), ~chosen)
    assert len(module.diary) == len(diary)
    farthest = max(
        (ours - theirs).abs().max().item()
        for page, other in zip(module.diary, diary, strict=True)
        for ours, theirs in zip(page, other, strict=True)
    )
    assert farthest < 1e-12
    assert [round(share, 3) for share in pruning.plan.sparsity().values()] == [0.829, 0.828, 0.844]
    assert (diary[surgery - 1][0] - diary[0][0]).abs().max() > 0.01
