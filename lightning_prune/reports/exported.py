"""What is known of an exported file, as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Export:
    """One exported file, and how far it departs from the network it was made of.

    Args:
        format: ``"onnx"`` or ``"torch_export"``.
        file: name of the file, without its folder.
        size: of the file, bytes.
        error: largest difference between its outputs and the network's, relative to the largest output.
        tolerance: that was allowed.
        batches: numbers of samples at which they were compared.
        versions: of what wrote and ran it.
        opset: of an ONNX file's operators; ``None`` for other formats.
    """

    format: str
    file: str
    size: int
    error: float
    tolerance: float
    batches: tuple[int, ...]
    versions: Mapping[str, str]
    opset: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "batches", tuple(self.batches))

    @property
    def kind(self) -> str:
        """The format, with the version of its operators where it has one."""
        return self.format if self.opset is None else f"{self.format} (opset {self.opset})"

    def to_json(self) -> str:
        """Sorted and indented."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    def __str__(self) -> str:
        sizes = " and ".join(map(str, self.batches))
        return (
            f"{self.file}: {self.kind}, {self.size / 1e6:.2f} MB, departs by {self.error:.1e} of the largest output"
            f" at batch {sizes}"
        )
