"""What a method counts in, channels or single weights: who takes part, which of it goes, where that lies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, final

import torch

from lightning_prune import structure
from lightning_prune.callbacks.joining import taking_part
from lightning_prune.callbacks.targets import Target, aim
from lightning_prune.door import check
from lightning_prune.errors import ConfigurationError
from lightning_prune.structure.bits import mask_of
from lightning_prune.structure.choice import smallest, value_of
from lightning_prune.structure.plan import named_tensors

if TYPE_CHECKING:
    from lightning_prune.callbacks.questions import Method

Numbers = Mapping[str, Sequence[int]]
"""Group name to numbers of channels, or to positions in the flattened weight."""


class Grain(ABC):
    """One granularity, and the groups that take part in it."""

    unit: ClassVar[str]

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        """Name and size of every group that takes part; none before :meth:`join`."""

    @property
    def channels(self) -> dict[str, structure.ChannelGroup]:
        """The channel groups that take part, by name."""
        return {}

    @abstractmethod
    def join(self, method: Method, graph: structure.ChannelGraph, label: str) -> None:
        """Find out which groups the method's arguments mean.

        Raises:
            ConfigurationError: there are none.
        """

    @abstractmethod
    def aim(self, method: Method, numbers: Numbers) -> list[Target]:
        """One target per parameter that has any of the numbers in it."""

    @abstractmethod
    def smallest(self, method: Method, graph: structure.ChannelGraph, score: str, share: float, seed: int) -> Numbers:
        """What has the least score in every group; see :meth:`Method.smallest`."""


@final
class Channels(Grain):
    """Channels, with everything that hangs together with them."""

    unit = "channels"

    def __init__(self) -> None:
        super().__init__()
        self._groups: dict[str, structure.ChannelGroup] = {}

    @property
    def channels(self) -> dict[str, structure.ChannelGroup]:
        """See :class:`Grain`."""
        return self._groups

    def join(self, method: Method, graph: structure.ChannelGraph, label: str) -> None:
        """See :class:`Grain`."""
        self._groups = taking_part(method, graph, label)
        self.sizes = {name: group.size for name, group in self._groups.items()}

    def aim(self, method: Method, numbers: Numbers) -> list[Target]:
        """See :class:`Grain`."""
        return aim(numbers, self._groups, method.reach, method._parameters)

    def smallest(self, method: Method, graph: structure.ChannelGraph, score: str, share: float, seed: int) -> Numbers:
        """See :class:`Grain`."""
        generator, tensors = torch.Generator().manual_seed(seed), named_tensors(graph.model)
        values = {name: value_of(group, tensors, score, generator) for name, group in self._groups.items()}
        shares = {name: method._shares[name] * share for name in values}
        return smallest(self._groups.values(), shares, values, round_to=method.multiple)


@final
class Weights(Grain):
    """Single weights, each by itself."""

    unit = "weights"

    def __init__(self) -> None:
        super().__init__()
        self._graph: structure.WeightGraph | None = None
        self._groups: dict[str, structure.WeightGroup] = {}

    def join(self, method: Method, graph: structure.ChannelGraph, label: str) -> None:
        """See :class:`Grain`."""
        self._graph = layers = weight_graph(graph)
        # where no ratio is given the method decides how much goes, not whether
        ratio = 0.5 if method.ratio is None else method.ratio
        shares = structure.select(layers, ratio, ratios=method.ratios, ignore=method.ignore, scope="all")
        self._groups = {group.name: group for group in layers.groups if shares[group.name] > 0 and group.size > 1}
        if not self._groups:
            known = ", ".join(group.name for group in layers.groups[:8]) or "none"
            raise ConfigurationError(f"{label} finds no layer whose weights it is to prune; trainable ones: {known}.")
        self.sizes = {name: group.size for name, group in self._groups.items()}

    def aim(self, method: Method, numbers: Numbers) -> list[Target]:
        """See :class:`Grain`."""
        targets = []
        for name, positions in numbers.items():
            parameter = method._parameters[self._groups[name].parameter]
            mask = mask_of(positions, parameter.numel(), parameter.device).view(parameter.shape)
            targets.append(Target(parameter, {name: torch.empty_like(parameter, requires_grad=False).copy_(mask)}))
        return targets

    def smallest(self, method: Method, graph: structure.ChannelGraph, score: str, share: float, seed: int) -> Numbers:
        """See :class:`Grain`."""
        # as they were in the beginning: a layer that has been frozen since takes part all the same
        layers, ratio = self._graph or weight_graph(graph), method.ratio or 0.5
        ratios = {pattern: value * share for pattern, value in (method.ratios or {}).items()}
        return structure.pick_weights(
            layers, ratio * share, score=score, ratios=ratios, ignore=method.ignore, seed=seed
        )


GRAINS: dict[str, type[Channels | Weights]] = {"channel": Channels, "weight": Weights}
"""By the value of a method's argument ``granularity``."""


def refuse_for_weights(granularity: str, argument: str, value: object, usual: object) -> None:
    """Refuse an argument that only channels give a meaning, unless it has its usual value."""
    message = f"{argument}={value!r} has no meaning with granularity='weight'; leave it out."
    check(granularity != "weight" or value == usual, message)


def weight_graph(graph: structure.ChannelGraph) -> structure.WeightGraph:
    """The single weights of a traced model."""
    return structure.weights_of(graph.model, graph.root)
