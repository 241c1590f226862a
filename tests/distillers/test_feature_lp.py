"""L1/L2 between paired maps."""

from typing import Any, ClassVar

import pytest
import torch
from contract import DistillerContract, Scene, make_scene
from torch import Tensor

from kd_det.distillers import FeatureLp, Pair, Step, Targets


def step_of(*pairs: tuple[Tensor, Tensor], size: tuple[int, int] = (8, 16)) -> Step:
    """Pairs of maps of one image, at stride 8."""
    sizes = torch.tensor([size], dtype=torch.float32)
    levels = [Pair("p3~p3", 8.0, s, t, sizes) for s, t in pairs]
    return Step({"features": levels}, {}, Targets([], [], [size], []))


# Two channels, two cells of 8 px; differences 1, -2 | 3, 0.
STUDENT = torch.tensor([[[[2.0, 1.0]], [[3.0, 5.0]]]])
TEACHER = torch.tensor([[[[1.0, 3.0]], [[0.0, 5.0]]]])


class TestFeatureLp(DistillerContract):
    name = "FeatureLp"
    other: ClassVar[dict[str, Any]] = {
        "DISTANCE": "cosine",
        "P": 1,
        "NORMALIZE": True,
        "MASK_PADDING": True,
        "STUDENT_CAPTURE": "head.cls_subnet",
        "TEACHER_CAPTURE": "backbone@1",
        "ADAPTER": "always",
    }


class TestL1(TestFeatureLp):
    options: ClassVar[dict[str, Any]] = {"p": 1}


class TestCosine(TestFeatureLp):
    options: ClassVar[dict[str, Any]] = {"distance": "cosine"}

    def test_the_length_of_a_cells_vector_does_not_matter(self, scene: Scene) -> None:
        longer = scene.maps(lambda x: x * 8, "teacher")
        torch.testing.assert_close(self.total(longer), self.total(scene), rtol=1e-5, atol=1e-7)


class TestNormalized(TestFeatureLp):
    options: ClassVar[dict[str, Any]] = {"normalize": True}

    def test_gain_and_offset_of_a_channel_do_not_matter(self, scene: Scene) -> None:
        """PKD: only the correlation counts, up to the small number that guards the division."""
        gain = torch.tensor([0.5, 1.0, 2.0, 8.0]).double()[:, None, None]
        moved = scene.maps(lambda x: x * gain + 3, "teacher")
        torch.testing.assert_close(self.total(moved), self.total(scene), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("p", "expected"), [(1, 6 / 4), (2, 14 / 4)])
def test_hand_values(p: int, expected: float) -> None:
    losses = FeatureLp(p=p)(step_of((STUDENT, TEACHER)))
    assert losses.keys() == {""}
    assert losses[""].item() == pytest.approx(expected)


def test_levels_are_summed() -> None:
    coarse = (torch.full((1, 3, 1, 1), 2.0), torch.zeros(1, 3, 1, 1))
    losses = FeatureLp(p=2)(step_of((STUDENT, TEACHER), coarse))
    assert losses[""].item() == pytest.approx(14 / 4 + 4)


@pytest.mark.parametrize(("p", "expected"), [(1, 4 / 2), (2, 10 / 2)])
def test_mask_padding_averages_over_cells_on_the_image(p: int, expected: float) -> None:
    """An image of 8 x 9 px: the centre of the second cell, at 12 px, is not on it."""
    step = step_of((STUDENT, TEACHER), size=(8, 9))
    assert FeatureLp(p=p, mask_padding=True)(step)[""].item() == pytest.approx(expected)


def test_normalized_hand_value() -> None:
    """Channel by channel the two cells become -1, 1 in some order; a constant one becomes 0."""
    student = torch.tensor([[[[1.0, 3.0]], [[7.0, 5.0]], [[4.0, 4.0]]]])
    teacher = torch.tensor([[[[0.0, 9.0]], [[1.0, 2.0]], [[0.0, 1.0]]]])
    losses = FeatureLp(p=2, normalize=True)(step_of((student, teacher)))
    # Differences 0 0 | 2 -2 | 1 -1.
    assert losses[""].item() == pytest.approx((0 + 8 + 2) / 6, rel=1e-4)


def test_normalized_within_the_mask() -> None:
    student = torch.tensor([[[[1.0, 3.0, 500.0]]]])
    teacher = torch.tensor([[[[3.0, 1.0, -70.0]]]])
    step = step_of((student, teacher), size=(8, 16))
    loss = FeatureLp(p=2, normalize=True, mask_padding=True)(step)[""]
    assert loss.item() == pytest.approx(4, rel=1e-4)


@pytest.mark.parametrize("p", [0, 3])
def test_refuses_other_exponents(p: int) -> None:
    with pytest.raises(ValueError, match=rf"KD.FEATURE_LP.P is {p}, expected 1 or 2"):
        FeatureLp(p=p)


def test_captures() -> None:
    (spec,) = FeatureLp(student_capture="a", teacher_capture="b@1").captures()
    assert (spec.student, spec.teacher, spec.kind) == ("a", "b@1", "pyramid")


def test_valid_cells_are_those_whose_centre_is_on_the_image() -> None:
    """Images of 48 x 64 and 32 x 40 px at strides 8 and 16."""
    pairs = make_scene(("features",)).step().pairs["features"]
    counts = [pair.valid().sum((1, 2, 3)).tolist() for pair in pairs]
    assert counts == [[6 * 8, 4 * 5], [3 * 4, 2 * 2]]  # 40 / 16 = 2.5: the third centre is at 40
    assert pairs[0].valid().shape == (2, 1, 6, 8)
    assert pairs[0].valid()[1, 0, 3, 4] == 1
    assert pairs[0].valid()[1, 0, 4, 4] == 0


def test_an_unknown_distance_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"KD\.FEATURE_LP\.DISTANCE is 'cos', expected 'lp' or 'co"
    ):
        FeatureLp(distance="cos")  # type: ignore[arg-type]
