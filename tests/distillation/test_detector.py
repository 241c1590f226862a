"""The wrapper: stock without distillers, named losses with them, the student in evaluation."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.env import seed_all_rng
from tiny_runs import TinyTeacher

from kd_det.config import student_cfg
from kd_det.distillation import DistillationDetector
from kd_det.functional.resize import reduce_image

Student = Callable[..., CfgNode]
MakeTeacher = Callable[[str], TinyTeacher]
Records = list[dict[str, Any]]

# Detectron2's mapper hands keypoints over as a list of arrays.
pytestmark = pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy:UserWarning")


class TestWithoutDistillers:
    """Promise 4: all distillers off equals stock Detectron2, bit for bit."""

    @pytest.mark.parametrize("detector", ["fcos", "retinanet", "faster_rcnn", "mask_rcnn"])
    def test_losses_and_gradients_are_stock(
        self, tiny_student: Student, tiny_records: Records, detector: str
    ) -> None:
        cfg = tiny_student(detector)
        batch = tiny_runs.batch_of(cfg, tiny_records)

        def run(config: CfgNode) -> tuple[dict[str, torch.Tensor], torch.nn.Module]:
            seed_all_rng(1)
            model = build_model(config)
            losses, _ = tiny_runs.losses_at(model, batch)
            sum(losses.values()).backward()
            return losses, getattr(model, "student", model)

        (ours, student), (stock, plain) = run(cfg), run(student_cfg(cfg))
        assert ours == stock
        pairs = zip(student.named_parameters(), plain.named_parameters(), strict=True)
        for (name, a), (other, b) in pairs:
            assert name == other
            assert (a.grad is None) == (b.grad is None)
            assert a.grad is None or torch.equal(a.grad, b.grad)

    @pytest.mark.parametrize("detector", ["fcos", "retinanet", "faster_rcnn"])
    @pytest.mark.parametrize("eval_period", [0, 2])
    def test_a_run_is_stock(self, tiny_student: Student, detector: str, eval_period: int) -> None:
        """Through Detectron2's own DefaultTrainer, with evaluation amid the training as well."""
        evaluated = [tiny_runs.DATA] if eval_period else []
        keys = {"TEST.EVAL_PERIOD": eval_period, "DATASETS.TEST": evaluated, "SEED": 3}
        cfg = tiny_student(detector, None, keys)
        _, ours = tiny_runs.train(cfg)

        class Stock(DefaultTrainer):
            build_evaluator = tiny_runs.DistillationTrainer.build_evaluator

        seed_all_rng(cfg.SEED)
        trainer = Stock(student_cfg(cfg))
        trainer.resume_or_load(resume=False)
        stock = tiny_runs.Recorder()
        trainer.register_hooks([stock])
        trainer.train()
        assert len(ours.steps) == 3
        assert ours.steps == stock.steps

    def test_weight_zero_gives_the_students_own_gradients(
        self, tiny_student: Student, tiny_teacher: MakeTeacher, tiny_records: Records
    ) -> None:
        off = tiny_student("fcos", None, name="off")
        idle = tiny_student("fcos", tiny_teacher("fcos"), {"KD.FEATURE_LP.WEIGHT": 0.0})
        batch = tiny_runs.batch_of(off, tiny_records)
        gradients = []
        for cfg in (off, idle):
            seed_all_rng(1)
            model = build_model(cfg)
            losses, _ = tiny_runs.losses_at(model, batch)
            sum(losses.values()).backward()
            gradients.append({k: p.grad for k, p in model.student.named_parameters()})
        assert tiny_runs.equal_states(*gradients)


