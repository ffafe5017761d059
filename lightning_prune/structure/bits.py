"""Many numbers in little room: which of a tensor's entries are meant, one bit each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final, overload

import numpy as np
import torch
from torch import Tensor

from lightning_prune.errors import PlanError


@final
@dataclass(frozen=True, repr=False)
class Bits(Sequence[int]):
    r"""Numbers below a size, ascending, each once; the positions of entries in a flattened tensor.

    Args:
        size: what all numbers are below.
        packed: eight numbers a byte, the first in the highest bit; unused bits at the end are zero.

    Raises:
        PlanError: the bytes are too few or too many, or an unused bit is set.

    >>> bits = Bits.of(torch.tensor([[True, False], [False, True]]))
    >>> bits, list(bits), list(bits.others()), bits == Bits(4, b"\x90")
    (Bits(2 of 4), [0, 3], [1, 2], True)
    """

    size: int
    packed: bytes

    def __post_init__(self) -> None:
        if len(self.packed) != -(-self.size // 8):
            raise PlanError(f"A bitmap of {self.size} entries has {-(-self.size // 8)} bytes, not {len(self.packed)}.")
        if self.size % 8 and self.packed[-1] & (0xFF >> self.size % 8):
            raise PlanError(f"A bitmap of {self.size} entries sets bits behind its end; it is damaged.")

    @classmethod
    def of(cls, mask: Tensor) -> Bits:
        """The positions where a boolean tensor of any shape is true."""
        return cls(mask.numel(), np.packbits(mask.detach().cpu().numpy().reshape(-1)).tobytes())

    def mask(self, device: torch.device | str = "cpu") -> Tensor:
        """True at the numbers, shape ``(size,)``."""
        return torch.from_numpy(self._unpacked()).to(device, torch.bool)

    def others(self) -> Bits:
        """The numbers below the size that are not among these."""
        return Bits.of(~self.mask())

    def to_plain(self) -> dict[str, Any]:
        """The same in values that torch loads with ``weights_only=True``."""
        return {"size": self.size, "bits": torch.tensor(np.frombuffer(self.packed, np.uint8))}

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> Bits:
        """Read what :meth:`to_plain` wrote."""
        return cls(values["size"], values["bits"].cpu().numpy().tobytes())

    def _unpacked(self) -> Any:
        return np.unpackbits(np.frombuffer(self.packed, np.uint8), count=self.size)

    def __len__(self) -> int:
        return int.from_bytes(self.packed, "big").bit_count()

    def __iter__(self) -> Iterator[int]:
        return iter(np.flatnonzero(self._unpacked()).tolist())

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[int, ...]: ...

    def __getitem__(self, index: int | slice) -> int | tuple[int, ...]:
        found = np.flatnonzero(self._unpacked())[index].tolist()
        return tuple(found) if isinstance(index, slice) else int(found)

    def __repr__(self) -> str:
        return f"Bits({len(self)} of {self.size})"


def compact(numbers: Sequence[int]) -> Sequence[int]:
    """Numbers in the form in which they are kept and compared: bits as they are, others as a tuple."""
    return numbers if isinstance(numbers, Bits) else tuple(int(number) for number in numbers)


def mask_of(numbers: Sequence[int], size: int, device: torch.device | str = "cpu") -> Tensor:
    """True at the numbers, shape ``(size,)``.

    >>> mask_of((0, 2), 3)
    tensor([ True, False,  True])
    """
    if isinstance(numbers, Bits):
        return numbers.mask(device)
    mask = torch.full((size,), len(numbers) == size, device=device)
    if len(numbers) < size:
        mask[torch.tensor(numbers, dtype=torch.int64, device=device)] = True
    return mask


def to_plain(numbers: Sequence[int]) -> Any:
    """Numbers as values that torch loads with ``weights_only=True``."""
    return numbers.to_plain() if isinstance(numbers, Bits) else list(numbers)


def from_plain(values: Any) -> Sequence[int]:
    """Read what :func:`to_plain` wrote."""
    return Bits.from_plain(values) if isinstance(values, dict) else tuple(values)
