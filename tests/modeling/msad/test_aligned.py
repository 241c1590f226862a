import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny_aligned import (
    DENSE,
    DETECTORS,
    HIGH,
    LOW,
    aligned,
    assert_same_detections,
    batch,
    detector_cfg,
)
from tiny_runs import calls_of
from torch import nn

import kd_det.modeling  # noqa: F401
from kd_det.functional.resize import reduce_image
from kd_det.modeling.msad.aligned import BRANCHES


@pytest.fixture(autouse=True)
def storage() -> Iterator[EventStorage]:
    torch.manual_seed(0)
    with EventStorage() as storage:
        yield storage


@pytest.mark.filterwarnings("ignore:Mean of empty slice:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered in scalar divide:RuntimeWarning")
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("name", DETECTORS)
def test_every_parameter_gets_a_gradient(name: str, empty: bool) -> None:
    model = aligned(name)
    losses = model(batch(empty))
    plain = {key.rsplit("_", 1)[0] for key in losses}
    assert set(losses) == {f"{key}_{branch}" for key in plain for branch in BRANCHES}
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    without = [key for key, p in model.named_parameters() if p.grad is None]
    assert without == []
    if not empty:
        assert all(loss > 0 for loss in losses.values())


@pytest.mark.parametrize("name", DETECTORS)
def test_high_branch_equals_the_wrapped_detector(name: str) -> None:
    """Losses and detections of the high branch are those of the detector alone, padded alike."""
    model = aligned(name, EVAL_BRANCH="high", LOSS_WEIGHTS=[0.5, 1.0, 0.4])
    data = batch()
    torch.manual_seed(1)
    alone = copy.deepcopy(model.detector)(data)
    torch.manual_seed(1)
    losses = model(data)
    assert {f"{key}_high" for key in alone} <= set(losses)
    for key, loss in alone.items():
        torch.testing.assert_close(losses[f"{key}_high"], 0.5 * loss)
    model.eval()
    for found, expected in zip(model(data), model.detector(data), strict=True):
        assert_same_detections(found["instances"], expected["instances"])


@pytest.mark.parametrize("name", DETECTORS)
def test_low_branch_equals_a_plain_detector_on_the_reduced_image(name: str) -> None:
    """Same weights by name; boxes come out in the full frame without any scaling."""
    model = aligned(name, EVAL_BRANCH="low", INTERPOLATION="area").eval()
    student = build_model(detector_cfg(name, LOW)).eval()
    state = model.inheritable_state()
    student.load_state_dict({key: state[key] for key in student.state_dict()})
    assert set(state) - set(student.state_dict()) == {
        "backbone.top_block.p7.weight",
        "backbone.top_block.p7.bias",
    }
    image = torch.rand(3, 96, 128) * 255
    full = {"image": image, "height": 96, "width": 128}
    reduced = {"image": reduce_image(image, 2, "area"), "height": 96, "width": 128}
    found, expected = model([full])[0]["instances"], student([reduced])[0]["instances"]
    assert_same_detections(found, expected)
    if name == "Mask":
        assert (found.pred_masks == expected.pred_masks).float().mean() > 0.999
    if name == "Keypoint":
        # Heatmaps, as the points themselves are rounded to pixels of the view.
        heatmaps = []
        for detector, item in ((model.detector, full), (student, reduced)):
            head = detector.roi_heads.keypoint_head.score_lowres
            owner = model if detector is model.detector else student
            heatmaps.append(calls_of(head, lambda: owner([item]))[0][1])  # noqa: B023
        torch.testing.assert_close(*heatmaps, atol=1e-4, rtol=1e-3)


def test_each_branchs_weight_scales_its_losses() -> None:
    """Published: 1, 1, 0.4."""
    model = aligned("RetinaNet")
    data = batch()
    published = model(data)
    model.loss_weights = dict.fromkeys(BRANCHES, 1.0)
    model.detector.loss_normalizer = 100.0
    plain = model(data)
    for key, loss in published.items():
        factor = 0.4 if key.endswith("_fused") else 1.0
        torch.testing.assert_close(loss, factor * plain[key])


