"""FPN builder, ResNets of any width and timm backbones: strides, channels, names, refusals."""

import sys
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import Backbone, build_backbone
from torch import nn

import kd_det.modeling  # noqa: F401
from kd_det.config import add_kd_config
from kd_det.modeling.backbones.timm_backbone import TimmBackbone
from kd_det.modeling.norms import GroupNorm

FROM_RES2 = ["res2", "res3", "res4", "res5"]
FROM_RES3 = FROM_RES2[1:]


def make_cfg(*opts: Any) -> CfgNode:
    """A narrow R18-FPN; opts override."""
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.merge_from_list(
        [
            *["MODEL.BACKBONE.NAME", "build_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 0],
            *["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.STEM_OUT_CHANNELS", 16],
            *["MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.RESNETS.NORM", "BN"],
            *["MODEL.RESNETS.OUT_FEATURES", FROM_RES2, "MODEL.FPN.OUT_CHANNELS", 8],
            *["MODEL.FPN.IN_FEATURES", FROM_RES2, *opts],
        ]
    )
    return cfg


def make_backbone(*opts: Any) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(make_cfg(*opts)).eval()


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def assert_announced_shapes(backbone: Backbone) -> None:
    """Run it on 96x64 and compare with what `output_shape` promises."""
    with torch.no_grad():
        maps = backbone(torch.rand(2, 3, 96, 64))
    assert list(maps) == list(backbone.output_shape())
    for name, shape in backbone.output_shape().items():
        height, width = -(-96 // shape.stride), -(-64 // shape.stride)
        assert maps[name].shape == (2, shape.channels, height, width), name


@pytest.mark.parametrize(
    ("in_features", "top_block", "levels"),
    [
        (FROM_RES2, "p6p7_c5", "p2 p3 p4 p5 p6 p7"),
        (FROM_RES3, "p6p7_p5", "p3 p4 p5 p6 p7"),
        (FROM_RES2, "p6_c5", "p2 p3 p4 p5 p6"),
        (FROM_RES2, "maxpool", "p2 p3 p4 p5 p6"),
        (FROM_RES3, "none", "p3 p4 p5"),
        (["res2", "res3"], "none", "p2 p3"),
    ],
)
def test_levels_follow_the_inputs_and_the_top_block(
    in_features: list[str], top_block: str, levels: str
) -> None:
    backbone = make_backbone("MODEL.FPN.IN_FEATURES", in_features, "MODEL.FPN.TOP_BLOCK", top_block)
    strides = {name: shape.stride for name, shape in backbone.output_shape().items()}
    assert strides == {name: 2 ** int(name[1]) for name in levels.split()}
    assert_announced_shapes(backbone)


@pytest.mark.parametrize(
    ("top_block", "stock"),
    [("maxpool", "build_resnet_fpn_backbone"), ("p6p7_c5", "build_retinanet_resnet_fpn_backbone")],
)
def test_equals_detectron2s_builder_where_that_one_works(top_block: str, stock: str) -> None:
    opts = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 64, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    opts += ["MODEL.FPN.TOP_BLOCK", top_block]
    ours = make_backbone(*opts).state_dict()
    expected = make_backbone(*opts, "MODEL.BACKBONE.NAME", stock).state_dict()
    assert list(ours) == list(expected)
    # Same seed, same order of initialisation: even the random weights agree.
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_p6_alone_carries_the_names_of_p6_and_p7() -> None:
    both = shapes_of(make_backbone("MODEL.FPN.TOP_BLOCK", "p6p7_c5"))
    alone = shapes_of(make_backbone("MODEL.FPN.TOP_BLOCK", "p6_c5"))
    assert alone.items() < both.items()
    assert both.keys() - alone.keys() == {"top_block.p7.weight", "top_block.p7.bias"}
    assert alone["top_block.p6.weight"] == (8, 256, 3, 3)


@pytest.mark.parametrize(("top_block", "source"), [("p6p7_c5", "c5"), ("p6p7_p5", "p5")])
def test_p6_reads_the_map_its_name_says(top_block: str, source: str) -> None:
    backbone = make_backbone("MODEL.FPN.TOP_BLOCK", top_block)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        maps = backbone(image)
        inputs = {"c5": backbone.bottom_up(image)["res5"], "p5": maps["p5"]}
        p6 = backbone.top_block.p6(inputs[source])
        torch.testing.assert_close(maps["p6"], p6)
        torch.testing.assert_close(maps["p7"], backbone.top_block.p7(p6.relu()))


@pytest.mark.parametrize("depth", [18, 34])
def test_narrow_resnet_is_the_stock_one_with_fewer_channels(depth: int) -> None:
    stock = [64, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.DEPTH", depth]
    half = [32, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.RESNETS.DEPTH", depth]
    key = "MODEL.RESNETS.STEM_OUT_CHANNELS"
    wide = shapes_of(make_backbone(key, *stock).bottom_up)
    narrow = shapes_of(make_backbone(key, *half).bottom_up)
    assert narrow == {
        name: tuple(d // 2 if d % 64 == 0 else d for d in shape) for name, shape in wide.items()
    }


def test_narrow_resnet_computes_what_the_stock_one_computes() -> None:
    """Strides and shortcuts agree: zeros in half of a stock net's channels change nothing."""
    key = "MODEL.RESNETS.STEM_OUT_CHANNELS"
    narrow = make_backbone(key, 32).bottom_up
    stock = make_backbone(key, 64, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64).bottom_up
    state = {name: torch.zeros_like(value) for name, value in stock.state_dict().items()}
    for name, value in narrow.state_dict().items():
        state[name][tuple(slice(d) for d in value.shape)] = value
        if name.endswith("running_var"):
            state[name][len(value) :] = 1
    stock.load_state_dict(state)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        wide_maps, maps = stock(image), narrow(image)
    for name, value in maps.items():
        torch.testing.assert_close(wide_maps[name][:, : value.shape[1]], value)


def test_narrow_resnet_freezes_and_norms_as_told() -> None:
    net = make_backbone("MODEL.BACKBONE.FREEZE_AT", 2).bottom_up
    trained = {name.split(".")[0] for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {"res3", "res4", "res5"}
    assert isinstance(net.res2[0].conv1.norm, FrozenBatchNorm2d)
    assert isinstance(net.res3[0].conv1.norm, nn.BatchNorm2d)
    grouped = make_backbone("MODEL.RESNETS.NORM", "GN").bottom_up
    assert isinstance(grouped.stem.conv1.norm, GroupNorm)
    assert grouped.stem.conv1.norm.num_groups == 8  # two channels each


def test_narrow_bottleneck_net() -> None:
    backbone = make_backbone(
        *["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64],
        *["MODEL.RESNETS.WIDTH_PER_GROUP", 16],
    )
    channels = [shape.channels for shape in backbone.bottom_up.output_shape().values()]
    assert channels == [64, 128, 256, 512]
    assert_announced_shapes(backbone)


def test_timm_backbone_under_the_fpn() -> None:
    backbone = make_backbone("MODEL.FPN.BOTTOM_UP", "timm", "MODEL.FPN.TOP_BLOCK", "p6_c5")
    levels = {k: (s.channels, s.stride) for k, s in backbone.bottom_up.output_shape().items()}
    # MobileNetV2 (CVPR 2018), table 2.
    assert levels == {"res2": (24, 4), "res3": (32, 8), "res4": (96, 16), "res5": (320, 32)}
    assert_announced_shapes(backbone)
    assert_announced_shapes(backbone.bottom_up)
    assert all(key.startswith("body.") for key in backbone.bottom_up.state_dict())


def test_timm_backbone_whose_maps_have_their_channels_at_the_end() -> None:
    words = ["MODEL.FPN.BOTTOM_UP", "timm", "MODEL.TIMM.NAME", "test_mambaout"]
    backbone = make_backbone(*words, "MODEL.FPN.TOP_BLOCK", "p6_c5")
    assert_announced_shapes(backbone.bottom_up)
    assert_announced_shapes(backbone)


@pytest.mark.parametrize("freeze_bn", [False, True])
def test_timm_backbone_freezes_as_told(freeze_bn: bool) -> None:
    """FREEZE_AT 2 stops stem and res2, weights and statistics; FREEZE_BN all statistics."""
    opts = ["MODEL.FPN.BOTTOM_UP", "timm", "MODEL.BACKBONE.FREEZE_AT", 2]
    net = make_backbone(*opts, "MODEL.TIMM.FREEZE_BN", freeze_bn).bottom_up.train()
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    stem = ("body.conv_stem.", "body.bn1.", "body.blocks.0.", "body.blocks.1.")
    assert frozen == {name for name, _ in net.named_parameters() if name.startswith(stem)}
    before = {name: value.clone() for name, value in net.named_buffers()}
    net(torch.rand(2, 3, 64, 64))["res5"].sum().backward()
    moved = {name for name, value in net.named_buffers() if not torch.equal(value, before[name])}
    expected = set() if freeze_bn else {name for name in before if not name.startswith(stem)}
    assert moved == expected
    # Scale and shift train on.
    assert net.body.blocks[3][0].bn1.weight.grad is not None


def test_freezing_a_net_whose_level_ends_in_an_activation() -> None:
    opts = ["MODEL.FPN.BOTTOM_UP", "timm", "MODEL.TIMM.NAME", "resnet18"]
    net = make_backbone(*opts, "MODEL.BACKBONE.FREEZE_AT", 1).bottom_up
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert frozen == {"body.conv1.weight", "body.bn1.weight", "body.bn1.bias"}


@pytest.mark.parametrize("name", ["mobilenetv2_100", "resnet18", "convnext_atto"])
def test_what_comes_after_the_last_level_is_left_out(name: str) -> None:
    """A parameter without a gradient would stop a training in several processes."""
    options = {"name": name, "pretrained": False, "in_channels": 3}
    whole = TimmBackbone(**options, out_features=["res4", "res5"]).eval()
    part = TimmBackbone(**options, freeze_at=2, out_features=["res3", "res4"]).eval()
    part.load_state_dict({k: v for k, v in whole.state_dict().items() if k in part.state_dict()})
    assert sum(p.numel() for p in part.parameters()) < sum(p.numel() for p in whole.parameters())
    image = torch.rand(1, 3, 64, 64)
    maps = part(image)
    torch.testing.assert_close(maps["res4"], whole(image)["res4"])
    assert list(part.output_shape()) == list(maps) == ["res3", "res4"]
    sum(m.sum() for m in maps.values()).backward()
    trained = [p.requires_grad for p in part.parameters()]
    assert trained == [p.grad is not None for p in part.parameters()]
    assert any(trained) and not all(trained)


def test_missing_timm_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="pip install 'timm"):
        make_backbone("MODEL.FPN.BOTTOM_UP", "timm")


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.FPN.BOTTOM_UP", "vgg"], "BOTTOM_UP is 'vgg'; expected resnet or timm"),
        (["MODEL.FPN.TOP_BLOCK", "p6p7"], "TOP_BLOCK is 'p6p7'; expected p6p7_c5"),
        (["MODEL.FPN.IN_FEATURES", ["res3", "res4"]], "does not end with res5"),
        (["MODEL.FPN.IN_FEATURES", []], r"IN_FEATURES is \[\].* gives .*res2"),
        (["MODEL.RESNETS.OUT_FEATURES", ["res5"]], r"'res2'.* gives \['res5'\]"),
        (["MODEL.RESNETS.RES5_DILATION", 2], "depth 18 has no DEFORM_ON_PER_STAGE, RES5_DILATION"),
        (
            ["MODEL.FPN.BOTTOM_UP", "timm", "MODEL.TIMM.OUT_FEATURES", ["res6"]],
            r"names \['res6'\], but mobilenetv2_100 has .*res5",
        ),
        (
            ["MODEL.FPN.BOTTOM_UP", "timm", "MODEL.BACKBONE.FREEZE_AT", 6],
            r"FREEZE_AT is 6, but the timm model has no level of stride 64, only of \[2, 4, 8, 16",
        ),
    ],
)
def test_wrong_values_are_refused(opts: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_backbone(*opts)
