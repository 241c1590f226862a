import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_det.functional.pgd import (
    ClassificationTerms,
    classification_terms,
    mean_mask,
    regression_terms,
)

LN3 = math.log(3)
# Two images of two cells, a and b; channel 0 of the teacher is (ln 3, 0), then (0, ln 3).
TEACHER = torch.tensor([[[[LN3, 0.0]], [[0.0, 0.0]]], [[[0.0, LN3]], [[0.0, 0.0]]]])
STUDENT = torch.zeros_like(TEACHER)
IMPORTANCE = torch.tensor([[[0.8, 0.0]], [[0.4, 0.0]]])
BACKGROUND = torch.tensor([[[0, 1]], [[0, 1]]]).bool()
WEIGHTS = dict(alpha=0.08, beta=0.04, delta=0.0008)


def near(*values: float) -> list[object]:
    return [pytest.approx(value, abs=1.5e-6) for value in values]


class Scene:
    """Random features and masks of N images on one level, float64 unless told otherwise."""

    def __init__(self, images: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (images, 5, 3, 4)
        self.student = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        self.teacher = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        random = torch.rand(images, 3, 4, generator=generator, dtype=torch.float64)
        self.importance = torch.where(random < 0.4, random, 0)
        self.background = random > 0.7

    def classification(self, part: slice = slice(None)) -> ClassificationTerms:
        return classification_terms(
            self.student[part], self.teacher[part], self.importance[part], self.background[part]
        )


@pytest.mark.parametrize(
    ("tau", "level_weight", "foreground", "attention", "total"),
    [(1.0, 1.0, 1.836420, 1.035898, 0.147742), (0.8, 1.25, 2.050005, 1.256684, 0.206006)],
)
def test_classification_of_one_image(tau, level_weight, foreground, attention, total):
    terms = classification_terms(STUDENT[:1], TEACHER[:1], IMPORTANCE[:1], BACKGROUND[:1], tau)
    assert list(terms) == near(foreground, 0, attention)
    assert terms.weighted(**WEIGHTS, level_weight=level_weight) == near(total)[0]


@pytest.mark.parametrize(
    ("tau", "foreground", "attention", "total"),
    [(1.0, 0.724169, 1.0, 0.0934937), (0.8, 0.770427, 1.191629, 0.0995679)],
)
def test_regression_of_one_image(tau, foreground, attention, total):
    terms = regression_terms(STUDENT[:1], TEACHER[:1], IMPORTANCE[:1], tau)
    assert list(terms) == near(foreground, attention)
    assert terms.weighted(gamma=0.128, delta=0.0008) == near(total)[0]


@pytest.mark.parametrize(
    ("scope", "foreground", "background", "total"),
    [("image", 0.918210, 1.147762, 0.120196), ("batch", 1.377315, 2.295525, 0.202835)],
)
def test_classification_of_two_images(scope, foreground, background, total):
    terms = classification_terms(
        STUDENT, TEACHER, IMPORTANCE, BACKGROUND, tau=1.0, mask_scope=scope
    )
    assert list(terms) == near(foreground, background, 1.035898)
    assert terms.weighted(**WEIGHTS) == near(total)[0]


def test_regression_of_two_images_divides_by_the_positions_of_the_batch():
    terms = regression_terms(STUDENT, TEACHER, IMPORTANCE, tau=1.0)
    assert list(terms) == near(0.362085, 0.5)
    assert terms.weighted(gamma=0.128, delta=0.0008) == near(0.0467468)[0]


def loop_classification(scene: Scene, tau: float) -> list[float]:
    """The formulas, one image, position and channel at a time."""
    images, channels, height, width = scene.student.shape
    parts = [0.0, 0.0, 0.0]
    for n in range(images):
        attention = []
        for features in (scene.student[n].flatten(1), scene.teacher[n].flatten(1)):
            size = features.abs() / tau
            per_channel = [channels * torch.softmax(column, 0) for column in size.unbind(1)]
            attention.append((per_channel, height * width * torch.softmax(size.mean(0), 0)))
        (student_a, student_s), (teacher_a, teacher_s) = attention
        masks = (scene.importance[n].flatten(), scene.background[n].flatten().double())
        for p in range(height * width):
            gap = (scene.student[n] - scene.teacher[n]).flatten(1)[:, p]
            error = float(sum(a * g**2 for a, g in zip(teacher_a[p], gap, strict=True)))
            for part, mask in enumerate(masks):
                count = max(int((mask != 0).sum()), 1)
                parts[part] += float(mask[p] / count * teacher_s[p]) * error / images
            distance = float((student_a[p] - teacher_a[p]).abs().sum()) / (height * width)
            parts[2] += (distance + float(abs(student_s[p] - teacher_s[p]))) / images
    return parts


def loop_regression(scene: Scene, tau: float) -> list[float]:
    """The formulas, one position at a time."""
    channels = scene.student.shape[1]
    places = scene.importance.nonzero().tolist()
    parts = [0.0, 0.0]
    for n, y, x in places:
        student, teacher = scene.student[n, :, y, x], scene.teacher[n, :, y, x]
        student_a, teacher_a = (
            channels * torch.softmax(f.abs() / tau, 0) for f in (student, teacher)
        )
        error = float((teacher_a * (student - teacher) ** 2).mean())
        parts[0] += float(scene.importance[n, y, x]) * error / len(places)
        parts[1] += float((student_a - teacher_a).abs().sum()) / len(places)
    return parts


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**31), st.integers(1, 3), st.sampled_from([0.4, 0.8, 2.0]))
def test_parity_with_a_loop_over_positions(seed, images, tau):
    scene = Scene(images, seed)
    terms = classification_terms(
        scene.student, scene.teacher, scene.importance, scene.background, tau
    )
    assert [float(term) for term in terms] == pytest.approx(loop_classification(scene, tau))
    terms = regression_terms(scene.student, scene.teacher, scene.importance, tau)
    assert [float(term) for term in terms] == pytest.approx(loop_regression(scene, tau))


