"""Single weights: which can go, what a plan of them says, what becomes zero, and the file that is smaller for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_prune.errors import ConfigurationError, PlanError, SlimFileError
from lightning_prune.structure import (
    Bits,
    PruningPlan,
    SparsityPlan,
    choose_weights,
    load_slim,
    pick_weights,
    prove,
    prune_,
    save_slim,
    weights_of,
)
from lightning_prune.structure.bits import compact, from_plain, mask_of, to_plain
from lightning_prune.structure.sparsity import plan_from_json
from tests.callbacks.nets import conv_net, seeded


@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000])
def test_bits_are_the_numbers_of_a_mask(size: int) -> None:
    mask = torch.rand(size, generator=torch.Generator().manual_seed(size)) < 0.3
    bits, numbers = Bits.of(mask), mask.nonzero().flatten().tolist()
    assert list(bits) == numbers and len(bits) == len(numbers)
    assert torch.equal(bits.mask(), mask) and torch.equal(mask_of(bits, size), mask)
    assert torch.equal(mask_of(tuple(numbers), size), mask) and mask_of(range(size), size).all()
    assert list(bits.others()) == sorted(set(range(size)) - set(numbers))
    assert len(bits.packed) == -(-size // 8)
    assert Bits.from_plain(bits.to_plain()) == bits and hash(Bits.from_plain(bits.to_plain())) == hash(bits)
    assert bits != bits.others()
    assert all(number in bits for number in numbers)
    assert bits[:2] == tuple(numbers[:2])
    if numbers:
        assert bits[0] == numbers[0] and bits[-1] == numbers[-1]


def test_numbers_of_either_kind_travel_as_plain_values() -> None:
    for numbers in ((0, 2, 5), Bits.of(torch.tensor([True, False, True]))):
        assert from_plain(to_plain(numbers)) == numbers == compact(numbers)


@pytest.mark.parametrize(("size", "packed"), [(9, b"\x00"), (8, b"\x00\x00"), (4, b"\x08")])
def test_damaged_bits_are_refused(size: int, packed: bytes) -> None:
    with pytest.raises(PlanError, match="bitmap of"):
        Bits(size, packed)


class Zoo(nn.Module):
    """One of everything that has a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.norm = nn.LayerNorm([4, 3])
        self.attention = nn.MultiheadAttention(4, 2)
        self.recurrent = nn.GRU(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.normed = parametrizations.weight_norm(nn.Linear(4, 4))
        self.slope = nn.PReLU(4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.table.weight
        self.again = nn.Linear(4, 4)
        self.twin = self.again


def test_which_weights_can_go() -> None:
    found = {group.name: (group.parameter, group.size, group.producers) for group in weights_of(Zoo()).groups}
    assert found == {
        "conv": ("conv.weight", 48, ("conv",)),
        "attention.in_proj_weight": ("attention.in_proj_weight", 48, ("attention.in_proj_weight",)),
        "attention.out_proj": ("attention.out_proj.weight", 16, ("attention.out_proj",)),
        "recurrent.weight_ih_l0": ("recurrent.weight_ih_l0", 48, ("recurrent.weight_ih_l0",)),
        "recurrent.weight_hh_l0": ("recurrent.weight_hh_l0", 48, ("recurrent.weight_hh_l0",)),
        "table": ("table.weight", 20, ("head",)),
        "again": ("again.weight", 16, ("again", "twin")),
    }


@pytest.mark.parametrize("ratio", [0.07, 0.5, 0.827, 0.999])
def test_the_smallest_go_and_as_many_as_the_ratio_says(ratio: float) -> None:
    net = seeded(conv_net)
    weights = {"0.weight": net[0].weight, "3.weight": net[3].weight, "8.weight": net[8].weight}
    plan = choose_weights(net, ratio)
    for name, weight in weights.items():
        gone = min(int(np.ceil(ratio * weight.numel() - 1e-9)), weight.numel() - 1)
        flat, kept = weight.detach().flatten().abs(), plan.kept[name].mask()
        assert int((~kept).sum()) == gone and flat[~kept].max() <= flat[kept].min()
    assert plan.weights() == {
        layer: (plan.kept[f"{layer}.weight"].size, len(plan.kept[f"{layer}.weight"])) for layer in "038"
    }


def test_patterns_and_random_scores() -> None:
    net = seeded(nn.Sequential, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))
    plan = choose_weights(net, 0.5, ratios={"0.1": 0.25, "1": 0.0})
    assert plan.sparsity() == {"0.0": 0.5, "0.1": 0.25}
    assert choose_weights(net, 0.5, ignore=["0"]).sparsity() == {"1": 0.5}
    first, second = (choose_weights(net, 0.5, score="random", seed=seed) for seed in (0, 1))
    assert first == choose_weights(net, 0.5, score="random", seed=0) != second
    parts = [pick_weights(weights_of(net), ratio, score="random")["1"] for ratio in (0.25, 0.5)]
    assert set(parts[0]) < set(parts[1])
    for arguments, message in (
        ({"score": "bn_scale"}, "score of single weights"),
        ({"ignore": ["2"]}, "does not match"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            choose_weights(net, 0.5, **arguments)
    with torch.no_grad():
        net[1].weight[0, 0] = torch.nan
    with pytest.raises(ConfigurationError, match="weights of '1' are not all finite"):
        choose_weights(net, 0.5)


def test_a_plan_survives_json_and_says_what_it_leaves() -> None:
    net = seeded(conv_net)
    plan = choose_weights(net, 0.75)
    again = plan_from_json(plan.to_json())
    assert again == plan and hash(again) == hash(plan) and again.diff(plan) == ""  # type: ignore[arg-type]
    assert str(plan).splitlines()[0] == "0  216 -> 54"
    assert plan.sparsity() == {"0": 0.75, "3": 0.75, "8": 0.75}
    assert plan.diff(choose_weights(net, 0.5, ignore=["8"])) == (
        "0.weight: 54 -> 108 of 216, 54 weights differ\n"
        "3.weight: 144 -> 288 of 576, 144 weights differ\n"
        "8.weight: masked in one of them only"
    )
    empty = PruningPlan({}, {}, "")
    assert plan_from_json(empty.to_json()) == empty


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "[]",
            "7",
            '{"bitmaps": 3}',
            '{"bitmaps": {}}',
            '{"bitmaps": {"a": "%"}}',
            '{"bitmaps": {}, "version": 9}',
        ),
        '{"bitmaps": {}, "version": 1, "signature": "", "shapes": {"a": [2]}}',
        '{"bitmaps": {}, "version": true, "signature": "", "shapes": {}}',
        '{"bitmaps": {}, "version": 1, "signature": 7, "shapes": {}}',
    ],
)
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan_from_json(text)
    assert "\n" not in str(caught.value)


