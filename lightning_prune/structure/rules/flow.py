"""A rule written down: how channels flow through an operator, in the notation of einsum with words for dims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lightning_prune.errors import ConfigurationError
from lightning_prune.structure.call import Call
from lightning_prune.structure.labels import Axes, Axis
from lightning_prune.structure.rules.registry import together

REST = "..."
STAYS = "_"
FIXED_PARTNER = "meet positions that are fixed"


class Along(NamedTuple):
    """One dim of one operand."""

    operand: str
    tensor: Tensor
    axis: Axis | None
    size: int


class Flow:
    """How channels flow through an operator: each dim of each tensor has a word, and equal words are equal channels.

    A word of several operands and of a result: combined position by position, as in a sum or a product. A word of two
    operands and of no result: multiplied and summed over, as in a linear layer. A word of one operand and of no result:
    taken together, as in a mean; such channels stay. A word of a result alone: new positions, which stay. ``_`` is a
    dim whose positions stay. ``...`` are any dims, aligned from the right; they are combined position by position.

    Args:
        inputs: name of an argument, parameter or buffer -> its dims. Tensors that are not named keep their channels;
            those that are ``None`` are left out.
        outputs: dims of the result; of each, where there are several.
        zeros: whether channels that are zero in all operands are zero in the result, which more can be built on.
        scales: operands that are the scales of a norm. Operands named ``bias`` are taken for shifts.
        sizes: attributes of a module that count channels, and which: their word.

    Raises:
        ConfigurationError: where the dims can't be read, or, in a trace, where they don't fit the tensors.

    >>> linear = Flow({"input": "... in", "weight": "out in", "bias": "out"}, "... out")
    >>> norm = Flow({"input": "n c ...", "weight": "c", "bias": "c"}, "n c ...", scales=["weight"])
    >>> linear
    Flow({'input': '... in', 'weight': 'out in', 'bias': 'out'}, '... out')
    """

    def __init__(
        self,
        inputs: Mapping[str, str],
        outputs: str | Sequence[str],
        *,
        zeros: bool = False,
        scales: Sequence[str] = (),
        sizes: Mapping[str, str] | None = None,
    ) -> None:
        self.written = dict(inputs), outputs
        if not inputs:
            raise ConfigurationError("A Flow needs the dims of at least one operand, such as {'x': 'n c ...'}.")
        self.inputs = {name: _words(dims, f"operand {name!r}") for name, dims in inputs.items()}
        self.outputs = [_words(dims, "a result") for dims in ([outputs] if isinstance(outputs, str) else outputs)]
        self.zeros, self.scales, self.sizes = zeros, tuple(scales), dict(sizes or {})
        known = {word for words in self.inputs.values() for word in words}
        if any(REST in words for words in self.outputs) and REST not in known:
            raise ConfigurationError("A result of a Flow has dims '...' that no operand has.")
        for name in self.scales:
            if name not in self.inputs:
                raise ConfigurationError(f"The scale {name!r} of a Flow must be one of its operands {_list(inputs)}.")
        for attribute, word in self.sizes.items():
            if word not in known:
                raise ConfigurationError(f"The size {attribute!r} of a Flow counts {word!r}, which no operand has.")

    def __repr__(self) -> str:
        return f"Flow({self.written[0]!r}, {self.written[1]!r})"

    def __call__(self, call: Call) -> list[Axes]:
        """The axes of the results, see :class:`Call`."""
        operands = self._operands(call)
        named = {id(tensor) for tensor in operands.values()}
        for tensor in call.inputs:
            if id(tensor) not in named:
                call.pin(call.axes(tensor), "are not named by the rule")
        along = self._along(call, operands)
        if len(call.outputs) != len(self.outputs):
            raise ConfigurationError(
                f"The rule of {call.name!r} has {len(self.outputs)} results; the operator has {len(call.outputs)}."
            )
        words = [
            _spelled(each, tensor, f"a result of {call.name!r}")
            for each, tensor in zip(self.outputs, call.outputs, strict=True)
        ]
        made = {word for each in words for word in each if word != STAYS}
        found = self._merged(call, along, made)
        return [
            tuple(_of_size(call, found.get(word), word, size) for word, size in zip(each, tensor.shape, strict=True))
            for each, tensor in zip(words, call.outputs, strict=True)
        ]

    def _operands(self, call: Call) -> dict[str, Tensor]:
        operands = {}
        for name in self.inputs:
            value = call.named(name)
            if isinstance(value, Tensor):
                operands[name] = value
            elif value is not None:
                kind = type(value).__name__
                raise ConfigurationError(f"The rule of {call.name!r} has dims for {name!r}, which is a {kind}.")
        return operands

    def _along(self, call: Call, operands: Mapping[str, Tensor]) -> dict[str, list[Along]]:
        """Word -> the dims that it names."""
        along: dict[str, list[Along]] = {}
        for name, tensor in operands.items():
            words = _spelled(self.inputs[name], tensor, f"{name!r} of {call.name!r}")
            for word, axis, size in zip(words, call.axes(tensor), tensor.shape, strict=True):
                along.setdefault(word, []).append(Along(name, tensor, axis, size))
        for dim in along.pop(STAYS, ()):
            call.pin(dim.axis, "stay, as its rule says")
        return along

    def _merged(self, call: Call, along: Mapping[str, list[Along]], made: set[str]) -> dict[str, Axis | None]:
        """Unite what a word names, and hand on what goes into results."""
        found: dict[str, Axis | None] = {}
        for word, dims in along.items():
            dims = _unstretched(call, word, dims)
            self._note(call, word, dims, word in made)
            axes = [dim.axis for dim in dims]
            vanishing = [axis is not None and axis.vanishes for axis in axes]
            if word in made:
                found[word] = together(call, axes, self.zeros and all(vanishing), FIXED_PARTNER)
            elif len(dims) == 1 or not any(vanishing):
                for axis in axes:
                    call.pin(axis, "are taken together")
            elif (axis := together(call, axes, True, FIXED_PARTNER)) is not None:
                if all(call.known.from_data(dim.tensor) for dim in dims):
                    call.labels.mark(axis.labels, "bound")
        for attribute, word in self.sizes.items():
            call.known.note_size(attribute, next((dim.axis for dim in along.get(word, ()) if dim.axis), None))
        return found

    def _note(self, call: Call, word: str, dims: Sequence[Along], made: bool) -> None:
        """What a parameter's dim is to its group."""
        brought = any(call.known.from_data(dim.tensor) for dim in dims)
        matrix = any(dim.tensor.dim() > 1 for dim in dims if not call.known.from_data(dim.tensor))
        for dim in dims:
            if dim.axis is None or call.known.from_data(dim.tensor):
                continue
            if dim.operand.rpartition(".")[2] == "bias":
                call.role(dim.axis.labels, "shifts")
            elif dim.operand in self.scales:
                call.role(dim.axis.labels, "scales")
            elif not made:
                call.role(dim.axis.labels, "inputs")
            elif brought and dim.tensor.dim() > 1:
                call.role(dim.axis.labels, "through")
            elif not brought and (dim.tensor.dim() > 1 or not matrix):
                call.role(dim.axis.labels, "outputs")


