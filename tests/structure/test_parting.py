"""Surgery with little memory: the same slim tensors, nobody else's memory touched, and a way back that takes none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.structure import PruningPlan, choose, parting, prune_, surgery, trace


class Net(nn.Module):
    """Convolutions of several kinds, a weight that is used twice, norms and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(24, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 24, 1))
        self.deep = nn.Conv2d(24, 24, 3, groups=24, padding=1)
        self.up = nn.ConvTranspose2d(24, 32, 2, 2)
        self.twice = nn.Linear(32, 32)
        self.again = nn.Linear(32, 32)
        self.again.weight = self.twice.weight
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.up(self.deep(x + self.inner(x)).relu()).mean((2, 3))
        return self.head(self.again(self.twice(x).relu()).relu())


def image() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def net() -> tuple[Net, PruningPlan]:
    torch.manual_seed(0)
    model = Net()
    return model, choose(trace(model, image()), 0.4, scope="all")


@pytest.fixture(autouse=True)
def no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever can be parted is, in blocks of a few rows."""
    monkeypatch.setattr(parting, "BESIDE", 0)
    monkeypatch.setattr(parting, "_BLOCK", 2**9)
    monkeypatch.setattr(surgery, "worth_parting", lambda sizes: slice(0, len(sizes)))


@pytest.fixture
def parted(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The dense tensors whose memory was used."""
    found: list[Tensor] = []
    real = surgery.reorder_

    def watched(out: Tensor, source: Tensor, orders: Any) -> None:
        found.append(source)
        real(out, source, orders)

    monkeypatch.setattr(surgery, "reorder_", watched)
    return found


def as_copies(model: nn.Module, plan: PruningPlan, *optimizers: Any) -> nn.Module:
    """What slim copies beside the dense tensors come to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surgery, "is_alone", lambda tensor: False)
        prune_(model, plan, optimizers)
    return model


def transposed(model: nn.Module) -> nn.Module:
    for name in ("twice", "head"):
        layer = getattr(model, name)
        layer.weight.data = layer.weight.detach().t().contiguous().t()
    return model


LAYOUTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "channels last": lambda model: model.to(memory_format=torch.channels_last),
    "transposed": transposed,
    "double": lambda model: model.double(),
    "bfloat16": lambda model: model.bfloat16(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_slim_tensors_are_those_of_copies(layout: str, parted: list[Tensor]) -> None:
    model, plan = net()
    model = LAYOUTS[layout](model)
    expected = as_copies(copy.deepcopy(model), plan)
    names = {name for name, _ in plan.kept} & {name for name, _ in model.named_parameters()}
    assert not parted
    prune_(model, plan)
    assert len(parted) >= len(names) - 2 and len(names) > 10
    for (name, tensor), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
        assert tensor.stride() == other.stride(), name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("place", [("reorder_", 9), ("_swap", 7), ("_renumber", 12)], ids=lambda place: place[0])
def test_the_way_back(
    monkeypatch: pytest.MonkeyPatch, place: tuple[str, int], error: type[BaseException], layout: str
) -> None:
    """Every weight is bit for bit as it was, where it was."""
    model, plan = net()
    model = LAYOUTS[layout](model)
    before = {name: (p.detach().clone(), p.stride(), p.data_ptr()) for name, p in model.named_parameters()}
    real, calls = getattr(surgery, place[0]), []

    def failing(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == place[1]:
            raise error
        return real(*args)

    monkeypatch.setattr(surgery, place[0], failing)
    with pytest.raises(error):
        prune_(model, plan)
    for name, parameter in model.named_parameters():
        tensor, stride, where = before[name]
        assert torch.equal(parameter, tensor), name
        assert (parameter.stride(), parameter.data_ptr()) == (stride, where), name
    monkeypatch.undo()
    prune_(model, plan)


def test_the_way_back_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the memory that ran out in surgery."""
    model, plan = net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    meter = Meter(model)

    def failing(*args: Any) -> None:
        meter.reset()
        raise MemoryError

    monkeypatch.setattr(surgery, "_renumber", failing)
    with meter, pytest.raises(MemoryError):
        prune_(model, plan)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert 0 < meter.most <= 3 * parting._BLOCK


