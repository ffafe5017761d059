"""A graph as a table that a person can read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

from lightning_prune.structure.plan import layer_of

if TYPE_CHECKING:
    from lightning_prune.structure.graph import ChannelGraph, ChannelGroup

WIDTH = 120
_NAME = 34
_HEADERS = ("group", "channels", "unit", "tied to", "read by", "remarks")


def overview(graph: ChannelGraph) -> str:
    """A line per group, long lists shortened, then the layers that stay, by their reasons.

    Columns: name and number of channels of a group; unit, how many positions of its first layer a channel stands for;
    the other layers whose channels go with it; the layers that read it; remarks, ``renormalised`` where a norm, an
    average or whatever standardises a weight takes statistics over the channels, ``not mergeable`` where none can stand
    for another. A column that says nothing is left out.
    """
    lines = _table(graph.groups) if graph.groups else ["No channel can go."]
    if graph.pinned:
        lines += ["", "What stays, and why:"]
        for reason, layers in _by_reason(graph.pinned):
            lines += wrap(reason, WIDTH, initial_indent="* ", subsequent_indent="  ")
            lines.append(f"    {_fitting(layers, WIDTH - 4)}")
    return "\n".join(lines)


def _table(groups: Sequence[ChannelGroup]) -> list[str]:
    """Columns as wide as what stands in them; the two lists share what the others leave of the width."""
    columns = {
        "group": [_middle(group.name, _NAME) for group in groups],
        "channels": [f"{group.size:>8}" for group in groups],
        "unit": [f"{group.unit:>4}" if group.unit > 1 else "" for group in groups],
        "tied to": [],
        "read by": [],
        "remarks": ["renormalised" if g.renormalised else "" if g.mergeable else "not mergeable" for g in groups],
    }
    taken = sum(2 + max(map(len, (header, *column))) for header, column in columns.items() if any(column))
    each = (WIDTH - taken) // 2 - 2
    columns["tied to"] = [_fitting(_tied(group), each) for group in groups]
    columns["read by"] = [_fitting(group.consumers, each) for group in groups]
    shown = {header: [header, *column] for header, column in columns.items() if any(column)}
    wide = {header: max(map(len, column)) for header, column in shown.items()}
    lines = [
        "  ".join(f"{cell:<{wide[header]}}" for header, cell in zip(shown, row, strict=True)).rstrip()
        for row in zip(*shown.values(), strict=True)
    ]
    return [lines[0], "  ".join("-" * width for width in wide.values()), *lines[1:]]


def _tied(group: ChannelGroup) -> list[str]:
    """The other layers that make these channels, and those that pass them on one by one, such as depthwise filters."""
    known = {layer_of(name) for name, _ in (*group.outputs, *group.inputs, *group.scales)}
    passing = [layer_of(member[0]) for member in group.members if member not in group.shifts]
    passing = [layer for layer in passing if layer not in known]
    return [name for name in dict.fromkeys((*group.producers, *passing)) if name != group.name.partition("#")[0]]


def _fitting(names: Iterable[str], width: int) -> str:
    """As many names as fit, and how many there are beside."""
    rest, shown = list(names), list[str]()
    while rest and len(", ".join([*shown, rest[0]])) + (len(f", +{len(rest) - 1}") if rest[1:] else 0) <= width:
        shown.append(rest.pop(0))
    if not shown and rest:
        shown.append(_middle(rest.pop(0), width - (len(f", +{len(rest)}") if rest else 0)))
    return ", ".join([*shown, *([f"+{len(rest)}"] if rest else [])])


def _middle(name: str, width: int) -> str:
    """A name that is too long without its middle.

    >>> _middle("features.denseblock1.denselayer2.conv1", 20)
    'features..yer2.conv1'
    """
    return name if len(name) <= width else f"{name[: width // 2 - 2]}..{name[-(width - width // 2) :]}"


def _by_reason(pinned: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Reasons with the layers that they hold; those that differ only in numbers of modules are one."""
    reasons: dict[str, tuple[str, list[str]]] = {}
    for layer, reason in pinned.items():
        alike = re.sub(r"(?<=[._'(])\d+(?=[._')])", "*", reason)
        first, layers = reasons.setdefault(alike, (reason, []))
        layers.append(layer)
        reasons[alike] = first if reason == first else alike, layers
    return list(reasons.values())
