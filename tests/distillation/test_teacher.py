"""The teacher: invisible to training, strictly loaded, stopped early, in its own pixel format."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.solver import build_optimizer
from tiny_runs import TinyTeacher
from torch import nn

from kd_det.config import load_config, student_cfg
from kd_det.distillation import detector as detector_module
from kd_det.distillation.capture import CapturePath, FeatureCapture
from kd_det.distillation.classes import check_same_classes
from kd_det.distillation.teacher import (
    Teacher,
    build_teacher,
    has_net_of,
    load_strictly,
    other_channel_order,
)
from kd_det.files import sha256_of

Student = Callable[..., CfgNode]
MakeTeacher = Callable[[str], TinyTeacher]


@pytest.fixture
def cfg(tiny_student: Student, tiny_teacher: MakeTeacher) -> CfgNode:
    return tiny_student("fcos", tiny_teacher("fcos"))


class Dropping(nn.Module):
    """A model with everything that behaves differently in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, inputs: list[dict[str, Any]]) -> torch.Tensor:
        images = torch.stack([item["image"].float() for item in inputs])
        out: torch.Tensor = self.drop(self.bn(self.conv(images)))
        return out


def test_reaches_nothing_that_training_touches(cfg: CfgNode) -> None:
    model = build_model(cfg)
    own = {id(t) for t in [*model.teacher.model.parameters(), *model.teacher.model.buffers()]}
    reached = [*model.parameters(), *model.buffers(), *model.state_dict(keep_vars=True).values()]
    optimizer = build_optimizer(cfg, model)
    reached += [p for group in optimizer.param_groups for p in group["params"]]

    assert own.isdisjoint(id(t) for t in reached)
    assert model.teacher.model not in list(model.modules())
    assert not any("teacher" in key for key in model.state_dict())
    assert not any(p.requires_grad for p in model.teacher.model.parameters())
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_stays_in_evaluation_mode_whatever_the_student_does(cfg: CfgNode) -> None:
    model = build_model(cfg)
    for mode in (True, False, True):
        model.train(mode)
        assert model.student.training is mode
        assert not any(module.training for module in model.teacher.model.modules())


def test_batchnorm_and_dropout_are_at_rest() -> None:
    torch.manual_seed(0)
    teacher = Teacher(Dropping().train())
    before = copy.deepcopy(teacher.model.state_dict())
    capture = FeatureCapture(teacher.model, [CapturePath("drop")])
    batch = [{"image": torch.rand(3, 8, 8)} for _ in range(2)]
    first, second = (teacher(batch, capture, 1).get(CapturePath("drop"))[0] for _ in range(2))

    assert torch.equal(first, second)
    assert not first.requires_grad
    assert not (first == 0).any()  # nothing dropped
    assert tiny_runs.equal_states(before, teacher.model.state_dict())


def test_follows_the_wrapper_to_other_dtypes_and_devices(cfg: CfgNode) -> None:
    model = build_model(cfg).to(torch.float64)
    assert {p.dtype for p in model.teacher.model.parameters()} == {torch.float64}
    assert model.teacher.model.pixel_mean.dtype == torch.float64

    model.to("meta")
    assert {p.device.type for p in model.teacher.model.parameters()} == {"meta"}
    assert {p.device.type for p in model.student.parameters()} == {"meta"}


def test_trains_in_float64(cfg: CfgNode, tiny_records: list[dict[str, Any]]) -> None:
    model = build_model(cfg).to(torch.float64)
    losses, _ = tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records))
    assert losses["loss_kd_feature_lp"].dtype == torch.float64


@pytest.mark.parametrize("student_format", ["BGR", "RGB"])
def test_channels_are_in_the_teachers_order_before_it_normalises(
    tiny_student: Student, tiny_teacher: MakeTeacher, student_format: str
) -> None:
    """An image of the teacher's mean colour must reach its backbone as exact zeros."""
    mean = [120.0, 110.0, 100.0]
    teacher = tiny_teacher("fcos")
    opts = ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", mean, "MODEL.PIXEL_STD", [50.0, 60.0, 70.0]]
    keys = {"INPUT.FORMAT": student_format, "KD.TEACHER.OPTS": opts}
    model = build_model(tiny_student("fcos", teacher, keys))

    colour = torch.tensor(mean, dtype=torch.uint8)
    image = (colour if student_format == "RGB" else colour.flip(0))[:, None, None]
    seen: list[torch.Tensor] = []
    handle = model.teacher.model.backbone.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    batch = [{"image": image.expand(3, 64, 64).contiguous()}]
    model.teacher(batch, model.watch.teacher, model.watch.stop_after)
    handle.remove()
    assert torch.equal(seen[0], torch.zeros(1, 3, 64, 64))


