"""What a model sees of the batch, and ground truth that follows it."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import (
    BitMasks,
    Boxes,
    Instances,
    Keypoints,
    PolygonMasks,
    RotatedBoxes,
)
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kd_det.distillation.detector import DistillationDetector
from kd_det.distillation.views import View, scale_instances

quick = settings(max_examples=30, deadline=None)


def item(height: int = 8, width: int = 12, **more: Any) -> dict[str, Any]:
    image = torch.arange(3 * height * width).remainder(251).reshape(3, height, width)
    return {"image": image.to(torch.uint8), "file_name": "a.png", "image_id": 7, **more}


def ground_truth(height: int = 8, width: int = 12, **fields: Any) -> Instances:
    return Instances((height, width), **fields)


def reduced(instances: Instances, factor: float = 2.0) -> Instances:
    batch = [item(*instances.image_size, instances=instances)]
    out: Instances = View(factor)(batch)[0]["instances"]
    return out


def test_factor_one_hands_the_batch_through() -> None:
    batch = [item(), item()]
    out = View()(batch)
    assert all(a is b for a, b in zip(batch, out, strict=True))
    assert "height" not in out[0]


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [((8, 12), 2, (4, 6)), ((9, 13), 2, (5, 7)), ((9, 13), 4, (3, 4)), ((9, 12), 1.5, (6, 8))],
)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "area"])
def test_image_is_reduced_and_the_rest_is_kept(
    size: tuple[int, int], factor: float, expected: tuple[int, int], interpolation: str
) -> None:
    given_item = item(*size, extra="x")
    (out,) = View(factor, interpolation)([given_item])
    assert out["image"].shape == (3, *expected)
    assert out["image"].dtype == torch.uint8
    assert {k: out[k] for k in ("file_name", "image_id", "extra")} == {
        "file_name": "a.png",
        "image_id": 7,
        "extra": "x",
    }
    # The frame for which the small image stands: as loaded, unless the original's is known.
    whole = tuple(side * factor for side in expected)
    assert (out["height"], out["width"]) == whole
    (out,) = View(factor, interpolation)([{**given_item, "height": 480, "width": 640}])
    assert out["height"] == round(480 * whole[0] / size[0])
    assert out["width"] == round(640 * whole[1] / size[1])


def test_interpolations_differ_as_they_should() -> None:
    image = torch.tensor([[0, 8, 100, 108], [16, 24, 116, 124]], dtype=torch.uint8)[None]
    values = {
        mode: View(2, mode)([{"image": image}])[0]["image"].flatten().tolist()
        for mode in ("nearest", "area")
    }
    assert values == {"nearest": [0, 100], "area": [12, 112]}
    (smooth,) = View(2, "bilinear")([{"image": image.float()}])
    assert 12 < smooth["image"][0, 0, 0] < smooth["image"][0, 0, 1] < 112


def test_boxes() -> None:
    out = reduced(ground_truth(gt_boxes=Boxes(torch.tensor([[1.0, 2.0, 11.0, 8.0]]))))
    assert out.image_size == (4, 6)
    assert out.gt_boxes.tensor.tolist() == [[0.5, 1.0, 5.5, 4.0]]


def test_a_whole_factor_divides_by_just_that() -> None:
    """9 x 13 becomes 5 x 7 cells, of which the image covers 4.5 x 6.5."""
    whole = ground_truth(9, 13, gt_boxes=Boxes(torch.tensor([[0.0, 0.0, 13.0, 9.0]])))
    assert reduced(whole).gt_boxes.tensor.tolist() == [[0.0, 0.0, 6.5, 4.5]]
    assert reduced(whole, 4.0).gt_boxes.tensor.tolist() == [[0.0, 0.0, 3.25, 2.25]]
    # Another factor by what the sides became: 6 x 9.
    boxes = reduced(whole, 1.5).gt_boxes.tensor
    torch.testing.assert_close(boxes, torch.tensor([[0.0, 0.0, 9.0, 6.0]]))


def test_the_image_is_divided_by_just_that_too() -> None:
    """A ramp's values are the coordinates that its cells stand for."""
    image = (torch.arange(13.0) + 0.5).expand(3, 9, 13)
    for mode in ("bilinear", "area"):
        row = View(2, mode)([{"image": image}])[0]["image"][0, 0]
        torch.testing.assert_close(row[1:5], torch.tensor([3.0, 5.0, 7.0, 9.0]))


