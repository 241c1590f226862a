"""FGD's masks, terms and blocks: the specification's vectors, slow loops, and the edge cases."""

import math

import pytest
import torch
from torch import Tensor
from waves import assert_float32_whatever_autocast_says, random, wave

from kd_det.functional.attention import spatial_attention
from kd_det.functional.fgd import (
    GlobalContext,
    GlobalRelation,
    background_mask,
    channel_attention,
    focal_terms,
    foreground_mask,
)

S, T = wave((2, 4, 4, 6), 1, 0.1, 0), wave((2, 4, 4, 6), 1.2, 0.17, 0.3)
BOXES = [torch.tensor([[4.0, 4, 20, 12], [10, 8, 40, 30]]), torch.zeros(0, 4)]
NONE = [torch.zeros(0, 4)] * 2
FG = foreground_mask(BOXES, (4, 6), 8)
VALID = torch.ones(2, 4, 6).bool()
VALID[1, 3:], VALID[1, :, 2:] = False, False


def near(*values: float) -> list[object]:
    return [pytest.approx(value, abs=1.5e-9) for value in values]


def terms_of(boxes: list[Tensor], valid: Tensor | None = None) -> list[float]:
    fg = foreground_mask(boxes, (4, 6), 8).double()
    return [value.item() for value in focal_terms(S, T, fg, valid=valid)]


def loop(s: Tensor, t: Tensor, boxes: list[Tensor], valid: Tensor, tau: float) -> list[float]:
    """The three terms at stride 8, one image, cell and channel at a time."""
    images, channels, height, width = s.shape
    total = [0.0, 0.0, 0.0]
    for n in range(images):
        cells = [(i, j) for i in range(height) for j in range(width) if valid[n, i, j]]
        spatial, channel = [], []
        for maps in (s[n].abs(), t[n].abs()):
            logits = torch.stack([maps[:, i, j].mean() / tau for i, j in cells])
            spatial.append(dict(zip(cells, len(cells) * logits.softmax(0), strict=True)))
            means = [sum(row[i, j] for i, j in cells) / len(cells) for row in maps]
            channel.append(channels * (torch.stack(means) / tau).softmax(0))
        inside = {}
        for x0, y0, x1, y1 in boxes[n].tolist():
            rows = [i for i in range(height) if (i + 1) * 8 > y0 and i * 8 < y1]
            columns = [j for j in range(width) if (j + 1) * 8 > x0 and j * 8 < x1]
            box = [(i, j) for i in rows for j in columns]
            for cell in box:
                inside[cell] = max(inside.get(cell, 0), 1 / len(box))
        free = [cell for cell in cells if cell not in inside]
        for i, j in cells:
            error = float((channel[1] * (s[n, :, i, j] - t[n, :, i, j]) ** 2).sum())
            error *= float(spatial[1][i, j])
            total[0] += inside.get((i, j), 0) * error
            total[1] += error / len(free) if (i, j) in free else 0
            total[2] += float((spatial[0][i, j] - spatial[1][i, j]).abs())
        total[2] += float((channel[0] - channel[1]).abs().sum())
    return [value / images for value in total]


class TestMasks:
    def test_vectors(self) -> None:
        expected = [
            [1 / 6, 1 / 6, 1 / 6, 0, 0, 0],
            [1 / 6, 1 / 6, 1 / 6, 1 / 12, 1 / 12, 0],
            [0, 1 / 12, 1 / 12, 1 / 12, 1 / 12, 0],
            [0, 1 / 12, 1 / 12, 1 / 12, 1 / 12, 0],
        ]
        torch.testing.assert_close(FG[0], torch.tensor(expected))
        assert not FG[1].any()
        bg = background_mask(FG)
        torch.testing.assert_close(bg[0], (FG[0] == 0) / 8)
        assert bg[1].flatten().tolist() == near(*[1 / 24] * 24)

    @pytest.mark.parametrize(
        ("box", "cells"),
        [
            ((8, 8, 16, 16), [(1, 1)]),  # exactly one cell, half open
            ((7.9, 8, 16.1, 16), [(1, 0), (1, 1), (1, 2)]),
            ((17, 17, 18, 18), [(2, 2)]),  # smaller than a cell
            ((-30, -30, 4, 4), [(0, 0)]),  # hangs over the corner
            ((44, 28, 90, 90), [(3, 5)]),
            ((16, 8, 16, 16), []),  # without area
            ((24, 24, 8, 8), []),  # inverted
            ((48, 0, 64, 8), []),  # right of the map
            ((-20, -20, -8, -8), []),
            ((float("nan"), 0, 8, 8), []),
        ],
    )
    def test_cells_of_a_box(
        self, box: tuple[float, float, float, float], cells: list[tuple[int, int]]
    ) -> None:
        mask = foreground_mask([torch.tensor([box])], (4, 6), 8)
        assert [tuple(cell) for cell in mask[0].nonzero().tolist()] == cells
        assert mask.sum().item() == pytest.approx(float(bool(cells)))

    def test_order_of_boxes_does_not_matter(self) -> None:
        assert torch.equal(foreground_mask([BOXES[0].flip(0), BOXES[1]], (4, 6), 8), FG)

    def test_padding_is_no_background(self) -> None:
        bg = background_mask(FG, VALID)
        torch.testing.assert_close(bg[1], VALID[1] / 6)
        assert not background_mask(FG, torch.zeros_like(VALID)).any()


