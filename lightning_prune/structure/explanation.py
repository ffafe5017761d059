"""A layer in plain words: what its channels are tied to and where, who reads them, how many can go, or why none."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lightning_prune.errors import PlanError, UnknownLayerError
from lightning_prune.structure.knowledge import Record
from lightning_prune.structure.labels import FIXED, Ints, Labels, Place, Solution
from lightning_prune.structure.plan import layer_of, named_tensors, plain_name, submodule

if TYPE_CHECKING:
    from lightning_prune.structure.graph import ChannelGraph, ChannelGroup

_LISTED = 5
_JOINS = ("cat", "concat", "concatenate", "stack")


class Notes(NamedTuple):
    """What a trace leaves behind; it is looked at only when somebody asks.

    Args:
        labels: of the whole model.
        solution: of these labels.
        roles: number of a parameter dim (see ``Labels.dims``) -> what it is to its group.
        used: names of the parameters and buffers that the pass has read.
        records: what every operator read and wrote.
    """

    labels: Labels
    solution: Solution
    roles: Mapping[int, set[str]]
    used: AbstractSet[str]
    records: Sequence[Record]


class Tie(NamedTuple):
    """Dims that one operator has tied: ``dims`` are numbers of ``Labels.dims``, helpers count below zero."""

    place: Place
    dims: frozenset[int]


def explain(graph: ChannelGraph, name: str) -> str:
    """See :meth:`ChannelGraph.explain`."""
    if graph.notes is None:
        raise PlanError("Only a graph that trace has made can explain a layer.")
    return _Explainer(graph, graph.notes).paragraph(_resolved(graph, name))


def listed(words: Sequence[str], most: int = _LISTED) -> str:
    """A list as a sentence has it, shortened where it is long.

    >>> listed(["a", "b", "c"]), listed("abcdefgh", 3)
    ('a, b and c', 'a, b, c and 5 more')
    """
    shown = [*words[:most], f"{len(words) - most} more"] if len(words) > most + 1 else list(words)
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _resolved(graph: ChannelGraph, name: str) -> str:
    """The name as it counts inside the traced model."""
    plain = plain_name(name)
    inside = {plain_name(path) for path, _ in graph.model.named_modules(remove_duplicate=False)}
    inside |= {plain_name(path) for path, _ in graph.model.named_parameters(remove_duplicate=False)}
    inside |= {plain_name(path) for path, _ in graph.model.named_buffers(remove_duplicate=False)}
    inside |= {*named_tensors(graph.model), *(group.name for group in graph.groups)}
    within = plain.removeprefix(graph.root).removeprefix(".") if _is_below(plain, graph.root) else plain
    for known in (plain, within):
        if known in inside:
            return known
    near = difflib.get_close_matches(within, sorted(inside - {""}), n=3)
    hint = f"near it are {listed([repr(each) for each in near])}" if near else "print(graph) shows the layers"
    raise UnknownLayerError(f"There is no layer {name!r}; {hint}.")


def _is_below(name: str, root: str) -> bool:
    return bool(root) and (name == root or name.startswith(f"{root}."))


class _Explainer:
    """Answers for one graph."""

    def __init__(self, graph: ChannelGraph, notes: Notes) -> None:
        self.graph, self.notes, self.labels, self.root = graph, notes, notes.labels, notes.solution.root
        self.tensors = named_tensors(graph.model)
        self.buffers = {plain_name(name) for name, _ in graph.model.named_buffers()}
        self.owner = np.full(self.root.size, -1, dtype=np.int64)
        for number, group in enumerate(graph.groups):
            self.owner[self._classes(group)] = number

    def paragraph(self, name: str) -> str:
        """Everything about a layer, sentence by sentence."""
        layer = name.partition("#")[0]
        own = self._dims_of(layer)
        if not own:
            return self._without_tensors(layer)
        own = [number for number in own if self.labels.dims[number][0] in self.notes.used]
        if not own:
            return f"{self._title(layer)} stays as it is. It is not used by this forward pass."
        makes, verb = self._channels_of(own)
        sentences = [*self._sharing(layer, own), *self._made(layer, makes, verb)]
        reads = [number for number in own if "inputs" in self._roles(number)]
        sentences += self._read("It" if sentences else self._title(layer), reads)
        if below := self._below(layer):
            sentences.append(f"It also holds {listed(below)}.")
        return " ".join(sentences)

    # what the layer has

    def _dims_of(self, layer: str) -> list[int]:
        """The dims of a layer's own parameters and buffers, or of the one parameter of that name."""
        first = {id(tensor): name for name, tensor in self.tensors.items()}
        parameters = self.graph.model.named_parameters(remove_duplicate=False)
        buffers = self.graph.model.named_buffers(remove_duplicate=False)
        called = [(plain_name(path), first[id(tensor)]) for path, tensor in (*parameters, *buffers)]
        names = {name for path, name in called if layer in (path, layer_of(path))}
        return [number for number, (name, _) in enumerate(self.labels.dims) if name in names]

    def _roles(self, number: int) -> set[str]:
        return self.notes.roles.get(number, set())

    def _layer(self, number: int) -> str:
        return layer_of(self.labels.dims[number][0])

    def _channels_of(self, own: list[int]) -> tuple[list[int], str]:
        """The dims that are a layer's channels, and what it does to these."""
        for role, verb in (("outputs", "makes"), ("through", "filters"), ("scales", "scales"), ("shifts", "shifts")):
            found = [number for number in own if role in self._roles(number)]
            if found:
                return found, verb
        lengths = np.diff(self.labels.starts)
        rest = [number for number in own if not self._roles(number)]
        return sorted(rest, key=lambda number: -int(lengths[number]))[:1], "holds values for"

    def _labels_of(self, numbers: Iterable[int]) -> Ints:
        starts = self.labels.starts
        return np.concatenate([np.arange(starts[number], starts[number + 1]) for number in numbers])

    def _classes(self, group: ChannelGroup) -> Ints:
        """The classes that are a group's channels, in their order."""
        (name, dim), index = next(iter(group.index.items()))
        classes: Ints = self.root[self.labels.first(name, dim) + index[:, 0].numpy()]
        return classes

    def _title(self, layer: str) -> str:
        try:
            kind = type(submodule(self.graph.model, layer)).__name__
        except AttributeError:
            kind = "parameter"
        return f"{layer!r} ({kind})"

    # sentences

    def _sharing(self, layer: str, own: list[int]) -> Iterator[str]:
        others = [
            each
            for each in dict.fromkeys(map(self._layer, own))
            if each != layer and self.labels.dims[own[0]][0] != layer
        ]
        if others:
            yield f"{self._title(layer)} shares its weight with {listed(others)}."

    def _made(self, layer: str, makes: list[int], verb: str) -> Iterator[str]:
        """How many channels there are, in which groups, and what comes of them."""
        if not makes:
            return
        classes = self.root[self._labels_of(makes)]
        owners = self.owner[classes]
        parts = [(self.graph.groups[n], int((owners == n).sum())) for n in dict.fromkeys(owners.tolist()) if n >= 0]
        held = classes[owners < 0]
        title = self._title(layer)
        if not parts:
            yield f"{title} keeps all of its {classes.size} channels."
        elif len(parts) == 1 and not held.size:
            yield f"{title} {verb} {_counted(*parts[0])}."
        else:
            counts = [_counted(group, size) for group, size in parts]
            stay = [f"{held.size} that stay"] if held.size else []
            yield f"{title} {verb} {listed([*counts, *stay])}."
        if held.size:
            reasons = self.notes.solution.reasons
            yield from list(dict.fromkeys(reasons[each] for each in held.tolist()))[:2]
        yield from self._tied(np.unique(classes[classes != self.root[FIXED]]), makes)
        if len(parts) > _LISTED:
            yield "Ask for a group by its name."
            return
        for group, _ in parts:
            yield from self._group(group, f"Those of group {group.name!r}" if len(parts) > 1 or held.size else "They")

    def _tied(self, classes: Ints, makes: list[int]) -> Iterator[str]:
        """The other layers in these classes, each with the operator through which it came in."""
        ties = list(self._ties(classes))
        reached = _reached(ties, makes)
        mine = {self._layer(number) for number in makes}
        words: dict[str, dict[str, None]] = {"outputs": {}, "": {}, "through": {}, "scales": {}}
        for number, tie in reached.items():
            (tensor, _), roles = self.labels.dims[number], self._roles(number)
            if layer_of(tensor) in mine or roles & {"inputs", "shifts"} or (not roles and tensor in self.buffers):
                continue
            kind = next((role for role in words if role in roles), "")
            name = layer_of(tensor) if kind else tensor
            by = "" if kind == "scales" or tie.place[1] == layer_of(tensor) else f" ({_told(tie.place)})"
            words[kind][f"{name}{by}"] = None
        if itself := dict.fromkeys(_told(tie.place, grouped=True) for tie in ties if len(tie.dims) == 1):
            yield f"Several of them at a time are tied to each other by {listed(list(itself))}."
        for kind, begin in (
            ("outputs", "They are tied to those of"),
            ("", "They are tied to the values of"),
            ("through", "They pass the depthwise filters of"),
            ("scales", "They pass the norm" if len(words["scales"]) == 1 else "They pass the norms"),
        ):
            if words[kind]:
                yield f"{begin} {listed(list(words[kind]))}."
        if joins := self._joins(classes):
            yield f"They stand beside others after {listed(joins, 3)}."

    def _ties(self, classes: Ints) -> Iterator[Tie]:
        """What was united within these classes, a tie per union."""
        for left, right, place in self.labels.unions():
            inside = (left != right) & np.isin(self.root[left], classes)
            if inside.any():
                both = np.unique(np.concatenate([left[inside], right[inside]]))
                helpers = both[both >= self.labels.atoms]
                atoms = self.labels.member_ids(both)
                yield Tie(place, frozenset([*atoms.tolist(), *(-helpers).tolist()]))

    def _joins(self, classes: Ints) -> list[str]:
        """Where these channels were put beside others."""
        found: dict[str, None] = {}
        for record in self.notes.records:
            if record.operator in _JOINS:
                joined = [axis.labels for axes in record.outputs for axis in axes if axis is not None]
                if any(0 < np.isin(self.root[labels], classes).sum() < labels.size for labels in joined):
                    found[_told((record.operator, record.where))] = None
        return list(found)

    def _group(self, group: ChannelGroup, they: str) -> Iterator[str]:
        """Who reads a group, how many of it can go, and how."""
        yield f"{they} are read by {listed([*self._readers(group)]) or 'no layer'}."
        yield f"At most {group.size - 1} of the {group.size} can go."
        if group.renormalised:
            yield from _renormalised(group)
            yield "What stays is normalised anew, and none can stand for another."
        elif group.mergeable:
            yield "One that is like another may be merged into it."
        else:
            yield "They are summed up as they are, so that none can stand for another."

    def _readers(self, group: ChannelGroup) -> Iterator[str]:
        for name, dim in group.inputs:
            each, size, layer = group.index[name, dim].shape[1], self.tensors[name].shape[dim], layer_of(name)
            if each * group.size < size:
                yield f"{layer} ({each * group.size} of its {size} inputs)"
            else:
                yield f"{layer} ({each} inputs for each)" if each > 1 else layer

    def _read(self, it: str, reads: list[int]) -> Iterator[str]:
        """Whose channels a layer reads itself."""
        if not reads:
            return
        classes = self.root[self._labels_of(reads)]
        owners = self.owner[classes]
        parts = [self.graph.groups[n] for n in dict.fromkeys(owners.tolist()) if n >= 0]
        held = int((owners < 0).sum())
        if parts:
            groups = "group" if len(parts) == 1 else "groups"
            rest = f"; {held} of its {owners.size} inputs stay" if held else ""
            yield f"{it} reads channels of {groups} {listed([repr(group.name) for group in parts])}{rest}."
        else:
            yield f"What {it.replace('It', 'it')} reads stays as it is."

    def _below(self, layer: str) -> list[str]:
        inside = dict.fromkeys(layer_of(name) for name in self.tensors if not layer or name.startswith(f"{layer}."))
        return [name for name in inside if name != layer]

    def _without_tensors(self, layer: str) -> str:
        """A module that only holds others, or one without parameters."""
        if below := self._below(layer):
            return f"{self._title(layer)} holds {len(below)} layers: {listed(below)}. Ask for one of them."
        passing: dict[str, None] = {}
        for record in self.notes.records:
            if record.where == layer:
                for axis in (axis for axes in record.inputs for axis in axes if axis is not None):
                    numbers = np.unique(self.owner[self.root[axis.labels]])
                    passing |= dict.fromkeys(repr(self.graph.groups[n].name) for n in numbers.tolist() if n >= 0)
        what = f"channels of {listed(list(passing))} pass through it" if passing else "no channels that can go pass it"
        return f"{self._title(layer)} has no parameters and makes no channels of its own; {what}."