def test_pixel_formats_without_conversion_are_refused() -> None:
    assert not other_channel_order("L", "L")
    assert other_channel_order("BGR", "RGB")
    with pytest.raises(ValueError, match=r"INPUT.FORMAT is 'BGR', the teacher's 'L'.*one RGB and"):
        other_channel_order("BGR", "L")


def test_stops_when_the_last_capture_has_fired(
    cfg: CfgNode, tiny_records: list[dict[str, Any]]
) -> None:
    model = build_model(cfg)
    calls: list[str] = []
    for name, module in model.teacher.model.named_modules():
        module.register_forward_hook(lambda m, a, o, name=name: calls.append(name))
    tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records))

    assert calls[-1] == "backbone"
    assert not any(name.startswith("head") for name in calls)
    assert calls.count("backbone.bottom_up") == 1


def test_stops_within_the_head_after_the_call_that_is_wanted(tiny_teacher: MakeTeacher) -> None:
    made = tiny_teacher("fcos")
    model = build_model(student_cfg(load_config(str(made.config_file)))).eval()
    teacher = Teacher(model)
    path = CapturePath.parse(
        "head.cls_subnet@2", model
    )  # the head's towers run once per level: p3 to p7
    capture = FeatureCapture(model, [path])
    with capture.record() as full:
        model([{"image": torch.zeros(3, 64, 64)}])
    calls: list[str] = []
    model.head.cls_subnet.register_forward_hook(lambda m, a, o: calls.append("cls"))
    stopped = teacher(
        [{"image": torch.zeros(3, 64, 64, dtype=torch.uint8)}],
        capture,
        capture.count_needed(full.order),
    )
    assert full.order == ["head.cls_subnet"] * 5
    assert stopped.order == ["head.cls_subnet"] * 3
    assert len(calls) == 3
    assert torch.equal(stopped.get(path)[0], full.get(path)[0])


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_precision_is_the_teachers_alone(
    tiny_student: Student,
    tiny_teacher: MakeTeacher,
    tiny_records: list[dict[str, Any]],
    precision: str,
) -> None:
    cfg = tiny_student("fcos", tiny_teacher("fcos"), {"KD.TEACHER.PRECISION": precision})
    model = build_model(cfg)
    convolution = model.teacher.model.backbone.fpn_output3
    dtypes: list[torch.dtype] = []
    convolution.register_forward_hook(lambda m, a, o: dtypes.append(o.dtype))
    own: list[torch.dtype] = []
    model.student.backbone.fpn_output3.register_forward_hook(lambda m, a, o: own.append(o.dtype))
    losses, _ = tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records))

    assert dtypes == [getattr(torch, precision)]
    assert own == [torch.float32]
    assert losses["loss_kd_feature_lp"].dtype == torch.float32
    assert torch.isfinite(losses["loss_kd_feature_lp"])


def test_teacher_keeps_its_precision_inside_the_students_autocast(
    cfg: CfgNode, tiny_records: list[dict[str, Any]]
) -> None:
    model = build_model(cfg)
    dtypes: list[torch.dtype] = []
    model.teacher.model.backbone.fpn_output3.register_forward_hook(
        lambda m, a, o: dtypes.append(o.dtype)
    )
    own: list[torch.dtype] = []
    model.student.backbone.fpn_output3.register_forward_hook(lambda m, a, o: own.append(o.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records))
    assert dtypes == [torch.float32]
    assert own == [torch.bfloat16]


def test_unknown_precision() -> None:
    with pytest.raises(ValueError, match=r"KD.TEACHER.PRECISION is 'fp8', expected one of float32"):
        Teacher(nn.Linear(1, 1), precision="fp8")


def test_bit_identical_after_training(cfg: CfgNode) -> None:
    """Promise 3: parameters and buffers, those outside the state dict as well."""
    kept: dict[str, torch.Tensor] = {}

    def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
        return {
            name: tensor.detach().clone()
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        }

    trainer = tiny_runs.DistillationTrainer(cfg)
    kept = snapshot(trainer.model.teacher.model)
    student = snapshot(trainer.model.student)
    trainer.train()
    assert tiny_runs.equal_states(kept, snapshot(trainer.model.teacher.model))
    assert not tiny_runs.equal_states(student, snapshot(trainer.model.student))
    assert any("running_mean" in name for name in kept)
    assert any("pixel_mean" in name for name in kept)


