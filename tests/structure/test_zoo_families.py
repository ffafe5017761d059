"""The families beyond the first zoo: exact against the judge, and at most as large as they have been."""

from __future__ import annotations

import os
import random

import pytest
import torch

from lightning_prune.structure import choose, pick, prune_, trace
from tests.structure.oracle import judge, parameter_count
from tests.structure.zoo import BEYOND, EVERYTHING, FAMILIES

FULL = os.environ.get("LIGHTNING_PRUNE_FULL") == "1"

#: One member of every family that has a small and quick one; all others belong to the full test.
QUICK = {
    "timm/convnextv2_atto",
    "timm/cs3darknet_focus_s",
    "timm/cspnext_tiny",
    "timm/dla46x_c",
    "timm/dpn48b",
    "timm/edgenext_xx_small",
    "timm/efficientvit_b0",
    "timm/fasternet_t0",
    "timm/fastvit_t8",
    "timm/ghostnet_100",
    "timm/hgnetv2_b0",
    "timm/hrnet_w18_small",
    "timm/inception_next_atto",
    "timm/lcnetv2_small",
    "timm/mixnet_s",
    "timm/mobilenetv4_conv_small",
    "timm/mobileone_s0",
    "timm/mobilevit_xxs",
    "timm/pvt_v2_b0",
    "timm/regnetx_002",
    "timm/repghostnet_050",
    "timm/repvit_m1",
    "timm/res2net50_26w_4s",
    "timm/resnest14d",
    "timm/rexnet_100",
    "timm/shvit_s1",
    "timm/skresnet18",
    "timm/starnet_s050",
    "timm/test_byobnet",
    "timm/test_convnext",
    "timm/test_efficientnet",
    "timm/test_mambaout",
    "timm/test_nfnet",
    "timm/test_resnet",
    "timm/test_vit",
    "timm/ese_vovnet19b_slim_dw",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "mc3_18",
    "r2plus1d_18",
    "ssdlite320_mobilenet_v3_large",
    "swin3d_t",
    "mnasnet0_5",
    "shufflenet_v2_x0_5",
}


@pytest.mark.parametrize("name", [name for name in BEYOND if FULL or name in QUICK])
def test_family(name: str) -> None:
    """Half of every group within the ceiling; another ratio for each group and exact."""
    entry = BEYOND[name]
    torch.manual_seed(0)
    model = entry.build().eval()
    graph = trace(model, entry.inputs())
    assert all(len(reason.split()) >= 3 for reason in graph.pinned.values())
    chance = random.Random(1)
    ratios = {group.name: chance.uniform(0.1, 0.9) for group in graph.groups}
    plan = graph.plan(pick(graph, 0.5, ratios=ratios, score="random", scope="all", renormalise=True))
    verdict = judge(lambda: entry.build().eval(), lambda net: prune_(net, plan), entry.inputs(1), modes=(False,))
    before = parameter_count(model)
    prune_(model, choose(graph, 0.5, scope="all"))
    assert parameter_count(model) / before <= entry.ceiling
    assert (verdict.left < 1) == (entry.ceiling < 1)


def test_the_families_are_whole() -> None:
    assert len(FAMILIES) >= 125
    assert len(EVERYTHING) >= 189
    assert set(BEYOND) >= QUICK
