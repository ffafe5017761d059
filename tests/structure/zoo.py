"""The networks that the engine must cut exactly: torchvision's and timm's families, small inputs, no downloads."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models import detection, optical_flow, segmentation, video

from tests.structure.ceilings import CEILINGS


@dataclasses.dataclass(frozen=True)
class Entry:
    """One network.

    Args:
        build: makes it, without pretrained weights.
        ceiling: largest fraction of parameters that may be left at ratio 0.5, scope "all".
        size: side of the square input, pixels.
        heavy: tested with fewer seeds unless the whole test is asked for.
        frames: length of a film; 0 for pictures.
        fixed: whether no other size will do.
        training: whether it is tried in training mode, where it has more outputs.
        kind: ``"images"``: a batch of two; ``"list"``: one picture, in a list; ``"pair"``: two such batches.
    """

    build: Callable[[], nn.Module]
    ceiling: float = 0.5
    size: int = 64
    heavy: bool = False
    frames: int = 0
    fixed: bool = False
    training: bool = False
    kind: str = "images"

    def inputs(self, seed: int = 0) -> Any:
        """A batch of two."""
        generator = torch.Generator().manual_seed(seed)
        shape = (2, 3, *([self.frames] if self.frames else []), self.size, self.size)
        first = torch.randn(shape, generator=generator)
        if self.kind == "list":
            return (list(first[:1].sigmoid()),)
        return (first, torch.randn(shape, generator=generator)) if self.kind == "pair" else first


def _net(name: str, **options: Any) -> Callable[[], nn.Module]:
    return functools.partial(getattr(models, name), weights=None, **options)


def _segmentation(name: str, **options: Any) -> Callable[[], nn.Module]:
    return functools.partial(getattr(segmentation, name), weights=None, weights_backbone=None, **options)


def _detection(name: str, **options: Any) -> Callable[[], nn.Module]:
    return functools.partial(getattr(detection, name), weights=None, weights_backbone=None, **options)


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: importlib.import_module("timm").create_model(name, **options)


CONVOLUTIONAL = {
    "resnet18": Entry(_net("resnet18")),
    "resnet50": Entry(_net("resnet50"), 0.31),
    "resnext50_32x4d": Entry(_net("resnext50_32x4d")),
    "wide_resnet50_2": Entry(_net("wide_resnet50_2"), heavy=True),
    "vgg11": Entry(_net("vgg11", init_weights=False), heavy=True),
    "vgg11_bn": Entry(_net("vgg11_bn", init_weights=False), 0.31, heavy=True),
    "alexnet": Entry(_net("alexnet")),
    "squeezenet1_0": Entry(_net("squeezenet1_0")),
    "squeezenet1_1": Entry(_net("squeezenet1_1")),
    "densenet121": Entry(_net("densenet121"), 0.31),
    "googlenet": Entry(_net("googlenet", init_weights=False, aux_logits=True), training=True),
    "inception_v3": Entry(
        _net("inception_v3", init_weights=False, aux_logits=True), training=True, size=299, heavy=True
    ),
    "mobilenet_v2": Entry(_net("mobilenet_v2"), 0.37),
    "mobilenet_v3_small": Entry(_net("mobilenet_v3_small")),
    "mobilenet_v3_large": Entry(_net("mobilenet_v3_large")),
    "mnasnet1_0": Entry(_net("mnasnet1_0")),
    "shufflenet_v2_x1_0": Entry(_net("shufflenet_v2_x1_0"), 0.44),
    "efficientnet_b0": Entry(_net("efficientnet_b0")),
    "efficientnet_v2_s": Entry(_net("efficientnet_v2_s"), heavy=True),
    "regnet_x_400mf": Entry(_net("regnet_x_400mf")),
    "regnet_y_400mf": Entry(_net("regnet_y_400mf")),
    "convnext_tiny": Entry(_net("convnext_tiny"), 0.31),
    "deeplabv3_resnet50": Entry(_segmentation("deeplabv3_resnet50", aux_loss=True), heavy=True),
    "fcn_resnet50": Entry(_segmentation("fcn_resnet50", aux_loss=True), heavy=True),
    "lraspp_mobilenet_v3_large": Entry(_segmentation("lraspp_mobilenet_v3_large")),
}

ATTENTION = {
    "vit_b_16": Entry(_net("vit_b_16", image_size=64), 0.27, heavy=True, fixed=True),
    "swin_t": Entry(_net("swin_t"), 0.27),
    "swin_v2_t": Entry(_net("swin_v2_t"), 0.27),
    "maxvit_t": Entry(_net("maxvit_t", input_size=(224, 224)), 0.27, size=224, heavy=True),
}

SIZES = {
    name: Entry(_net(name, **options), fixed="image_size" in options)
    for name, options in {
        "resnet34": {},
        "resnet101": {},
        "resnext101_32x8d": {},
        "vgg16_bn": {"init_weights": False},
        "densenet169": {},
        "mnasnet0_5": {},
        "shufflenet_v2_x0_5": {},
        "shufflenet_v2_x1_5": {},
        "shufflenet_v2_x2_0": {},
        "efficientnet_b1": {},
        "efficientnet_b4": {},
        "regnet_y_1_6gf": {},
        "regnet_x_3_2gf": {},
        "convnext_small": {},
        "vit_b_32": {"image_size": 64},
        "swin_s": {},
        "swin_v2_s": {},
    }.items()
}

SMALL = {"min_size": 128, "max_size": 128}
DETECTION = {
    "fasterrcnn_resnet50_fpn": Entry(_detection("fasterrcnn_resnet50_fpn", box_score_thresh=0.0, **SMALL), size=128),
    "fasterrcnn_mobilenet_v3_large_320_fpn": Entry(
        _detection("fasterrcnn_mobilenet_v3_large_320_fpn", box_score_thresh=0.0, min_size=192, max_size=192), size=192
    ),
    "maskrcnn_resnet50_fpn": Entry(_detection("maskrcnn_resnet50_fpn", box_score_thresh=0.0, **SMALL), size=128),
    "keypointrcnn_resnet50_fpn": Entry(
        _detection("keypointrcnn_resnet50_fpn", box_score_thresh=0.0, **SMALL), size=128
    ),
    "retinanet_resnet50_fpn": Entry(_detection("retinanet_resnet50_fpn", score_thresh=0.0, **SMALL), size=128),
    "retinanet_resnet50_fpn_v2": Entry(
        _detection("retinanet_resnet50_fpn_v2", score_thresh=0.0, min_size=192, max_size=192), size=192
    ),
    "fcos_resnet50_fpn": Entry(_detection("fcos_resnet50_fpn", score_thresh=0.0, min_size=192, max_size=192), size=192),
    "ssd300_vgg16": Entry(_detection("ssd300_vgg16", score_thresh=0.0), size=300),
    "ssdlite320_mobilenet_v3_large": Entry(_detection("ssdlite320_mobilenet_v3_large", score_thresh=0.0), size=320),
}
DETECTION = {name: dataclasses.replace(entry, kind="list") for name, entry in DETECTION.items()}


def _video(name: str, **options: Any) -> Callable[[], nn.Module]:
    return functools.partial(getattr(video, name), weights=None, **options)


FILMS = {
    "r3d_18": Entry(_video("r3d_18"), frames=4, size=32),
    "mc3_18": Entry(_video("mc3_18"), frames=4, size=32),
    "r2plus1d_18": Entry(_video("r2plus1d_18"), frames=4, size=32),
    "s3d": Entry(_video("s3d"), frames=16, size=224),
    "mvit_v1_b": Entry(_video("mvit_v1_b"), frames=16, size=224),
    "mvit_v2_s": Entry(_video("mvit_v2_s"), frames=16, size=224),
    "swin3d_t": Entry(_video("swin3d_t"), frames=4, size=64),
    "raft_small": Entry(functools.partial(optical_flow.raft_small, weights=None), size=128, kind="pair"),
    "raft_large": Entry(functools.partial(optical_flow.raft_large, weights=None), size=128, kind="pair"),
}

#: Side of the input, pixels -> members of timm's families, small ones.
TIMM = {
    64: (
        "convformer_s18 convmixer_768_32 convnextv2_atto cpubone_nano cs3darknet_focus_s cspdarknet53 cspnext_tiny "
        "cspresnet50 davit_tiny densenet121 dla34 dla46x_c dm_nfnet_f0 dpn48b ecaresnet26t edgenext_xx_small "
        "efficientnet_lite0 efficientvit_b0 ese_vovnet19b_slim_dw fasternet_t0 fastvit_t8 focalnet_tiny_srf "
        "gcresnet33ts ghostnet_100 ghostnetv2_100 ghostnetv3_100 hardcorenas_b hgnetv2_b0 hrnet_w18_small "
        "inception_next_atto lcnetv2_small legacy_seresnet18 lowformer_b0 mixnet_s mobilenetv3_small_050 "
        "mobilenetv4_conv_small mobilenetv4_hybrid_medium mobileone_s0 mobilevit_xxs mobilevitv2_050 nextvit_small "
        "nf_resnet50 poolformerv2_s12 pvt_v2_b0 rdnet_tiny regnetx_002 regnetz_b16 repghostnet_050 repvgg_a0 "
        "repvit_m1 res2net50_26w_4s res2net50d res2next50 resnest14d resnest50d resnetv2_18 resnetv2_50x1_bit "
        "rexnet_100 selecsls42 seresnext26d_32x4d shvit_s1 skresnet18 starnet_s050 test_byobnet test_convnext "
        "test_efficientnet test_mambaout test_nfnet test_resnet tf_efficientnetv2_b0 tresnet_m"
    ),
    160: ("test_coatnet test_vit test_vit_relpos"),
    224: (
        "beit_base_patch16_224 cait_xxs24_224 coat_tiny convit_tiny deit3_small_patch16_224 "
        "deit_tiny_distilled_patch16_224 efficientformer_l1 efficientformerv2_s0 efficientvim_m1 efficientvit_m0 "
        "eva02_tiny_patch14_224 gcvit_xxtiny gmlp_ti16_224 hiera_tiny_224 iformer_t levit_128s mixer_s32_224 "
        "mvitv2_tiny nest_tiny pit_ti_224 resmlp_12_224 samvit_base_patch16_224 sequencer2d_s swiftformer_xs "
        "swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 twins_svt_small "
        "visformer_tiny vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 xcit_nano_12_p8_224"
    ),
    240: ("crossvit_tiny_240"),
    256: (
        "botnet26t_256 halonet_h1 lambda_resnet26t maxxvit_rmlp_nano_rw_256 mobilenetv5_base swinv2_tiny_window8_256 "
        "vit_tiny_patch16_dinov3_qkvb"
    ),
    299: ("inception_resnet_v2 inception_v4 legacy_xception xception41p"),
    331: ("nasnetalarge pnasnet5large"),
    384: ("naflexvit_base_patch16_parfac_gap"),
    512: ("csatv2"),
}

ZOO = {**CONVOLUTIONAL, **ATTENTION}
FAMILIES = {
    f"timm/{name}": Entry(_timm(name), size=size, fixed=size != 64)
    for size, names in TIMM.items()
    for name in names.split()
}
BEYOND = {
    name: dataclasses.replace(entry, ceiling=CEILINGS[name])
    for name, entry in {**SIZES, **DETECTION, **FILMS, **FAMILIES}.items()
}
EVERYTHING = {**ZOO, **BEYOND}
CLASSIFIERS = {name: entry for name, entry in EVERYTHING.items() if name not in {**DETECTION, **FILMS}}
