"""Which single weights of a model can go: those of its convolutions, linear layers and their relatives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from lightning_prune.errors import PlanError
from lightning_prune.structure.bits import Bits
from lightning_prune.structure.plan import named_tensors, plain_name, signature
from lightning_prune.structure.sparsity import SparsityPlan, label_of

_TABLES_AND_NORMS = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.PReLU,
    nn.RMSNorm,
    nn.modules.batchnorm._NormBase,
)
_RECURRENT = ("weight_ih", "weight_hh", "weight_hr")


@dataclass(frozen=True)
class WeightGroup:
    """The single weights of one parameter: each can go by itself.

    Args:
        name: of the layer, or of the parameter where that isn't the layer's ``weight``.
        parameter: name of the parameter; of a tied one the first.
        size: number of weights.
        producers: every name by which patterns may call it.
    """

    name: str
    parameter: str
    size: int
    producers: tuple[str, ...]
    renormalised: bool = field(default=False, init=False)


@dataclass(frozen=True, eq=False)
class WeightGraph:
    """The counterpart of :class:`~lightning_prune.structure.ChannelGraph`: nothing hangs together here.

    Args:
        model: as it is.
        groups: one per parameter whose weights can go.
        root: name of the model inside a larger module, where it is part of one: patterns may begin with it.
    """

    model: nn.Module
    groups: tuple[WeightGroup, ...]
    root: str = ""
    pinned: Mapping[str, str] = field(default_factory=dict, init=False)

    def plan(self, removed: Mapping[str, Bits]) -> SparsityPlan:
        """The plan by which these weights (group name -> positions in the flattened parameter) become zero.

        Raises:
            PlanError: for an unknown group, or one that would lose all its weights.
        """
        # a layer may have been frozen since its weights were picked
        known, tensors = {label_of(name): name for name in _names_of_weights(self.model)}, named_tensors(self.model)
        for name in removed:
            if name not in known:
                raise PlanError(f"There is no layer {name!r} with weights to mask; there are {', '.join(known)}.")
        kept = {known[name]: gone.others() for name, gone in removed.items()}
        return SparsityPlan(kept, {name: tuple(tensors[name].shape) for name in kept}, signature(self.model))


def weights_of(model: nn.Module, root: str = "") -> WeightGraph:
    """The parameters of at least two dims that a model's layers multiply with.

    Tied parameters count once. Embedding tables, norms, frozen parameters and the parts of a parametrized weight
    don't belong to them.

    Args:
        model: any module; it needs no input.
        root: see :class:`WeightGraph`.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.LayerNorm([2, 2]))
    >>> [(group.name, group.size) for group in weights_of(net).groups]
    [('0', 18)]
    """
    tensors = named_tensors(model)
    groups = [
        WeightGroup(label_of(name), name, tensors[name].numel(), tuple(called))
        for name, called in _names_of_weights(model).items()
        if tensors[name].requires_grad
    ]
    return WeightGraph(model, tuple(groups), root)


def _names_of_weights(model: nn.Module) -> dict[str, list[str]]:
    """Parameters that layers multiply with, by their first names: every name by which patterns may call them."""
    first = {id(tensor): name for name, tensor in named_tensors(model).items()}
    names: dict[str, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _TABLES_AND_NORMS):
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() >= 2 and _is_weight(key):
                own = plain_name(f"{path}.{key}" if path else key)
                names.setdefault(first[id(parameter)], []).append(label_of(own))
    return names


def _is_weight(key: str) -> bool:
    return key == "weight" or key.endswith("_weight") or key.startswith(_RECURRENT)
