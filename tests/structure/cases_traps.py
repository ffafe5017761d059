"""Traps: networks on which a nearly right engine is wrong."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from tests.structure.case_table import IMAGE, Head, block, case


@case(name="ViewAsNear", apart=2)
@case(name="ViewAsFar", apart=6)
@case(name="ViewAsFarther", apart=7)
@case(name="ViewAsFarthest", apart=13)
class ViewAs(nn.Module):
    """Two widths agree because Python says so, however many other widths lie between them."""

    def __init__(self, apart: int) -> None:
        super().__init__()
        self.first, self.tail, self.head = nn.Conv2d(3, 8, 1), block(8, 8), Head(8)
        self.rest = nn.Sequential(*(nn.Conv2d(8, 8, 1) for _ in range(apart)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(self.tail(self.rest(x).tanh().reshape(x.shape)))


@case(name="ViewAsTwo", channels=2)
@case(name="ViewAsThree", channels=3)
class ViewAsFew(nn.Module):
    """So few channels that two groups can hardly lose different numbers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.mix = nn.Conv2d(3, channels, 1), nn.Parameter(torch.randn(channels, channels))
        self.b, self.head = block(channels, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b((self.mix @ x.flatten(2)).view_as(x)))


@case(name="ChunkOdd0", before=0, width=9)
@case(name="ChunkOdd1", before=1, width=9)
@case(name="ChunkOdd2", before=2, width=9)
@case(name="ChunkOdd3", before=3, width=9)
@case(name="ChunkOdd4", before=4, width=9)
@case(name="ChunkOdd5", before=5, width=7)
@case(name="ChunkOdd6", before=6, width=5)
class ChunkOdd(nn.Module):
    """Two pieces that differ by one channel: some cuts fit by chance."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 1), *(nn.Conv2d(6, 6, 1) for _ in range(before)))
        self.a, half = nn.Conv2d(6, width, 1), (width + 1) // 2
        self.b, self.c, self.head = nn.Conv2d(half, 8, 1), nn.Conv2d(width - half, 8, 1), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(self.stem(x)).chunk(2, 1)
        return self.head(self.b(left.relu()) + self.c(right.tanh()))


@case()
class ChannelNumbers(nn.Module):
    """Every channel is multiplied by its own number, counted anew in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        number = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
        return self.head(self.b(x * number.view(1, -1, 1, 1) + torch.linspace(0, 1, x.shape[1])[:, None, None].to(x)))


@case()
class ChannelConstants(nn.Module):
    """Ones and zeros of whatever width is there are harmless."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x + x.new_full((x.shape[1], 1, 1), 0.5) * torch.ones_like(x[:1])))


@case()
class ChannelIdentity(nn.Module):
    """An identity matrix of the width at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        mix = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).roll(1, 0)
        return self.head(self.b(torch.einsum("oc,bchw->bohw", mix, x)))


