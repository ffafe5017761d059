"""Twins of attention modules: the same results, and a life of their own outside this library."""

from __future__ import annotations

import copy
import io
import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import SwinTransformer
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

from lightning_prune.structure import PruningPlan, choose, load_slim, prove, prune_, save_slim, trace
from lightning_prune.structure.elastic import Elastic, loosen_
from tests.structure.cases import CASES
from tests.structure.cases_heads import JoinedByWidth
from tests.structure.oracle import leaves, randomise_


def twin_of(module: nn.Module) -> nn.Module:
    """A copy that has become elastic."""
    twin = loosen_(copy.deepcopy(module))
    assert isinstance(twin, Elastic) and isinstance(twin, type(module))
    return twin


def drawn(module: nn.Module) -> nn.Module:
    """The module in double precision, with weights in general position."""
    module.double()
    randomise_(module, seed=1)
    return module


def assert_same(module: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> None:
    """Module and twin agree in both modes, gradients included."""
    twin = twin_of(module)
    for training in (True, False):
        results = []
        for each in (module.train(training), twin.train(training)):
            given = [tensor.clone().requires_grad_() for tensor in inputs]
            given = given * 3 if isinstance(each, nn.MultiheadAttention) and len(given) == 1 else given
            torch.manual_seed(0)
            found = leaves(out := each(*given, **options))
            first = out[0] if isinstance(out, tuple) else out
            wanted = [*each.parameters(), given[0]]
            gradients = torch.autograd.grad(first.square().sum(), wanted, allow_unused=True, materialize_grads=True)
            results.append([*found, *gradients])
        assert len(results[0]) == len(results[1])
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


LATER = torch.ones(5, 5, dtype=torch.bool).triu(1)
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "bool": {"attn_mask": LATER},
    "float": {"attn_mask": torch.linspace(-1, 1, 25).view(5, 5).double()},
    "each head": {"attn_mask": LATER.expand(12, 5, 5)},
    "padding": {"key_padding_mask": torch.arange(5).expand(3, 5) > 3},
    "float padding": {"key_padding_mask": torch.linspace(-1, 1, 15).view(3, 5).double()},
    "both": {"attn_mask": LATER, "key_padding_mask": torch.arange(5).expand(3, 5) > 3},
    "causal": {"attn_mask": LATER, "is_causal": True},
}
SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True},
)

WEIGHTS = ((True, True), (True, False), (False, True))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(mask: str, batch_first: bool) -> None:
    for options, (need_weights, average) in itertools.product(SHAPES, WEIGHTS):
        module = drawn(nn.MultiheadAttention(12, 4, batch_first=batch_first, **options))
        x = torch.randn(3, 5, 12, dtype=torch.float64)
        x = x if batch_first else x.transpose(0, 1)
        assert_same(module, (x,), need_weights=need_weights, average_attn_weights=average, **MASKS[mask])


@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 7}])
def test_multihead_attention_to_another_sequence(widths: dict[str, int]) -> None:
    module = drawn(nn.MultiheadAttention(12, 3, batch_first=True, **widths))
    shapes = [(3, 5, 12), (3, 4, widths.get("kdim", 12)), (3, 4, widths.get("vdim", 12))]
    inputs = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)
    assert_same(module, inputs)
    assert_same(module, inputs, attn_mask=torch.ones(5, 4, dtype=torch.bool).tril(1).logical_not())


def test_multihead_attention_without_a_batch() -> None:
    module = drawn(nn.MultiheadAttention(12, 4))
    x = torch.randn(5, 12, dtype=torch.float64)
    for average in (True, False):
        assert_same(module, (x,), average_attn_weights=average)
    assert_same(module, (x,), attn_mask=LATER.expand(4, 5, 5), key_padding_mask=torch.arange(5) > 3)


def test_multihead_attention_drops_the_same_weights() -> None:
    module = drawn(nn.MultiheadAttention(12, 4, dropout=0.5, batch_first=True))
    assert_same(module, (torch.randn(3, 5, 12, dtype=torch.float64),))


@pytest.mark.parametrize("options", [{"is_causal": True}, {"attn_mask": LATER[:4]}, {"attn_mask": LATER[0]}])
def test_arguments_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    x = torch.randn(3, 5, 12)
    with pytest.raises(RuntimeError, match="attn_mask"):
        twin_of(nn.MultiheadAttention(12, 4, batch_first=True))(x, x, x, **options)


