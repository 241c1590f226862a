"""The toolkit's rules on cases worked out by hand, and against a slow literal form of them."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_det.evaluation.crowdhuman_metrics import CrowdScene, crowd_metrics
from kd_det.evaluation.crowdhuman_official import (
    clip_to_frame,
    jaccard_index,
    log_average_miss_rate,
    match_official,
    official_metrics,
)


def strip(left: float, right: float) -> tuple[float, float, float, float]:
    """A box of height 10, so that areas and overlaps are those of intervals."""
    return (left, 0, right, 10)


def scene(
    people: Sequence[Sequence[float]] = (),
    ignored: Sequence[Sequence[float]] = (),
    detections: Sequence[Sequence[float]] = (),
    scores: Sequence[float] = (),
) -> CrowdScene:
    def boxes(rows: Sequence[Sequence[float]]) -> np.ndarray:
        return np.array(rows, dtype=np.float64).reshape(-1, 4)

    return CrowdScene(boxes(people), boxes(ignored), boxes(detections), np.array(scores, float))


# ---- hand-computed cases ------------------------------------------------------------------------


def test_points_are_joined_without_an_envelope():
    # 4 people in 2 images; in score order TP FP TP TP, one person missed.
    #   recall 1/4 1/4 2/4 3/4, precision 1 1/2 2/3 3/4
    #   AP = 1/4 (1/2 + 2/3) / 2 + 1/4 (2/3 + 3/4) / 2 = 31/96; with an envelope 60/96.
    #   False positives per image 0 1/2 1/2 1/2: seven references up to 0.3162 are reached by the
    #   second point, 3/4 missed; 0.5623 and 1 by none, so the last counts, 1/4 missed.
    first = scene(
        [strip(0, 10), strip(20, 30), strip(40, 50)],
        [],
        [strip(20, 30), strip(0, 10), strip(300, 310)],
        [0.6, 0.9, 0.8],
    )
    second = scene([strip(0, 10)], [], [strip(0, 10)], [0.7])
    found = official_metrics([first, second])
    assert found["AP"] == pytest.approx(100 * 31 / 96)
    logs = 7 * math.log(3 / 4) + 2 * math.log(1 / 4)
    assert found["MR"] == pytest.approx(100 * math.exp(logs / 9))
    assert found["recall"] == 75
    assert found["JI"] == pytest.approx(75, abs=1e-3)


def test_a_perfect_detector_misses_what_comes_before_its_first_detection():
    people = [strip(0, 10), strip(30, 40), strip(50, 60), strip(70, 80)]
    found = official_metrics([scene(people, [], people, [0.9, 0.8, 0.7, 0.6]), scene()])
    assert (found["AP"], found["MR"], found["recall"]) == (75, 0, 100)
    assert found["JI"] == pytest.approx(100 * 4 / (4 + 1e-6), abs=1e-9)


def test_the_first_point_at_a_reference_counts_though_a_later_one_misses_less():
    # TP TP FP TP of 4 people in one image: 1 false positive per image from the third point on.
    people = [strip(40 * i, 40 * i + 10) for i in range(4)]
    boxes = [*people[:2], strip(300, 310), people[2]]
    crowd = scene(people, [], boxes, [0.9, 0.8, 0.7, 0.6])
    assert official_metrics([crowd])["MR"] == pytest.approx(50)
    assert crowd_metrics([crowd])["MR"] == pytest.approx(100 * (0.5**8 * 0.25) ** (1 / 9))


def test_references_are_those_of_the_table():
    # 10 of 562 is 0.01779, which exceeds 10^-1.75 but not 0.0178: the second reference is met by
    # the eleventh false positive, after one of 4 people was found. The first is met by the sixth.
    hits = np.array([False] * 10 + [True, False, True])
    expected = math.exp((math.log(1) + math.log(3 / 4) + 7 * math.log(1 / 2)) / 9)
    assert log_average_miss_rate(hits, 4, 562) == pytest.approx(expected)


def test_equal_scores_come_in_the_order_of_images_and_detections():
    # TP TP FP: recall 1/3 2/3 2/3, AP 1/3, always 1/3 missed. FP TP TP: recall 0 1/3 2/3, precision
    # 0 1/2 2/3, AP 1/3 (1/4 + 7/12) = 5/18; seven references miss all, the last two 1/3.
    people = [strip(0, 10), strip(30, 40), strip(60, 70)]
    good = scene(people, [], people[:2], [0.5, 0.5])
    bad = scene([], [], [strip(0, 10)], [0.5])
    one_way, other_way = official_metrics([good, bad]), official_metrics([bad, good])
    assert one_way["AP"] == pytest.approx(100 / 3) and one_way["MR"] == pytest.approx(100 / 3)
    assert other_way["AP"] == pytest.approx(500 / 18)
    assert other_way["MR"] == pytest.approx(100 * math.exp(2 * math.log(1 / 3) / 9))
    assert one_way["JI"] == other_way["JI"]
    # Two detections of one person: the first in the list takes it.
    twice = scene([strip(0, 10)], [], [strip(0, 9), strip(0, 10)], [0.5, 0.5])
    assert match_official(twice).tolist() == [1, 0]


def test_thresholds_are_exclusive():
    half = scene([strip(0, 10)], [], [strip(0, 5)], [0.9])  # IoU 5/10
    more = scene([strip(0, 10)], [], [strip(0, 5.01)], [0.9])
    covered = scene([], [strip(0, 100)], [strip(-5, 5)], [0.9])  # half of it inside
    mostly = scene([], [strip(0, 100)], [strip(-5, 5.01)], [0.9])
    labels = [int(match_official(s)[0]) for s in (half, more, covered, mostly)]
    assert labels == [0, 1, 0, -1]


def test_jaccard_takes_scores_above_the_threshold():
    # Above 0 both: 1/2. Above 0.1 neither: 0. With "at least 0.1" it would be the right one alone.
    crowd = scene([strip(0, 10)], [], [strip(0, 10), strip(30, 40)], [0.1, 0.05])
    assert jaccard_index([crowd]) == pytest.approx(1 / 2, abs=1e-6)
    # A score of 0 never counts.
    assert jaccard_index([scene([strip(0, 10)], [], [strip(0, 10)], [0.0])]) == 0


def test_jaccard_prefers_the_larger_overlap_to_more_pairs():
    # Strips of 60, shifted by 19 (IoU 41/79) or 1 (59/61):
    # P0 -19- D1 -1- P1 -19- D2 -1- P2 -19- D3.
    # Three pairs by 19 sum up to 1.56, two pairs by 1 to 1.93: 2 / (3 + 3 - 2).
    people = [strip(x, x + 60) for x in (0, 20, 40)]
    boxes = [strip(x, x + 60) for x in (19, 39, 59)]
    crowd = scene(people, [], boxes, [0.95] * 3)
    assert jaccard_index([crowd]) == pytest.approx(1 / 2, abs=1e-6)
    assert crowd_metrics([crowd])["JI"] == pytest.approx(100)


def test_what_is_ignored_does_not_count():
    crowd = scene(
        [strip(0, 10), strip(50, 60)],
        [strip(45, 65)],
        [strip(0, 10), strip(48, 49), strip(100, 110)],
        [0.95, 0.97, 0.5],
    )
    # One pair, the second person and the second detection excused, the third alone above 0.5.
    assert match_official(crowd).tolist() == [1, -1, 0]
    assert jaccard_index([crowd]) == pytest.approx(1, abs=1e-5)
    assert jaccard_index([crowd, scene(), scene(ignored=[strip(0, 9)])]) == jaccard_index([crowd])


def test_without_people_or_detections():
    found = official_metrics([scene([strip(0, 10)]), scene()])
    assert found == {"AP": 0.0, "MR": 100.0, "JI": 0.0, "recall": 0.0}
    assert all(math.isnan(value) for value in official_metrics([scene()]).values())
    with pytest.raises(ValueError, match="0 images"):
        official_metrics([])


def test_the_first_corner_ends_a_pixel_before_the_border():
    boxes = np.array([[-5.0, -6, 50, 60], [105, 2, 120, 30], [10, 99, 20, 130], [-9, 0, -3, 5]])
    assert clip_to_frame(boxes, 100, 80).tolist() == [
        [0, 0, 50, 60],
        [99, 2, 100, 30],
        [10, 79, 20, 80],
        [0, 0, 0, 5],
    ]


# ---- the rules once more, step by step ----------------------------------------------------------


def ratio(a: Sequence[float], b: Sequence[float], of_union: bool) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    area_a, area_b = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return common / ((area_a + area_b - common if of_union else area_a) + 1e-6)


def ignored(box: Sequence[float], regions: Any) -> bool:
    return any(ratio(box, region, False) > 0.5 for region in regions)


def slow_judgements(images: list[tuple]) -> list[tuple[float, bool]]:
    """(score, hit) of every detection that counts, image by image, sorted by a stable sort."""
    judged = []
    for people, regions, found in images:
        taken: set[int] = set()
        for box, score in sorted(found, key=lambda item: item[1], reverse=True):
            best, best_iou = None, 0.5
            for j, person in enumerate(people):
                if j not in taken and ratio(box, person, True) > best_iou:
                    best, best_iou = j, ratio(box, person, True)
            if best is not None:
                taken.add(best)
                judged.append((score, True))
            elif not ignored(box, regions):
                judged.append((score, False))
    return sorted(judged, key=lambda item: item[0], reverse=True)


def slow_curves(images: list[tuple]) -> tuple[float, float]:
    """AP and MR in percent."""
    num_people = sum(len(people) for people, _, _ in images)
    recalls, precisions, per_image = [], [], []
    hits = misfires = 0
    for _, hit in slow_judgements(images):
        hits, misfires = hits + hit, misfires + (not hit)
        recalls.append(hits / num_people)
        precisions.append(hits / (hits + misfires))
        per_image.append(misfires / len(images))
    area = 0.0
    for (r0, r1), (p0, p1) in zip(
        itertools.pairwise(recalls), itertools.pairwise(precisions), strict=True
    ):
        area += (r1 - r0) * (p0 + p1) / 2
    if not recalls:
        return 0.0, 100.0
    logs = 0.0
    for reference in (0.01, 0.0178, 0.0316, 0.0562, 0.1, 0.1778, 0.3162, 0.5623, 1.0):
        at = next((i for i, value in enumerate(per_image) if value >= reference), -1)
        logs += math.log(1 - recalls[at]) / 9 if recalls[at] < 1 else -math.inf
    return 100 * area, 100 * math.exp(logs)


def matchings(rows: int, columns: range) -> Iterator[list[tuple[int, int]]]:
    """All sets of pairs in which no row or column is twice."""
    if not rows:
        yield []
        return
    for rest in matchings(rows - 1, columns):
        yield rest
        yield from ([*rest, (rows - 1, j)] for j in columns if all(j != c for _, c in rest))


def slow_jaccard(images: list[tuple]) -> float:
    best = 0.0
    for threshold in range(10):
        values = []
        for people, regions, found in images:
            boxes = [box for box, score in found if score > 0.1 * threshold]
            iou = {
                (i, j): ratio(box, person, True)
                for (i, box), (j, person) in itertools.product(enumerate(boxes), enumerate(people))
            }
            allowed = (
                m
                for m in matchings(len(boxes), range(len(people)))
                if all(iou[pair] > 0.5 for pair in m)
            )
            pairs = max(allowed, key=lambda m: sum(iou[pair] for pair in m))
            rows, columns = {i for i, _ in pairs}, {j for _, j in pairs}
            n = sum(i in rows or not ignored(box, regions) for i, box in enumerate(boxes))
            m = sum(j in columns or not ignored(p, regions) for j, p in enumerate(people))
            if n or m:
                values.append(len(pairs) / (m + n - len(pairs) + 1e-6))
        best = max(best, sum(values) / len(values) if values else 0.0)
    return 100 * best


def as_scenes(images: list[tuple]) -> list[CrowdScene]:
    return [
        scene(people, regions, [box for box, _ in found], [score for _, score in found])
        for people, regions, found in images
    ]


# A coarse grid and coarse scores: equal scores, exact halves and rival overlaps are frequent.
grid = st.integers(0, 5)
some_box = st.builds(
    lambda x, y, w, h: (x, y, x + w, y + h), grid, grid, st.integers(1, 6), st.integers(1, 6)
)
some_image = st.tuples(
    st.lists(some_box, max_size=4),
    st.lists(some_box, max_size=2),
    st.lists(st.tuples(some_box, st.integers(0, 5).map(lambda n: n / 5)), max_size=6),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(some_image, min_size=1, max_size=3).filter(lambda s: any(p for p, _, _ in s)))
def test_curves_agree_with_the_slow_form(images):
    found = official_metrics(as_scenes(images))
    assert (found["AP"], found["MR"]) == pytest.approx(slow_curves(images), abs=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_jaccard_agrees_with_the_slow_form(seed):
    # Boxes of real size in general position: no two matchings have the same sum of overlaps.
    rng = np.random.default_rng(seed)

    def boxes(count: int) -> list[list[float]]:
        corners = rng.uniform(0, 8, size=(count, 2))
        return np.hstack([corners, corners + rng.uniform(8, 20, size=(count, 2))]).tolist()

    images = [
        (boxes(4), boxes(1), [(box, rng.integers(0, 11) / 10) for box in boxes(4)])
        for _ in range(4)
    ]
    found = official_metrics(as_scenes(images))
    assert found["JI"] == pytest.approx(slow_jaccard(images), abs=1e-9)
    assert (found["AP"], found["MR"]) == pytest.approx(slow_curves(images), abs=1e-9)