def test_polygons() -> None:
    polygons = [
        [np.array([0.0, 0.0, 4.0, 0.0, 4.0, 6.0]), np.array([8.0, 2.0, 10.0, 2.0, 9.0, 5.0])],
        [np.array([1.0, 1.0, 3.0, 1.0, 3.0, 3.0, 1.0, 3.0])],
    ]
    out = reduced(ground_truth(gt_masks=PolygonMasks(polygons)))
    halves = [[p / 2 for p in ps] for ps in polygons]
    assert [len(ps) for ps in out.gt_masks.polygons] == [2, 1]
    for found, expected in zip(out.gt_masks.polygons, halves, strict=True):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_polygons_scale_x_by_the_width_and_y_by_the_height() -> None:
    polygon = np.array([13.0, 9.0, 0.0, 9.0, 6.5, 0.0])
    out = reduced(ground_truth(9, 13, gt_masks=PolygonMasks([[polygon]])))
    np.testing.assert_allclose(out.gt_masks.polygons[0][0], [6.5, 4.5, 0.0, 4.5, 3.25, 0.0])


def test_bitmasks_keep_cells_of_which_half_is_covered() -> None:
    mask = torch.zeros(2, 8, 12, dtype=torch.bool)
    mask[0, 2:6, 4:8] = True  # cells 1..2 x 2..3 exactly
    mask[1, 0, 0:3] = True  # half of cell (0, 0), a quarter of cell (0, 1)
    out = reduced(ground_truth(gt_masks=BitMasks(mask))).gt_masks
    expected = torch.zeros(2, 4, 6, dtype=torch.bool)
    expected[0, 1:3, 2:4] = True
    expected[1, 0, 0] = True
    assert out.tensor.dtype == torch.bool
    assert torch.equal(out.tensor, expected)
    # 7 x 11 pixels: the last cells' missing pixels are outside.
    odd = torch.ones(1, 7, 11, dtype=torch.bool)
    out = reduced(ground_truth(7, 11, gt_masks=BitMasks(odd))).gt_masks.tensor
    assert out[:, :3].all() and out[:, :, :5].all()
    assert not out[:, 3, 5].any()  # a quarter


def test_keypoints_keep_their_visibility() -> None:
    points = torch.tensor([[[2.0, 4.0, 2.0], [0.0, 0.0, 0.0], [11.0, 7.0, 1.0]]])
    out = reduced(ground_truth(gt_keypoints=Keypoints(points)))
    assert out.gt_keypoints.tensor.tolist() == [[[1, 2, 2], [0, 0, 0], [5.5, 3.5, 1]]]


def test_fields_without_geometry_are_kept() -> None:
    classes = torch.tensor([3, 1])
    out = reduced(
        ground_truth(gt_boxes=Boxes(torch.zeros(2, 4)), gt_classes=classes, weights=classes * 0.5)
    )
    assert torch.equal(out.gt_classes, classes)
    assert torch.equal(out.weights, classes * 0.5)
    assert len(out) == 2


def test_empty_ground_truth() -> None:
    out = reduced(
        ground_truth(
            gt_boxes=Boxes(torch.zeros(0, 4)),
            gt_classes=torch.zeros(0, dtype=torch.int64),
            gt_masks=BitMasks(torch.zeros(0, 8, 12, dtype=torch.bool)),
            gt_keypoints=Keypoints(torch.zeros(0, 3, 3)),
        )
    )
    assert len(out) == 0
    assert out.gt_masks.tensor.shape == (0, 4, 6)
    assert len(reduced(ground_truth(gt_masks=PolygonMasks([])))) == 0


