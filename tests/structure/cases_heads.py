"""Hard cases of attention in which whole heads can go, and embedding widths that modules keep as numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import (
    PatchMerging,
    PatchMergingV2,
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
)

from tests.structure.case_table import case
from tests.structure.cases_attention import TOKENS, Mlp


@case(TOKENS, name="HeadsReturned", call={"need_weights": True})
@case(TOKENS, name="HeadsAfterBias", call={"need_weights": False}, add_bias_kv=True)
@case(TOKENS, name="HeadsBesideZeros", add_zero_attn=True)
@case(TOKENS, name="HeadsBesideBoth", add_bias_kv=True, add_zero_attn=True, bias=False)
@case((5, 3, 12), name="HeadsSequenceFirst", batch_first=False)
@case((5, 12), name="HeadsUnbatched")
@case(TOKENS, name="HeadsCausal", masks=("causal",))
@case(TOKENS, name="HeadsCausalHint", masks=("causal",), call={"need_weights": False, "is_causal": True})
@case(TOKENS, name="HeadsPadded", masks=("padded",), call={"need_weights": False})
@case(TOKENS, name="HeadsMaskedTwice", masks=("causal", "padded"), add_bias_kv=True, add_zero_attn=True)
@case(TOKENS, name="HeadsMaskedEach", shrinks=False, masks=("each",), call={"need_weights": False})
@case(TOKENS, name="HeadsWeighed", masks=("floating",))
class MultiheadOptions(nn.Module):
    """The embedding is an output, so that heads go alone; the weights of the attention are dropped."""

    def __init__(
        self, masks: tuple[str, ...] = (), call: dict[str, Any] | None = None, batch_first: bool = True, **options: Any
    ) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(12, 4, batch_first=batch_first, **options)
        self.masks, self.call = masks, call or {}

    def forward(self, x: Tensor) -> Tensor:
        given: dict[str, Any] = dict(self.call)
        later = torch.ones(5, 5, dtype=torch.bool, device=x.device).triu(1)
        if "causal" in self.masks:
            given["attn_mask"] = later
        if "each" in self.masks:
            given["attn_mask"] = later.expand(12, 5, 5)
        if "floating" in self.masks:
            given["attn_mask"] = -0.5 * later.to(x.dtype)
        if "padded" in self.masks:
            given["key_padding_mask"] = torch.arange(5, device=x.device).expand(3, 5) > 3
        return self.attend(x, x, x, **given)[0]


@case(TOKENS, name="HeadsSeen", shrinks=False)
@case(TOKENS, name="HeadsSeenApart", shrinks=False, average=False)
class HeadsSeen(nn.Module):
    """Weights of an attention that are an output: each of them, or their mean over all heads."""

    def __init__(self, average: bool = True) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(12, 4, batch_first=True)
        self.average = average

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.attend(x, x, x, average_attn_weights=self.average)


@case(TOKENS, (3, 4, 12))
class CrossAttention(nn.Module):
    """Keys and values of another sequence, from a packed projection, and from one of their own widths."""

    def __init__(self) -> None:
        super().__init__()
        self.here, self.there = nn.Linear(12, 8), nn.Linear(12, 8)
        self.packed = nn.MultiheadAttention(8, 4, batch_first=True)
        self.apart = nn.MultiheadAttention(8, 2, kdim=6, vdim=10, batch_first=True)
        self.k, self.v, self.fc = nn.Linear(8, 6), nn.Linear(8, 10), nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self.here(x), self.there(y)
        x = x + self.packed(x, y, y)[0]
        return self.fc(x + self.apart(x, self.k(y), self.v(y), need_weights=False)[0])


@case(TOKENS, (3, 4, 12))
class EncoderAndDecoder(nn.Module):
    """The whole of ``nn.Transformer``, which checks its width against a number."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.body = nn.Transformer(16, 4, 2, 1, 24, 0.0, batch_first=True)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(y.shape[1], x.device, x.dtype)
        return self.fc(self.body(self.embed(x), self.embed(y), tgt_mask=mask))