def test_attentions_of_the_vectors() -> None:
    spatial = spatial_attention(T.abs().mean(1), 0.5)
    assert [spatial[0, 0, 0].item(), spatial[1, 3, 5].item()] == near(0.762425145, 1.179349598)
    channel = channel_attention(T, 0.5)
    assert [channel[0, 0].item(), channel[1, 3].item()] == near(0.990839814, 1.054302131)


def test_terms_of_the_vectors() -> None:
    found = terms_of(BOXES)
    torch.manual_seed(0)
    found.append(GlobalRelation(4).double()(S, T).item())
    # The masks are float32.
    expected = [4.156987400, 4.723170987, 3.149191443, 112.745219073]
    assert found == pytest.approx(expected, rel=1e-7)
    weights = (1e-3, 5e-4, 5e-4, 5e-6)
    total = sum(w * value for w, value in zip(weights, found, strict=True))
    assert total == pytest.approx(0.008656895, rel=1e-6)


def test_no_boxes_and_nothing_but_boxes() -> None:
    full = [torch.tensor([[0.0, 0, 48, 32]])] * 2
    assert terms_of(NONE)[:2] == pytest.approx([0, 4.740168861], rel=1e-7)
    assert terms_of(full)[:2] == pytest.approx([4.740168861, 0], rel=1e-7)
    assert terms_of(NONE)[2] == terms_of(full)[2] > 0


def test_masks_of_the_release_give_its_values() -> None:
    """Its boxes end one cell later, and cells beyond the map count: 20 where 15 lie on it."""
    later = [BOXES[0] + torch.tensor([0.0, 0, 8, 8]), BOXES[1]]
    fg = foreground_mask(later, (4, 6), 8).double()
    found = focal_terms(S, T, torch.where((fg - 1 / 15).abs() < 1e-6, 1 / 20, fg))
    assert found.foreground.item() == pytest.approx(3.146361985, rel=1e-6)
    assert found.background.item() == pytest.approx(4.767702349, rel=1e-6)


@pytest.mark.parametrize("valid", [None, VALID])
def test_parity_with_the_loop(valid: Tensor | None) -> None:
    student, teacher = random(2, 3, 4, 6), random(2, 3, 4, 6, seed=1)
    boxes = [BOXES[0], torch.tensor([[1.0, 1.0, 7.0, 12.0]])]
    fg = foreground_mask(boxes, (4, 6), 8).double()
    found = [v.item() for v in focal_terms(student, teacher, fg, tau=0.8, valid=valid)]
    inside = torch.ones_like(VALID) if valid is None else valid
    assert found == pytest.approx(loop(student, teacher, boxes, inside, 0.8), rel=1e-7)


