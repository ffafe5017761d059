"""What kind of thing an argument is: looked at before anything reads it, and refused in one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, TypeVar

from lightning_prune.errors import ConfigurationError

Record = TypeVar("Record")


def check(condition: bool, sentence: str) -> None:
    """Refuse an argument with one sentence.

    Raises:
        ConfigurationError: the condition doesn't hold.

    >>> check(0.5 < 1, "0.5 must be less than 1.")
    """
    if not condition:
        raise ConfigurationError(sentence)


def is_whole(value: Any) -> bool:
    """Whether it counts something; ``True`` is an answer and no number.

    >>> is_whole(3), is_whole(3.0), is_whole(True)
    (True, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it measures something.

    >>> is_number(0.5), is_number("0.5"), is_number(True)
    (True, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def whole(name: str, value: Any, least: int | None = None) -> None:
    """Refuse what is no whole number, or one below ``least``.

    >>> whole("start", 3, least=0)
    """
    check(is_whole(value), f"{name}={value!r} must be a whole number.")
    check(least is None or value >= least, f"{name}={value} must be at least {least}.")


def number(name: str, value: Any) -> None:
    """Refuse what is no number.

    >>> number("ratio", 0.5)
    """
    check(is_number(value), f"{name}={value!r} must be a number.")


def switch(name: str, value: Any) -> None:
    """Refuse what is neither ``True`` nor ``False``: a text that says no would pass for yes.

    >>> switch("coupled", False)
    """
    check(isinstance(value, bool), f"{name}={value!r} must be True or False.")


def text(name: str, value: Any) -> None:
    """Refuse what is neither a text nor ``None``.

    >>> text("module", "net")
    """
    check(value is None or isinstance(value, str), f"{name}={value!r} must be a string, or None.")


def listed(name: str, value: Any, what: str) -> list[Any]:
    """The members of a list; a text or a mapping is none.

    >>> listed("latency_batches", (1, 64), "batch sizes")
    [1, 64]
    """
    is_one = isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
    check(is_one, f"{name}={value!r} must be a list of {what}.")
    return list(value)


def once_each(name: str, value: Any, what: str) -> list[Any]:
    """The members of a list that names each only once.

    >>> once_each("latency_batches", [1, 64], "batch sizes")
    [1, 64]
    """
    found = listed(name, value, what)
    twice = next((each for at, each in enumerate(found) if each in found[:at]), None)
    check(twice is None, f"{name}={found!r} names {twice!r} twice.")
    return found


def patterns(name: str, value: Any) -> tuple[str, ...]:
    """Name patterns of layers.

    >>> patterns("ignore", ["fc", "layer1.*"])
    ('fc', 'layer1.*')
    """
    found = listed(name, value, "patterns")
    for each in found:
        check(isinstance(each, str), f"{name}={found!r} must be a list of patterns, and {each!r} is none.")
    return tuple(found)


def shares(name: str, value: Any) -> dict[str, float]:
    """Name patterns of layers with the share of each that goes; ``None`` has none.

    >>> shares("ratios", {"layer1.*": 0.25, "fc": 0})
    {'layer1.*': 0.25, 'fc': 0}
    """
    check(
        value is None or isinstance(value, Mapping),
        f"{name}={value!r} must map patterns to ratios: {{'layer1.*': 0.25}}.",
    )
    found = dict(value or {})
    for pattern, share in found.items():
        check(isinstance(pattern, str), f"{name}={found!r} must map patterns to ratios, and {pattern!r} is none.")
        number(f"{name}[{pattern!r}]", share)
        check(0 <= share < 1, f"{name}[{pattern!r}]={share} must lie in [0, 1).")
    return found


def record(kind: type[Record], name: str, value: Any, example: Mapping[str, Any]) -> Record | None:
    """A dataclass from its fields by name, as users write it; one of its kind and ``None`` stay as they are.

    >>> from lightning_prune import Budget
    >>> record(Budget, "budget", {"macs": 0.5}, example={"macs": 0.4}) == Budget(macs=0.5)
    True
    """
    if value is None or isinstance(value, kind):
        return value
    check(isinstance(value, Mapping), f"{name}={value!r} must be a mapping such as {dict(example)}.")
    known = [each.name for each in fields(kind)]  # type: ignore[arg-type]  # it is a dataclass
    for key in value:
        check(key in known, f"{name} knows {', '.join(known)}, not {key!r}.")
    return kind(**value)
