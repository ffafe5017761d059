"""Small random networks, described by plain data: every description is legal, whatever numbers it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

WIDTHS = (4, 6, 8, 9, 12)
WIDEST = 36
SIDE = 8


@dataclasses.dataclass(frozen=True)
class Node:
    """One part: its kind, a number from which the part derives its options, and the bodies inside it."""

    kind: str
    number: int
    bodies: tuple[tuple[Node, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A whole network: the parts in their order, and how it ends."""

    parts: tuple[Node, ...]
    head: int


class Part(nn.Module):
    """Maps ``channels`` to ``outputs`` channels; the sides of the image may change."""

    bodies = 0  # how many bodies a part of this kind has

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.channels, self.outputs = channels, outputs


PARTS: dict[str, type[Part]] = {}


def part(kind: type[Part]) -> type[Part]:
    """Enter a part into the table."""
    PARTS[kind.__name__] = kind
    return kind


def divisor(channels: int, number: int) -> int:
    """One of the divisors of a number of channels."""
    found = [value for value in range(1, channels + 1) if channels % value == 0]
    return found[number % len(found)]


def activation(number: int) -> Callable[[Tensor], Tensor]:
    """One of several, some of them not zero at zero."""
    return (torch.relu, torch.sigmoid, F.gelu, torch.tanh, F.hardswish, torch.cos)[number % 6]


