"""What `prune_` leaves: the same Parameter objects, an optimiser that goes on, numbers that fit; or nothing changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.errors import PlanError
from lightning_prune.structure import PruningPlan, choose, prove, prune_, trace

OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
}


class Net(nn.Module):
    """A small residual network with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 1))
        self.deep = nn.Conv2d(8, 8, 3, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.deep(x + self.inner(x)).relu()
        return self.head(x.mean((2, 3)))


def step(model: nn.Module, optimizer: Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def image() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimiser_goes_on_as_if_the_slim_network_had_always_been(name: str) -> None:
    """State is cut along, entry by entry, and the next step moves whatever has a gradient."""
    torch.manual_seed(0)
    model = Net()
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(3):
        step(model, optimizer, image())
    before = {id(p): dict(optimizer.state[p]) for p in model.parameters()}
    plan = choose(trace(model, image()), 0.4, scope="all")
    names = dict(model.named_parameters())
    objects = {key: id(p) for key, p in names.items()}
    prune_(model, plan, optimizer)
    assert {key: id(p) for key, p in model.named_parameters()} == objects
    cut = [key for key in names if any(member == key for member, _ in plan.kept)]
    assert len(cut) == 13
    for key in cut:
        parameter = names[key]
        for entry, old in before[objects[key]].items():
            if isinstance(old, Tensor) and old.dim() and name != "adafactor":
                want = old
                for (member, dim), kept in plan.kept.items():
                    if member == key:
                        want = want.index_select(dim, torch.tensor(kept))
                assert torch.equal(optimizer.state[parameter][entry], want)
    weights = [p.detach().clone() for p in model.parameters()]
    step(model, optimizer, image())
    for old, new in zip(weights, model.parameters(), strict=True):
        assert new.grad is not None and (new.grad.abs().max() < 1e-6 or not torch.equal(old, new))


def test_lbfgs_begins_anew_and_goes_on() -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(image()).square().mean()
        loss.backward()
        return loss

    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    optimizer.step(closure)
    plan = choose(trace(model, image()), ratio=0.5)
    with pytest.warns(UserWarning, match="LBFGS begins anew"):
        prune_(model, plan, optimizer)
    before = closure().item()
    optimizer.step(closure)
    assert closure().item() < before


def test_synchronised_norms_are_watched_and_proved_on_one_rank() -> None:
    """In training their own forward asks for a GPU and for the other ranks; the model keeps them."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Net())
    plan = choose(trace(model, image()), ratio=0.5, scope="all")
    assert prove(model, plan, image()).modes == ("eval", "train")
    prune_(model, plan)
    norms = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert [norm.num_features for norm in norms] == [4, 6]
    assert model.eval()(image()).shape == (4, 5)


def test_numbers_of_the_modules_follow() -> None:
    model = Net()
    prune_(model, choose(trace(model, image()), 0.5, scope="all"))
    assert (model.stem[0].out_channels, model.stem[1].num_features) == (4, 4)
    assert (model.deep.groups, model.deep.in_channels, model.deep.out_channels) == (4, 4, 4)
    assert (model.inner[0].in_channels, model.inner[0].out_channels, model.head.in_features) == (4, 6, 4)


def test_gradients_ties_flags_and_layout() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 3))
    model[2].weight = model[1].weight
    model[0].weight.requires_grad_(False)
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8)
    model(x).sum().backward()
    tied = model[1].weight
    prune_(model, choose(trace(model, x), 0.5, scope="all"))
    assert model[1].weight is model[2].weight is tied
    assert tied.shape == (4, 4, 1, 1)
    assert not model[0].weight.requires_grad and model[1].weight.requires_grad
    assert all(p.grad is None for p in (model[0].weight, tied, model[3].weight))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    model(x).sum().backward()
    assert model[3].weight.grad is not None and model[3].weight.grad.shape == (4, 4, 3, 3)


def test_a_graph_kept_from_before_does_not_poison_the_gradients() -> None:
    """A loss of the dense pass that is still alive holds nodes that expect gradients of the old shape."""
    model = Net()
    alive = model(image()).sum()
    prune_(model, choose(trace(model, image()), 0.5))
    model(image()).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    assert alive.requires_grad


def everything(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return {
        "tensors": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "state": copy.deepcopy(optimizer.state_dict()["state"]),
        "numbers": repr(model),
    }


@pytest.mark.parametrize("at", range(4))
def test_all_or_nothing(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Whatever fails half way, weights, gradients, optimiser and numbers are as they were."""
    from lightning_prune.structure import surgery

    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer, image())
    before = everything(model, optimizer)
    plan = choose(trace(model, image()), 0.5, scope="all")
    name = ("_cut", "_swap", "_update", "_renumber")[at]
    real, calls = getattr(surgery, name), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(surgery, name, failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        prune_(model, plan, optimizer)
    after = everything(model, optimizer)
    assert after["numbers"] == before["numbers"]
    for key in ("tensors", "grads", "state"):
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=0)
    monkeypatch.undo()
    step(model, optimizer, image())
    prune_(model, plan, optimizer)
    step(model, optimizer, image())


def test_a_plan_for_another_model_changes_nothing() -> None:
    plan = choose(trace(Net(), image()), 0.5)
    other = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(PlanError, match=r"inner\.0"):
        prune_(other, plan)
    wider = Net()
    wider.head = nn.Linear(8, 6)
    with pytest.raises(PlanError, match="another model"):
        prune_(wider, plan)
    assert wider.inner[0].out_channels == 12
    slim = Net()
    prune_(slim, plan)
    with pytest.raises(PlanError, match="length 12"):
        prune_(slim, plan)
    assert isinstance(plan, PruningPlan)


def test_resnet50_keeps_all_161_parameters_in_training() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x = torch.randn(2, 3, 32, 32)
    step(model, optimizer, x)
    before = {name: id(p) for name, p in model.named_parameters()}
    prune_(model, choose(trace(model, x), 0.5, scope="all"), optimizer)
    assert len(before) == 161 and {name: id(p) for name, p in model.named_parameters()} == before
    weights = [p.detach().clone() for p in model.parameters()]
    step(model, optimizer, x)
    moved = sum(not torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert moved == 161
    assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in model.parameters())
