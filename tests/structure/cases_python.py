"""Hard cases of Python: control flow, constants, caches, containers, frozen and unused parts."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from tests.structure.case_table import IMAGE, Head, block, case


@case()
class HardCodedView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = block(3, 8), block(8, 6), nn.Linear(6 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.max_pool2d(self.b(self.a(x)), 2).view(-1, 6 * 16))


@case()
class HardCodedSplitSizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 12), block(6, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.split(self.a(x), [6, 6], dim=1)
        return self.head(self.b(left * right))


@case()
class HardCodedBroadcast(nn.Module):
    """Python makes a tensor of a fixed number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x * torch.arange(1.0, 9.0, device=x.device, dtype=x.dtype).view(1, 8, 1, 1)))


@case()
class CountedChannels(nn.Module):
    """A number of channels becomes a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 8), block(8, 6), block(6, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.c(self.b(x) * x.shape[1] ** -0.5))


@case()
class WidthDecides(nn.Module):
    """Another way through the network below a certain width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x.tanh() if x.shape[1] >= 8 else x.sigmoid()))


@case()
class DataDependentBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x * 2 if x.sum() > 0 else x - 1
        return self.head(self.b(x))


@case()
class DataDependentItem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        factor = float(x.abs().max().item())
        return self.head(self.b(self.a(x / factor)))


@case()
class DataDependentIndex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        best = x.mean((1, 3)).argmax(1)
        return self.head(self.b(self.a(x)[torch.arange(len(x), device=x.device), :, best].unsqueeze(2)))


class Swish(torch.autograd.Function):
    """x times sigmoid of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = x.sigmoid()
        return gradient * gate * (1 + x * (1 - gate))


@case()
class CustomFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 3), Head(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Swish.apply(self.b(Swish.apply(self.a(x)))))


@case(name="CheckpointReentrant", reentrant=True)
@case(name="CheckpointNonReentrant", reentrant=False)
class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 8), block(8, 12), block(12, 8), Head(8)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = checkpoint(lambda z: self.c(self.b(z)), x, use_reentrant=self.reentrant)
        return self.head(x + y)


@case()
class Caching(nn.Module):
    """Keeps a feature map on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 8), block(8, 8), block(8, 8), Head(8)
        self.last: Tensor | None = None
        self.calls = 0
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.a(x)
        self.calls += 1
        self.seen.append(tuple(self.last.shape))
        return self.head(self.c(self.b(self.last) + self.last))


@case()
class CachedGrid(nn.Module):
    """Builds a table at the first call and reuses it while the size stays."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(5, 8), block(8, 8), Head(8)
        self.grid: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.grid is None or self.grid.shape[-2:] != x.shape[-2:] or self.grid.dtype != x.dtype:
            line = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype, device=x.device)
            self.grid = torch.stack(torch.meshgrid(line, line, indexing="ij"))
        return self.head(self.b(self.a(torch.cat([x, self.grid.expand(len(x), -1, -1, -1)], 1))))


@case()
class FrozenStem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(8, 8), Head(8)
        self.a.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.a(x)
        return self.head(self.b(x))


@case()
class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 8), block(8, 8), block(8, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x.detach()) + self.c(x))


@case()
class PartlyEvaluated(nn.Module):
    """A backbone that stays in evaluation mode while the rest trains."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(8, 8), Head(8)

    def train(self, mode: bool = True) -> PartlyEvaluated:
        super().train(mode)
        self.a.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)))


@case()
class UnusedParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(8, 8), Head(8)
        self.unused, self.branch = block(8, 8), nn.Linear(8, 8)
        self.spare = nn.Parameter(torch.randn(8))
        self.register_buffer("counts", torch.zeros(8, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)))