class TestLosses:
    def test_keys_and_weight(
        self, tiny_student: Student, tiny_teacher: MakeTeacher, tiny_records: Records
    ) -> None:
        values = []
        for weight in (1.0, 0.25):
            cfg = tiny_student("fcos", tiny_teacher("fcos"), {"KD.FEATURE_LP.WEIGHT": weight})
            seed_all_rng(1)
            losses, storage = tiny_runs.losses_at(
                build_model(cfg), tiny_runs.batch_of(cfg, tiny_records)
            )
            assert set(losses) == {
                "loss_fcos_cls",
                "loss_fcos_loc",
                "loss_fcos_ctr",
                "loss_kd_feature_lp",
            }
            assert storage.history("kd/feature_lp/weight").latest() == weight
            values.append(losses["loss_kd_feature_lp"].item())
        assert values[1] == pytest.approx(0.25 * values[0], rel=1e-6)

    def test_weight_follows_the_iteration(
        self, tiny_student: Student, tiny_teacher: MakeTeacher, tiny_records: Records
    ) -> None:
        schedule = {
            "KD.FEATURE_LP.SCHEDULE.WARMUP_ITERS": 4,
            "KD.FEATURE_LP.SCHEDULE.STOP_AT": 9,
            "KD.FEATURE_LP.WEIGHT": 1.0,
        }
        cfg = tiny_student("fcos", tiny_teacher("fcos"), schedule)
        model = build_model(cfg)
        batch = tiny_runs.batch_of(cfg, tiny_records)
        seen = {}
        for iteration in (0, 1, 4, 9):
            losses, storage = tiny_runs.losses_at(model, batch, iteration)
            weight = storage.history("kd/feature_lp/weight").latest()
            loss = losses.get("loss_kd_feature_lp", torch.zeros(())).item()
            seen[iteration] = weight, loss
        assert [weight for weight, _ in seen.values()] == [0, 0.25, 1, 0]
        assert seen[0][1] == seen[9][1] == 0
        assert seen[1][1] == pytest.approx(0.25 * seen[4][1], rel=1e-5)

    def test_zero_where_the_student_is_the_teacher(
        self, tiny_teacher: MakeTeacher, tiny_records: Records, tmp_path: Path
    ) -> None:
        teacher = tiny_teacher("fcos")
        keys = tiny_runs.distil_keys("fcos", teacher)
        keys |= {
            "MODEL.RESNETS.NORM": "FrozenBN",
            "MODEL.WEIGHTS": str(teacher.weights),
            "KD.INHERIT": ["*"],
        }
        path = tiny_runs.write_config(tmp_path / "self.yaml", "fcos", keys, r50=True)
        cfg = tiny_runs.load_config(str(path))
        model = build_model(cfg)
        model.inherit_from_teacher()
        losses, _ = tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records))
        assert losses["loss_kd_feature_lp"].item() < 1e-8

    def test_a_teacher_that_only_bequeaths_is_let_go(
        self, tiny_student: Student, tiny_teacher: MakeTeacher
    ) -> None:
        keys = {"KD.DISTILLERS": [], "KD.INHERIT": ["head"]}
        model = build_model(tiny_student("retinanet", tiny_teacher("retinanet"), keys))
        gone = weakref.ref(model.teacher.model)
        assert model.inherit_from_teacher()
        assert model.teacher is None and gone() is None

    def test_same_initial_student_with_and_without_a_teacher(
        self, tiny_student: Student, tiny_teacher: MakeTeacher
    ) -> None:
        """Arms share initial weights and every random draw that follows."""
        drawn, states = [], []
        for cfg in (tiny_student("fcos"), tiny_student("fcos", tiny_teacher("retinanet"))):
            seed_all_rng(4)
            states.append(dict(build_model(cfg).student.state_dict()))
            drawn.append(torch.rand(4))
        assert tiny_runs.equal_states(*states)
        assert torch.equal(*drawn)

    @pytest.mark.parametrize("detector", ["fcos", "retinanet", "faster_rcnn"])
    def test_empty_ground_truth(
        self,
        tiny_student: Student,
        tiny_teacher: MakeTeacher,
        tiny_records: Records,
        detector: str,
    ) -> None:
        cfg = tiny_student(detector, tiny_teacher("fcos"))
        batch = tiny_runs.batch_of(cfg, tiny_records)
        for item in batch:
            item["instances"] = Instances(
                item["instances"].image_size,
                gt_boxes=Boxes(torch.zeros(0, 4)),
                gt_classes=torch.zeros(0, dtype=torch.int64),
            )
        model = build_model(cfg)
        losses, _ = tiny_runs.losses_at(model, batch)
        assert all(torch.isfinite(value) for value in losses.values())
        assert all(value.requires_grad for value in losses.values())
        sum(losses.values()).backward()
        without = [name for name, p in model.named_parameters() if p.grad is None]
        assert without == []
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())

    def test_padding_does_not_count_with_mask_padding(
        self, tiny_student: Student, tiny_teacher: MakeTeacher, tiny_records: Records
    ) -> None:
        """A wider companion pads the image; its own loss, masked, is that of the image alone."""
        keys = {"KD.FEATURE_LP.MASK_PADDING": True, "MODEL.RESNETS.NORM": "FrozenBN"}
        cfg = tiny_student("fcos", tiny_teacher("fcos"), keys)
        model = build_model(cfg)
        image = torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8)
        empty = Instances(
            (64, 64),
            gt_boxes=Boxes(torch.zeros(0, 4)),
            gt_classes=torch.zeros(0, dtype=torch.int64),
        )
        alone = [{"image": image, "instances": empty}]
        losses, _ = tiny_runs.losses_at(model, alone)
        twice, _ = tiny_runs.losses_at(model, alone * 2)
        key = "loss_kd_feature_lp"
        assert losses[key].item() == pytest.approx(twice[key].item(), rel=1e-5)