@pytest.mark.parametrize("name", DETECTORS)
def test_batch_of_four_equals_four_batches_of_one(name: str) -> None:
    """(j), with images of equal size, so that padding is equal as well."""
    model = aligned(name).eval()
    data = [{"image": torch.rand(3, 64, 96) * 255} for _ in range(4)]
    together = [x["instances"] for x in model(data)]
    alone = [model([item])[0]["instances"] for item in data]
    for found, expected in zip(together, alone, strict=True):
        assert_same_detections(found, expected)
    assert not torch.equal(alone[0].scores, alone[1].scores)


@pytest.mark.parametrize("branch", BRANCHES)
def test_evaluation_runs_only_what_the_branch_needs(branch: str) -> None:
    model = aligned("RetinaNet", EVAL_BRANCH=branch).eval()
    views = calls_of(model.detector.backbone, lambda: model([{"image": torch.rand(3, 64, 100)}]))
    sizes = [tuple(inputs[0].shape[2:]) for inputs, _ in views]
    assert sizes == {"high": [(64, 128)], "low": [(32, 64)], "fused": [(64, 128), (32, 64)]}[branch]
    assert [list(out) for _, out in views] == {"high": [HIGH], "low": [LOW], "fused": [HIGH, LOW]}[
        branch
    ]
    fused = calls_of(model.fusion, lambda: model([{"image": torch.rand(3, 64, 100)}]))
    assert len(fused) == (branch == "fused")


@pytest.mark.parametrize("name", DENSE)
def test_targets_are_computed_once_and_shared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels are the same objects in all branches; the loss normaliser moves once per step."""
    model = aligned(name)
    detector = type(model.detector)
    calls, labels, steps = [], [], []
    label_anchors, losses, ema = detector.label_anchors, detector.losses, detector._ema_update

    def counted(self: nn.Module, *args: Any) -> Any:
        calls.append(label_anchors(self, *args))
        return calls[-1]

    def recorded(self: nn.Module, *args: Any) -> Any:
        # Some detectors label with one object, others with (labels, boxes).
        targets = calls[-1] if isinstance(calls[-1], tuple) else (calls[-1],)
        labels.append(all(any(x is y for x in args) for y in targets))
        return losses(self, *args)

    def moved(self: nn.Module, *args: Any) -> float:
        steps.append(ema(self, *args))
        return steps[-1]

    monkeypatch.setattr(detector, "label_anchors", counted)
    monkeypatch.setattr(detector, "losses", recorded)
    monkeypatch.setattr(detector, "_ema_update", moved)
    model(batch())
    assert len(calls) == 1 and labels == [True] * 3
    assert len(steps) <= 1
    model(batch())
    assert len(calls) == 2


def test_anchors_are_sampled_once() -> None:
    model = aligned("Faster")
    rpn = model.detector.proposal_generator
    found = []
    original = rpn.losses
    rpn.losses = lambda *args: found.append(args[2]) or original(*args)
    model(batch())
    assert len(found) == 3
    assert found[0] is found[1] is found[2]


def test_loss_normaliser_moves_once_per_step() -> None:
    """Detectron2's RetinaNet: 0.9 of the old value, 100 at first, and 0.1 of the positives."""
    model = aligned("RetinaNet")
    data = batch()
    images = model.detector.preprocess_image(data)
    anchors = model.detector.anchor_generator(
        list(model._pyramids(images, ["high"])["high"].values())
    )
    labels, _ = model.detector.label_anchors(anchors, [x["instances"] for x in data])
    positives = sum(int(((x >= 0) & (x < 3)).sum()) for x in labels)
    model(data)
    assert model.detector.loss_normalizer == pytest.approx(0.9 * 100 + 0.1 * positives)


def test_branches_log_under_their_own_names(storage: EventStorage) -> None:
    aligned("Faster")(batch())
    names = {key.split("/", 1)[0] for key in storage.latest()}
    assert names == set(BRANCHES)


def test_masked_pooling_gets_the_sizes_without_padding() -> None:
    for masked, sizes in ((False, None), (True, [(61, 100), (80, 57)])):
        model = aligned("RetinaNet", MASK_PADDING=masked)
        ((inputs, _),) = calls_of(model.fusion, lambda: model(batch()))  # noqa: B023
        assert inputs[2:] == ([8, 16, 32, 64, 128], sizes)


@pytest.mark.parametrize("name", ["FCOS", "GFL", "Faster"])
def test_says_its_classes_and_the_view_it_expects(name: str) -> None:
    model = aligned(name, INTERPOLATION="area")
    assert model.num_classes == 3
    assert model.expected_view() == (2.0, "area")