def test_identity_is_that_of_the_file(cfg: CfgNode, tiny_teacher: MakeTeacher) -> None:
    identity = build_teacher(cfg).identity
    assert identity is not None
    assert identity.weights == str(tiny_teacher("fcos").weights)
    assert identity.sha256 == sha256_of(identity.weights)
    assert len(identity.sha256) == 64


def test_a_teacher_trained_on_a_reduced_view_keeps_looking_at_one(
    tiny_student: Student, tiny_teacher: MakeTeacher, tmp_path: Path
) -> None:
    reduced = {**tiny_runs.distil_keys("fcos", None), "KD.STUDENT.VIEW_FACTOR": 2.0}
    file = tiny_runs.write_config(tmp_path / "reduced.yaml", "fcos", reduced, r50=True)
    teacher = TinyTeacher(file, tiny_teacher("fcos").weights)
    built = build_teacher(tiny_student("fcos", teacher))
    assert built.view.factor == 2


class TestLoading:
    """Every tensor of the file finds its place and every place its tensor, or the run stops."""

    @pytest.fixture
    def model(self, tiny_teacher: MakeTeacher) -> nn.Module:
        return build_model(student_cfg(load_config(str(tiny_teacher("fcos").config_file))))

    @pytest.fixture
    def state(self, tiny_teacher: MakeTeacher) -> dict[str, torch.Tensor]:
        return dict(torch.load(tiny_teacher("fcos").weights)["model"])

    def save(self, folder: Path, state: Any) -> str:
        path = folder / "weights.pth"
        torch.save({"model": state}, path)
        return str(path)

    def test_all_tensors_are_the_files(
        self, model: nn.Module, state: dict[str, torch.Tensor], tiny_teacher: MakeTeacher
    ) -> None:
        load_strictly(model, str(tiny_teacher("fcos").weights))
        assert tiny_runs.equal_states(dict(model.state_dict()), state)

    def test_nothing_matches(
        self, model: nn.Module, state: dict[str, torch.Tensor], tmp_path: Path
    ) -> None:
        path = self.save(tmp_path, {f"ema.{key}": value for key, value in state.items()})
        with pytest.raises(ValueError, match=r"0 of \d+ tensors matched") as error:
            load_strictly(model, path)
        assert "missing in the file" in str(error.value)
        assert "in the file but not in the model" in str(error.value)
        with pytest.raises(ValueError, match=r"0 of \d+ tensors matched"):
            load_strictly(model, path, ignore=["*"])

    def test_partly_matched(
        self, model: nn.Module, state: dict[str, torch.Tensor], tmp_path: Path
    ) -> None:
        del state["head.ctrness.bias"]
        state["head.cls_score.bias"] = torch.zeros(5)
        state["head.extra.weight"] = torch.zeros(1)
        with pytest.raises(ValueError) as error:
            load_strictly(model, self.save(tmp_path, state))
        message = str(error.value)
        assert "missing in the file (1): head.ctrness.bias" in message
        assert "of another shape (1): head.cls_score.bias: file (5,), model (2,)" in message
        assert "in the file but not in the model (1): head.extra.weight" in message
        counted = [k for k in state if not k.endswith("num_batches_tracked")]
        assert f"{len(counted) - 2} of {len(counted)} tensors matched" in message
        assert "KD.TEACHER.CONFIG_FILE" in message

    def test_ignored_keys(
        self, model: nn.Module, state: dict[str, torch.Tensor], tmp_path: Path
    ) -> None:
        del state["head.ctrness.bias"]
        state["ema.extra"] = torch.zeros(1)
        path = self.save(tmp_path, state)
        load_strictly(model, path, ignore=["head.ctrness.*", "ema.*"])
        with pytest.raises(ValueError, match=r"not in the model \(1\): ema.extra"):
            load_strictly(model, path, ignore=["head.*"])

    def test_old_files_may_carry_what_models_make_themselves(
        self, model: nn.Module, state: dict[str, torch.Tensor], tmp_path: Path
    ) -> None:
        state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
        state["pixel_mean"] = torch.zeros(3, 1, 1)
        state["anchor_generator.cell_anchors.0"] = torch.zeros(1, 4)
        load_strictly(model, self.save(tmp_path, state))

    def test_other_architecture(self, model: nn.Module, tiny_teacher: MakeTeacher) -> None:
        with pytest.raises(ValueError, match=r"not fit the model of its config") as error:
            load_strictly(model, str(tiny_teacher("faster_rcnn").weights))
        assert "head.cls_subnet.0.weight" in str(error.value)
        assert "proposal_generator" in str(error.value)

    @pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04half"])
    def test_unreadable(self, model: nn.Module, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "broken.pth"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"broken.pth could not be read \("):
            load_strictly(model, str(path))

    def test_truncated(self, model: nn.Module, tmp_path: Path, tiny_teacher: MakeTeacher) -> None:
        whole = tiny_teacher("fcos").weights.read_bytes()
        path = tmp_path / "half.pth"
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=r"half.pth could not be read \("):
            load_strictly(model, str(path))

    def test_wrong_weights_stop_the_build_of_the_wrapper(
        self, tiny_student: Student, tiny_teacher: MakeTeacher
    ) -> None:
        mixed = TinyTeacher(tiny_teacher("fcos").config_file, tiny_teacher("retinanet").weights)
        with pytest.raises(ValueError, match="do not fit the model of its config"):
            build_model(tiny_student("fcos", mixed))