@case()
class UnusedOutput(nn.Module):
    """A branch that is computed and thrown away: it must still run afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 8), block(8, 8), block(8, 4), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.c(x)
        return self.head(self.b(x))


@case()
class AuxiliaryHeadInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head, self.side = block(3, 8), block(8, 8), Head(8), Head(8)

    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        out = self.head(self.b(x))
        return (out, self.side(x)) if self.training else out


@case()
class DictOutputs(nn.Module):
    """A feature pyramid."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = block(3, 8), block(8, 12, stride=2)
        self.lateral = nn.ModuleDict({"fine": nn.Conv2d(8, 6, 1), "coarse": nn.Conv2d(12, 6, 1)})
        self.smooth, self.out = block(6, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.a(x)
        coarse = self.lateral["coarse"](self.b(fine))
        fine = self.lateral["fine"](fine) + F.interpolate(coarse, size=fine.shape[-2:], mode="nearest")
        return {"fine": self.out(self.smooth(fine)), "coarse": self.out(self.smooth(coarse))}


@case()
class ListOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.heads = block(3, 8), block(8, 8), nn.ModuleList(Head(8) for _ in range(2))

    def forward(self, x: Tensor) -> list[Any]:
        x = self.b(self.a(x))
        return [self.heads[0](x), (self.heads[1](x), None, 3)]


@case()
class FeatureOutput(nn.Module):
    """What leaves the network keeps its width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = block(3, 8), block(8, 8), block(8, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a(x)
        return x, self.c(self.b(x))


@dataclasses.dataclass
class Answer:
    """What a detector hands back."""

    logits: Tensor
    boxes: Tensor


pytree.register_dataclass(Answer)


@dataclasses.dataclass
class Opaque:
    """The same, unknown to torch."""

    logits: Tensor
    boxes: Tensor


@case(name="DataclassOutput", kind=Answer)
@case(name="UnregisteredDataclassOutput", kind=Opaque)
class DataclassOutput(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.a, self.b, self.logits, self.boxes = block(3, 8), block(8, 8), Head(8), Head(8)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        return self.kind(logits=self.logits(self.b(x)), boxes=self.boxes(x))


@case(IMAGE, keywords={"context": (3, 6), "scale": (3, 1, 1, 1)})
class KeywordInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.project, self.head = block(3, 8), block(8, 8), nn.Linear(6, 8), Head(8)

    def forward(self, x: Tensor, *, context: Tensor, scale: Tensor | None = None) -> Tensor:
        x = self.a(x) + self.project(context)[:, :, None, None]
        return self.head(self.b(x if scale is None else x * scale))


@case((3, 4), (3, 6))
class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.c(torch.tanh(self.a(x)) * self.b(y))


@case()
class Where(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 8), block(3, 8), block(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x), self.b(x)
        return self.head(self.c(torch.where(left > right, left * 2, right - 1)))


@case()
class MaskedFill(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), block(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x.masked_fill(x < 0, -0.25).clamp(max=2.0)))


@case()
class BooleanIndex(nn.Module):
    """A mask over the batch decides which samples go on: sizes depend on data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        bright = x.mean((1, 2, 3)) > -1e6
        return self.head(self.b(x[bright]))


@case()
class Looped(nn.Module):
    """A recurrent convolution with a hidden state of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.turn, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        hidden = torch.zeros_like(x)
        for _ in range(3):
            hidden = torch.tanh(x + self.turn(hidden))
        return self.head(hidden)


@case()
class HookedLayer(nn.Module):
    """A forward hook changes what a layer hands on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(8, 8), Head(8)
        self.a.register_forward_hook(_scale_output)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)))


def _scale_output(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2 + 1


@case()
class SharedModuleTwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 8)
        self.b = block(8, 8)
        self.again, self.head = self.b, Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.again(self.b(x)) + x)


@case((3, 6), name="Embedding")
class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(10, 8), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x * 100).long().abs() % 10
        return self.b(self.a(self.table(tokens)).relu())


@case()
class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 8), block(8, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x = self.a(x)
        return self.head(self.b(x).to(x.dtype).contiguous())


@case()
class Nested(nn.Module):
    """A list of a dict of tensors travels between two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 8), block(3, 6), block(14, 8), Head(8)

    def pack(self, x: Tensor) -> list[dict[str, Tensor]]:
        return [{"wide": self.a(x)}, {"narrow": self.b(x)}]

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.pack(x)
        return self.head(self.c(torch.cat((*first.values(), *second.values()), 1)))