def _renormalised(group: ChannelGroup) -> Iterator[str]:
    """Which norms, weights and averages run over these channels."""
    norms = dict.fromkeys(layer_of(name) for name, dim in group.renormalised if (name, dim) in group.scales)
    weights = dict.fromkeys(layer_of(name) for name, dim in group.renormalised if (name, dim) in group.inputs)
    if norms:
        yield f"Norms take their statistics over them ({listed([*norms])})."
    if weights:
        yield f"Weights are standardised over them ({listed([*weights])})."
    if set(group.renormalised) - {*group.scales, *group.inputs}:
        yield "Averages are taken over them."


def _counted(group: ChannelGroup, size: int) -> str:
    if size == group.size:
        return f"the {size} channels of group {group.name!r}"
    each = size // group.size
    return f"{size} channels, {each} at a time for each of the {group.size} of group {group.name!r}"


def _told(place: Place, grouped: bool = False) -> str:
    """An operator and its module; a convolution that ties channels of one layer does so by its groups."""
    operator, module = place[0].removesuffix("_"), place[1]
    operator = f"grouped {operator}" if grouped and operator.startswith("conv") else operator
    return f"{operator} in {module!r}" if module else f"{operator} in the model's own forward"


def _reached(ties: Sequence[Tie], start: Iterable[int]) -> dict[int, Tie]:
    """Every dim that hangs together with those at the start, and the tie by which it does, nearest first."""
    by_dim: dict[int, list[Tie]] = {}
    for tie in ties:
        for number in tie.dims:
            by_dim.setdefault(number, []).append(tie)
    seen, queue, reached = set(start), list(start), dict[int, Tie]()
    for number in queue:  # grows while it is read
        for tie in by_dim.get(number, ()):
            for other in tie.dims - seen:
                seen.add(other)
                queue.append(other)
                if other >= 0:
                    reached[other] = tie
    return reached