@part
class Conv(Part):
    def __init__(self, channels: int, number: int) -> None:
        super().__init__(channels, WIDTHS[number % 5])
        size = (1, 3)[number % 2]
        self.conv = nn.Conv2d(channels, self.outputs, size, padding=size // 2, bias=number % 3 > 0)
        self.norm = nn.BatchNorm2d(self.outputs) if number % 4 else nn.Identity()
        self.act = activation(number)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


@part
class GroupedConv(Part):
    def __init__(self, channels: int, number: int) -> None:
        groups = divisor(channels, number)
        super().__init__(channels, groups * (1 + number % max(1, 12 // groups)))
        self.conv = nn.Conv2d(channels, self.outputs, 3, padding=1, groups=groups)
        self.act = activation(number)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


@part
class Depthwise(Part):
    def __init__(self, channels: int, number: int) -> None:
        multiplier = 1 + number % 2
        super().__init__(channels, channels * multiplier)
        self.conv = nn.Conv2d(channels, self.outputs, 3, padding=1, groups=channels, bias=number % 3 == 0)
        self.norm = nn.BatchNorm2d(self.outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


@part
class Transposed(Part):
    def __init__(self, channels: int, number: int) -> None:
        groups = divisor(channels, number) if number % 2 else 1
        super().__init__(channels, groups * (1 + number % max(1, 9 // groups)))
        self.conv = nn.ConvTranspose2d(channels, self.outputs, 2, stride=2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


@part
class Norm(Part):
    def __init__(self, channels: int, number: int) -> None:
        super().__init__(channels, channels)
        self.norm = (
            nn.BatchNorm2d(channels),
            nn.GroupNorm(divisor(channels, number // 5), channels),
            nn.InstanceNorm2d(channels, affine=number % 2 == 0),
            nn.GroupNorm(divisor(channels, number // 5), channels, affine=False),
            nn.BatchNorm2d(channels, affine=False),
        )[number % 5]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


@part
class ChannelsLast(Part):
    def __init__(self, channels: int, number: int) -> None:
        super().__init__(channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 10), nn.Linear(10, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.gelu(self.up(self.norm(x.permute(0, 2, 3, 1)))))
        return x + y.permute(0, 3, 1, 2)


@part
class Activation(Part):
    def __init__(self, channels: int, number: int) -> None:
        super().__init__(channels, channels)
        self.slope = nn.PReLU(channels if number % 2 else 1) if number % 3 == 0 else None
        self.act = activation(number)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) if self.slope is None else self.slope(x)


@part
class Residual(Part):
    bodies = 1

    def __init__(self, channels: int, number: int, body: Part) -> None:
        super().__init__(channels, channels)
        self.body, self.project = body, nn.Conv2d(body.outputs, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(F.adaptive_avg_pool2d(self.body(x), x.shape[-2:]))


@part
class DirectResidual(Part):
    """Adds the body itself where the widths agree, and pads or cuts nothing where they don't."""

    bodies = 1

    def __init__(self, channels: int, number: int, body: Part) -> None:
        super().__init__(channels, body.outputs)
        self.body = body
        self.shortcut = nn.Identity() if channels == body.outputs else nn.Conv2d(channels, body.outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + F.adaptive_avg_pool2d(self.body(x), x.shape[-2:])


@part
class Cat(Part):
    bodies = 2

    def __init__(self, channels: int, number: int, left: Part, right: Part) -> None:
        super().__init__(channels, left.outputs + right.outputs)
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        left, right = (F.adaptive_avg_pool2d(body(x), x.shape[-2:]) for body in (self.left, self.right))
        return torch.cat([left, right], 1)


@part
class DenseCat(Part):
    bodies = 1

    def __init__(self, channels: int, number: int, body: Part) -> None:
        super().__init__(channels, channels + body.outputs)
        self.body, self.first = body, number % 2 == 0

    def forward(self, x: Tensor) -> Tensor:
        y = F.adaptive_avg_pool2d(self.body(x), x.shape[-2:])
        return torch.cat([x, y] if self.first else [y, x], 1)


@part
class CatTwice(Part):
    def __init__(self, channels: int, number: int) -> None:
        super().__init__(channels, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], 1)


@part
class MergeTwo(Part):
    """Two bodies of one width meet in an operator of two arguments."""

    bodies = 2

    def __init__(self, channels: int, number: int, left: Part, right: Part) -> None:
        super().__init__(channels, 6)
        self.left, self.right = left, right
        self.a, self.b = nn.Conv2d(left.outputs, 6, 1), nn.Conv2d(right.outputs, 6, 1)
        self.number = number % 4

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(F.adaptive_avg_pool2d(self.left(x), 4))
        b = self.b(F.adaptive_avg_pool2d(self.right(x), 4))
        if self.number == 0:
            return torch.maximum(a, b)
        if self.number == 1:
            return torch.where(a > b, a, b - a)
        return a * b.sigmoid() if self.number == 2 else a - b


@part
class HalfWorked(Part):
    """One half goes through a body and comes back: CSP, ShuffleNet."""

    bodies = 1

    def __init__(self, channels: int, number: int, body: Part) -> None:
        super().__init__(channels, channels // 2 + body.outputs if channels % 2 == 0 else channels)
        self.body, self.back, self.channels = body, number % 2 == 0, channels

    def forward(self, x: Tensor) -> Tensor:
        if self.channels % 2:
            return x
        left, right = x.chunk(2, 1)
        right = F.adaptive_avg_pool2d(self.body(right), x.shape[-2:])
        return torch.cat([right, left] if self.back else [left, right], 1)


@part
class Swap(Part):
    def __init__(self, channels: int, number: int) -> None:
        super().__init__(channels, channels)
        self.pieces = divisor(channels, number)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(x.chunk(self.pieces, 1)[::-1], 1)


@part
class Shuffle(Part):
    def __init__(self, channels: int, number: int) -> None:
        super().__init__(channels, channels)
        self.groups = divisor(channels, number)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = x.reshape(batch, self.groups, channels // self.groups, height, width)
        return x.transpose(1, 2).reshape(batch, channels, height, width)


@part
class Gate(Part):
    def __init__(self, channels: int, number: int) -> None:
        super().__init__(channels, channels // 2 if channels % 2 == 0 else channels)
        self.number = number % 3

    def forward(self, x: Tensor) -> Tensor:
        if self.channels % 2:
            return x
        left, right = x.chunk(2, 1)
        if self.number == 0:
            return F.glu(x, 1)
        return torch.maximum(left, right) if self.number == 1 else left * right.tanh()


@part
class UnevenSplit(Part):
    def __init__(self, channels: int, number: int) -> None:
        super().__init__(channels, 7)
        self.cut = 1 + number % (channels - 1)
        self.a, self.b = nn.Conv2d(self.cut, 7, 1), nn.Conv2d(channels - self.cut, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.split([self.cut, self.channels - self.cut], 1)
        return self.a(a) + self.b(b).relu()


@part
class Slice(Part):
    def __init__(self, channels: int, number: int) -> None:
        self.cut, self.number = 1 + number % (channels - 1), number % 3
        super().__init__(channels, (self.cut, channels - self.cut, (channels + 1) // 2)[self.number])

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, : self.cut], x[:, self.cut :], x[:, ::2])[self.number]


@part
class Reorder(Part):
    def __init__(self, channels: int, number: int) -> None:
        super().__init__(channels, channels)
        order = torch.randperm(channels, generator=torch.Generator().manual_seed(number))
        self.register_buffer("order", order)
        self.number = number % 3

    def forward(self, x: Tensor) -> Tensor:
        if self.number == 0:
            return x.index_select(1, self.order)
        return x.roll(1, 1) if self.number == 1 else x.flip(1)


@part
class Pad(Part):
    def __init__(self, channels: int, number: int) -> None:
        self.front, self.back = number % 3, number // 3 % 4
        super().__init__(channels, channels + self.front + self.back)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, self.front, self.back))


@part
class Excite(Part):
    def __init__(self, channels: int, number: int) -> None:
        super().__init__(channels, channels)
        self.squeeze, self.excite = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, 1 if number % 3 == 0 else channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


@part
class AcrossChannels(Part):
    """Operators that look along the channels."""

    def __init__(self, channels: int, number: int) -> None:
        self.number = number % 6
        super().__init__(channels, channels + 1 if self.number == 0 else channels)
        self.slide = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.number == 0:
            return torch.cat([x, x.mean(1, keepdim=True)], 1)
        if self.number == 1:
            return x.softmax(1)
        if self.number == 2:
            return x * x.sum(1, keepdim=True).sigmoid()
        if self.number == 3:
            return F.normalize(x, dim=1)
        if self.number == 4:
            return x * self.slide(x.mean((2, 3)).unsqueeze(1)).sigmoid().transpose(1, 2).unsqueeze(-1)
        return x - x.amax(1, keepdim=True)


@part
class Pixels(Part):
    def __init__(self, channels: int, number: int) -> None:
        self.up = channels % 4 == 0 and number % 2 == 0
        self.down = not self.up and 4 * channels <= WIDEST
        super().__init__(channels, channels // 4 if self.up else 4 * channels if self.down else channels)
        self.by_hand = number % 3 == 0

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            return F.pixel_shuffle(x, 2)
        if not self.down:
            return x
        x = F.adaptive_avg_pool2d(x, 4)
        if self.by_hand:
            return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
        return F.pixel_unshuffle(x, 2)


@part
class Resize(Part):
    def __init__(self, channels: int, number: int) -> None:
        super().__init__(channels, channels)
        self.number = number % 3

    def forward(self, x: Tensor) -> Tensor:
        if self.number == 0:
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.adaptive_max_pool2d(x, 4) if self.number == 1 else F.avg_pool2d(x, 3, 1, 1)


@part
class Raw(Part):
    """Parameters and buffers that no layer owns."""

    def __init__(self, channels: int, number: int) -> None:
        super().__init__(channels, channels)
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.position = nn.Parameter(torch.zeros(1, channels, 4, 4)) if number % 3 == 0 else None
        self.register_buffer("fixed", torch.linspace(0.5, 1.5, channels).reshape(-1, 1, 1))
        self.mix = nn.Parameter(torch.zeros(channels, channels)) if number % 3 == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale + self.fixed
        if self.position is not None:
            return F.adaptive_avg_pool2d(x, 4) + self.position
        return x if self.mix is None else (self.mix @ x.flatten(2)).view_as(x)


@part
class CalledTwice(Part):
    def __init__(self, channels: int, number: int) -> None:
        super().__init__(channels, channels)
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.functional = number % 2 == 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        again = F.conv2d(x, self.conv.weight, padding=2, dilation=2) if self.functional else self.conv(x)
        return again + x


@part
class WeightNormed(Part):
    def __init__(self, channels: int, number: int) -> None:
        super().__init__(channels, 7)
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(channels, 7, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


@part
class TwoChunks(Part):
    """Two pieces by ``chunk``, of which the second may be shorter, each with a layer of its own."""

    def __init__(self, channels: int, number: int) -> None:
        super().__init__(channels, 5)
        half = (channels + 1) // 2
        self.a, self.b = nn.Conv2d(half, 5, 1), nn.Conv2d(channels - half, 5, 1)
        self.act = activation(number)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return self.a(a) + self.act(self.b(b))


@part
class SumOver(Part):
    """A sum over channels after a function that may not be zero at zero."""

    def __init__(self, channels: int, number: int) -> None:
        super().__init__(channels, channels + 1)
        self.act, self.number = activation(number), number // 6 % 4

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(x)
        if self.number == 0:
            y = F.pad(y, (1, 0), value=0.5)[..., :-1]
        if self.number == 1:
            y = F.layer_norm(y, y.shape[-2:])
        if self.number == 2:
            y = torch.where(y > 0, y, torch.full_like(y, 0.25))
        return torch.cat([y.sum(1, keepdim=True), x], 1)


@part
class Reshaped(Part):
    """A layer whose result is read in the shape of something else."""

    bodies = 1

    def __init__(self, channels: int, number: int, body: Part) -> None:
        super().__init__(channels, channels)
        self.body, self.back = body, nn.Conv2d(body.outputs, channels, 1)
        self.number = number % 3

    def forward(self, x: Tensor) -> Tensor:
        y = self.back(F.adaptive_avg_pool2d(self.body(x), x.shape[-2:]))
        if self.number == 0:
            return y.tanh().reshape(x.shape)
        if self.number == 1:
            return y * x.shape[1] ** -0.5
        return y.view(len(x), self.channels, *x.shape[2:])


@part
class IntoBatch(Part):
    """Every channel by itself, or every pair, through a shared layer."""

    def __init__(self, channels: int, number: int) -> None:
        self.each = 2 if channels % 2 == 0 and number % 2 else 1
        super().__init__(channels, channels // self.each * 2)
        self.shared = nn.Conv2d(self.each, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2) if number % 3 == 0 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.shared(x.reshape(-1, self.each, *x.shape[2:]))
        y = y if self.norm is None else self.norm(y)
        return y.reshape(len(x), -1, *x.shape[2:])


@part
class Branches(Part):
    """Bodies are stacked and weighed against each other, channel by channel."""

    bodies = 2

    def __init__(self, channels: int, number: int, left: Part, right: Part) -> None:
        super().__init__(channels, 6)
        self.left, self.right = left, right
        self.a, self.b = nn.Conv2d(left.outputs, 6, 1), nn.Conv2d(right.outputs, 6, 1)
        self.weigh, self.number = nn.Linear(6, 12), number % 2

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(F.adaptive_avg_pool2d(self.left(x), 4))
        b = self.b(F.adaptive_avg_pool2d(self.right(x), 4))
        both = torch.stack([a, b], 1)
        weights = self.weigh(both.sum(1).mean((2, 3)))
        weights = weights.view(len(x), 2, -1) if self.number else weights.view(len(x), -1, 2).transpose(1, 2)
        return (both * weights.softmax(1)[..., None, None]).sum(1)


@part
class Attention(Part):
    """Over positions, with heads where the number of channels allows it."""

    def __init__(self, channels: int, number: int) -> None:
        super().__init__(channels, channels)
        self.heads = (1, 2)[number % 2]
        self.qkv, self.back = nn.Linear(channels, 24), nn.Linear(8, channels)
        self.fused = number % 3 == 0

    def forward(self, x: Tensor) -> Tensor:
        y = F.adaptive_avg_pool2d(x, 4).flatten(2).transpose(1, 2)
        q, k, v = (z.reshape(len(x), 16, self.heads, -1).transpose(1, 2) for z in self.qkv(y).chunk(3, -1))
        if self.fused:
            found = F.scaled_dot_product_attention(q, k, v)
        else:
            found = (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v
        y = y + self.back(found.transpose(1, 2).reshape(len(x), 16, -1))
        return y.transpose(1, 2).reshape(len(x), self.channels, 4, 4)


@part
class Recall(Part):
    """Meets an earlier feature map of its own chain again, or the first of them."""

    def __init__(self, channels: int, number: int, earlier: Sequence[int]) -> None:
        self.where, self.add = number % len(earlier), number % 3 == 0 and earlier[number % len(earlier)] == channels
        super().__init__(channels, channels if self.add else channels + earlier[self.where])

    def forward(self, x: Tensor, earlier: Sequence[Tensor]) -> Tensor:
        old = F.adaptive_avg_pool2d(earlier[self.where], x.shape[-2:])
        return x + old if self.add else torch.cat([old, x], 1)


class Chain(Part):
    """Parts one after the other, never wider than ``WIDEST`` and never larger than ``SIDE``."""

    def __init__(self, channels: int, nodes: Sequence[Node]) -> None:
        super().__init__(channels, channels)
        self.parts = nn.ModuleList()
        widths = [channels]
        for node in nodes:
            if self.outputs > WIDEST or self.outputs < 2:
                node = Node("Conv", node.number)
            self.parts.append(build_part(self.outputs, node, widths))
            self.outputs = self.parts[-1].outputs
            widths.append(self.outputs)

    def forward(self, x: Tensor) -> Tensor:
        earlier = [x]
        for step in self.parts:
            x = step(x, earlier) if isinstance(step, Recall) else step(x)
            if x.shape[-1] > SIDE:
                x = F.adaptive_avg_pool2d(x, SIDE)
            earlier.append(x)
        return x


def build_part(channels: int, node: Node, earlier: Sequence[int]) -> Part:
    """The module of one node behind maps of ``earlier`` widths."""
    kind = PARTS[node.kind]
    if kind is Recall:
        return Recall(channels, node.number, earlier)
    inner = channels // 2 if kind is HalfWorked and channels % 2 == 0 else channels
    return kind(channels, node.number, *(Chain(inner, body) for body in node.bodies))


class Network(nn.Module):
    """Stem, parts, head."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = Chain(8, recipe.parts)
        self.mode = recipe.head % 4
        self.last = nn.Conv2d(self.body.outputs, 6, 1)
        self.fc = nn.Linear(6 * (1 if self.mode == 0 else 4), 3)

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        x = self.last(self.body(self.stem(x))).tanh()
        if self.mode == 0:
            return self.fc(x.mean((2, 3)))
        small = F.adaptive_avg_pool2d(x, 2)
        if self.mode == 1:
            return self.fc(small.flatten(1))
        if self.mode == 2:
            return self.fc(small.permute(0, 2, 3, 1).reshape(len(x), -1))
        return {"map": self.fc(small.view(len(x), 24)), "pooled": x.sum(1)}


def _nodes(children: st.SearchStrategy[tuple[Node, ...]] | None) -> st.SearchStrategy[Node]:
    numbers = st.integers(0, 59)

    def of(kind: str) -> st.SearchStrategy[Node]:
        count = PARTS[kind].bodies
        bodies = st.tuples(*[children] * count) if children is not None else st.just(())
        return st.builds(Node, st.just(kind), numbers, bodies)

    usable = sorted(kind for kind in PARTS if children is not None or PARTS[kind].bodies == 0)
    return st.sampled_from(usable).flatmap(of)


def recipes() -> st.SearchStrategy[Recipe]:
    """All networks of up to six parts, with bodies in bodies."""
    plain = st.lists(_nodes(None), min_size=1, max_size=3).map(tuple)
    nested = st.lists(_nodes(plain), min_size=1, max_size=3).map(tuple)
    return st.builds(Recipe, st.lists(_nodes(nested), min_size=1, max_size=6).map(tuple), st.integers(0, 3))