class TestIdleDistillers:
    def test_adapters_keep_their_gradients(
        self, tiny_student: Student, tiny_teacher: MakeTeacher, tiny_records: Records
    ) -> None:
        """DDP waits for every parameter's gradient, also while the weight is 0."""
        cfg = tiny_student("fcos", tiny_teacher("fcos"), {"KD.FEATURE_LP.WEIGHT": 0.0})
        model = build_model(cfg)
        losses, _ = tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records))
        assert losses["loss_kd_feature_lp_idle"].item() == 0
        sum(losses.values()).backward()
        gradients = [p.grad for p in model.active.parameters()]
        assert len(gradients) == 5
        assert all(g is not None and not g.any() for g in gradients)

    def test_the_teacher_does_not_run(
        self, tiny_student: Student, tiny_teacher: MakeTeacher, tiny_records: Records
    ) -> None:
        schedule = {"KD.FEATURE_LP.SCHEDULE.STOP_AT": 2}
        cfg = tiny_student("fcos", tiny_teacher("fcos"), schedule)
        model = build_model(cfg)
        calls: list[int] = []
        model.teacher.model.backbone.register_forward_pre_hook(lambda m, a: calls.append(1))
        batch = tiny_runs.batch_of(cfg, tiny_records)
        tiny_runs.losses_at(model, batch, 2)
        assert not calls
        tiny_runs.losses_at(model, batch, 1)
        assert calls


def test_adapters_are_trained_and_are_not_the_students(
    tiny_student: Student, tiny_teacher: MakeTeacher
) -> None:
    cfg = tiny_student("fcos", tiny_teacher("fcos"), {"SOLVER.BASE_LR": 0.01})
    trainer = tiny_runs.DistillationTrainer(cfg)
    model = trainer.model
    adapters = list(model.active.parameters())
    assert [tuple(p.shape) for p in adapters] == [(48, 32, 1, 1)] * 5
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in adapters} <= optimized
    assert optimized == {id(p) for p in model.parameters()}
    assert model.student.state_dict().keys() == build_model(student_cfg(cfg)).state_dict().keys()
    before = [p.detach().clone() for p in adapters]
    trainer.train()
    assert not any(torch.equal(a, b) for a, b in zip(before, adapters, strict=True))