def compare(student: CfgNode, teacher: CfgNode) -> None:
    """Compare the classes of two configs' models."""
    models = [build_model(student_cfg(cfg)) for cfg in (student, teacher)]
    check_same_classes(*models, student, teacher)


class TestClasses:
    """Classes are compared where, and only where, a distiller reads class scores."""

    def test_other_count_is_fine_for_features_and_refused_for_scores(
        self,
        tiny_student: Student,
        tiny_teacher: MakeTeacher,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        cfg = tiny_student("fcos", tiny_teacher("fcos"), {"MODEL.FCOS.NUM_CLASSES": 3})
        build_model(cfg)
        monkeypatch.setattr(
            detector_module.build_distiller("FeatureLp", cfg).__class__, "uses_class_scores", True
        )
        message = (
            "The student predicts 3 classes, the teacher 2, and a distiller reads class scores"
        )
        with pytest.raises(ValueError, match=message):
            build_model(cfg)

    def test_counts_come_from_the_architecture_that_is_used(
        self, tiny_student: Student, tiny_teacher: MakeTeacher
    ) -> None:
        cfg = tiny_student("fcos", None, {"MODEL.ROI_HEADS.NUM_CLASSES": 9})
        for detector in ("fcos", "retinanet", "faster_rcnn"):
            compare(cfg, load_config(str(tiny_teacher(detector).config_file)))

    def test_names_are_compared_without_the_teachers_data_being_registered(
        self, tiny_student: Student, tiny_data: dict[str, str], tmp_path: Path
    ) -> None:
        content = json.loads(Path(tiny_data["json"]).read_text())
        content["categories"][1]["name"] = "bee"
        file = tmp_path / "other.json"
        file.write_text(json.dumps(content))
        keys = {
            "DATASETS.TRAIN": ["never_registered"],
            "KD.DATASETS": [{"name": "never_registered", "json": str(file), "images": "."}],
        }
        cfg = tiny_student("fcos")
        with pytest.raises(ValueError, match=r"name their classes differently.*: 1: b / bee\."):
            compare(cfg, tiny_student("fcos", None, keys, name="other"))

        content["categories"].append({"id": 3, "name": "c"})
        content["categories"][1]["name"] = "b"
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r": 2: none / c\."):
            compare(cfg, tiny_student("fcos", None, keys, name="other"))

    def test_unknown_names_are_not_compared(self, tiny_student: Student) -> None:
        unknown = tiny_student("fcos", None, {"DATASETS.TRAIN": ["not_here"]}, name="other")
        compare(tiny_student("fcos"), unknown)


def test_which_teacher_has_the_students_net() -> None:
    def model(depth: int, pyramid: bool = True, norm: str = "BN", freeze: int = 0) -> nn.Module:
        out = nn.Module()
        stages = ResNet.make_default_stages(depth, norm=norm)
        out.backbone = ResNet(BasicStem(norm=norm), stages, out_features=["res3", "res4"])
        out.backbone.freeze(freeze)
        if pyramid:
            out.backbone = FPN(out.backbone, ["res3", "res4"], 16)
        return out

    r50, r101 = model(50), model(101)
    assert has_net_of(r50, r101) and has_net_of(r50, r50)
    assert not has_net_of(r101, r50)
    assert not has_net_of(r50, model(18))
    assert has_net_of(model(50, pyramid=False), r101)
    assert not has_net_of(nn.Linear(1, 1), r101)
    # A frozen norm, or one that Detectron2 freezes with its stage, is the same net's.
    frozen = model(50, norm="FrozenBN")
    assert has_net_of(r50, frozen) and has_net_of(frozen, r50)
    assert has_net_of(r50, model(50, freeze=3)) and has_net_of(model(50, freeze=3), r101)
    assert not has_net_of(r50, model(50, norm=""))
