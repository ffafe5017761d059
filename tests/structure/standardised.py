"""What the judge knows of convolutions that standardise their filters: over the inputs that are left, by formula.

It knows classes by name and which coordinates of their weights survived, and nothing of the library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def _deviation(correction: int, inside: float | None, outside: float = 0.0) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """``sqrt(variance + inside) + outside`` of a sum of squares and the number of its terms."""

    def deviation(module: Any, squares: Tensor, count: Tensor) -> Tensor:
        epsilon = module.eps if inside is None else inside
        return (squares / (count - correction) + epsilon).sqrt() + outside

    return deviation


#: Class -> what its filters, their mean taken off, are divided by.
DEVIATIONS = {
    **dict.fromkeys(
        ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame", "ScaledConv"), _deviation(0, None)
    ),
    "StandardConv": _deviation(1, 0.0, 1e-5),
    "BatchNormConv": _deviation(0, 1e-6),
    "StepwiseConv": _deviation(1, 0.0, 1e-5),
    "RootConv": _deviation(0, 1e-5),
}


class KeptFilters(TorchFunctionMode):
    """Convolutions of those classes use what the slim network makes of its filters, with zeros where inputs have gone.

    Args:
        model: the masked network.
        kept: per dim of each of its parameters and buffers, the coordinates that are still there.
    """

    def __init__(self, model: nn.Module, kept: Mapping[str, Sequence[Tensor]]) -> None:
        super().__init__()
        self.filters = {
            name: _standardised(module, *kept[f"{name}.weight"][:2])
            for name, module in model.named_modules()
            if type(module).__name__ in DEVIATIONS
        }
        self.at_work: list[str] = []
        self.hooks = []
        for name in self.filters:
            module = model.get_submodule(name)
            self.hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self.at_work.append(name)))
            self.hooks.append(module.register_forward_hook(lambda *_: self.at_work.clear()))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.at_work and getattr(func, "__name__", "") == "conv2d":
            args = (args[0], self.filters[self.at_work[-1]], *args[2:])
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*error)


@torch.no_grad()
def _standardised(module: Any, rows: Tensor, columns: Tensor) -> Tensor:
    """``gain * scale * (w - mean) / deviation`` of the filters and inputs that are left; zero elsewhere."""
    left = module.weight[rows][:, columns]
    count = torch.tensor(left[0].numel(), dtype=left.dtype)
    apart = left - left.sum((1, 2, 3), keepdim=True) / count
    squares = apart.square().sum((1, 2, 3), keepdim=True)
    filters = apart / DEVIATIONS[type(module).__name__](module, squares, count)
    if hasattr(module, "gain"):
        filters = filters * module.gain[rows] * module.scale
    whole = torch.zeros_like(module.weight)
    whole[rows[:, None], columns] = filters
    return whole