def everything() -> dict[str, Any]:
    given = item(
        instances=ground_truth(
            gt_boxes=Boxes(torch.tensor([[1.0, 2.0, 11.0, 8.0]])),
            gt_classes=torch.tensor([1]),
            gt_masks=PolygonMasks([[np.array([1.0, 1.0, 3.0, 1.0, 3.0, 3.0])]]),
            gt_keypoints=Keypoints(torch.ones(1, 3, 3)),
        )
    )
    return {**given, "height": 16, "width": 24}


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "area"])
def test_inputs_are_not_modified(interpolation: str) -> None:
    batch = [everything()]
    before, image = copy.deepcopy(batch), batch[0]["image"]
    out = View(2, interpolation)(batch)
    own, kept = batch[0], before[0]
    assert list(own) == list(kept)
    assert own["image"] is image
    assert torch.equal(image, kept["image"])
    assert own["instances"].image_size == (8, 12)
    for name, value in kept["instances"].get_fields().items():
        now = own["instances"].get(name)
        if isinstance(value, PolygonMasks):
            np.testing.assert_array_equal(now.polygons[0][0], value.polygons[0][0])
        else:
            raw = [x if isinstance(x, Tensor) else x.tensor for x in (now, value)]
            assert torch.equal(*raw)
    assert out[0]["instances"] is not own["instances"]


@pytest.mark.parametrize("key", ["sem_seg", "proposals"])
def test_inputs_that_see_the_image_are_refused(key: str) -> None:
    batch = [item(**{key: torch.zeros(1)})]
    with pytest.raises(ValueError, match=rf"holds {key}, .* KD.STUDENT.VIEW_FACTOR 1"):
        View(2)(batch)
    assert View(1)(batch)[0] is batch[0]


@pytest.mark.parametrize(
    ("value", "kind"),
    [(RotatedBoxes(torch.zeros(1, 5)), "RotatedBoxes"), (torch.zeros(1, 4), "Tensor")],
)
def test_fields_of_unknown_geometry_are_refused(value: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"field gt_odd \({kind}\) has a geometry"):
        scale_instances(ground_truth(gt_odd=value), (4, 6), 0.5, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 0.5}, r"KD.STUDENT.VIEW_FACTOR is 0\.5.* expected >= 1"),
        ({"factor": 2, "interpolation": "cubic"}, "VIEW_INTERPOLATION is 'cubic', expected one of"),
    ],
)
def test_bad_views_are_refused_when_built(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        View(**options)


class Pixels(nn.Module):
    """
    Finds the bright rectangle of each image, as a detector would: boxes of its own input, then
    Detectron2's usual post-processing. In training it tells its ground truth by its "loss".
    """

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, inputs: list[dict[str, Any]]) -> Any:
        self.sizes = [tuple(x["image"].shape[-2:]) for x in inputs]
        if self.training:
            boxes = torch.cat([x["instances"].gt_boxes.tensor for x in inputs])
            return {"loss_sum": boxes.sum() + 0 * self.unused}
        return [{"instances": self._detect(x)} for x in inputs]

    def _detect(self, x: dict[str, Any]) -> Instances:
        height, width = x["image"].shape[-2:]
        ys, xs = (x["image"][0] > 100).nonzero().unbind(1)
        box = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
        found = Instances((height, width), pred_boxes=Boxes(box[None]), scores=torch.ones(1))
        return detector_postprocess(found, x.get("height", height), x.get("width", width))


def bright(size: tuple[int, int], box: tuple[int, int, int, int]) -> dict[str, Any]:
    image = torch.zeros(3, *size, dtype=torch.uint8)
    image[:, box[1] : box[3], box[0] : box[2]] = 200
    return {"image": image}