@case(TOKENS, name="FusedProjection")
@case(TOKENS, name="FusedProjectionKernel", kernel=True)
@case(TOKENS, name="FusedProjectionThreeHeads", heads=3)
@case(TOKENS, name="FusedProjectionSquareHeads", width=16)
@case(TOKENS, name="FusedProjectionGated", gated=True)
@case(TOKENS, name="FusedProjectionNormed", normed=True)
class FusedProjection(nn.Module):
    """Queries, keys and values from one layer; the module keeps the number, the width and the product of both."""

    def __init__(
        self, heads: int = 4, width: int = 12, kernel: bool = False, gated: bool = False, normed: bool = False
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, width // heads, width
        self.scale = self.head_dim**-0.5
        self.embed, self.qkv, self.proj = nn.Linear(12, width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate = nn.Linear(width, width) if gated else None
        self.q_norm = nn.LayerNorm(self.head_dim) if normed else nn.Identity()
        self.mlp, self.fc, self.kernel = Mlp(width), nn.Linear(width, 3), kernel

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q = self.q_norm(q)
        if self.kernel:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q * self.scale @ k.transpose(-2, -1)).softmax(-1) @ v
        y = y.transpose(1, 2).reshape(batch, length, self.attn_dim)
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.fc(self.mlp(x + self.proj(y)))


class JoinedByWidth(nn.Module):
    """The joined heads are as wide as the embedding because Python says so, in one of several ways."""

    def __init__(self, join: str) -> None:
        super().__init__()
        self.n_head, self.n_embd, self.join = 4, 12, join
        self.qkv, self.proj, self.scale = nn.Linear(12, 36), nn.Linear(12, 12), 3**-0.5

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        if self.join == "gpt":
            parts = self.qkv(x).split(self.n_embd, dim=2)
            q, k, v = (part.view(batch, length, self.n_head, width // self.n_head).transpose(1, 2) for part in parts)
        else:
            heads = self.qkv(x).reshape(batch, length, 3, self.n_head, width // self.n_head)
            q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        y = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        y = y.transpose(1, 2)
        if self.join == "deit":
            return self.proj(y.reshape(batch, length, width))
        if self.join == "torch":
            return self.proj(torch.reshape(y, x.shape))
        if self.join == "list":
            return self.proj(y.contiguous().view([batch, length, width]))
        return self.proj(y.contiguous().view(batch, length, width))


@case(TOKENS, name="JoinedInReshape", join="deit")
@case(TOKENS, name="JoinedInFunction", join="torch")
@case(TOKENS, name="JoinedInList", join="list")
@case(TOKENS, name="JoinedInView", join="gpt")
class JoinedHeads(nn.Module):
    def __init__(self, join: str) -> None:
        super().__init__()
        self.embed, self.attend, self.again = nn.Linear(12, 12), JoinedByWidth(join), JoinedByWidth(join)
        self.mlp, self.fc = Mlp(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attend(x)
        return self.fc(self.mlp(x + self.again(x)))


@case(TOKENS)
class HeadsOutOfWidth(nn.Module):
    """As before, but in the model's own forward, whose class is nobody's to change."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.embed, self.qkv, self.proj = nn.Linear(12, 12), nn.Linear(12, 36), nn.Linear(12, 12)
        self.mlp, self.fc = Mlp(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.num_heads, 3).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        return self.fc(self.mlp(x + self.proj(y)))


@case((3, 12))
class WrongWidthWrittenDown(nn.Module):
    """A reshape inside of a part of the model that fails for another reason."""

    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(len(x), 8, 1, 1).expand(len(x), 8, 2, 1).reshape(len(x), 16)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.part, self.b, self.c = nn.Linear(12, 8), self.Part(), nn.Linear(16, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.part(self.a(x))).relu())


@case(TOKENS)
class SeparateProjections(nn.Module):
    """BERT's manner: three layers, and the width of all heads together as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = 4, 3, 12
        self.embed, self.mlp, self.fc = nn.Linear(12, 16), Mlp(16), nn.Linear(16, 3)
        self.query, self.key, self.value = (nn.Linear(16, 12) for _ in range(3))
        self.dense = nn.Linear(12, 16)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_attention_heads, self.attention_head_size).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) / self.attention_head_size**0.5
        y = (scores.softmax(-1) @ v).permute(0, 2, 1, 3).contiguous()
        return self.fc(self.mlp(x + self.dense(y.view(*y.shape[:2], self.all_head_size))))


@case(TOKENS, name="SharedKeys")
@case(TOKENS, name="SharedKeysOfOne", shared=1)
@case(TOKENS, name="SharedKeysByNumber", counted=True)
class SharedKeys(nn.Module):
    """Llama's manner: several heads look at the same keys, which are repeated; positions turn halves of a head."""

    def __init__(self, shared: int = 2, counted: bool = False) -> None:
        super().__init__()
        self.head_dim, self.groups, self.counted = 4, 4 // shared, counted
        self.num_heads, self.num_key_value_heads = (4, shared) if counted else (0, 0)
        self.embed, self.mlp, self.fc = nn.Linear(12, 10), Mlp(10), nn.Linear(10, 3)
        self.q, self.k, self.v = nn.Linear(10, 16), nn.Linear(10, 4 * shared), nn.Linear(10, 4 * shared)
        self.o = nn.Linear(16, 10)
        angle = torch.outer(torch.arange(5.0), 10.0 ** -torch.arange(2.0)).repeat(1, 2)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def split(self, x: Tensor, number: int) -> Tensor:
        return x.view(*x.shape[:-1], number if self.counted else -1, self.head_dim).transpose(1, 2)

    def turn(self, x: Tensor) -> Tensor:
        left, right = x[..., :2], x[..., 2:]
        return x * self.cos + torch.cat([-right, left], -1) * self.sin

    def repeated(self, x: Tensor) -> Tensor:
        batch, heads, length, width = x.shape
        wide = x[:, :, None].expand(batch, heads, self.groups, length, width)
        return wide.reshape(batch, heads * self.groups, length, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q = self.turn(self.split(self.q(x), self.num_heads))
        k, v = (self.split(layer(x), self.num_key_value_heads) for layer in (self.k, self.v))
        y = F.scaled_dot_product_attention(q, self.repeated(self.turn(k)), self.repeated(v), is_causal=True)
        y = y.transpose(1, 2).reshape(*x.shape[:-1], -1)
        return self.fc(self.mlp(x + self.o(y)))


@case((3, 3, 8, 8))
class PatchesAndToken(nn.Module):
    """The embedding width is a number of the model; a token and positions are added to the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_dim = 12
        self.patch = nn.Conv2d(3, 12, 4, stride=4)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 12)), nn.Parameter(torch.randn(1, 5, 12))
        layer = nn.TransformerEncoderLayer(12, 4, 20, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.fc = nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).reshape(len(x), self.hidden_dim, 4).permute(0, 2, 1)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        return self.fc(self.norm(self.body(x))[:, 0])


@case((3, 3, 8, 8), name="TwoWidthsByNumber")
class TwoWidthsByNumber(nn.Module):
    """One number counts two widths that have nothing to do with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_dim = 8
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 2, stride=2), nn.Linear(8, 8), nn.Linear(8, 3)
        self.extra = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).reshape(len(x), self.hidden_dim, 16).mean(2)
        x = self.b(x.relu()).relu().view(len(x), 1, self.hidden_dim)
        return self.fc(self.extra(x))


@case((2, 3, 16, 16), name="Windows")
@case((2, 3, 16, 16), name="WindowsCosine", cosine=True)
@case((2, 3, 14, 10), name="WindowsPadded")
@case((2, 3, 8, 8), name="WindowsLargerThanImage", window=8)
class Windows(nn.Module):
    """Swin's blocks: windows at rest and shifted, and merged patches in between."""

    def __init__(self, cosine: bool = False, window: int = 4) -> None:
        super().__init__()
        attention = ShiftedWindowAttentionV2 if cosine else ShiftedWindowAttention
        sides, shift = [window, window], [window // 2, window // 2]
        self.patch = nn.Conv2d(3, 8, 2, stride=2)
        self.rest, self.shifted = attention(8, sides, [0, 0], 4), attention(8, sides, shift, 2)
        self.merge = (PatchMergingV2 if cosine else PatchMerging)(8)
        self.deep = attention(16, sides, shift, 4, qkv_bias=cosine)
        self.norm, self.deep_norm, self.mlp, self.fc = nn.LayerNorm(8), nn.LayerNorm(16), Mlp(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        x = x + self.rest(self.norm(x))
        x = self.merge(x + self.shifted(self.norm(x)))
        return self.fc(self.mlp(x + self.deep(self.deep_norm(x))).mean((1, 2)))


@case((2, 2, 9, 12))
class RelativePositions(nn.Module):
    """MaxViT's attention within partitions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend = nn.Linear(12, 12), RelativePositionalMultiHeadAttention(12, 3, 9)
        self.mlp, self.fc = Mlp(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.fc(self.mlp(x + self.attend(x)))


@case((3, 6, 4, 4))
class CrossCovariance(nn.Module):
    """XCiT's manner: within a head the matrix is channels by channels, scaled by a temperature per head."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.embed, self.qkv, self.proj = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 48, 1), nn.Conv2d(16, 8, 1)
        self.temperature, self.fc = nn.Parameter(torch.ones(4, 1, 1)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = self.qkv(x).reshape(len(x), 3, self.num_heads, 4, 16).unbind(1)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        y = ((q @ k.mT) * self.temperature).softmax(-1) @ v
        return self.fc((x + self.proj(y.reshape(len(x), -1, *x.shape[2:]))).mean((2, 3)))
