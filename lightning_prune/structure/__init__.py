"""Which channels hang together, which of them (or which single weights) go, and the proof that it made no difference.

Works on any ``torch.nn.Module`` and knows neither penalties nor Lightning.
"""

from lightning_prune.structure.bits import Bits
from lightning_prune.structure.budget import Budget, Outcome
from lightning_prune.structure.choice import choose, choose_weights, pick, pick_weights, select
from lightning_prune.structure.custom import RuleHandle, register_rule
from lightning_prune.structure.graph import ChannelGraph, ChannelGroup
from lightning_prune.structure.plan import PruningPlan, kept_channels, signature
from lightning_prune.structure.proof import Proof, masked_state, prove
from lightning_prune.structure.rules.flow import Flow
from lightning_prune.structure.slim_file import load_slim, read_slim_header, read_slim_plan, save_slim
from lightning_prune.structure.sparsity import Plan, SparsityPlan
from lightning_prune.structure.surgery import prune_
from lightning_prune.structure.tracing import trace
from lightning_prune.structure.weights import WeightGraph, WeightGroup, weights_of

__all__ = [
    "Bits",
    "Budget",
    "ChannelGraph",
    "ChannelGroup",
    "Flow",
    "Outcome",
    "Plan",
    "Proof",
    "PruningPlan",
    "RuleHandle",
    "SparsityPlan",
    "WeightGraph",
    "WeightGroup",
    "choose",
    "choose_weights",
    "kept_channels",
    "load_slim",
    "masked_state",
    "pick",
    "pick_weights",
    "prove",
    "prune_",
    "read_slim_header",
    "read_slim_plan",
    "register_rule",
    "save_slim",
    "select",
    "signature",
    "trace",
    "weights_of",
]
