import numpy as np
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from kd_det.data import CheckedDatasetMapper


def test_crowd_boxes_follow_the_augmentation(tmp_path):
    Image.fromarray(np.zeros((40, 60, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    mapper = CheckedDatasetMapper(
        is_train=True,
        augmentations=[T.HFlipTransform(60)],
        image_format="BGR",
        instance_mask_format="polygon",
    )
    common = {"category_id": 0, "bbox_mode": BoxMode.XYWH_ABS}
    record = {
        "file_name": str(tmp_path / "a.png"),
        "height": 40,
        "width": 60,
        "annotations": [
            {**common, "bbox": [0, 0, 10, 10], "iscrowd": 0},
            {**common, "bbox": [50, 30, 20, 5], "iscrowd": 1},
        ],
    }
    mapped = mapper(record)
    assert len(mapped["instances"]) == 1
    # x 50..70 of a 60 pixels wide image is flipped to -10..10 and clipped.
    assert mapped["ignored_boxes"].tolist() == [[0, 30, 10, 35]]
    assert len(record["annotations"]) == 2
    without = mapper({**record, "annotations": record["annotations"][:1]})
    assert without["ignored_boxes"].shape == (0, 4)