@pytest.mark.parametrize("kind", [ShiftedWindowAttention, ShiftedWindowAttentionV2])
@pytest.mark.parametrize("shift", [(0, 0), (2, 2), (2, 0), (1, 2)])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (4, 9), (3, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_windows(kind: Any, shift: tuple[int, int], size: tuple[int, int], bias: bool) -> None:
    module = drawn(kind(12, [4, 4], list(shift), 3, qkv_bias=bias, proj_bias=bias))
    assert_same(module, (torch.randn(2, *size, 12, dtype=torch.float64),))


@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 2, 2), (0, 2, 0)])
@pytest.mark.parametrize("size", [(4, 8, 8), (5, 7, 10), (1, 4, 9), (2, 3, 4)])
def test_windows_of_films(shift: tuple[int, ...], size: tuple[int, ...]) -> None:
    module = drawn(ShiftedWindowAttention3d(12, [2, 4, 4], list(shift), 3))
    assert_same(module, (torch.randn(2, *size, 12, dtype=torch.float64),))


def test_windows_drop_the_same_weights() -> None:
    module = drawn(ShiftedWindowAttention(12, [4, 4], [2, 2], 3, attention_dropout=0.5, dropout=0.3))
    assert_same(module, (torch.randn(2, 8, 8, 12, dtype=torch.float64),))


def test_relative_positions() -> None:
    assert_same(drawn(RelativePositionalMultiHeadAttention(12, 4, 9)), (torch.randn(2, 5, 9, 12, dtype=torch.float64),))


def swin() -> SwinTransformer:
    """Two stages of two blocks, with and without a shift."""
    torch.manual_seed(0)
    return SwinTransformer([2, 2], 16, [2, 2], [4, 8], [4, 4], stochastic_depth_prob=0.0, num_classes=5)


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def heads_alone(model: nn.Module, inputs: Any) -> PruningPlan:
    """A quarter of all heads go, no embedding."""
    graph = trace(model, inputs)
    heads = [group for group in graph.groups if any("qkv" in name or "in_proj" in name for name, _ in group.outputs)]
    assert heads and not any(group.mergeable or group.renormalised for group in heads)
    return graph.plan({group.name: range(max(1, group.size // 4)) for group in heads})


def pruned_swin() -> tuple[SwinTransformer, PruningPlan]:
    model = swin().eval()
    plan = heads_alone(model, IMAGES)
    assert prove(model, plan, IMAGES).error < 1e-8
    prune_(model, plan)
    return model, plan


def test_only_what_has_outgrown_its_forward_changes_its_class() -> None:
    model = swin()
    graph = trace(model, IMAGES)
    prune_(model, graph.plan({"features.1.0.attn.qkv": (1,)}))
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if name.endswith("attn")}
    assert kinds.pop("features.1.0.attn") == "ElasticShiftedWindowAttention"
    assert set(kinds.values()) == {"ShiftedWindowAttention"}
    assert model.features[1][0].attn.num_heads == 3
    assert isinstance(model.features[1][0].attn, ShiftedWindowAttention)


def test_heads_and_embedding_in_proportion_need_no_other_class() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    model = nn.Sequential(nn.Linear(6, 16), layer, nn.Linear(16, 3))
    x = torch.randn(2, 5, 6)
    prune_(model, choose(trace(model, x), 0.5, scope="all"))
    attention = layer.self_attn
    assert type(attention) is nn.MultiheadAttention
    assert (attention.embed_dim, attention.kdim, attention.vdim, attention.num_heads, attention.head_dim) == (
        *(8, 8, 8, 2, 4),
    )
    slow = model(x)
    assert slow.shape == (2, 5, 3)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(x), twin_of_all(model)(x))


def twin_of_all(model: nn.Module) -> nn.Module:
    return loosen_(copy.deepcopy(model))


def test_copies_and_pickles() -> None:
    model, _ = pruned_swin()
    expected = model(IMAGES)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stored, weights_only=False)
    for twin in twins:
        assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
        torch.testing.assert_close(twin(IMAGES), expected)
    assert model.state_dict().keys() == swin().state_dict().keys()


def test_exports() -> None:
    model, _ = pruned_swin()
    exported = torch.export.export(model, (IMAGES,)).module()
    torch.testing.assert_close(exported(IMAGES), model(IMAGES))


def test_multihead_attention_is_exported_with_a_free_batch() -> None:
    model = nn.TransformerEncoderLayer(12, 4, 20, dropout=0.0, batch_first=True).eval()
    x = torch.randn(3, 5, 12)
    prune_(model, heads_alone(model, x))
    shapes = {"src": {0: torch.export.Dim("batch", min=2)}}
    exported = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
    more = torch.randn(7, 5, 12)
    torch.testing.assert_close(exported(more), model(more))


def test_plans_and_slim_files_know_no_classes(tmp_path: Path) -> None:
    model, plan = pruned_swin()
    save_slim(model, tmp_path / "slim.safetensors", plan)
    fresh = swin().eval()
    assert load_slim(tmp_path / "slim.safetensors", fresh) == plan == PruningPlan.from_json(plan.to_json())
    assert [type(module) for module in fresh.modules()] == [type(module) for module in model.modules()]
    torch.testing.assert_close(fresh(IMAGES), model(IMAGES))


def test_pruned_again() -> None:
    model, _ = pruned_swin()
    before = sum(parameter.numel() for parameter in model.parameters())
    plan = choose(trace(model, IMAGES), 0.5, scope="all")
    assert prove(model, plan, IMAGES).error < 1e-8
    prune_(model, plan)
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.4 * before


def test_a_failure_leaves_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_prune.structure import surgery

    model = swin()
    plan = heads_alone(model, IMAGES)
    expected = model.eval()(IMAGES)
    outgrown = surgery.outgrown

    def failing(network: nn.Module) -> Any:
        yield from list(outgrown(network))[:1]
        yield model, "no class"

    monkeypatch.setattr(surgery, "outgrown", failing)
    with pytest.raises(TypeError):
        prune_(model, plan)
    assert not any(isinstance(module, Elastic) for module in model.modules())
    torch.testing.assert_close(model(IMAGES), expected)


def gpt() -> nn.Module:
    """Attention of a foreign class: Python asks for the embedding's width where the heads are joined."""
    torch.manual_seed(0)
    return CASES["JoinedInView"].build().eval()


def test_foreign_attention_joins_what_is_left(tmp_path: Path) -> None:
    model, x = gpt(), torch.randn(3, 5, 12)
    graph = trace(model, x)
    assert graph.joined == ("attend", "again")
    plan = graph.plan({"attend.qkv": (1, 3), "embed": (0,)})
    assert plan.joined == ("again", "attend")
    assert PruningPlan.from_json(plan.to_json()) == plan
    assert prove(model, plan, x).error < 1e-8
    prune_(model, plan)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.export.export(model, (x,)).module()):
        torch.testing.assert_close(twin(x), expected)
    save_slim(model, tmp_path / "slim.safetensors", plan)
    fresh = gpt()
    load_slim(tmp_path / "slim.safetensors", fresh)
    torch.testing.assert_close(fresh(x), expected)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    again = choose(trace(model, x), 0.5, scope="all")
    assert again.joined == () and prove(model, again, x).error < 1e-8


