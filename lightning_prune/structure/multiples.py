"""Of which number widths should be multiples so that a device is fast: measured on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.structure.replica import quiet_room
from lightning_prune.structure.stopwatch import clock_of, seconds

MULTIPLES = (1, 2, 4, 8, 16, 32)
"""Among which the choice is made."""

CENTRE = 96
"""Width around which is measured; a multiple of all of them."""

NEAR = 1.05
"""How much slower per multiply-add than the fastest a multiple may be and still be taken, for it cuts finer."""

_ROUNDS = 21

Work = tuple[Callable[[], Tensor], int]
"""What to run, and its multiply-adds."""


def fast_multiple(model: nn.Module) -> int:
    """The finest of the multiples that costs next to no speed where the model is, in its precision.

    A convolution and a linear layer are timed at widths around 96 that are multiples of 1, 2, 4, ... and of no more, as
    far above as below, turn by turn; the least time per multiply-add counts, for what else runs only adds to it.

    >>> fast_multiple(nn.Linear(2, 2)) in MULTIPLES
    True
    """
    tensors = (tensor for tensor in chain(model.parameters(), model.buffers()) if tensor.is_floating_point())
    like = next(tensors, torch.empty(0)).detach()
    with quiet_room():
        works = {multiple: _works(multiple, like) for multiple in MULTIPLES}
        for run, _ in chain(*works.values()):
            run()
        clock = clock_of(model)
        turns = [{each: _per_macs(work, clock) for each, work in works.items()} for _ in range(_ROUNDS)]
    return finest({each: min(turn[each] for turn in turns) for each in MULTIPLES})


def finest(times: Mapping[int, float]) -> int:
    """The smallest number whose time is near the least.

    >>> finest({1: 1.5, 2: 1.2, 4: 1.02, 8: 1.0, 16: 1.01}), finest({1: 1.0, 2: 1.0})
    (4, 1)
    """
    return min(number for number, time in times.items() if time <= NEAR * min(times.values()))


def _per_macs(works: Sequence[Work], clock: Callable[[], float]) -> float:
    return sum(seconds(run, clock=clock) for run, _ in works) / sum(macs for _, macs in works)


def _works(multiple: int, like: Tensor) -> list[Work]:
    """Both operators at one width below the centre and at one as far above; at the centre where that is no finer."""
    is_no_finer = CENTRE // multiple % 2
    widths = (CENTRE, CENTRE) if is_no_finer else (CENTRE - multiple, CENTRE + multiple)
    return [work for width in widths for work in (_convolution(width, like), _linear(width, like))]


def _convolution(width: int, like: Tensor) -> Work:
    images, weight = like.new_ones(4, width, 14, 14), like.new_ones(width, width, 3, 3)
    return lambda: F.conv2d(images, weight, padding=1), images.numel() * width * 9


def _linear(width: int, like: Tensor) -> Work:
    rows, weight = like.new_ones(1024, width), like.new_ones(width, width)
    return lambda: F.linear(rows, weight), rows.numel() * width
