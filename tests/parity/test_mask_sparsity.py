"""MaskSparsity against a plain loop that restates the published procedure, in double precision."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_prune.callbacks.mask_sparsity import MaskSparsity
from lightning_prune.callbacks.masks import vote
from lightning_prune.schedules import MaskSparsityStrength
from tests.callbacks.nets import conv_net, image_loader, seeded, trainer

LEARNING_RATE, STRENGTH, GLOBAL = 0.02, 0.03, 0.01


class Module(LightningModule):
    """Cross-entropy under one optimiser, and a diary of all weights."""

    def __init__(self, net: nn.Module, optimizer: str) -> None:
        super().__init__()
        self.net = net
        self.optimizer = optimizer
        self.diary: list[list[Tensor]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.diary.append([parameter.detach().clone() for parameter in self.net.parameters()])
        return nn.functional.cross_entropy(self.net(batch[0].double()), batch[1])

    def configure_optimizers(self) -> Any:
        return built(self.optimizer, self.net)


def built(name: str, net: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(net.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    return torch.optim.AdamW(net.parameters(), lr=1e-3)


def restated(
    net: nn.Module, batches: list[Any], optimizer: str, ratio: float, epochs: int, bias: bool, restart: bool = False
) -> Any:
    """The published loop: gradients get lambda * mask * sign(gamma) between backward and step."""
    steps = built(optimizer, net)
    norms = [module for module in net if isinstance(module, nn.BatchNorm2d)]  # type: ignore[attr-defined]
    masks: list[Tensor] | None = None
    diary: list[Any] = []
    dense = None
    for epoch in range(epochs):
        if epoch == 1:
            masks = [torch.zeros_like(norm.weight) for norm in norms]
            for norm, mask in zip(norms, masks, strict=True):
                mask[norm.weight.detach().abs().argsort()[: round(ratio * len(mask))]] = 1
            if restart:
                net.load_state_dict(dense)
                steps = built(optimizer, net)
        for images, labels in batches:
            diary.append([parameter.detach().clone() for parameter in net.parameters()])
            steps.zero_grad()
            loss = nn.functional.cross_entropy(net(images.double()), labels)
            dense = copy.deepcopy(net.state_dict()) if dense is None else dense
            loss.backward()
            pulls = []
            for number, norm in enumerate(norms):
                if masks is None:
                    pulls.append((norm.weight, torch.full_like(norm.weight, GLOBAL)))
                else:
                    pulls += [(norm.weight, STRENGTH * masks[number])]
                    pulls += [(norm.bias, STRENGTH * masks[number])] if bias else []
            if optimizer == "sgd":
                for parameter, pull in pulls:
                    parameter.grad += pull * parameter.detach().sign()
            steps.step()
            if optimizer == "adamw":
                with torch.no_grad():
                    for parameter, pull in pulls:
                        parameter.copy_(parameter.sign() * (parameter.abs() - 1e-3 * pull).clamp(min=0))
    return diary, masks


@pytest.mark.parametrize("restart", [None, "baseline"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.filterwarnings("ignore:.*moves a scale by at most")
def test_weights_follow_the_published_loop(optimizer: str, bias: bool, restart: str | None) -> None:
    net = seeded(conv_net).double()
    with torch.no_grad():
        for norm in (net[1], net[4]):
            norm.weight.copy_(torch.linspace(0.5, 1.5, 8).roll(3))
    twin, loader = copy.deepcopy(net), image_loader(6)
    module = Module(net, optimizer)
    constants = MaskSparsityStrength(STRENGTH, GLOBAL)
    options: dict[str, Any] = {"global_epochs": 1, "penalize_bias": bias, "constants": constants}
    method = MaskSparsity(0.5, epochs=4, restart_from=restart, **options)
    trainer(method, precision="64-true", max_epochs=4).fit(module, loader)
    diary, masks = restated(twin, list(loader), optimizer, 0.5, 4, bias, restart is not None)
    for mine, theirs in zip(module.diary, diary, strict=True):
        assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-13) for a, b in zip(mine, theirs, strict=True))
    assert method.removal() == {
        name: tuple(mask.nonzero().flatten().tolist()) for name, mask in zip(("0", "3"), masks, strict=True)
    }


def test_a_vote_is_the_published_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        norms = int(torch.randint(1, 6, (), generator=generator))
        small = torch.rand(norms, 12, generator=generator) < torch.rand(norms, 1, generator=generator)
        found = {channel for channel, goes in enumerate(vote(small).tolist()) if goes}
        sets = [{channel for channel in range(12) if row[channel]} for row in small]
        least = min(map(len, sets))
        majority = norms
        while True:
            wanted = {channel for channel in range(12) if sum(channel in one for one in sets) >= majority}
            if len(wanted) >= least:
                break
            majority -= 1
        assert found == wanted >= set.intersection(*sets) and len(found) >= least
