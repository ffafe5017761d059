"""Words and tables of the generated pages."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any


def line(cells: Iterable[object]) -> str:
    """A row of a table.

    >>> line(("a", 1))
    '| a | 1 |'
    """
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def table(head: Sequence[str], rows: Iterable[Iterable[object]], words: int = 1) -> list[str]:
    """A table whose first columns, so many, hold words and stand at the left; numbers stand at the right.

    >>> print(*table(("name", "ms"), [("a", 1)]), sep=chr(10))
    | name | ms |
    | --- | ---: |
    | a | 1 |
    """
    ruler = ["---"] * words + ["---:"] * (len(head) - words)
    return [line(head), line(ruler), *map(line, rows)]


def number(row: dict[str, Any], key: str, form: str) -> str:
    """A value of a row, where there is one."""
    return format(row[key], form) if key in row else ""


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Mean and, of more than one value, standard deviation.

    >>> spread([1.0, 3.0]), spread([2.0])
    ('2.00 ± 1.41', '2.00')
    """
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def quartiles(values: Sequence[float], form: str = ".3f") -> str:
    """Median, and the outer quartiles in brackets, of a triple in ascending order.

    >>> quartiles((1.0, 1.01, 1.02))
    '1.010 (1.000-1.020)'
    """
    low, middle, high = values
    return f"{middle:{form}} ({low:{form}}-{high:{form}})"


def on(found: dict[str, str], *more: str) -> str:
    """The machine in a sentence: the device, and the versions of packages.

    >>> on({"device": "cpu X", "torch": "2.15.0"}, "2 threads")
    'cpu X, 2 threads; torch 2.15.0.'
    """
    device = ", ".join([found.get("cpu") or found.get("device", ""), *more])
    packages = ", ".join(f"{name} {version}" for name, version in found.items() if name not in ("cpu", "device"))
    return f"{device}; {packages}."


def listed(names: Iterable[str]) -> str:
    """Names with commas; "none" without any.

    >>> listed(["a", "b"]), listed([])
    ('a, b', 'none')
    """
    return ", ".join(names) or "none"


def counted(threads: int) -> str:
    """How many threads.

    >>> counted(1), counted(2)
    ('1 thread', '2 threads')
    """
    return f"{threads} thread{'s' * (threads > 1)}"


def code(name: str) -> str:
    """A name, in the type of code where it is some.

    >>> code("TPP"), code("TPP, gram=0")
    ('TPP', '`TPP, gram=0`')
    """
    return f"`{name}`" if "=" in name else name
