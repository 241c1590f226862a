"""SSIM on paired levels; `functional.ssim` has tests of its own."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import tiny_runs
import torch
from contract import DistillerContract, Scene
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tiny_runs import TinyTeacher

from kd_det.distillers import SSIM
from kd_det.functional.ssim import SSIMOptions, ssim_loss


class TestSSIM(DistillerContract):
    name = "SSIM"
    other: ClassVar[dict[str, Any]] = {
        "WINDOW_SIZE": 7,
        "SIGMA": 2.0,
        "WINDOW": "box",
        "BORDER": "renorm",
        "NORMALIZE": "image",
        "EXPONENTS": [0, 1, 1],
        "MASK_PADDING": True,
        "STUDENT_CAPTURE": "backbone@0",
        "TEACHER_CAPTURE": "neck",
        "ADAPTER": "never",
    }

    def test_is_the_sum_over_levels_of_the_functional_form(self, scene: Scene) -> None:
        pairs = scene.step().pairs["features"]
        expected = sum(ssim_loss(pair.student, pair.teacher) for pair in pairs)
        torch.testing.assert_close(self.losses(scene), {"": expected})

    def test_every_option_reaches_the_functional_form(self, scene: Scene) -> None:
        options: dict[str, Any] = {
            "window_size": 3,
            "sigma": 0.7,
            "window": "box",
            "border": "renorm",
            "normalize": "level",
            "exponents": (1, 0, 1),
        }
        pairs = scene.step().pairs["features"]
        for part in [{key: value} for key, value in options.items()]:
            functional = SSIMOptions(**part)
            expected = sum(ssim_loss(pair.student, pair.teacher, functional) for pair in pairs)
            assert self.total(scene, **part) == expected
        assert len({self.total(scene, **{k: v}).item() for k, v in options.items()}) == 6

    def test_mask_padding_hands_over_the_valid_cells(self, scene: Scene) -> None:
        pairs = scene.step().pairs["features"]
        expected = sum(ssim_loss(p.student, p.teacher, mask=p.valid()) for p in pairs)
        assert self.total(scene, mask_padding=True) == expected

    def test_gain_and_offset_of_a_channel_do_not_matter(self, scene: Scene) -> None:
        """Each channel of each image is brought to its own range first."""
        gain = torch.tensor([0.5, 1.0, 2.0, 8.0]).double()[:, None, None]
        moved = scene.maps(lambda x: x * gain - 5, "student")
        torch.testing.assert_close(self.total(moved), self.total(scene), rtol=1e-4, atol=0)

    def test_bounded_by_the_number_of_levels(self, scene: Scene) -> None:
        opposite = scene.maps(lambda x: -x, "teacher")
        assert 0 < self.total(scene) < 2
        assert 0 < self.total(opposite) < 2


class TestRenormBox(TestSSIM):
    options: ClassVar[dict[str, Any]] = {"window": "box", "border": "renorm", "window_size": 3}

    def test_is_the_sum_over_levels_of_the_functional_form(self, scene: Scene) -> None:
        pairs = scene.step().pairs["features"]
        options = SSIMOptions(**self.options)
        expected = sum(ssim_loss(p.student, p.teacher, options) for p in pairs)
        assert self.total(scene) == expected

    test_every_option_reaches_the_functional_form = None  # type: ignore[assignment]
    test_mask_padding_hands_over_the_valid_cells = None  # type: ignore[assignment]


def test_captures() -> None:
    (spec,) = SSIM(student_capture="a", teacher_capture="b").captures()
    assert (spec.student, spec.teacher, spec.kind) == ("a", "b", "pyramid")


@pytest.mark.parametrize("teacher", ["fcos", "faster_rcnn"])
def test_no_head_of_the_teacher_runs(
    tiny_student: Callable[..., CfgNode],
    tiny_teacher: Callable[[str], TinyTeacher],
    tiny_records: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    teacher: str,
) -> None:
    cfg = tiny_student("fcos", tiny_teacher(teacher), {"KD.DISTILLERS": ["SSIM"]})
    model = build_model(cfg)

    def fail(*args: Any) -> None:
        raise AssertionError("a head ran")

    heads = [m for name, m in model.teacher.model.named_children() if name != "backbone"]
    assert heads
    for head in heads:
        monkeypatch.setattr(head, "forward", fail)
    losses, _ = tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records))
    losses["loss_kd_ssim"].backward()
    gradients = [p.grad for p in model.student.backbone.parameters() if p.grad is not None]
    assert any(g.abs().sum() > 0 for g in gradients)
