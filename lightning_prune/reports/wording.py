"""Numbers as a reader sees them, in tables and on pages."""

from __future__ import annotations

from collections.abc import Iterable

_NAMED_OPERATORS = 6


def count(number: float | None) -> str:
    """A large number in four digits and its unit.

    >>> count(1_264_000), count(12), count(None)
    ('1.264 M', '12', '?')
    """
    if number is None:
        return "?"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.0f}"


def percent(old: float | None, new: float | None) -> str:
    """The relative change; empty where there is none to tell.

    >>> percent(4, 3), percent(None, 3)
    ('-25.0 %', '')
    """
    return f"{100 * (new - old) / old:+.1f} %" if old and new is not None else ""


def metric(value: float | None) -> str:
    """An accuracy or a loss.

    >>> metric(0.98), metric(None)
    ('0.9800', '?')
    """
    return "?" if value is None else f"{value:.4f}"


def difference(old: float | None, new: float | None) -> str:
    """The absolute change; empty where there is none to tell.

    >>> difference(0.98, 0.97)
    '-0.0100'
    """
    return "" if old is None or new is None else f"{new - old:+.4f}"


def milliseconds(median: float, spread: float) -> str:
    """Median and interquartile range.

    >>> milliseconds(2.0, 0.125)
    '2 (0.12)'
    """
    return f"{median:.3g} ({spread:.2g})"


def size(number: int | None) -> str:
    """A file's length.

    >>> size(1_500_000), size(None)
    ('1.50 MB', '?')
    """
    if number is None:
        return "?"
    for unit, bytes_each in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= bytes_each:
            return (
                f"{number / bytes_each:.3g} {unit}"
                if number >= 10 * bytes_each
                else f"{number / bytes_each:.2f} {unit}"
            )
    return f"{number} B"


def times(ratio: float | None) -> str:
    """A speed-up.

    >>> times(1.999), times(None)
    ('2.00x', '?')
    """
    return "?" if ratio is None else f"{ratio:.2f}x"


def uncounted(operators: tuple[str, ...]) -> str:
    """What fvcore has no rule for, the first few by name; empty where that is nothing.

    >>> uncounted(("aten::add", "aten::mul"))
    ' without add, mul'
    """
    if not operators:
        return ""
    names = [operator.removeprefix("aten::") for operator in operators]
    more = f" and {len(names) - _NAMED_OPERATORS} more" if len(names) > _NAMED_OPERATORS else ""
    return f" without {', '.join(names[:_NAMED_OPERATORS])}{more}"


def first_line(error: Exception) -> str:
    """What went wrong, in one line and without a full stop.

    >>> first_line(RuntimeError("No compiler was found."))
    'RuntimeError: No compiler was found'
    """
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")


def clocked(batch: int, variant: str) -> str:
    """What a latency is of, as a row begins.

    >>> clocked(1, "eager"), clocked(64, "compiled")
    ('latency, batch 1, ms', 'compiled, batch 64, ms')
    """
    return f"{'latency' if variant == 'eager' else variant}, batch {batch}, ms"


def advice(found: Iterable[tuple[int, str]]) -> str:
    """Which variant is the fastest at which batch size, in one sentence; empty where there was no choice.

    >>> advice([(1, "eager"), (64, "compiled"), (128, "compiled")])
    'Fastest slim network: eager at batch 1, compiled at batch 64 and 128.'
    """
    batches: dict[str, list[str]] = {}
    for batch, variant in found:
        batches.setdefault(variant, []).append(str(batch))
    places = ", ".join(f"{variant} at batch {' and '.join(each)}" for variant, each in batches.items())
    return f"Fastest slim network: {places}." if places else ""