class TestEvaluation:
    @given(
        st.sampled_from([1.0, 2.0, 4.0]),
        st.sampled_from(["nearest", "bilinear", "area"]),
        st.integers(1, 3),
    )
    @quick
    def test_boxes_come_out_in_the_original_images_frame(
        self, factor: float, interpolation: str, enlarged: int
    ) -> None:
        model = DistillationDetector(student=Pixels(), view=View(factor, interpolation)).eval()
        batch = [bright((32, 48), (8, 16, 40, 24)), bright((32, 16), (0, 0, 8, 16))]
        for x in batch:
            x["height"], x["width"] = (side * enlarged for side in x["image"].shape[-2:])
        out = [x["instances"] for x in model(batch)]
        assert model.student.sizes == [(32 / factor, 48 / factor), (32 / factor, 16 / factor)]
        boxes = [x.pred_boxes.tensor[0].tolist() for x in out]
        assert boxes == [
            [v * enlarged for v in (8, 16, 40, 24)],
            [v * enlarged for v in (0, 0, 8, 16)],
        ]
        assert [x.image_size for x in out] == [(x["height"], x["width"]) for x in batch]

    def test_without_original_size_the_loaded_images_frame(self) -> None:
        model = DistillationDetector(student=Pixels(), view=View(2, "area")).eval()
        (out,) = model([bright((32, 48), (8, 16, 40, 24))])
        assert out["instances"].pred_boxes.tensor.tolist() == [[8, 16, 40, 24]]

    @given(
        st.sampled_from([2, 4]),
        st.sampled_from(["nearest", "bilinear", "area"]),
        st.integers(33, 37),
        st.integers(49, 53),
    )
    @quick
    def test_odd_sizes_are_no_exception(
        self, factor: int, interpolation: str, height: int, width: int
    ) -> None:
        """Boxes on whole cells come out as they went in; one at the border is cut there."""
        model = DistillationDetector(student=Pixels(), view=View(factor, interpolation)).eval()
        size = (height, width)
        inner, outer = (8, 16, 48, 32), (16, 8, width, height)
        found = [x["instances"] for x in model([bright(size, inner), bright(size, outer)])]
        assert [x.image_size for x in found] == [size, size]
        assert found[0].pred_boxes.tensor[0].tolist() == list(inner)
        assert found[1].pred_boxes.tensor[0].tolist() == list(outer)

    def test_what_lies_in_the_added_border_alone_is_dropped(self) -> None:
        class Border(nn.Module):
            def forward(self, inputs: list[dict[str, Any]]) -> Any:
                size = (inputs[0]["height"], inputs[0]["width"])
                boxes = torch.tensor([[49.0, 0.0, 50.0, 9.0], [1.0, 1.0, 50.0, 9.0]])
                masks = torch.ones(2, *size, dtype=torch.bool)
                found = Instances(size, pred_boxes=Boxes(boxes), pred_masks=masks)
                return [{"instances": found, "sem_seg": torch.zeros(3, *size)}]

        student = nn.Sequential(Border())
        student.weight = nn.Parameter(torch.zeros(()))
        model = DistillationDetector(student=student, view=View(2)).eval()
        (out,) = model([{"image": torch.zeros(3, 33, 49)}])
        assert out["sem_seg"].shape == (3, 33, 49)
        assert out["instances"].pred_boxes.tensor.tolist() == [[1, 1, 49, 9]]
        assert out["instances"].pred_masks.shape == (1, 33, 49)

    def test_training_sees_small_images_and_their_own_boxes(self) -> None:
        model = DistillationDetector(student=Pixels(), view=View(2)).train()
        x = bright((32, 48), (8, 16, 40, 24))
        x["instances"] = Instances(
            (32, 48), gt_boxes=Boxes(torch.tensor([[8.0, 16.0, 40.0, 24.0]]))
        )
        with EventStorage():
            losses = model([x])
        assert model.student.sizes == [(16, 24)]
        assert losses["loss_sum"].item() == (8 + 16 + 40 + 24) / 2
