"""How labels flow through operators: one small rule per operator, in rooms by kind."""

from lightning_prune.structure.call import Call
from lightning_prune.structure.labels import Axis
from lightning_prune.structure.rules import contraction, factory, layout, normalisation, positions, reduction
from lightning_prune.structure.rules.elementwise import pointwise
from lightning_prune.structure.rules.flow import Flow
from lightning_prune.structure.rules.registry import RULES, contract, couple, rule, together

__all__ = [
    "RULES",
    "Axis",
    "Call",
    "Flow",
    "contract",
    "contraction",
    "couple",
    "factory",
    "layout",
    "normalisation",
    "pointwise",
    "positions",
    "reduction",
    "rule",
    "together",
]
