"""MSAD's second stage: what the student starts as, what it learns, what is left to evaluate."""

from pathlib import Path
from typing import Any

import pytest
import tiny_msad
import tiny_runs
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Instances
from tiny_msad import MakeAligned, msad_cfg
from tiny_runs import calls_of
from torch import nn

from kd_det.config import load_config, student_cfg
from kd_det.distillation.capture import tensors_of

Records = list[dict[str, Any]]
LOSS = "loss_kd_aligned_pyramid"
NORMS: list[dict[str, Any]] = [
    {"MODEL.RESNETS.NORM": "FrozenBN"},
    {"MODEL.RESNETS.NORM": "GN", "MODEL.RESNETS.DEPTH": 18},
    {"MODEL.RESNETS.NORM": "BN", "MODEL.ALIGNED.SPLIT_BN": True},
]


def inherited(cfg: CfgNode) -> nn.Module:
    model = build_model(cfg)
    assert model.inherit_from_teacher()
    return model


class TestStart:
    """(c): before any step the student is the teacher's low branch."""

    @pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm["MODEL.RESNETS.NORM"])
    @pytest.mark.parametrize("sizes", [[(128, 192)], [(64, 128), (99, 77)]])
    def test_head_outputs_are_the_low_branchs(
        self, aligned_teacher: MakeAligned, tmp_path: Path, norm: dict[str, Any], sizes: Any
    ) -> None:
        teacher = aligned_teacher("fcos", 2, norm)
        own = {key: value for key, value in norm.items() if "ALIGNED" not in key}
        model = inherited(msad_cfg(tmp_path / "s.yaml", "fcos", teacher, **own)).eval()
        self.check(model, sizes, "head")
        if "MODEL.ALIGNED.SPLIT_BN" in norm:  # the statistics of the low view, not of the full one
            plain = dict(model.teacher.model.named_buffers())
            name = "backbone.bottom_up.stem.conv1.norm.{}running_mean"
            mean = model.student.get_buffer(name.format(""))
            assert torch.equal(mean, plain["detector." + name.format("low_")])
            assert not torch.equal(mean, plain["detector." + name.format("")])

    @pytest.mark.parametrize(
        ("detector", "head"),
        [("retinanet", "head"), ("faster_rcnn", "proposal_generator.rpn_head")],
    )
    def test_for_other_detectors(
        self, aligned_teacher: MakeAligned, tmp_path: Path, detector: str, head: str
    ) -> None:
        cfg = msad_cfg(tmp_path / "s.yaml", detector, aligned_teacher(detector))
        self.check(inherited(cfg).eval(), [(64, 128)], head)

    @pytest.mark.parametrize(
        ("interpolation", "size"),
        [
            ("nearest", (128, 192)),
            ("bilinear", (128, 192)),
            ("area", (128, 192)),
            ("nearest", (97, 129)),
        ],
    )
    def test_boxes_are_the_low_branchs(
        self,
        aligned_teacher: MakeAligned,
        tmp_path: Path,
        interpolation: str,
        size: tuple[int, int],
    ) -> None:
        teacher = aligned_teacher("retinanet", 2, {"MODEL.ALIGNED.INTERPOLATION": interpolation})
        keys = {"KD.STUDENT.VIEW_INTERPOLATION": interpolation}
        model = inherited(msad_cfg(tmp_path / "s.yaml", "retinanet", teacher, **keys)).eval()
        aligned = model.teacher.model
        aligned.eval_branch = "low"
        batch = [{"image": torch.rand(3, *size) * 255}]
        with torch.no_grad():
            found, expected = (m(batch)[0]["instances"] for m in (model, aligned))
        assert found.image_size == expected.image_size == size
        assert len(found) == len(expected) > 5
        torch.testing.assert_close(
            found.pred_boxes.tensor, expected.pred_boxes.tensor, atol=1e-3, rtol=1e-4
        )

    def check(self, model: nn.Module, sizes: list[tuple[int, int]], head: str) -> None:
        batch = [{"image": torch.randint(0, 256, (3, *size)).byte()} for size in sizes]
        teacher = model.teacher.model
        teacher.eval_branch = "low"
        heads = model.student.get_submodule(head), teacher.detector.get_submodule(head)
        ((_, ours),) = calls_of(heads[0], lambda: model(batch))
        ((_, theirs),) = calls_of(heads[1], lambda: teacher(batch))
        pairs = list(zip(tensors_of(ours), tensors_of(theirs), strict=True))
        assert len(pairs) >= 10 and any(a.std() > 0 for a, _ in pairs)
        for a, b in pairs:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