class Meter(TorchDispatchMode):
    """The most bytes that tensors have taken at once, beyond what there was at the last reset."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.storages = {p.untyped_storage()._cdata: self._entry(p) for p in model.parameters()}
        self.reset()

    @staticmethod
    def _entry(tensor: Tensor) -> tuple[StorageWeakRef, int]:
        return StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes()

    def _taken(self) -> int:
        return sum(size for reference, size in self.storages.values() if not reference.expired())

    def reset(self) -> None:
        self.start, self.most = self._taken(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.storages[tensor.untyped_storage()._cdata] = self._entry(tensor)
        self.most = max(self.most, self._taken() - self.start)
        return result


def test_the_peak_is_about_one_tensor() -> None:
    model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(400, 400), nn.ReLU())))
    plan = choose(trace(model, torch.randn(2, 400)), 0.3)
    again = copy.deepcopy(model)
    largest = model[0].weight.nbytes
    with Meter(model) as meter:
        prune_(model, plan)
    assert largest <= meter.most <= 1.2 * largest
    with Meter(again) as other:
        as_copies(again, plan)
    assert other.most > 4 * largest


def held(model: Net, kind: str, path: Path) -> Any:
    """Somebody sees the memory of one weight, by one of many ways."""
    weight = model.up.weight
    if kind == "state dict":
        return model.state_dict()
    if kind == "array":
        return weight.detach().numpy()
    if kind == "view":
        return weight.detach()[3:]
    if kind == "graph":
        return (model.up(torch.randn(1, 24, 2, 2, requires_grad=True)) * 1.0).sum()
    if kind == "shared":
        return model.share_memory()
    if kind == "lent":
        array = torch.rand(weight.shape).numpy()
        model.up.weight = nn.Parameter(torch.from_numpy(array))
        return array
    torch.save(model.up.state_dict(), path / "up.pt")
    model.up.load_state_dict(torch.load(path / "up.pt", mmap=True, weights_only=True), assign=True)
    return path


@pytest.mark.parametrize("kind", ["state dict", "array", "view", "graph", "shared", "lent", "file"])
def test_memory_that_others_see_is_left_alone(kind: str, parted: list[Tensor], tmp_path: Path) -> None:
    model, plan = net()
    holder = held(model, kind, tmp_path)
    where = model.up.weight.data_ptr()
    dense = model.up.weight.detach()
    before = dense.clone()
    expected = as_copies(copy.deepcopy(model), plan)
    prune_(model, plan)
    assert all(source.data_ptr() != where for source in parted)
    assert torch.equal(dense, before)
    assert holder is not None
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_who_is_alone() -> None:
    weight = nn.Parameter(torch.zeros(3, 4))
    assert parting.is_alone(weight)
    other = weight.detach()
    assert not parting.is_alone(weight)
    del other
    assert parting.is_alone(weight)
    assert not parting.is_alone(nn.Parameter(torch.zeros(8)[2:5]))
    assert not parting.is_alone(nn.Parameter(torch.zeros(3, 1).expand(3, 4)))
    assert not parting.is_alone(nn.Parameter(torch.empty(3, device="meta")))
    assert not parting.is_alone(nn.Parameter(torch.empty(0)))
    with torch.inference_mode():
        inside = nn.Parameter(torch.zeros(3))
    assert not parting.is_alone(inside)


def test_where_holders_are_not_counted_copies_are_made(monkeypatch: pytest.MonkeyPatch, parted: list[Tensor]) -> None:
    monkeypatch.setattr(parting, "_count_holders", None)
    model, plan = net()
    prune_(model, plan)
    assert not parted and model(image()).shape == (2, 5)


def test_without_memory_for_a_tidy_end_the_slim_network_is_right() -> None:
    class Full(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.clone.default:
                raise RuntimeError("can't allocate memory")
            return func(*args, **(kwargs or {}))

    model, plan = net()
    expected = as_copies(copy.deepcopy(model), plan)
    with Full():
        prune_(model, plan)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    model(image()).sum().backward()


@pytest.mark.parametrize("shape", [(6,), (6, 5), (3, 4, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("block", [1, 2**7, 2**20])
def test_reordering_and_back(shape: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parting, "_BLOCK", block)
    generator = torch.Generator().manual_seed(len(shape))
    dims = torch.randperm(len(shape), generator=generator)
    source = torch.rand([shape[dim] for dim in dims.argsort()], generator=generator).permute(*dims.argsort().argsort())
    for count in range(1, len(shape) + 1):
        orders = {dim: torch.randperm(source.shape[dim], generator=generator) for dim in range(count)}
        expected = source
        for dim, order in orders.items():
            expected = expected.index_select(dim, order)
        out, back = torch.empty_like(source), torch.empty_like(source)
        parting.reorder_(out, source, orders)
        assert torch.equal(out, expected)
        parting.reorder_(back, out, {dim: order.argsort() for dim, order in orders.items()})
        assert torch.equal(back, source)
