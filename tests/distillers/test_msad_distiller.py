"""MSAD's student: distances to the teacher's aligned pyramid."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import tiny_runs
import torch
from contract import DistillerContract, Scene, config
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tiny_runs import TinyTeacher
from torch import Tensor
from torch.nn import functional as F

from kd_det.distillation.capture import tensors_of
from kd_det.distillation.schedule import Schedule
from kd_det.distillers import AlignedPyramid, Pair, Step, Targets, build_distiller
from kd_det.functional.ssim import ssim_loss

Student = Callable[..., CfgNode]


class TestAlignedPyramid(DistillerContract):
    name = "AlignedPyramid"
    other: ClassVar[dict[str, Any]] = {
        "LOSS": "l2",
        "MASK_PADDING": True,
        "STUDENT_CAPTURE": "head.cls_subnet",
        "TEACHER_CAPTURE": "detector.backbone@1",
        "ADAPTER": "always",
    }


class TestL2(TestAlignedPyramid):
    options: ClassVar[dict[str, Any]] = {"loss": "l2"}


class TestSmoothL1(TestAlignedPyramid):
    options: ClassVar[dict[str, Any]] = {"loss": "smooth_l1"}


class TestCosine(TestAlignedPyramid):
    options: ClassVar[dict[str, Any]] = {"loss": "cosine"}

    def test_the_length_of_a_cells_vector_does_not_matter(self, scene: Scene) -> None:
        moved = scene.maps(lambda x: 7 * x, "teacher")
        torch.testing.assert_close(self.total(moved), self.total(scene))


class TestSsim(TestAlignedPyramid):
    options: ClassVar[dict[str, Any]] = {"loss": "ssim"}


def step_of(*pairs: tuple[Tensor, Tensor], size: tuple[int, int] = (8, 16)) -> Step:
    sizes = torch.tensor([size], dtype=torch.float32)
    levels = [Pair("p2~p3", 8.0, s, t, sizes) for s, t in pairs]
    return Step({"features": levels}, {}, Targets([], [], [size], []))


# One image, two channels, two cells: differences 1, -2 | 0.5, 0.
STUDENT = torch.tensor([[[[2.0, 1.0]], [[0.5, 4.0]]]])
TEACHER = torch.tensor([[[[1.0, 3.0]], [[0.0, 4.0]]]])
COSINE = [(2 * 1 + 0.5 * 0) / (4.25**0.5 * 1), (1 * 3 + 4 * 4) / (17**0.5 * 5)]


@pytest.mark.parametrize(
    ("loss", "full", "first_cell"),
    [
        ("l1", 3.5 / 4, 1.5 / 2),
        ("l2", 5.25 / 4, 1.25 / 2),
        ("smooth_l1", (0.5 + 1.5 + 0.125) / 4, (0.5 + 0.125) / 2),
        ("cosine", 1 - sum(COSINE) / 2, 1 - COSINE[0]),
    ],
)
def test_hand_values(loss: str, full: float, first_cell: float) -> None:
    step = step_of((STUDENT, TEACHER))
    assert AlignedPyramid(loss=loss)(step)[""].item() == pytest.approx(full, rel=1e-5)
    narrow = step_of((STUDENT, TEACHER), size=(8, 8))
    masked = AlignedPyramid(loss=loss, mask_padding=True)(narrow)[""]
    assert masked.item() == pytest.approx(first_cell, rel=1e-5)
    assert AlignedPyramid(loss=loss)(narrow)[""].item() == pytest.approx(full, rel=1e-5)


def test_ssim_is_the_functional_form() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1, 3, 12, 16, generator=generator) for _ in range(2))
    step = step_of((student, teacher), size=(80, 100))
    assert AlignedPyramid(loss="ssim")(step)[""] == ssim_loss(student, teacher)
    (pair,) = step.pairs["features"]
    masked = AlignedPyramid(loss="ssim", mask_padding=True)(step)[""]
    assert masked == ssim_loss(student, teacher, mask=pair.valid())


def test_weighted_it_is_the_papers_coefficient() -> None:
    """alpha * T^2 / T = 0.2 * 3 = 0.6 of the mean distance, summed over levels, after warm-up."""
    cfg = config()
    distiller = build_distiller("AlignedPyramid", cfg)
    cfg.KD.ALIGNED_PYRAMID.WEIGHT, cfg.KD.ALIGNED_PYRAMID.SCHEDULE.WARMUP_ITERS = 0.6, 500
    weight = Schedule.from_config(cfg.KD.ALIGNED_PYRAMID, 90000)
    coarse = (torch.full((1, 2, 1, 1), -3.0), torch.zeros(1, 2, 1, 1))
    loss = distiller(step_of((STUDENT, TEACHER), coarse))[""]
    values = [weight(t) * loss.item() for t in (0, 50, 500, 89999)]
    full = 0.6 * (3.5 / 4 + 3)
    assert values == pytest.approx([0, full / 10, full, full])


def test_unknown_loss() -> None:
    with pytest.raises(ValueError, match=r"LOSS is 'l3', expected one of l1, l2, smooth_l1"):
        AlignedPyramid(loss="l3")


def test_zero_vectors_have_finite_cosine_gradients() -> None:
    student = torch.zeros(1, 4, 2, 2, requires_grad=True)
    loss = AlignedPyramid(loss="cosine")(step_of((student, torch.ones(1, 4, 2, 2))))[""]
    loss.backward()
    assert loss.item() == pytest.approx(1)
    assert torch.isfinite(student.grad).all()  # type: ignore[arg-type]


HALF = {
    "KD.DISTILLERS": ["AlignedPyramid"],
    "KD.STUDENT.VIEW_FACTOR": 2.0,
    "KD.ALIGNED_PYRAMID.WEIGHT": 0.6,
    "KD.ALIGNED_PYRAMID.SCHEDULE.WARMUP_ITERS": 500,
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.TOP_BLOCK": "p6_c5",
    "MODEL.FCOS.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
}


@pytest.fixture(scope="module")
def aligned_teacher(
    tiny_data: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> TinyTeacher:
    """FCOS on both views of the image, P2..P7, as MSAD's first stage trains it."""
    keys = {
        "MODEL.META_ARCHITECTURE": "AlignedMultiScaleDetector",
        "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.TOP_BLOCK": "p6p7_c5",
    }
    return tiny_runs.make_teacher(tmp_path_factory.mktemp("aligned"), "fcos", **keys)


