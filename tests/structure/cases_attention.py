"""Hard cases of attention: heads, scales and sizes that Python derives from other sizes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.structure.case_table import Head, block, case

TOKENS = (3, 5, 12)


class Mlp(nn.Module):
    """Something that can always shrink, with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


@case(TOKENS)
class SDPA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), scale=0.25))


@case(TOKENS)
class SDPADefaultScale(nn.Module):
    """The scale is one over the root of the width of a head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


@case(TOKENS, name="SDPAHeads")
@case(TOKENS, name="SDPAHeadsMasked", masked=True)
class SDPAHeads(nn.Module):
    def __init__(self, masked: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.mlp, self.fc = nn.Linear(12, 36), nn.Linear(12, 12), Mlp(12), nn.Linear(12, 3)
        self.masked = masked

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, 3, width // 3).permute(2, 0, 3, 1, 4)
        mask = torch.ones(length, length, device=x.device).tril().bool() if self.masked else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(batch, length, width)
        return self.fc(self.mlp(x + self.out(y)))


@case(TOKENS)
class RederivedScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
        return self.out(scores.softmax(-1) @ v)


@case(TOKENS)
class FixedScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 10), nn.Linear(10, 4)
        self.scale = 8**-0.5

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.bmm(self.q(x) * self.scale, self.k(x).transpose(1, 2))
        return self.out(torch.bmm(scores.softmax(-1), self.v(x)))


@case(TOKENS, name="HeadsByHand")
@case(TOKENS, name="HeadsByHandFixedWidth", fixed=True)
class HeadsByHand(nn.Module):
    """Either the number of heads or the width of a head is a constant; the other is derived."""

    def __init__(self, fixed: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))
        self.embed, self.mlp, self.fc = nn.Linear(12, 12), Mlp(12), nn.Linear(12, 3)
        self.fixed = fixed

    def split(self, x: Tensor) -> Tensor:
        shape = (len(x), x.shape[1], -1, 4) if self.fixed else (len(x), x.shape[1], 3, -1)
        return x.view(*shape).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        scores = (q @ k.transpose(-2, -1)) * 0.5
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.fc(self.mlp(x + self.out(y)))


@case(TOKENS)
class MultiheadAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend = nn.Linear(12, 12), nn.MultiheadAttention(12, 3, batch_first=True)
        self.mlp, self.fc = Mlp(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.fc(self.mlp(x + self.attend(x, x, x, need_weights=False)[0]))


@case(TOKENS)
class MultiheadAttentionWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(12, 3, batch_first=True, kdim=8, vdim=6)
        self.k, self.v = nn.Linear(12, 8), nn.Linear(12, 6)
        self.mlp, self.fc = Mlp(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found, weights = self.attend(x, self.k(x), self.v(x))
        return self.fc(self.mlp(found)), weights


@case(TOKENS)
class TransformerEncoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(12, 3, dim_feedforward=16, dropout=0.0, batch_first=True)
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer(x).mean(1))


@case()
class NonLocal(nn.Module):
    """Attention over the positions of an image; the inner width is free."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = block(3, 8), Head(8)
        self.theta, self.phi, self.value, self.back = (
            nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 5, 1), nn.Conv2d(5, 8, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        theta, phi, value = (layer(x).flatten(2) for layer in (self.theta, self.phi, self.value))
        weights = torch.softmax(theta.transpose(1, 2) @ phi, -1)
        return self.head(x + self.back((value @ weights.transpose(1, 2)).unflatten(2, x.shape[2:])))


@case()
class ChannelAttention(nn.Module):
    """XCA manner: the attention matrix is channels by channels, and softmax runs along channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(8, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        flat = x.flatten(2)
        weights = torch.softmax(flat @ flat.transpose(1, 2), -1)
        return self.head(self.b((weights @ flat).view_as(x)))


@case()
class GramMatrix(nn.Module):
    """Bilinear pooling: every pair of channels becomes an input of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = block(3, 6), block(6, 4), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.b(self.a(x)).flatten(2)
        return self.fc((flat @ flat.transpose(1, 2)).flatten(1))


@case(TOKENS)
class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.mix, self.out = nn.Linear(12, 10), nn.Parameter(torch.randn(10, 8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.einsum("btc,cd->btd", self.a(x).relu(), self.mix).relu())


@case(TOKENS)
class EinsumAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.einsum("bic,bjc->bij", self.q(x), self.k(x)).softmax(-1)
        return self.out(torch.einsum("bij,bjd->bid", weights, self.v(x)))


@case(TOKENS)
class Rotary(nn.Module):
    """Halves of the width turn against each other."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 10), nn.Linear(10, 4)
        angle = torch.outer(torch.arange(5.0), 10.0 ** -torch.arange(4.0)).repeat(1, 2)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def turn(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return x * self.cos + torch.cat([-right, left], -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.turn(self.q(x)) @ self.turn(self.k(x)).mT / 3).softmax(-1)
        return self.out(weights @ self.v(x))


@case((3, 16, 6))
class MlpMixer(nn.Module):
    """Linear layers along the tokens and along the channels in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(16, 12), nn.Linear(12, 16)
        self.mlp, self.fc = Mlp(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(F.gelu(self.up(self.norm(x).transpose(1, 2)))).transpose(1, 2)
        return self.fc(self.mlp(x).mean(1))


@case()
class WindowAttention(nn.Module):
    """Swin manner: windows cut out of the image, biases from a table."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.qkv, self.out = nn.Conv2d(3, 8, 2, stride=2), nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp, self.fc = Mlp(8), nn.Linear(8, 3)
        self.table = nn.Parameter(torch.randn(9, 2))
        steps = torch.cartesian_prod(torch.arange(2), torch.arange(2))
        apart = steps[:, None] - steps[None] + 1
        self.register_buffer("where", apart[..., 0] * 3 + apart[..., 1])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(self.patch(x).permute(0, 2, 3, 1), (-1, -1), (1, 2))
        batch, height, width, channels = x.shape
        y = x.view(batch, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, channels)
        q, k, v = self.qkv(y).reshape(len(y), 4, 3, 2, channels // 2).permute(2, 0, 3, 1, 4)
        bias = self.table[self.where.view(-1)].view(4, 4, 2).permute(2, 0, 1).unsqueeze(0)
        y = ((q * 0.5) @ k.transpose(-2, -1) + bias).softmax(-1) @ v
        y = self.out(y.transpose(1, 2).reshape(-1, 4, channels))
        y = y.view(batch, height // 2, width // 2, 2, 2, channels).permute(0, 1, 3, 2, 4, 5).reshape(x.shape)
        return self.fc(self.mlp(x + y).mean((1, 2)))