class TestEvaluation:
    def outputs(self, model: torch.nn.Module, batch: list[dict[str, Any]]) -> list[Instances]:
        with torch.no_grad():
            return [out["instances"] for out in model.eval()(batch)]

    @pytest.mark.parametrize("detector", ["fcos", "faster_rcnn"])
    def test_is_the_students(
        self,
        tiny_student: Student,
        tiny_teacher: MakeTeacher,
        tiny_records: Records,
        detector: str,
    ) -> None:
        cfg = tiny_student(
            detector,
            tiny_teacher("fcos"),
            {"MODEL.FCOS.SCORE_THRESH_TEST": 0.0, "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0},
        )
        model = build_model(cfg)
        if detector == "fcos":
            model.student.head.bbox_pred.bias.data.fill_(1.0)  # no empty boxes
        batch = tiny_runs.batch_of(cfg, tiny_records)
        calls: list[int] = []
        model.teacher.model.backbone.register_forward_pre_hook(lambda m, a: calls.append(1))
        ours, own = self.outputs(model, batch), self.outputs(model.student, batch)
        assert not calls
        for a, b in zip(ours, own, strict=True):
            assert len(a) > 0
            assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
            assert torch.equal(a.scores, b.scores)

    def test_needs_no_ground_truth_and_no_storage(
        self, tiny_student: Student, tiny_teacher: MakeTeacher
    ) -> None:
        model = build_model(tiny_student("fcos", tiny_teacher("fcos")))
        self.outputs(model, [{"image": torch.zeros(3, 64, 64)}])


class TestReducedView:
    @pytest.fixture
    def keys(self) -> dict[str, Any]:
        """MSAD's student: P2..P6 on half the image."""
        return {
            "KD.STUDENT.VIEW_FACTOR": 2.0,
            "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
            "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
            "MODEL.FPN.TOP_BLOCK": "p6_c5",
            "MODEL.FCOS.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
            "MODEL.FCOS.SCORE_THRESH_TEST": 0.0,
        }

    def test_pairs_p2_to_p6_with_p3_to_p7(
        self,
        tiny_student: Student,
        tiny_teacher: MakeTeacher,
        tiny_records: Records,
        keys: dict[str, Any],
    ) -> None:
        cfg = tiny_student("fcos", tiny_teacher("fcos"), keys)
        model = build_model(cfg)
        (wanted,) = model.active["FeatureLp"].captures
        names = [(p.name, p.stride, p.resample) for p in wanted.pairs]
        assert names == [(f"p{i}~p{i + 1}", 2.0 ** (i + 1), False) for i in range(2, 7)]

        sizes: list[torch.Size] = []
        model.student.backbone.register_forward_pre_hook(lambda m, a: sizes.append(a[0].shape))
        losses, _ = tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records))
        # 96x80 and 64x96 halved, padded to 32: 64x64, while the teacher's batch is 96x96.
        assert sizes == [torch.Size([2, 3, 64, 64])]
        assert losses["loss_kd_feature_lp"].requires_grad

    def test_boxes_come_out_in_the_original_frame(
        self, tiny_student: Student, tiny_records: Records, keys: dict[str, Any]
    ) -> None:
        """As the plain student gives them for the small image, times 2, and so for other sizes."""
        cfg = tiny_student("fcos", None, keys)
        model = build_model(cfg).eval()
        image = tiny_runs.batch_of(cfg, tiny_records)[0]["image"]  # (3, 96, 80)
        small = reduce_image(image, 2.0, "bilinear")
        with torch.no_grad():
            own = model.student([{"image": small}])[0]["instances"]
            ours = model([{"image": image}])[0]["instances"]
            original = model([{"image": image, "height": 192, "width": 160}])[0]["instances"]
        assert len(own) > 0
        assert ours.image_size == (96, 80)
        assert original.image_size == (192, 160)
        torch.testing.assert_close(ours.pred_boxes.tensor, 2 * own.pred_boxes.tensor)
        torch.testing.assert_close(original.pred_boxes.tensor, 4 * own.pred_boxes.tensor)

    def test_stock_config_of_the_student_sees_the_same_size(
        self, tiny_student: Student, keys: dict[str, Any]
    ) -> None:
        sizes = {"INPUT.MIN_SIZE_TEST": 800, "INPUT.MAX_SIZE_TEST": 1333}
        plain = student_cfg(tiny_student("fcos", None, {**keys, **sizes}))
        assert (plain.INPUT.MIN_SIZE_TEST, plain.INPUT.MAX_SIZE_TEST) == (400, 666)
        assert plain.MODEL.META_ARCHITECTURE == "FCOS"
        assert "KD" not in plain


PAIRS = [
    *[(detector, detector) for detector in tiny_runs.META],  # R50 teaches R18
    ("fcos", "retinanet"),
    ("faster_rcnn", "fcos"),
    ("retinanet", "mask_rcnn"),
    ("mask_rcnn", "keypoint_rcnn"),
    ("keypoint_rcnn", "fcos"),
]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_trains_three_steps(
    tiny_student: Student, tiny_teacher: MakeTeacher, student: str, teacher: str
) -> None:
    """Every architecture as student and as teacher, written to a checkpoint at the end."""
    cfg = tiny_student(student, tiny_teacher(teacher), {"KD.GRAD_SHARE_PERIOD": 2})
    trainer, recorder = tiny_runs.train(cfg)
    assert isinstance(trainer.model, DistillationDetector)
    assert len(recorder.steps) == 3
    losses = [step["loss_kd_feature_lp"] for step in recorder.steps]
    assert all(0 < value < float("inf") for value in losses)
    measured = ["kd/feature_lp/grad_share" in step for step in recorder.steps]
    assert measured == [True, True, True]  # the first steps all are
    assert len([k for k in recorder.steps[0] if k.startswith("loss_")]) > 2
    assert (Path(cfg.OUTPUT_DIR) / "model_final.pth").is_file()


def test_unknown_student(tiny_student: Student) -> None:
    cfg = tiny_student("fcos", None, {"KD.STUDENT.META_ARCHITECTURE": "FCOSS"})
    with pytest.raises(KeyError, match=r"KD.STUDENT.META_ARCHITECTURE is 'FCOSS'.*names are FCOS"):
        build_model(cfg)


def test_distillers_need_a_teacher(tiny_student: Student) -> None:
    with pytest.raises(ValueError, match=r"KD.TEACHER.CONFIG_FILE is empty"):
        build_model(tiny_student("fcos", None, {"KD.DISTILLERS": ["FeatureLp"]}))