class TestLoss:
    @pytest.fixture
    def model(self, aligned_teacher: MakeAligned, tmp_path: Path) -> nn.Module:
        norm = {"MODEL.RESNETS.NORM": "FrozenBN"}
        teacher = aligned_teacher("fcos", 2, norm)
        schedule = {"KD.ALIGNED_PYRAMID.SCHEDULE.WARMUP_ITERS": 500}
        return inherited(msad_cfg(tmp_path / "s.yaml", "fcos", teacher, **norm, **schedule))

    @pytest.fixture
    def batch(self, model: nn.Module, tiny_records: Records, tmp_path: Path) -> Any:
        return tiny_runs.batch_of(load_config(str(tmp_path / "s.yaml")), tiny_records)

    def test_zero_where_the_student_is_the_fused_pyramid_and_a_hand_made_difference(
        self, model: nn.Module, batch: Any
    ) -> None:
        """(d): the fused pyramid replaced by the low one, plus a constant per level."""
        for deltas in ([0, 0, 0, 0, 0], [0.1, -0.2, 0.3, 0, 1]):
            handle = model.teacher.model.fusion.register_forward_hook(
                lambda _, inputs, out: [
                    x + d
                    for x, d in zip(inputs[1], deltas, strict=True)  # noqa: B023
                ]
            )
            losses, _ = tiny_runs.losses_at(model, batch, 500)
            handle.remove()
            assert losses[LOSS].item() == pytest.approx(0.6 * sum(map(abs, deltas)), abs=1e-5)

    def test_is_the_papers_with_its_warm_up(self, model: nn.Module, batch: Any) -> None:
        found: dict[int, float] = {}
        for iteration in (0, 125, 1000):
            losses, _ = tiny_runs.losses_at(model, batch, iteration)
            found[iteration] = losses[LOSS].item() if LOSS in losses else 0.0
        full = [{"image": item["image"]} for item in batch]
        ((_, fused),) = calls_of(model.teacher.model.fusion, lambda: model.teacher.model(full))
        ((_, own),) = calls_of(model.student.backbone, lambda: model.eval()(full))
        pairs = zip(own.values(), fused, strict=True)
        expected = 0.6 * sum((a - b).abs().mean().item() for a, b in pairs)
        assert expected > 0
        assert found[0] == 0
        assert found[125] == pytest.approx(expected / 4, rel=1e-5)
        assert found[1000] == pytest.approx(expected, rel=1e-5)


class TestTeacherCaptures:
    @pytest.mark.parametrize(("call", "view", "runs"), [(0, "high", 1), (1, "low", 2)])
    def test_one_view_of_an_aligned_teacher(
        self,
        aligned_teacher: MakeAligned,
        tiny_records: Records,
        tmp_path: Path,
        call: int,
        view: str,
        runs: int,
    ) -> None:
        """The full view is enough for the first, so the reduced one is not run."""
        own = {
            "KD.ALIGNED_PYRAMID.TEACHER_CAPTURE": f"detector.backbone@{call}",
            "MODEL.RESNETS.NORM": "FrozenBN",  # in training, too, the statistics of the low view
        }
        teacher = aligned_teacher("fcos", 2, {"MODEL.ALIGNED.SPLIT_BN": True})
        cfg = msad_cfg(tmp_path / "s.yaml", "fcos", teacher, **own)
        model = inherited(cfg)
        aligned = model.teacher.model
        batch = tiny_runs.batch_of(cfg, tiny_records)
        losses: dict[str, Any] = {}
        before = {key: value.clone() for key, value in aligned.state_dict().items()}

        def step() -> None:
            losses.update(tiny_runs.losses_at(model, batch)[0])

        calls = calls_of(aligned.detector.backbone, step)
        assert len(calls) == runs
        assert list(calls[call][1]) == aligned.branch_levels[view]
        assert not calls_of(aligned.fusion, step)
        # The pass ends early, and the branches' statistics are in their places again.
        assert tiny_runs.equal_states(before, dict(aligned.state_dict()))
        names = [pair.name for pair in model.active["AlignedPyramid"].captures[0].pairs]
        partners = aligned.branch_levels[view]
        assert names == [f"p{i}~{level}" for i, level in enumerate(partners, start=2)]
        assert (losses[LOSS].item() < 1e-4) == (view == "low")

    def test_factor_four(
        self, aligned_teacher: MakeAligned, tiny_records: Records, tmp_path: Path
    ) -> None:
        teacher = aligned_teacher("fcos", 4)
        keys = tiny_msad.msad_keys("fcos", teacher, 4)
        cfg = msad_cfg(tmp_path / "s.yaml", "fcos", teacher, **keys)
        trainer, recorder = tiny_runs.train(cfg)
        assert [step[LOSS] > 0 for step in recorder.steps] == [True] * 3
        model = trainer.model
        pairs = model.active["AlignedPyramid"].captures[0].pairs
        # A fused pyramid is a list.
        assert [(p.name, p.stride, p.resample) for p in pairs] == [
            (f"p{i}~[{i - 2}]", 2.0 ** (i + 2), False) for i in range(2, 6)
        ]
        batch = tiny_runs.batch_of(cfg, tiny_records)
        calls = calls_of(model.student.backbone, lambda: model.eval()(batch))
        assert [tuple(inputs[0].shape[2:]) for inputs, _ in calls] == [(32, 32)]