def test_classification_of_a_batch_is_the_mean_of_its_images():
    scene = Scene()
    scene.importance[1], scene.background[2] = 0, False
    single = torch.tensor([list(scene.classification(slice(n, n + 1))) for n in range(3)])
    torch.testing.assert_close(torch.tensor(list(scene.classification())), single.mean(0))


def test_equal_features_give_exactly_zero():
    scene = Scene(dtype=torch.float32)
    scene.student = scene.teacher.clone()
    assert list(scene.classification()) == [0, 0, 0]
    assert list(regression_terms(scene.student, scene.teacher, scene.importance)) == [0, 0]


def total(student: Tensor, scene: Scene, valid: Tensor | None = None) -> Tensor:
    terms = classification_terms(
        student, scene.teacher, scene.importance, scene.background, valid=valid
    )
    regression = regression_terms(student, scene.teacher, scene.importance)
    return terms.weighted(1.0, 0.5, 0.3, 1.25) + regression.weighted(1.6, 0.3)


@pytest.mark.parametrize("block_rows", [3, 1])
def test_gradients(monkeypatch, block_rows):
    monkeypatch.setattr("kd_det.functional.attention._rows_per_block", lambda features: block_rows)
    scene = Scene(images=2)
    scene.teacher.requires_grad_()
    student = scene.student.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: total(x, scene), student)
    total(student, scene).backward()
    assert scene.teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_empty_level_is_zero_finite_and_attached(dtype):
    scene = Scene(dtype=dtype)
    student = (scene.student * 20).requires_grad_()
    empty = torch.zeros(3, 3, 4)
    terms = classification_terms(student, scene.teacher, empty, empty.bool())
    regression = regression_terms(student, scene.teacher, empty)
    assert terms[:2] == (0, 0) and list(regression) == [0, 0]
    assert terms.attention > 0 and terms.attention.dtype == torch.float32
    loss = terms.weighted(**WEIGHTS) + regression.weighted(1, 1)
    loss.backward()
    assert student.grad is not None and student.grad.isfinite().all()
    (zero,) = torch.autograd.grad(
        regression_terms(student, scene.teacher, empty).foreground, student
    )
    assert not zero.any()


def test_single_cell_level():
    student = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
    one = torch.ones(1, 1, 1)
    terms = classification_terms(student, student * 0, one, one.bool(), tau=1.0)
    # Teacher attention is 1 everywhere; the student's is 2 / (1 + e^2) and 2 e^2 / (1 + e^2).
    expected = 2 * (math.e**2 - 1) / (1 + math.e**2)
    assert list(terms) == near(10, 10, expected)


def test_half_precision_equals_float32_of_the_same_numbers():
    scene = Scene(dtype=torch.float16)
    wide = Scene(dtype=torch.float16)
    wide.student, wide.teacher = scene.student.float(), scene.teacher.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = total(scene.student, scene)
    assert found == total(wide.student, wide)


def test_masked_padding_changes_nothing():
    scene, padded = Scene(), Scene()
    generator = torch.Generator().manual_seed(7)
    for name in ("student", "teacher"):
        noise = torch.randn(3, 5, 6, 9, generator=generator).double() * 3
        noise[..., :3, :4] = getattr(scene, name)
        setattr(padded, name, noise)
    padded.importance = torch.nn.functional.pad(scene.importance, (0, 5, 0, 3))
    padded.background = torch.nn.functional.pad(scene.background, (0, 5, 0, 3), value=True)
    valid = torch.zeros(3, 6, 9).bool()
    valid[:, :3, :4] = True
    student = padded.student.requires_grad_()
    found = total(student, padded, valid)
    torch.testing.assert_close(found, total(scene.student, scene))
    found.backward()
    assert student.grad is not None and not student.grad[:, :, 3:].any()
    assert abs(total(student, padded) - found) > 0.01


def test_mean_mask_counts_each_image():
    mask = torch.tensor([[[0.5, 0.0, 1.0]], [[0.0, 0.0, 0.0]]])
    assert mean_mask(mask).tolist() == [[[0.25, 0, 0.5]], [[0, 0, 0]]]


def test_errors_name_what_does_not_fit():
    scene = Scene()
    with pytest.raises(ValueError, match=r"\(3, 4, 3, 4\), the teacher's \(3, 5, 3, 4\)"):
        regression_terms(scene.student[:, 1:], scene.teacher, scene.importance)
    with pytest.raises(ValueError, match=r"\(3, 12\). Expected \(3, 3, 4\)"):
        regression_terms(scene.student, scene.teacher, scene.importance.flatten(1))
    with pytest.raises(ValueError, match="'level'"):
        classification_terms(
            scene.student,
            scene.teacher,
            scene.importance,
            scene.background,
            mask_scope="level",  # type: ignore[arg-type]
        )