@case()
class LowerTriangle(nn.Module):
    """Every channel sees itself and those before it, with weights of the network's own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(8, 6), Head(6)
        self.mix = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b((torch.tril(self.mix) @ x.flatten(2)).unflatten(2, x.shape[2:])))


def _not_zero_at_zero() -> dict[str, Any]:
    return {
        "cos": torch.cos,
        "exp": torch.exp,
        "sigmoid": torch.sigmoid,
        "softplus": F.softplus,
        "plus_one": lambda x: x + 1,
        "radd": lambda x: 1 + x,
        "rsub": lambda x: 1 - x,
        "clamp": lambda x: x.clamp(min=0.5),
        "clamp_max": lambda x: x.clamp(max=-0.5),
        "is_zero": lambda x: (x == 0).to(x.dtype),
        "less": lambda x: (x < 0.5).to(x.dtype),
        "where": lambda x: torch.where(x > 0, x, torch.ones_like(x)),
        "where_scalar": lambda x: torch.where(x > 0, x, 2.0),
        "masked_fill": lambda x: x.masked_fill(x <= 0, 3.0),
        "power_zero": lambda x: x.abs() ** 0,
        "power_of": lambda x: 2**x,
        "threshold": lambda x: F.threshold(x, 0.1, 2.0),
        "maximum": lambda x: torch.maximum(x, torch.full_like(x, 0.25)),
        "in_place": lambda x: x.clone().add_(1),
        "fill": lambda x: torch.full_like(x, 0.75),
        "normalised": lambda x: F.layer_norm(x, x.shape[-2:], bias=torch.ones(x.shape[-2:], dtype=x.dtype)),
        "padded": lambda x: F.pad(x, (1, 1), value=1.0),
        "logit": lambda x: torch.logit(x, eps=0.1),
        "reciprocal": lambda x: 1 / (x.abs() + 1),
        "acos": lambda x: torch.acos(x.clamp(-0.9, 0.9)),
        "lerp": lambda x: torch.lerp(x, torch.ones_like(x), 0.5),
        "addcmul": lambda x: torch.addcmul(torch.ones_like(x), x, x),
        "isfinite": lambda x: torch.isfinite(x).to(x.dtype),
        "softmax_space": lambda x: x.flatten(2).softmax(-1),
        "hardsigmoid": F.hardsigmoid,
        "logsigmoid": F.logsigmoid,
        "out_argument": lambda x: torch.add(x, 1, out=torch.empty_like(x)),
        "view_written": lambda x: _write_through_a_view(x),
        "random_free": lambda x: torch.ones_like(x).cumsum(-1),
    }


def _write_through_a_view(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, :2].add_(1)
    x.flatten(2)[..., 3:5] = 7
    return x


NOT_ZERO_AT_ZERO = _not_zero_at_zero()


class SumAfter(nn.Module):
    """A sum over channels after something that is not zero where its input is."""

    def __init__(self, function: str) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), block(9, 6), Head(6)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        with torch.no_grad():
            seen = NOT_ZERO_AT_ZERO[self.function](x)
        seen = seen.flatten(2).sum((1, 2)).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        return self.head(self.b(torch.cat([x, seen], 1)))


for _function in NOT_ZERO_AT_ZERO:
    case(name=f"SumAfter_{_function}", function=_function)(SumAfter)


@case()
class InPlaceOnHalf(nn.Module):
    """A piece is changed in place, and the whole is used afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Conv2d(3, 8, 3), block(8, 6), nn.Conv2d(1, 6, 1), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        right = x[:, 4:]
        right.add_(1)
        return self.head(self.b(x) + self.c(x.sum(1, keepdim=True)))


@case((3, 5, 12), name="ScoresOfSigmoids", function="sigmoid")
@case((3, 5, 12), name="ScoresOfCosines", function="cos")
class ScoresWithoutZeros(nn.Module):
    """A product over the width of two tensors of which neither is zero where channels were removed."""

    def __init__(self, function: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 10), nn.Linear(10, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        act = getattr(torch, self.function)
        weights = torch.bmm(act(self.q(x)), act(self.k(x)).transpose(1, 2))
        fused = F.scaled_dot_product_attention(act(self.q(x)), act(self.k(x)), self.v(x), scale=0.5)
        return self.out(weights @ self.v(x) + fused)


@case((3, 12))
class PositiveWeights(nn.Module):
    """The exponential of a parameter is the weight: zeroed, it is one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.log, self.out = nn.Linear(12, 8), nn.Parameter(torch.zeros(6, 8)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(self.a(x).sigmoid(), self.log.exp()).tanh())


@case((3, 12))
class Cosine(nn.Module):
    """Cosine similarity with prototypes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 10), nn.Linear(10, 8)
        self.prototypes = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu())
        return F.cosine_similarity(x[:, None], self.prototypes[None], dim=-1) - torch.cdist(x, self.prototypes)


@case()
class CircularPadding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        self.b, self.head = nn.Conv2d(8, 6, 3, padding="same", padding_mode="reflect"), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu()).relu())


@case()
class Unfold(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 6), nn.Conv1d(6 * 9, 8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(F.unfold(self.a(x), 3)).relu().mean(-1))


