"""The judge is judged: right cuts made by hand pass, wrong ones don't."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tests.structure.oracle import judge, read_survivors, write_indices_

INPUTS = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    """Convolution, norm, sigmoid (which is not zero at zero), convolution."""

    def __init__(self, norm: str = "batch") -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        group = nn.GroupNorm(2, 8, affine=norm != "bare")
        self.norm = nn.BatchNorm2d(8) if norm == "batch" else group
        self.second = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).sigmoid())


def slice_(model: nn.Module, keep: dict[str, tuple[int, Sequence[int]]]) -> None:
    """``name -> (dim, kept)``, by hand."""
    for name, (dim, index) in keep.items():
        owner_name, _, last = name.rpartition(".")
        tensor = getattr(model.get_submodule(owner_name), last)
        tensor.data = tensor.data.index_select(dim, torch.tensor(index))


def cut_plain(model: nn.Module, out: Sequence[int], into: Sequence[int], norm: Sequence[int]) -> None:
    slice_(model, {"first.weight": (0, out), "first.bias": (0, out), "second.weight": (1, into)})
    model.first.out_channels = model.second.in_channels = len(out)
    slice_(model, {f"norm.{name}": (0, norm) for name, value in model.norm.state_dict().items() if value.dim()})
    for name in ("num_features", "num_channels"):
        if hasattr(model.norm, name):
            setattr(model.norm, name, len(out))


@pytest.mark.parametrize("norm", ["batch", "group", "bare"])
def test_a_right_cut_is_exact(norm: str) -> None:
    keep = (0, 2, 5, 7)
    verdict = judge(lambda: Plain(norm), lambda model: cut_plain(model, keep, keep, keep), INPUTS)
    assert verdict.error < 1e-12
    assert verdict.left < 0.6


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("wrong", ["into", "norm"])
def test_a_wrong_index_is_found(norm: str, wrong: str) -> None:
    keep, other = (0, 2, 5, 7), (0, 3, 5, 7)
    into, held = (other, keep) if wrong == "into" else (keep, other)
    with pytest.raises(AssertionError, match="departs"):
        judge(lambda: Plain(norm), lambda model: cut_plain(model, keep, into, held), INPUTS)


def test_a_group_norm_that_loses_unequally_is_found() -> None:
    keep = (0, 1, 2, 7)
    with pytest.raises(AssertionError, match="departs"):
        judge(lambda: Plain("group"), lambda model: cut_plain(model, keep, keep, keep), INPUTS)


def test_a_changed_number_is_found() -> None:
    def forget(model: nn.Module) -> None:
        cut_plain(model, (0, 1, 2), (0, 1, 2), (0, 1, 2))
        model.norm.num_features = 8

    with pytest.raises(AssertionError, match="norm: BatchNorm2d says"):
        judge(Plain, forget, INPUTS)


def test_a_replaced_parameter_is_found() -> None:
    def replace(model: nn.Module) -> None:
        model.first.weight = nn.Parameter(model.first.weight.data.clone())

    with pytest.raises(AssertionError, match="other Parameter objects"):
        judge(Plain, replace, INPUTS)


def test_a_changed_weight_is_found() -> None:
    calls: list[int] = []

    def scale_once_tagged(model: nn.Module) -> None:
        calls.append(1)
        if len(calls) == 2:
            model.first.weight.data.mul_(1.001)

    with pytest.raises(AssertionError, match="other values after the cut"):
        judge(Plain, scale_once_tagged, INPUTS)


def test_survivors_must_form_a_grid() -> None:
    dense, ragged = nn.Linear(3, 3), nn.Linear(3, 3)
    write_indices_(ragged)
    ragged.weight.data = ragged.weight.data.flatten()[torch.tensor([0, 1, 4, 5])].reshape(2, 2)
    with pytest.raises(AssertionError, match="is no grid"):
        read_survivors(dense, ragged)