class TestBlocks:
    def relation(self) -> GlobalRelation:
        """Return the blocks of the vectors, in float64."""
        made = GlobalRelation(4).double()
        student = [(0.5, 0.9, 0.1), (0.6, 0.8, 0.2), (0.4, 1.1, 0.5), (0.1, 0.7, 0.3)]
        teacher = [(0.4, 1.3, 0.6), (0.5, 1.7, 0.9), (0.3, 0.6, 1.5), (0.2, 0.4, 0.8)]
        biases = [(0.1, (0.1, -0.2)), (-0.1, (0.3, 0.1))]
        blocks = zip((made.student, made.teacher), (student, teacher), biases, strict=True)
        for block, waves, (bias, first_bias) in blocks:
            one = torch.ones(2, dtype=torch.float64)
            block.load_state_dict(
                {
                    "attend.weight": wave((1, 4, 1, 1), *waves[0]),
                    "attend.bias": torch.tensor([bias], dtype=torch.float64),
                    "transform.0.weight": wave((2, 4), *waves[1]),
                    "transform.0.bias": torch.tensor(first_bias, dtype=torch.float64),
                    "transform.1.weight": one,
                    "transform.1.bias": 0 * one,
                    "transform.3.weight": wave((4, 2), *waves[2]),
                    "transform.3.bias": wave((4,), *waves[3]),
                }
            )
        return made

    def test_vectors(self) -> None:
        made = self.relation()
        found = [made.student(S)[0, 0, 0, 0].item(), made.teacher(T)[0, 0, 0, 0].item()]
        assert found == near(0.221274488, 0.797137655)
        assert made(S, T).item() == near(122.190901620)[0]

    def test_new_blocks_are_the_identity(self) -> None:
        made = GlobalRelation(4).double()
        assert torch.equal(made.student(S), S)
        assert made(T, T).item() == 0

    def test_parameters_at_256_channels(self) -> None:
        made = GlobalRelation(256)
        assert sum(p.numel() for p in made.parameters()) == 132866
        std = made.student.attend.weight.std().item()
        assert std == pytest.approx(math.sqrt(2 / 256), rel=0.2)
        assert not made.student.attend.bias.any()

    @pytest.mark.parametrize("channels", [1, 3])
    def test_odd_widths(self, channels: int) -> None:
        block = GlobalContext(channels)
        assert block.transform[0].out_features == 1
        assert torch.isfinite(block(torch.randn(2, channels, 3, 3))).all()

    def test_padding_is_as_a_smaller_map(self) -> None:
        made = self.relation()
        junk = S + 50 * ~VALID[:, None], T - 50 * ~VALID[:, None]
        cut = made(S[1:, :, :3, :2], T[1:, :, :3, :2])
        expected = (made(S[:1], T[:1]) + cut) / 2
        torch.testing.assert_close(made(*junk, VALID), expected)

    def test_both_blocks_learn_and_the_teachers_map_does_not(self) -> None:
        made, student, teacher = self.relation(), S.clone(), T.clone()
        made(student.requires_grad_(), teacher.requires_grad_()).backward()
        assert student.grad is not None and student.grad.any()
        assert teacher.grad is None
        assert all(p.grad is not None for p in made.parameters())

    def test_gradcheck(self) -> None:
        made = self.relation()

        def loss(x: Tensor) -> Tensor:
            return made(x, T[:, :, :2, :2], VALID[:, :2, :2])

        assert torch.autograd.gradcheck(loss, S[:, :, :2, :2].clone().requires_grad_())


@pytest.mark.parametrize("valid", [None, VALID])
def test_gradcheck(valid: Tensor | None) -> None:
    student, teacher, fg = random(2, 2, 4, 6), random(2, 2, 4, 6, seed=1), FG.double()

    def loss(x: Tensor) -> Tensor:
        return torch.stack(focal_terms(x, teacher, fg, valid=valid)).sum()

    assert torch.autograd.gradcheck(loss, student.requires_grad_(), fast_mode=True)


def test_equal_features_give_zero() -> None:
    assert [value.item() for value in focal_terms(T, T, FG)] == [0, 0, 0]


def test_padding_neither_matters_nor_learns() -> None:
    outside = ~VALID[:, None]
    student = (S + 50 * outside).requires_grad_()
    found = focal_terms(student, T - 50 * outside, FG.double(), valid=VALID)
    assert [value.item() for value in found] == pytest.approx(terms_of(BOXES, VALID))
    (grad,) = torch.autograd.grad(torch.stack(found).sum(), student)
    assert not (grad * outside).any()


def test_no_valid_cell_gives_zero_on_the_graph() -> None:
    student, nothing = S.clone().requires_grad_(), torch.zeros_like(VALID)
    relation = GlobalRelation(4).double()
    losses = [*focal_terms(student, T, 0 * FG, valid=nothing), relation(student, T, nothing)]
    assert [value.item() for value in losses] == [0, 0, 0, 0]
    torch.stack(losses).sum().backward()
    assert torch.equal(student.grad, torch.zeros_like(S))


def test_a_batch_is_the_mean_of_its_images() -> None:
    alone = [focal_terms(S[n : n + 1], T[n : n + 1], FG[n : n + 1]) for n in range(2)]
    for whole, parts in zip(focal_terms(S, T, FG), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.stack(parts).mean())


def test_the_teacher_gets_no_gradient() -> None:
    teacher = T.clone().requires_grad_()
    assert not any(value.requires_grad for value in focal_terms(S, teacher, FG))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_under_autocast(dtype: torch.dtype) -> None:
    def terms(student: Tensor, teacher: Tensor) -> Tensor:
        return torch.stack(focal_terms(student, teacher, FG)).sum()

    def relation(student: Tensor, teacher: Tensor) -> Tensor:
        made = TestBlocks().relation()
        return (made if student.dtype == torch.float64 else made.float())(student, teacher)

    assert_float32_whatever_autocast_says(terms, S, T, dtype=dtype)
    assert_float32_whatever_autocast_says(relation, S, T, dtype=dtype)