@case()
class SpatialTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.where, self.b, self.head = block(3, 8), nn.Linear(8, 6), block(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        theta = self.where(x.mean((2, 3))).tanh().view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return self.head(self.b(F.grid_sample(x, grid, align_corners=False)))


@case()
class Fourier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(16, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        found = torch.fft.rfft2(self.a(x), norm="ortho")
        return self.head(self.b(torch.cat([found.real, found.imag], 1)))


@case()
class Deformable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.offset, self.conv = block(3, 8), nn.Conv2d(8, 18, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.b, self.head = block(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = deform_conv2d(x, self.offset(x).tanh(), self.conv.weight, self.conv.bias, padding=1)
        return self.head(self.b(x))


@case()
class SpectralNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.a, self.b, self.c = norm(nn.Conv2d(3, 8, 3)), norm(nn.Conv2d(8, 6, 3)), block(6, 6)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(x).relu())))


@case((3, 5, 6))
class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.lstm, self.gru, self.out = nn.Linear(6, 8), nn.LSTMCell(8, 6), nn.GRUCell(6, 6), nn.Linear(6, 3)
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        state, hidden = None, None
        for step in self.a(x).unbind(1):
            state = self.lstm(step, state)
            hidden = self.gru(state[0], hidden)
        return self.last(self.out(hidden).relu())


@case(IMAGE, keywords={"times": 2, "mode": "wide", "extra": None, "flags": [True, False]})
class PlainArguments(nn.Module):
    """Numbers, words and nothing among the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(8, 8), Head(8)

    def forward(self, x: Tensor, times: int, mode: str, extra: Tensor | None, flags: list[bool]) -> Tensor:
        x = self.a(x) if extra is None else extra
        for _ in range(times if mode == "wide" and flags[0] else 1):
            x = self.b(x)
        return self.head(x)


@case(IMAGE, (3, 6), pack=lambda image, vector: {"image": image, "more": [vector]})
class DictInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), nn.Linear(6, 8), Head(8)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.head(self.a(batch["image"]) * self.b(batch["more"][0])[..., None, None])


@case(IMAGE, (3, 3, 4, 4), pack=lambda *images: list(images))
class ListInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = block(3, 8), Head(8)

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return [self.head(self.a(image)) for image in images]


@case((3, 6))
class TiedEmbedding(nn.Module):
    """A language model reads and writes with one table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(10, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.write = nn.Linear(8, 10, bias=False)
        self.write.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.table((x * 100).long().abs() % 10)
        return self.write(x + self.down(self.up(x).relu()))


@case(name="FlatWeight", fixed=False)
@case(name="FlatWeightFixed", fixed=True)
class FlatWeight(nn.Module):
    """A filter that is stored as one long vector."""

    def __init__(self, fixed: bool) -> None:
        super().__init__()
        self.a, self.flat, self.b, self.head = block(3, 8), nn.Parameter(torch.randn(6 * 8 * 9)), block(6, 6), Head(6)
        self.fixed = fixed

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        weight = self.flat.view(6, 8, 3, 3) if self.fixed else self.flat.view(-1, x.shape[1], 3, 3)
        return self.head(self.b(F.conv2d(x, weight).relu()))


@case(IMAGE, (1, 4))
class GeneratedFilters(nn.Module):
    """A linear layer makes the filters of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.make, self.b, self.head = block(3, 8), nn.Linear(4, 6 * 8 * 9), block(6, 6), Head(6)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        weight = self.make(z).view(6, 8, 3, 3) * 0.3
        return self.head(self.b(F.conv2d(self.a(x), weight).relu()))


@case()
class ModulatedConv(nn.Module):
    """StyleGAN manner: every sample has its own filters, and the batch becomes groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.style, self.b, self.head = block(3, 8), nn.Linear(8, 8), block(6, 6), Head(6)
        self.weight = nn.Parameter(torch.randn(6, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        batch, _, height, width = x.shape
        weight = self.weight[None] * (1 + self.style(x.mean((2, 3))))[:, None, :, None, None]
        weight = weight * torch.rsqrt(weight.pow(2).sum((2, 3, 4), keepdim=True) + 1e-8)
        y = F.conv2d(x.reshape(1, -1, height, width), weight.flatten(0, 1), padding=1, groups=batch)
        return self.head(self.b(y.view(batch, -1, height, width)))


@case(name="Ghost", outputs=12)
@case(name="GhostCropped", outputs=11)
class Ghost(nn.Module):
    """Half of the channels are cheap copies; the surplus is cropped."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.a, self.main, self.cheap = block(3, 8), block(8, 6, 1), block(6, 6, groups=6)
        self.b, self.head, self.outputs = block(outputs, 8), Head(8), outputs

    def forward(self, x: Tensor) -> Tensor:
        main = self.main(self.a(x))
        return self.head(self.b(torch.cat([main, self.cheap(main)], 1)[:, : self.outputs]))


@case()
class SelectiveKernel(nn.Module):
    """A softmax over branches weighs every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.one, self.two = block(3, 8), block(8, 8), block(8, 8, 1)
        self.squeeze, self.weigh, self.head = nn.Linear(8, 4), nn.Linear(4, 16), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        both = torch.stack([self.one(x), self.two(x)], 1)
        weights = self.weigh(self.squeeze(both.sum(1).mean((2, 3))).relu())
        weights = weights.view(len(x), 2, -1).softmax(1)
        return self.head((both * weights[..., None, None]).sum(1))


@case()
class SplitAttention(nn.Module):
    """ResNeSt: a grouped convolution makes radix pieces, which are summed with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.conv, self.norm = block(3, 8), nn.Conv2d(8, 16, 3, padding=1, groups=2), nn.BatchNorm2d(16)
        self.squeeze, self.weigh, self.b, self.head = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 16, 1), block(8, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.a(x))).relu()
        batch, channels, height, width = x.shape
        pieces = x.reshape(batch, 2, channels // 2, height, width)
        weights = self.weigh(self.squeeze(pieces.sum(1).mean((2, 3), keepdim=True)).relu())
        weights = weights.view(batch, 1, 2, -1).transpose(1, 2).softmax(1).reshape(batch, 2, channels // 2, 1, 1)
        return self.head(self.b((pieces * weights).sum(1)))


@case()
class WeightedFusion(nn.Module):
    """BiFPN: positive weights that sum to one, one for each branch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 8), block(3, 8), block(8, 6), Head(6)
        self.share = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        share = self.share.relu()
        share = share / (share.sum() + 1e-4)
        return self.head(self.c(share[0] * self.a(x) + share[1] * self.b(x)))


@case()
class DropPathByHand(nn.Module):
    """Whole samples skip the body by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(8, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.a(x), self.b(self.a(x))
        if self.training:
            y = y * torch.rand(len(y), 1, 1, 1, dtype=y.dtype, device=y.device).add(0.5).floor()
        return self.head(x + y)


class Scripted(nn.Module):
    """Compiled by torch.jit below."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


@case()
class ScriptedActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head, self.act = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), Head(6), scripted()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.b(self.act(self.a(x)))))


