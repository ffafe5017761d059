"""Which channels hang together, which go, and the proof that it made no difference.

Works on any ``torch.nn.Module`` and knows neither penalties nor Lightning.
"""

from lightning_prune.structure.choose import choose, pick, select
from lightning_prune.structure.graph import ChannelGraph, ChannelGroup, trace
from lightning_prune.structure.plan import PruningPlan, kept_channels, signature
from lightning_prune.structure.surgery import prune_

__all__ = [
    "ChannelGraph",
    "ChannelGroup",
    "PruningPlan",
    "choose",
    "kept_channels",
    "pick",
    "prune_",
    "select",
    "signature",
    "trace",
]
