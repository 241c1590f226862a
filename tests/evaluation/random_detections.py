"""Random ground truth and random detections of it, in COCO's formats."""

from typing import Any

import numpy as np
import pycocotools.mask as mask_util

SIDE = 160
KEYPOINTS = 4


def random_truth(rng: np.random.Generator, *, images: int = 12, classes: int = 3) -> dict[str, Any]:
    """Objects with boxes, box-shaped polygons and keypoints; one in eight is a crowd."""
    annotations = []
    for image in range(images):
        for _ in range(rng.integers(0, 6)):
            w, h = np.exp(rng.uniform(np.log(8), np.log(150), 2))
            x, y = rng.uniform(0, SIDE - w), rng.uniform(0, SIDE - h)
            crowd = rng.random() < 1 / 8
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            rle = mask_util.frPyObjects([polygon], SIDE, SIDE)[0]
            keypoints = np.stack(
                [
                    rng.uniform(x, x + w, KEYPOINTS),
                    rng.uniform(y, y + h, KEYPOINTS),
                    rng.integers(0, 3, KEYPOINTS),
                ],
                axis=1,
            )
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 7 * image + 3,
                    "category_id": int(rng.integers(classes)) * 2 + 1,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(crowd),
                    "segmentation": (
                        {"size": rle["size"], "counts": rle["counts"].decode()}
                        if crowd
                        else [polygon]
                    ),
                    "keypoints": keypoints.ravel().tolist(),
                    "num_keypoints": int((keypoints[:, 2] > 0).sum()),
                }
            )
    sizes = {"width": SIDE, "height": SIDE}
    return {
        "images": [{"id": 7 * i + 3, "file_name": f"{i}.jpg", **sizes} for i in range(images)],
        "annotations": annotations,
        "categories": [{"id": 2 * k + 1, "name": f"kind{k}"} for k in range(classes)],
    }


def random_results(
    rng: np.random.Generator, truth: dict[str, Any], *, quality: float = 0.12, extra: int = 4
) -> list[dict[str, Any]]:
    """Objects found with an error of about `quality` of their size, and false detections."""
    results = []
    for annotation in truth["annotations"]:
        if rng.random() < 0.8:
            x, y, w, h = annotation["bbox"]
            shift = rng.normal(0, quality, 4) * (w, h, w, h)
            box = [x + shift[0], y + shift[1], max(2, w + shift[2]), max(2, h + shift[3])]
            keypoints = np.array(annotation["keypoints"]).reshape(-1, 3)
            keypoints[:, :2] += rng.normal(0, quality * 20, (KEYPOINTS, 2))
            keypoints[:, 2] = 1
            results.append((annotation["image_id"], annotation["category_id"], box, keypoints))
    for image in truth["images"]:
        for _ in range(rng.integers(0, extra + 1)):
            box = [*rng.uniform(0, SIDE / 2, 2), *rng.uniform(4, SIDE / 2, 2)]
            category = rng.choice(truth["categories"])["id"]
            keypoints = rng.uniform(0, SIDE, (KEYPOINTS, 3))
            results.append((image["id"], category, box, keypoints))
    return [
        {
            "image_id": image_id,
            "category_id": category_id,
            "bbox": [float(v) for v in box],
            "score": float(rng.random()),
            "segmentation": _encode(mask_of_box(box)),
            "keypoints": keypoints.ravel().tolist(),
        }
        for image_id, category_id, box, keypoints in results
    ]


def mask_of_box(box: list[float]) -> np.ndarray:
    """The box in whole pixels as a mask, uint8 of (SIDE, SIDE)."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    x, y, right, bottom = np.clip(np.round([*box[:2], box[0] + box[2], box[1] + box[3]]), 0, SIDE)
    mask[int(y) : int(bottom), int(x) : int(right)] = 1
    return mask


def _encode(mask: np.ndarray) -> dict[str, Any]:
    rle = mask_util.encode(np.asfortranarray(mask))
    return {"size": rle["size"], "counts": rle["counts"].decode()}