def scripted() -> nn.Module:
    """A compiled activation."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(Scripted())


@case()
class ListsOfParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), block(8, 6), Head(6)
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(8, 1, 1)) for _ in range(2))
        self.named = nn.ParameterDict({"shift": nn.Parameter(torch.zeros(8, 1, 1))})

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        for scale in self.scales:
            x = (x * scale).tanh()
        return self.head(self.b(x + self.named["shift"]))


@case(name="PartialConvSplit", split=True)
@case(name="PartialConvSlice", split=False)
class PartialConv(nn.Module):
    """FasterNet: only the first quarter of the channels is convolved."""

    def __init__(self, split: bool) -> None:
        super().__init__()
        self.a, self.part, self.b, self.head = block(3, 12), nn.Conv2d(3, 3, 3, padding=1), block(12, 8), Head(8)
        self.split = split

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.split:
            left, right = torch.split(x, [3, 9], dim=1)
            x = torch.cat([self.part(left), right], 1)
        else:
            x = x.clone()
            x[:, :3] = self.part(x[:, :3])
        return self.head(self.b(x))


@case((3, 12))
class LossInside(nn.Module):
    """The forward pass works out its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.a(x).relu()
        logits = self.out(self.b(hidden).relu())
        target = torch.arange(len(x), device=x.device) % 4
        return {"loss": F.cross_entropy(logits, target) + 0.01 * hidden.pow(2).mean(), "logits": logits}