def _words(dims: str, what: str) -> tuple[str, ...]:
    if not isinstance(dims, str):
        raise ConfigurationError(f"The dims of {what} must be a text such as 'n c ...', not {dims!r}.")
    words = tuple(dims.split())
    for word in words:
        if word not in (REST, STAYS) and not word.isidentifier():
            raise ConfigurationError(f"The dims of {what}, {dims!r}, hold {word!r}, which is neither a word nor '...'.")
        if word != STAYS and words.count(word) > 1:
            raise ConfigurationError(f"The dims of {what}, {dims!r}, hold {word!r} twice.")
    return words


def _spelled(words: tuple[str, ...], tensor: Tensor, what: str) -> tuple[str, ...]:
    """The words of a tensor's dims, those of ``...`` numbered from the right."""
    more = tensor.dim() - len(words) + (REST in words)
    if more < 0 or (more and REST not in words):
        raise ConfigurationError(
            f"The rule names {len(words)} dims ({' '.join(words)}) for {what}, which has {tensor.dim()}."
        )
    rest = tuple(f"{REST}{k}" for k in reversed(range(more)))
    at = words.index(REST) if REST in words else len(words)
    return (*words[:at], *rest, *words[at + 1 :])


def _unstretched(call: Call, word: str, dims: list[Along]) -> list[Along]:
    """Without dims of size one beside longer ones."""
    longest = max(dim.size for dim in dims)
    for dim in dims:
        if dim.size not in (1, longest):
            raise ConfigurationError(
                f"The rule of {call.name!r} gives one word, {word!r}, to dims of {dim.size} and of {longest} positions."
            )
        if dim.size != longest:
            call.pin(dim.axis, "are stretched over another dim")
    return [dim for dim in dims if dim.size == longest]


def _of_size(call: Call, axis: Axis | None, word: str, size: int) -> Axis | None:
    if axis is not None and axis.labels.size != size:
        raise ConfigurationError(
            f"The rule of {call.name!r} foretells {axis.labels.size} positions along {word!r} of its result; "
            f"there are {size}."
        )
    return axis


def _list(names: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, names))