def test_half_view_student_of_the_aligned_teacher(
    tiny_student: Student, aligned_teacher: TinyTeacher, tiny_records: list[dict[str, Any]]
) -> None:
    """P2..P6 of half the image learn the fused P3..P7; value and warm-up by hand."""
    cfg = tiny_student("fcos", aligned_teacher, HALF)
    model = build_model(cfg)
    (wanted,) = model.active["AlignedPyramid"].captures
    assert [p.stride for p in wanted.pairs] == [8, 16, 32, 64, 128]
    assert not any(p.resample for p in wanted.pairs)

    batch = tiny_runs.batch_of(cfg, tiny_records)
    seen: list[list[Pair]] = []
    model.active["AlignedPyramid"].distiller.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].pairs["features"])
    )
    first, storage = tiny_runs.losses_at(model, batch, 0)
    assert "loss_kd_aligned_pyramid" not in first
    assert storage.history("kd/aligned_pyramid/weight").latest() == 0
    assert not seen  # at weight 0 the teacher does not even run

    losses, storage = tiny_runs.losses_at(model, batch, 250)
    assert storage.history("kd/aligned_pyramid/weight").latest() == pytest.approx(0.3)
    (pairs,) = seen
    expected = 0.3 * sum(F.l1_loss(pair.student, pair.teacher) for pair in pairs)
    torch.testing.assert_close(losses["loss_kd_aligned_pyramid"], expected)
    # The teacher's side is the fused pyramid, whose maps are blends of its two views' maps.
    fused: list[Any] = []
    model.teacher.model.fusion.register_forward_hook(lambda m, args, out: fused.append(out))
    tiny_runs.losses_at(model, batch, 250)
    for pair, x in zip(seen[-1], tensors_of(fused[0]), strict=True):
        height, width = pair.teacher.shape[-2:]
        assert torch.equal(pair.teacher, x[..., :height, :width])


def test_each_branch_of_the_aligned_teacher_can_teach(
    tiny_student: Student, aligned_teacher: TinyTeacher, tiny_records: list[dict[str, Any]]
) -> None:
    values = {}
    for capture in ("fusion", "detector.backbone@0", "detector.backbone@1"):
        keys = {**HALF, "KD.ALIGNED_PYRAMID.TEACHER_CAPTURE": capture}
        cfg = tiny_student("fcos", aligned_teacher, keys)
        tiny_runs.seed_all_rng(3)  # the same student and adapters each time
        model = build_model(cfg)
        losses, _ = tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records), 500)
        values[capture] = losses["loss_kd_aligned_pyramid"].item()
        assert losses["loss_kd_aligned_pyramid"].requires_grad
    assert len(set(values.values())) == 3
    assert all(value > 0 for value in values.values())