@case((3, 12))
class WeightPenaltyInside(nn.Module):
    """A penalty on the weights is part of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        penalty = self.a.weight.pow(2).sum() + self.out.weight.abs().mean()
        return self.out(self.b(self.a(x).relu()).relu()), penalty


@case()
class PairwiseProducts(nn.Module):
    """All channels times all channels, by broadcasting."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = block(3, 4), block(3, 4), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).mean((2, 3)), self.b(x).mean((2, 3))
        return self.fc((a[:, :, None] * b[:, None, :]).flatten(1))


@case()
class ChannelsIntoBatch(nn.Module):
    """Every channel is an image of its own for a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.single, self.b, self.head = block(3, 8), nn.Conv2d(1, 2, 3, padding=1), block(16, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        batch, channels, height, width = x.shape
        x = self.single(x.reshape(batch * channels, 1, height, width))
        return self.head(self.b(x.reshape(batch, channels * 2, height, width)))


@case()
class ChannelsIntoBatchNormed(nn.Module):
    """The same with a batch norm, whose statistics run over the channels in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(1), block(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(self.norm(x.flatten(0, 1).unsqueeze(1)).view_as(x)))


@case()
class GroupsByView(nn.Module):
    """A maximum over groups of channels, the number of groups fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 12, 3), nn.Conv2d(4, 8, 3), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x.view(len(x), 4, -1, *x.shape[2:]).amax(2)).relu())


@case()
class SqueezedChannel(nn.Module):
    """A squeeze without a dim takes whatever has size one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = block(3, 4), block(4, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.b(self.a(x)), 1).squeeze())


@case()
class Quantiles(nn.Module):
    """Sorting and thresholds over all activations of a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 8), block(8, 6), block(6, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        level = x.flatten(1).kthvalue(100, dim=1).values
        return self.head(self.c(self.b(x * (x > level[:, None, None, None]).to(x.dtype))))


@case()
class DynamicChannels(nn.Module):
    """The strongest channels of every sample are gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 8), block(3, 6), block(6, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        strongest = x.mean((2, 3)).topk(3, dim=1).indices[..., None, None].expand(-1, -1, *x.shape[2:])
        return self.head(self.c(self.b(x.gather(1, strongest))))


@case()
class ScatteredChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 4), block(8, 6), block(6, 6), Head(6)
        self.register_buffer("where", torch.tensor([1, 7, 2, 4]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        wide = x.new_zeros(len(x), 8, *x.shape[2:]).index_copy(1, self.where, x)
        return self.head(self.c(self.b(wide.index_add(1, self.where, x))))


class ViewAsClasses(nn.Module):
    """Two widths agree in Python; in one of them several channels always go together."""

    def __init__(self, before: int, pieces: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 1), *(nn.Conv2d(6, 6, 1) for _ in range(before)))
        self.a, self.b, self.tail, self.head = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 1), block(8, 8), Head(8)
        self.pieces = pieces

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat(self.a(self.stem(x)).chunk(self.pieces, 1)[::-1], 1)
        return self.head(self.tail(self.b(x).tanh().reshape(x.shape)))


class CatThenReshape(nn.Module):
    """The widths of two layers add up to that of a third, says Python."""

    def __init__(self, before: int, pieces: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 1), *(nn.Conv2d(6, 6, 1) for _ in range(before)))
        self.a, self.b, self.tail, self.head = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1), block(8, 8), Head(8)
        self.c = nn.Conv2d(8, 8, 1, groups=1 if pieces == 2 else 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        both = torch.cat([self.a(x), self.b(x)], 1)
        return self.head(self.tail(self.c(both).tanh().reshape(both.shape)))


for _before in range(6):
    for _pieces in (2, 4):
        case(name=f"ViewAsClasses_{_before}_{_pieces}", before=_before, pieces=_pieces)(ViewAsClasses)
        case(name=f"CatThenReshape_{_before}_{_pieces}", before=_before, pieces=_pieces)(CatThenReshape)