def test_malformed_plans_are_refused() -> None:
    one = Bits.of(torch.tensor([True, False]))
    for kept, shapes, message in (
        ({"a": one}, {}, "shape of exactly"),
        ({"a": one}, {"a": (3,)}, "has 2 entries, its shape is"),
        ({"a": Bits.of(torch.tensor([False, False]))}, {"a": (2,)}, "removes all 2 weights of 'a'"),
    ):
        with pytest.raises(PlanError, match=message):
            SparsityPlan(kept, shapes, "")
    net = seeded(conv_net)
    with pytest.raises(PlanError, match="no layer '7'"):
        weights_of(net).plan({"7": one})


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
}


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    net(torch.randn(4, 3, 6, 6)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_and_momenta_become_zero_and_nothing_else_changes(name: str) -> None:
    net = seeded(conv_net).to(memory_format=torch.channels_last)
    optimizer = OPTIMIZERS[name](net.parameters())
    step(net, optimizer)
    plan = choose_weights(net, 0.5, ignore=["8"])
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    momenta = {p: {key: value.clone() for key, value in state.items()} for p, state in optimizer.state.items()}
    prune_(net, plan, optimizer)
    for key, tensor in net.state_dict().items():
        kept = (
            plan.kept[key].mask().view(tensor.shape) if key in plan.kept else torch.ones_like(tensor, dtype=torch.bool)
        )
        assert torch.equal(tensor, torch.where(kept, before[key], 0))
    for key, parameter in net.named_parameters():
        for part, value in optimizer.state[parameter].items():
            was = momenta[parameter][part]
            fits = key in plan.kept and value.shape == parameter.shape
            kept = plan.kept[key].mask().view(parameter.shape) if fits else torch.ones_like(was, dtype=torch.bool)
            assert torch.equal(value, torch.where(kept, was, 0))
    step(net, optimizer)


def test_a_plan_for_another_model_changes_nothing() -> None:
    plan = choose_weights(seeded(conv_net), 0.5)
    for other, message in (
        (nn.Sequential(nn.Linear(2, 2)), "masks '0.weight' in shape"),
        (nn.Sequential(nn.ReLU()), "does not have"),
        (nn.Sequential(*seeded(conv_net), nn.BatchNorm1d(4)), "another model"),
    ):
        before = [parameter.clone() for parameter in other.parameters()]
        with pytest.raises(PlanError, match=message):
            prune_(other, plan)
        assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_there_is_nothing_to_prove() -> None:
    net = seeded(conv_net)
    with pytest.raises(PlanError, match="single weights cuts no channel"):
        prove(net, choose_weights(net, 0.5), torch.zeros(2, 3, 6, 6))  # type: ignore[arg-type]


# On disk.


def saved(folder: Path, ratio: float = 0.9) -> tuple[nn.Module, SparsityPlan, Path]:
    net = seeded(conv_net, 64)
    plan = choose_weights(net, ratio)
    prune_(net, plan)
    save_slim(net, folder / "sparse.safetensors", plan, accuracy=0.5)
    return net, plan, folder / "sparse.safetensors"


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_the_file_brings_every_weight_back_and_is_small(tmp_path: Path) -> None:
    net, plan, path = saved(tmp_path)
    fresh = seeded(conv_net, 64, seed=1)
    assert load_slim(path, fresh) == plan and same(net, fresh)
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, tmp_path / "dense.safetensors")
    weights, kept = (sum(part) for part in zip(*plan.weights().values(), strict=True))
    saved_bytes = (tmp_path / "dense.safetensors").stat().st_size - path.stat().st_size
    # four bytes for every weight that went, less one bit for each; the header takes some
    assert saved_bytes > 4 * (weights - kept) - weights / 8 - 3000
    assert path.stat().st_size < 0.2 * (tmp_path / "dense.safetensors").stat().st_size
    stored = load_file(path)
    assert stored["0.weight"].shape == (len(plan.kept["0.weight"]),)
    assert stored["0.weight:bitmap"].dtype == torch.uint8


