"""How labels flow through operators: one small rule per operator, in rooms by kind."""

from lightning_prune.structure.rules import contraction, factory, layout, normalisation, positions, reduction
from lightning_prune.structure.rules.elementwise import pointwise
from lightning_prune.structure.rules.registry import RULES, rule

__all__ = ["RULES", "contraction", "factory", "layout", "normalisation", "pointwise", "positions", "reduction", "rule"]
