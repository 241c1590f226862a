"""Importance of a batch against the method box by box, and both against a loop over positions."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_det.functional.gaussian_importance import (
    Gate,
    ImportanceOptions,
    importance_maps,
    importance_of_box,
)
from kd_det.functional.level_grid import Grid, count_positions, grid_positions


def loop_over_boxes(
    probability: Tensor,
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_classes: Tensor,
    gt_valid: Tensor,
    grids: tuple[Grid, ...],
    exponent: float,
    top_k: int,
    gate: Gate,
) -> Tensor:
    """The formulas, one box and one position at a time; (N, R * A, K) probabilities."""
    points = [tuple(point) for point in grid_positions(grids).tolist()]
    anchors = boxes.shape[1] // len(points)
    result = torch.zeros(len(boxes), len(points), dtype=torch.float64)
    for n, m in gt_valid.nonzero().tolist():
        x0, y0, x1, y1 = gt_boxes[n, m].tolist()
        candidates = []
        for r, (x, y) in enumerate(points):
            inside = min(x - x0, y - y0, x1 - x, y1 - y) > 1e-10
            best = 0.0
            for index in range(r * anchors, (r + 1) * anchors):
                u0, v0, u1, v1 = boxes[n, index].tolist()
                width, height = min(x1, u1) - max(x0, u0), min(y1, v1) - max(y0, v0)
                common = max(width, 0) * max(height, 0)
                iou = common / ((x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - common)
                p = probability[n, index, gt_classes[n, m]].item()
                best = max(best, p ** (1 - exponent) * iou**exponent)
            if best > 0 and (inside or gate == "after"):
                candidates.append((best, r, inside))
        chosen = sorted(candidates, reverse=True)[:top_k]
        if not chosen:
            continue
        xy = torch.tensor([points[r] for _, r, _ in chosen], dtype=torch.float64)
        centred = xy - xy.mean(0)
        sigma = centred.T @ centred / len(chosen) + 8.3e-4 * torch.eye(2, dtype=torch.float64)
        for (_, r, inside), d in zip(chosen, centred, strict=True):
            value = math.exp(-0.5 * float(d @ torch.linalg.solve(sigma, d)))
            result[n, r] = max(result[n, r].item(), value if inside else 0.0)
    return result


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    boxes_per_image=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    top_k=st.sampled_from([1, 4, 9, 200]),
    gate=st.sampled_from(["before", "after"]),
    anchors=st.sampled_from([1, 2]),
    max_pairs=st.sampled_from([1, 60, 1 << 20]),
)
def test_parity_with_a_loop_over_boxes(seed, boxes_per_image, top_k, gate, anchors, max_pairs):
    generator = torch.Generator().manual_seed(seed)
    grids = (Grid(6, 8, 8), Grid(3, 4, 16), Grid(2, 2, 32))
    count, images, slots = count_positions(grids), len(boxes_per_image), max(boxes_per_image)

    def random_boxes(*shape: int) -> Tensor:
        corner = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 50 - 5
        size = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 40 + 1
        return torch.cat([corner, corner + size], dim=-1)

    logits = torch.randn(images, count * anchors, 3, generator=generator, dtype=torch.float64)
    boxes, gt_boxes = random_boxes(images, count * anchors), random_boxes(images, slots)
    gt_classes = torch.randint(0, 3, (images, slots), generator=generator)
    gt_valid = torch.arange(slots) < torch.tensor(boxes_per_image)[:, None]
    options = ImportanceOptions(top_k=top_k, gate=gate, max_pairs=max_pairs)
    probability = logits.sigmoid()
    maps = importance_maps(logits, boxes, gt_boxes, gt_classes, gt_valid, grids, options)
    for found, exponent in zip(maps, options.exponents, strict=True):
        expected = loop_over_boxes(
            probability, boxes, gt_boxes, gt_classes, gt_valid, grids, exponent, top_k, gate
        )
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        one_by_one = torch.zeros_like(expected)
        for n, m in gt_valid.nonzero().tolist():
            of_box = importance_of_box(
                probability[n, :, gt_classes[n, m]].view(count, anchors),
                boxes[n].view(count, anchors, 4),
                grid_positions(grids),
                gt_boxes[n, m],
                exponent,
                options,
            )
            one_by_one[n] = torch.maximum(one_by_one[n], of_box)
        torch.testing.assert_close(one_by_one, found, atol=1e-12, rtol=0)