def test_ties_and_other_formats_go_through_a_file(tmp_path: Path) -> None:
    def build() -> nn.Module:
        net = seeded(conv_net).to(torch.bfloat16)
        net[3].weight.requires_grad_(False)
        return nn.Sequential(net, net)

    net = build()
    plan = choose_weights(net, 0.5)
    prune_(net, plan)
    assert list(plan.weights()) == ["0.0", "0.8"]
    save_slim(net, tmp_path / "tied", plan)
    fresh = build()
    assert load_slim(tmp_path / "tied", fresh) == plan and same(net, fresh)


def changed(path: Path, target: Path, change: Any) -> Path:
    """A file with other tensors and header, whose digest is right."""
    from safetensors import safe_open

    from lightning_prune.structure.slim_file import KEY, _digest

    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[KEY])
    tensors: dict[str, Tensor] = load_file(path)
    change(tensors, header)
    del header["digest"]
    save_file(tensors, target, metadata={KEY: json.dumps({**header, "digest": _digest(header, tensors)})})
    return target


def test_damaged_and_foreign_files_change_nothing(tmp_path: Path) -> None:
    _, _, path = saved(tmp_path)
    whole = path.read_bytes()
    files = {name: tmp_path / name for name in ("cut", "flipped")}
    files["cut"].write_bytes(whole[:-7])
    files["flipped"].write_bytes(whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:])

    def without(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        del tensors["0.weight:bitmap"]

    def shorter(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        tensors["0.weight"] = tensors["0.weight"][1:].clone()

    def narrow(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        tensors["0.weight:bitmap"] = tensors["0.weight:bitmap"][1:].clone()

    def more(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        tensors["9.weight"] = torch.zeros(3)

    def later(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        header["plan"]["version"] = 2

    for change in (without, shorter, narrow, more, later):
        files[change.__name__] = changed(path, tmp_path / change.__name__, change)
    fresh = seeded(conv_net, 64, seed=1)
    before = seeded(conv_net, 64, seed=1)
    for name, file in files.items():
        with pytest.raises(SlimFileError) as caught:
            load_slim(file, fresh)
        assert "\n" not in str(caught.value) and same(fresh, before), name
    other = seeded(conv_net, 32)
    with pytest.raises(SlimFileError, match=r"masks '0.weight' in shape \(64, 3, 3, 3\)"):
        load_slim(path, other)
    assert same(other, seeded(conv_net, 32))


def test_what_the_plan_does_not_describe_is_not_saved(tmp_path: Path) -> None:
    net = seeded(conv_net)
    plan = choose_weights(net, 0.5)
    with pytest.raises(SlimFileError, match=r"108 weights of '0\.weight' are not zero"):
        save_slim(net, tmp_path / "dense", plan)
    with pytest.raises(SlimFileError, match="in shape"):
        save_slim(seeded(conv_net, 16), tmp_path / "wide", plan)
    assert not list(tmp_path.iterdir())
