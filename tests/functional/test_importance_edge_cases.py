from math import ceil

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kd_det.bench.measure import peak_bytes
from kd_det.functional.gaussian_importance import ImportanceOptions, importance_maps
from kd_det.functional.level_grid import Grid, count_positions, grid_positions

LEVELS = (Grid(8, 12, 8), Grid(4, 6, 16), Grid(2, 3, 32), Grid(1, 1, 128))
R = count_positions(LEVELS)


class Batch:
    """Random predictions of a teacher for N images with up to M boxes each."""

    def __init__(self, images: int = 2, slots: int = 5, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(images, R, 3, generator=generator)
        points = grid_positions(LEVELS).float()
        reach = torch.rand(images, R, 4, generator=generator) * 24 + 4
        self.boxes = torch.cat([points - reach[..., :2], points + reach[..., 2:]], dim=2)
        corner = torch.rand(images, slots, 2, generator=generator) * 60
        size = torch.rand(images, slots, 2, generator=generator) * 30 + 4
        self.gt_boxes = torch.cat([corner, corner + size], dim=2)
        self.gt_classes = torch.randint(0, 3, (images, slots), generator=generator)
        self.gt_valid = torch.ones(images, slots, dtype=torch.bool)
        self.position_valid: Tensor | None = None

    def maps(self, top_k: int = 9, max_pairs: int = 1 << 20, gate: str = "before") -> list[Tensor]:
        return importance_maps(
            self.logits,
            self.boxes,
            self.gt_boxes,
            self.gt_classes,
            self.gt_valid,
            LEVELS,
            ImportanceOptions(top_k=top_k, gate=gate, max_pairs=max_pairs),  # type: ignore[arg-type]
            position_valid=self.position_valid,
        )


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


@pytest.mark.parametrize("slots", [0, 3])
def test_batch_without_boxes_is_all_zero(slots):
    batch = Batch(slots=slots)
    batch.gt_valid[:] = False
    maps = batch.maps()
    assert [tuple(m.shape) for m in maps] == [(2, R), (2, R)]
    assert not torch.stack(maps).any()


def test_an_image_without_boxes_stays_zero_beside_others():
    batch = Batch()
    alone = Batch()
    batch.gt_valid[0] = False
    maps, full = batch.maps(), alone.maps()
    assert not maps[0][0].any()
    assert_same([m[1] for m in maps], [m[1] for m in full])


def test_maps_lie_in_the_unit_interval_and_select_top_k_inside_boxes():
    batch = Batch(images=1, slots=1)
    batch.gt_boxes = torch.tensor([[[0.0, 0.0, 64.0, 64.0]]])
    for importance in batch.maps(top_k=9):
        assert (importance > 0).sum() == 9
        assert importance.max() <= 1
        x, y = grid_positions(LEVELS)[importance[0] > 0].unbind(1)
        assert x.max() < 64 and y.max() < 64


@pytest.mark.parametrize(("corner", "expected"), [(5.0, 0), (0.0, 1)])
def test_tiny_boxes(corner, expected):
    batch = Batch(images=1, slots=1)  # (4, 4) is the only position of [0, 0, 6, 6]
    batch.gt_boxes = torch.tensor([[[corner, corner, 6.0, 6.0]]])
    for importance in batch.maps():
        assert (importance > 0).sum() == expected
        assert importance.sum() == expected  # a single position weighs 1


def test_positions_of_zero_quality_are_never_selected():
    batch = Batch(images=1, slots=1)
    batch.gt_boxes = torch.tensor([[[0.0, 0.0, 64.0, 64.0]]])
    batch.boxes[:, 3:] = 0  # IoU 0 everywhere but at the first three positions
    for importance in batch.maps(top_k=30):
        assert importance[0].nonzero().flatten().tolist() == [0, 1, 2]
        expected = torch.tensor([1.5, 0, 1.5]).mul(-0.5).exp()
        torch.testing.assert_close(importance[0, :3], expected, atol=1e-4, rtol=0)


def test_broken_predictions_are_passed_over():
    batch = Batch(images=1, slots=1)
    batch.gt_boxes = torch.tensor([[[0.0, 0.0, 64.0, 64.0]]])
    expected_positions = Batch(images=1, slots=1)
    expected_positions.gt_boxes = batch.gt_boxes
    batch.logits[:, ::2] = torch.nan
    expected_positions.boxes[:, ::2] = 0
    assert_same(batch.maps(), expected_positions.maps())


def test_positions_on_padding_are_never_selected():
    batch, blind = Batch(), Batch()
    batch.position_valid = torch.rand(2, R, generator=torch.Generator().manual_seed(1)) < 0.5
    blind.boxes = blind.boxes * batch.position_valid[..., None]
    maps = batch.maps()
    assert_same(maps, blind.maps())
    assert not any((importance[~batch.position_valid] > 0).any() for importance in maps)


def test_order_and_padding_of_boxes_do_not_matter():
    batch, shuffled = Batch(), Batch()
    order = torch.tensor([3, 0, 4, 1, 2])
    padding = torch.tensor([[[0.0, 0.0, 90.0, 60.0]]]).expand(2, 2, 4)
    shuffled.gt_boxes = torch.cat([batch.gt_boxes[:, order], padding], dim=1)
    shuffled.gt_classes = torch.cat([batch.gt_classes[:, order], torch.full((2, 2), -7)], dim=1)
    shuffled.gt_valid = torch.tensor([[True] * 5 + [False] * 2] * 2)
    assert_same(shuffled.maps(), batch.maps())


def test_half_precision_predictions_give_float32_maps():
    batch = Batch()
    batch.logits, batch.boxes = batch.logits.half(), batch.boxes.half()
    rounded = Batch()
    rounded.logits, rounded.boxes = batch.logits.float(), batch.boxes.float()
    assert_same(batch.maps(), rounded.maps())
    assert batch.maps()[0].dtype == torch.float32


class LargestTensor(TorchDispatchMode):
    """Record the largest tensor that any operation returns, in elements."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("gate", ["before", "after"])
def test_chunks_bound_what_is_built_at_a_time(gate):
    batch = Batch(images=1, slots=200)
    batch.gt_boxes = torch.tensor([0.0, 0.0, 96.0, 64.0]).expand(1, 200, 4).contiguous()
    expected = batch.maps(gate=gate)
    with LargestTensor() as whole:
        batch.maps(gate=gate)
    with LargestTensor() as chunked:
        found = batch.maps(gate=gate, max_pairs=1000)
    assert_same(found, expected)
    assert whole.elements > 100 * R
    assert chunked.elements <= 4 * (1000 + R)  # four sides per pair


@pytest.mark.parametrize(("boxes", "anchors"), [(500, 1), (30, 9)])
def test_crowded_images_need_less_than_300_mb(boxes, anchors):
    """Boxes as large as an image of 800 x 1333 pixels: every position is a candidate of each."""
    grids = tuple(Grid(ceil(832 / s), ceil(1344 / s), s) for s in (8, 16, 32, 64, 128))
    count = count_positions(grids) * anchors
    corners = torch.tensor([0.0, 0.0, 1333.0, 800.0])
    arguments = (
        torch.randn(1, count, 1),
        corners + torch.randn(1, count, 4).mul(50),
        corners.expand(1, boxes, 4),
        torch.zeros(1, boxes, dtype=torch.int64),
        torch.ones(1, boxes, dtype=torch.bool),
        grids,
    )
    assert peak_bytes(lambda: importance_maps(*arguments), "cpu") < 300e6


def test_errors_name_what_does_not_fit():
    batch = Batch()
    batch.gt_classes[1, 2] = 3
    with pytest.raises(ValueError, match=r"run from \d to 3, but the teacher scores 3"):
        batch.maps()
    batch = Batch()
    batch.boxes = batch.boxes[:, 1:]
    with pytest.raises(ValueError, match=f"R = {R} positions"):
        batch.maps()
    batch = Batch()
    batch.gt_boxes = batch.gt_boxes[:1]
    with pytest.raises(ValueError, match=r"shapes \(1, 5, 4\), \(2, 5\) and \(2, 5\)"):
        batch.maps()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "around"}, r"'around'.*'before' or 'after'"),
        ({"exponents": (0.8, 1.2)}, r"\(0.8, 1.2\)"),
        ({"top_k": 0}, "top_k is 0"),
        ({"ridge": -1.0}, "ridge is -1"),
        ({"max_pairs": 0}, "max_pairs is 0"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ImportanceOptions(**options)
