import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny_aligned import HIGH, LOW, aligned, assert_same_detections, batch, detector_cfg
from torch import nn

import kd_det.modeling  # noqa: F401


@pytest.fixture(autouse=True)
def storage() -> Iterator[EventStorage]:
    torch.manual_seed(0)
    with EventStorage() as storage:
        yield storage


def test_split_statistics_equal_those_of_each_resolution_alone() -> None:
    """Running means after one step are those that a detector of that view alone would have."""
    model = aligned("RetinaNet", norm="BN", SPLIT_BN=True)
    plain = copy.deepcopy(model.detector.backbone)
    images = model.detector.preprocess_image(data := batch()).tensor
    model(data)
    norm = model.detector.backbone.bottom_up.res4[0].conv1.norm
    for view, name in ((images, "running_mean"), (images[..., ::2, ::2], "low_running_mean")):
        alone = copy.deepcopy(plain)
        alone(view)
        expected = alone.bottom_up.res4[0].conv1.norm.running_mean
        torch.testing.assert_close(getattr(norm, name), expected)
    assert norm.num_batches_tracked == norm.low_num_batches_tracked == 1
    state = model.inheritable_state()
    assert set(state) == set(aligned("RetinaNet", norm="BN").detector.state_dict())
    key = "backbone.bottom_up.res4.0.conv1.norm.running_mean"
    assert torch.equal(state[key], norm.low_running_mean)
    assert not torch.equal(state[key], norm.running_mean)


def test_split_statistics_survive_a_checkpoint_and_reach_evaluation() -> None:
    model = aligned("RetinaNet", norm="BN", SPLIT_BN=True, EVAL_BRANCH="low")
    for _ in range(3):
        model(batch())
    other = aligned("RetinaNet", norm="BN", SPLIT_BN=True, EVAL_BRANCH="low")
    other.load_state_dict(model.state_dict())
    data = [{"image": torch.rand(3, 64, 64) * 255}]
    found = other.eval()(data)[0]["instances"]
    assert_same_detections(found, model.eval()(data)[0]["instances"])
    cfg = detector_cfg("RetinaNet", LOW)
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.RETINANET.NORM = "BN"
    plain = build_model(cfg).eval()
    state = model.inheritable_state()
    plain.load_state_dict({key: state[key] for key in plain.state_dict()})
    reduced = [{"image": data[0]["image"][..., ::2, ::2], "height": 64, "width": 64}]
    assert_same_detections(found, plain(reduced)[0]["instances"])


@pytest.mark.parametrize("norm", ["FrozenBN", "GN", "SyncBN", "BN"])
def test_norms(norm: str) -> None:
    cfg = detector_cfg("RetinaNet", HIGH)
    cfg.MODEL.META_ARCHITECTURE = "AlignedMultiScaleDetector"
    cfg.MODEL.ALIGNED.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.RETINANET.NORM = "BN" if norm == "SyncBN" else ""
    cfg.MODEL.ALIGNED.SPLIT_BN = norm in ("BN", "SyncBN")
    model = build_model(cfg)
    losses = model(batch())
    assert all(torch.isfinite(loss) for loss in losses.values())
    if norm == "SyncBN":
        # Per level of the head: one update of each branch's statistics, none shared.
        head_norm = model.detector.head.cls_subnet[1][0]
        means = [head_norm.running_mean, head_norm.low_running_mean, head_norm.fused_running_mean]
        assert len({tuple(mean.tolist()) for mean in means}) == 3
    if norm in ("FrozenBN", "GN"):
        cfg.MODEL.ALIGNED.SPLIT_BN = True
        with pytest.raises(ValueError, match="no layer of the detector has running statistics"):
            build_model(cfg)


def test_trains_under_ddp_without_looking_for_unused_parameters(tmp_path: Path) -> None:
    """DDP raises in the second step when a parameter had no gradient in the first."""
    init = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=init, rank=0, world_size=1)
    try:
        for empty in (False, True):
            model = aligned("RetinaNet", norm="BN", SPLIT_BN=True)
            parallel = nn.parallel.DistributedDataParallel(model)
            for _ in range(2):
                sum(parallel(batch(empty)).values()).backward()
            norm = model.detector.backbone.bottom_up.stem.conv1.norm
            assert norm.num_batches_tracked == norm.low_num_batches_tracked == 2
    finally:
        torch.distributed.destroy_process_group()