class TestEvaluation:
    def boxes(self, model: nn.Module, batch: Any) -> list[Instances]:
        with torch.no_grad():
            return [output["instances"] for output in model.eval()(batch)]

    @pytest.mark.parametrize("detector", list(tiny_runs.META))
    def test_native_small_images_in_stock_detectron2(
        self, aligned_teacher: MakeAligned, tmp_path: Path, detector: str
    ) -> None:
        """
        (k): the student's state in the stock model gives the same boxes for a small image.

        That is every second pixel of the large one: 50 x 64 pixels stand for 100 x 128 of it, and
        it ends at 99 x 127.
        """
        cfg = msad_cfg(tmp_path / "s.yaml", detector, aligned_teacher(detector))
        model = inherited(cfg)
        stock = build_model(student_cfg(cfg))
        assert type(stock) is type(model.student)
        stock.load_state_dict(model.student.state_dict())
        large = [torch.randint(0, 256, (3, *size)).byte() for size in ((96, 128), (99, 127))]
        batch = [
            {"image": image, "height": 3 * image.shape[1], "width": 3 * image.shape[2]}
            for image in large
        ]
        small = [
            {"image": pixels, "height": 6 * pixels.shape[1], "width": 6 * pixels.shape[2]}
            for pixels in (image[:, ::2, ::2] for image in large)
        ]
        found, expected = self.boxes(model, batch), self.boxes(stock, small)
        for a, b, item in zip(found, expected, batch, strict=True):
            size = (item["height"], item["width"])
            b.pred_boxes.clip(size)
            b = b[b.pred_boxes.nonempty()]
            assert a.image_size == size
            assert len(a) == len(b) > 0
            assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
            assert torch.equal(a.scores, b.scores)
        # In the original's frame: some lie beyond the loaded image.
        assert found[0].pred_boxes.tensor.max() > 128

    def test_runs_no_teacher_and_no_full_view(
        self, aligned_teacher: MakeAligned, tmp_path: Path
    ) -> None:
        cfg = msad_cfg(tmp_path / "s.yaml", "fcos", aligned_teacher())
        model = build_model(cfg).eval()
        batch = [{"image": torch.zeros(3, *size)} for size in ((128, 192), (64, 100))]
        calls = calls_of(model.student.backbone, lambda: model(batch))
        assert [tuple(inputs[0].shape) for inputs, _ in calls] == [(2, 3, 64, 96)]
        assert calls_of(model.teacher.model.detector.backbone, lambda: model(batch)) == []


@pytest.mark.parametrize(
    ("keys", "warned"),
    [
        ({}, False),
        ({"KD.STUDENT.VIEW_INTERPOLATION": "bilinear"}, True),
        ({"KD.STUDENT.VIEW_FACTOR": 1.0, "KD.DISTILLERS": []}, False),
    ],
)
def test_another_small_image_than_the_teachers_is_warned_about(
    aligned_teacher: MakeAligned,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    keys: dict[str, Any],
    warned: bool,
) -> None:
    build_model(msad_cfg(tmp_path / "s.yaml", "fcos", aligned_teacher(), **keys))
    found = "by 2 (bilinear), but the aligned teacher learned on images reduced by 2 (nearest)"
    assert (found in caplog.text) is warned


@pytest.mark.parametrize("detector", ["mask_rcnn", "keypoint_rcnn"])
def test_ground_truth_follows_the_view(
    aligned_teacher: MakeAligned, tiny_records: Records, tmp_path: Path, detector: str
) -> None:
    cfg = msad_cfg(tmp_path / "s.yaml", detector, aligned_teacher(detector))
    model = build_model(cfg)
    batch = tiny_runs.batch_of(cfg, tiny_records)
    seen: list[Any] = []
    model.student.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    tiny_runs.losses_at(model, batch)
    for item, loaded in zip(seen, batch, strict=True):
        assert [2 * side for side in item["image"].shape[1:]] == list(loaded["image"].shape[1:])
        own, full = item["instances"], loaded["instances"]
        assert len(own) == 2
        assert torch.equal(2 * own.gt_boxes.tensor, full.gt_boxes.tensor)
        if detector == "mask_rcnn":
            pairs = zip(own.gt_masks.polygons, full.gt_masks.polygons, strict=True)
            assert all((2 * a[0] == b[0]).all() for a, b in pairs)
        else:
            a, b = own.gt_keypoints.tensor, full.gt_keypoints.tensor
            assert torch.equal(2 * a[..., :2], b[..., :2]) and torch.equal(a[..., 2], b[..., 2])


@pytest.mark.parametrize(("key", "value"), [("TEST.PRECISE_BN.ENABLED", True), ("VIS_PERIOD", 20)])
def test_what_an_aligned_teacher_cannot_do_is_refused(
    aligned_teacher: MakeAligned, key: str, value: Any
) -> None:
    cfg = load_config(str(aligned_teacher().config_file), [key, value])
    with pytest.raises(ValueError, match=rf"^{key} is {value}.*AlignedMultiScaleDetector"):
        build_model(cfg)