def test_a_class_that_allows_no_subclass_keeps_its_heads() -> None:
    class Final(JoinedByWidth):
        def __init_subclass__(cls) -> None:
            raise NotImplementedError("This is the last one.")

    model: Any = gpt()
    model.attend = Final("deit")
    graph = trace(model, torch.randn(3, 5, 12))
    assert graph.joined == ("again",)
    assert "reshape (attend) fails" in graph.pinned["attend.qkv"]


def test_nobody_joins_without_need() -> None:
    graph = trace(gpt(), torch.randn(3, 5, 12))
    assert graph.plan({}).joined == ()
    assert trace(swin(), IMAGES).joined == ()
    old = {key: value for key, value in json.loads(graph.plan({"embed": (0,)}).to_json()).items() if key != "joined"}
    assert PruningPlan.from_json(json.dumps(old)).joined == ()


class OwnForward(nn.MultiheadAttention):
    """Does something of its own, so that no twin can stand for it."""

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(2 * query, *args, **kwargs)


class OwnName(nn.MultiheadAttention):
    """The same under another name."""


def test_subclasses() -> None:
    x = torch.randn(3, 5, 12)
    for kind, shrinks in ((OwnForward, False), (OwnName, True)):
        layer = nn.TransformerEncoderLayer(12, 4, 20, dropout=0.0, batch_first=True)
        layer.self_attn = kind(12, 4, batch_first=True)
        graph = trace(layer, x)
        assert ("self_attn" in {group.name for group in graph.groups}) == shrinks
        plan = choose(graph, 0.5)
        assert prove(layer, plan, x).error < 1e-8
        prune_(layer, plan)
        assert isinstance(layer.self_attn, kind)
        assert type(pickle.loads(pickle.dumps(layer)).self_attn) is type(layer.self_attn)


@pytest.mark.parametrize("gone", [1, 2])
def test_torch_kernels_of_whole_encoders_are_not_fooled(gone: int) -> None:
    """In inference mode torch takes whole layers at once, on nested tensors, where it may."""
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    randomise_(model, seed=0)
    x, padding = torch.randn(3, 5, 16), torch.arange(5).expand(3, 5) > torch.tensor([[4], [3], [2]])
    graph = trace(model, x, {"src_key_padding_mask": padding})
    plan = graph.plan({"layers.1.self_attn": range(gone)})
    prune_(model, plan)
    assert not model.use_nested_tensor
    expected = model.train()(x, src_key_padding_mask=padding)
    with torch.inference_mode():
        found = model.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], expected[~padding])
