"""CrowdHuman metrics against hand-computed cases and a slow implementation in plain Python."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_det.evaluation.crowdhuman_metrics import (
    CrowdScene,
    crowd_metrics,
    jaccard_index,
    match_caltech,
)

Box = tuple[int, int, int, int]


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


def test_perfect_detections():
    people = [strip(0, 10), strip(3, 13), strip(50, 60)]
    scenes = [scene(people, [strip(80, 99)], people, [0.99, 0.98, 0.97]), scene()]
    assert crowd_metrics(scenes) == {"AP": 100.0, "MR": 0.0, "JI": 100.0, "recall": 100.0}


def test_average_precision_and_miss_rate_by_hand():
    # 4 people in 2 images; in score order TP FP TP TP, one person missed.
    #   recall 1/4 1/4 2/4 3/4, precision 1 1/2 2/3 3/4, envelope 1 3/4 3/4 3/4.
    #   AP = 1/4 * 1 + 1/4 * 3/4 + 1/4 * 3/4 = 0.625
    # The false positive is 0.5 per image. 10^-2 ... 10^-0.5 = 0.316 are seven points before it,
    # with miss rate 3/4; 10^-0.25 = 0.562 and 1 allow it, and everything after: 1/4.
    #   MR = exp((7 ln 3/4 + 2 ln 1/4) / 9)
    far = strip(300, 310)
    first = scene(
        [strip(0, 10), strip(20, 30), strip(40, 50)],
        [],
        [strip(20, 30), strip(0, 10), far],
        [0.6, 0.9, 0.8],
    )
    second = scene([strip(0, 10)], [], [strip(0, 10)], [0.7])
    found = crowd_metrics([first, second])
    assert found["AP"] == pytest.approx(62.5, abs=1e-6)
    expected = 100 * math.exp((7 * math.log(0.75) + 2 * math.log(0.25)) / 9)
    assert found["MR"] == pytest.approx(expected, abs=1e-6)
    assert found["recall"] == pytest.approx(75.0, abs=1e-6)
    # JI, t <= 0.6: image 1 pairs 2 of 3 people and 3 detections, 2 / 4; image 2 1 / 1: mean 0.75.
    # Above it only falls: t = 0.7 gives (1/4 + 1) / 2.
    assert jaccard_index([first, second]) == (pytest.approx(0.75, abs=1e-9), 0.0)
    assert found["JI"] == pytest.approx(75.0, abs=1e-6)


def test_jaccard_chooses_the_score_threshold():
    # t = 0 ... 0.2: one pair, two detections, two people: 1/3. From 0.3 the stray one is gone: 1/2.
    stray = scene([strip(0, 10), strip(50, 60)], [], [strip(0, 10), strip(90, 99)], [0.85, 0.25])
    assert jaccard_index([stray]) == (0.5, 0.3)


def test_greedy_and_bipartite_matching_differ():
    # D1 = [1, 11] overlaps P1 = [0, 10] by 9/11 and P2 = [4, 14] by 7/13; D2 = [-2, 8] overlaps P1
    # by 8/12 and P2 by 4/16. Greedy: D1 takes P1, D2 finds nobody. Bipartite: D1-P2 and D2-P1.
    crowd = scene([strip(0, 10), strip(4, 14)], [], [strip(1, 11), strip(-2, 8)], [0.99, 0.98])
    assert match_caltech(crowd).tolist() == [1, 0]
    found = crowd_metrics([crowd])
    assert found["AP"] == pytest.approx(50.0, abs=1e-6)
    assert found["JI"] == pytest.approx(100.0, abs=1e-6)
    # Half of the people missed with no false positive at hand: every point is 1/2.
    assert found["MR"] == pytest.approx(50.0, abs=1e-6)


def test_a_duplicate_is_a_false_positive_and_order_follows_scores():
    person = strip(0, 10)
    twice = scene([person], [], [strip(0, 9), person], [0.5, 0.6])
    assert match_caltech(twice).tolist() == [0, 1]
    # JI: 1 / (1 + 2 - 1) with both, 1 from t = 0.6 on, where only the better one is left.
    assert jaccard_index([twice]) == (1.0, 0.6)


def test_thresholds_are_inclusive():
    half = scene([strip(0, 10)], [], [strip(0, 5)], [0.9])  # IoU 5/10
    less = scene([strip(0, 10)], [], [strip(0, 4.99)], [0.9])
    covered = scene([], [strip(0, 100)], [strip(-5, 5)], [0.9])  # half of it inside
    barely = scene([], [strip(0, 100)], [strip(-5.01, 5)], [0.9])
    labels = [int(match_caltech(s)[0]) for s in (half, less, covered, barely)]
    assert labels == [1, 0, -1, 0]


def test_ignore_regions_excuse_many_but_only_what_finds_nobody():
    # Both stray detections are excused; the one on the person counts although a region covers it.
    region = strip(0, 100)
    crowd = scene(
        [strip(0, 10)],
        [region],
        [strip(40, 50), strip(0, 10), strip(60, 70), strip(0, 10)],
        [0.9, 0.8, 0.95, 0.7],
    )
    assert match_caltech(crowd).tolist() == [-1, 1, -1, -1]
    assert crowd_metrics([crowd]) == {"AP": 100.0, "MR": 0.0, "JI": 100.0, "recall": 100.0}


def test_jaccard_takes_float32_scores_as_they_were_meant():
    """In float32, 0.7 is 0.69999999; the stray below it must go, and it must stay."""
    box, other = [[0.0, 0.0, 10.0, 20.0]], [[50.0, 0.0, 60.0, 20.0]]
    scores = [float(np.float32(0.7)), float(np.float32(0.6))]
    assert scores[0] < 0.7
    assert jaccard_index([scene(box, [], [*box, *other], scores)]) == (1.0, 0.7)


def test_jaccard_does_not_count_an_unfound_person_inside_an_ignore_region():
    crowd = scene([strip(0, 10), strip(50, 60)], [strip(45, 65)], [strip(0, 10)], [0.95])
    assert jaccard_index([crowd])[0] == 1.0
    assert crowd_metrics([crowd])["recall"] == 50.0  # Caltech matching does count them


def test_jaccard_leaves_the_excused_boxes_unmatched():
    # Both detections overlap the person, only the second lies in the region (5 of 8 wide). Pairing
    # the first leaves nothing to count, pairing the second would leave a false detection: 1, not
    # 1/2. The same with people and detections exchanged.
    rivals, single, region = [strip(0, 9), strip(3, 11)], [strip(0, 10)], [strip(6, 20)]
    for order in (1, -1):
        assert jaccard_index([scene(single, region, rivals[::order], [0.95, 0.95])])[0] == 1.0
        assert jaccard_index([scene(rivals[::order], region, single, [0.95])])[0] == 1.0


def test_without_people_only_false_detections_count():
    empty, ignored_only = scene(), scene(ignored=[strip(0, 10)])
    found = crowd_metrics([empty, ignored_only])
    assert all(math.isnan(value) for value in found.values())
    stray = scene(detections=[strip(0, 10)], scores=[0.95])
    assert jaccard_index([empty, stray]) == (0.0, 0.0)


def test_images_without_people_dilute_false_positives():
    # The stray detection scores higher. Over 100 images it is 10^-2 per image, which every point
    # allows, over 99 more, which the first point does not: eight points at the floor, one at 1.
    person = scene([strip(0, 10)], [], [strip(0, 10)], [0.9])
    stray = scene(detections=[strip(0, 10)], scores=[0.95])
    assert crowd_metrics([person, stray] + [scene()] * 98)["MR"] == 0.0
    diluted = crowd_metrics([person, stray] + [scene()] * 97)["MR"]
    assert diluted == pytest.approx(100 * 1e-10 ** (8 / 9), rel=1e-9)


def test_without_detections_everything_is_missed():
    found = crowd_metrics([scene([strip(0, 10)]), scene()])
    assert found == {"AP": 0.0, "MR": 100.0, "JI": 0.0, "recall": 0.0}


def test_some_points_without_a_miss_keep_the_logarithm_finite():
    # 1 image: the false positive comes first, so eight points miss everybody and the ninth nobody.
    # The floor of 1e-10 makes the mean 1e-10 ** (1 / 9).
    crowd = scene([strip(0, 10)], [], [strip(50, 60), strip(0, 10)], [0.9, 0.8])
    assert crowd_metrics([crowd])["MR"] == pytest.approx(100 * 1e-10 ** (1 / 9), abs=1e-6)


def test_equal_scores_enter_together_whatever_the_order_of_images():
    # A single threshold with one true and one false positive: AP = 1/2. Over 2 images that is 1/2
    # per image, allowed by the two points 0.562 and 1, at the floor; the other seven miss all.
    good = scene([strip(0, 10)], [], [strip(0, 10)], [0.5])
    bad = scene([], [], [strip(0, 10)], [0.5])
    one_way, other_way = crowd_metrics([good, bad]), crowd_metrics([bad, good])
    assert one_way == other_way
    assert one_way["AP"] == pytest.approx(50.0, abs=1e-6)
    assert one_way["MR"] == pytest.approx(100 * 1e-10 ** (2 / 9), abs=1e-6)


def test_boxes_without_area_overlap_nothing():
    flat = scene([strip(5, 5)], [strip(7, 7)], [strip(5, 5), strip(7, 7)], [0.9, 0.8])
    assert match_caltech(flat).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"people": np.zeros((2, 5))}, r"people has shape \(2, 5\)"),
        ({"scores": np.zeros(3)}, r"scores have shape \(3,\); expected one for each of the 1"),
        ({"scores": np.array([np.nan])}, "scores hold NaN"),
        ({"detections": np.array([[0, 0, np.inf, 1]])}, "detections hold NaN or infinite"),
    ],
)
def test_bad_scenes_are_refused(change, message):
    fine = {
        "people": np.zeros((0, 4)),
        "ignored": np.zeros((0, 4)),
        "detections": np.zeros((1, 4)),
        "scores": np.zeros(1),
    }
    with pytest.raises(ValueError, match=message):
        CrowdScene(**(fine | change))


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match="0 images"):
        crowd_metrics([])


# ---- the definitions once more, in plain Python -------------------------------------------------


def area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def common(a: Box, b: Box) -> int:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0


def overlap(a: Box, b: Box) -> bool:
    return 2 * common(a, b) >= area(a) + area(b) - common(a, b)


def excused(box: Box, regions: list[Box]) -> bool:
    return any(2 * common(box, region) >= area(box) for region in regions)


def slow_labels(people: list[Box], regions: list[Box], found: list[tuple[Box, float]]) -> list[int]:
    labels, free = [0] * len(found), set(range(len(people)))
    for i in sorted(range(len(found)), key=lambda i: -found[i][1]):
        box = found[i][0]
        best, best_iou = None, 0.0
        for j in sorted(free):
            iou = common(box, people[j]) / (area(box) + area(people[j]) - common(box, people[j]))
            if overlap(box, people[j]) and iou > best_iou:
                best, best_iou = j, iou
        if best is not None:
            labels[i] = 1
            free.remove(best)
        elif excused(box, regions):
            labels[i] = -1
    return labels


def matchings(edges: dict[int, list[int]], rows: list[int], used: frozenset) -> Iterator[dict]:
    if not rows:
        yield {}
        return
    yield from matchings(edges, rows[1:], used)
    for j in edges[rows[0]]:
        if j not in used:
            for rest in matchings(edges, rows[1:], used | {j}):
                yield {rows[0]: j} | rest


def slow_jaccard(people: list[Box], regions: list[Box], boxes: list[Box]) -> float | None:
    edges = {
        i: [j for j, person in enumerate(people) if overlap(box, person)]
        for i, box in enumerate(boxes)
    }
    every = list(matchings(edges, list(range(len(boxes))), frozenset()))
    k = max(len(m) for m in every)
    smallest = min(
        sum(i in m or not excused(box, regions) for i, box in enumerate(boxes))
        + sum(j in m.values() or not excused(p, regions) for j, p in enumerate(people))
        - k
        for m in every
        if len(m) == k
    )
    return k / smallest if smallest else None


def slow_metrics(images: list[tuple]) -> dict[str, float]:
    num_people = sum(len(people) for people, _, _ in images)
    judged = [
        (score, label)
        for people, regions, found in images
        for (_, score), label in zip(found, slow_labels(people, regions, found), strict=True)
    ]
    points = []  # (recall, precision, false positives per image), falling threshold
    for threshold in sorted({score for score, label in judged if label >= 0}, reverse=True):
        hits = sum(label == 1 and score >= threshold for score, label in judged)
        misfires = sum(label == 0 and score >= threshold for score, label in judged)
        points.append((hits / num_people, hits / (hits + misfires), misfires / len(images)))

    ap, previous = 0.0, 0.0
    for i, (recall, _, _) in enumerate(points):
        ap += (recall - previous) * max(precision for _, precision, _ in points[i:])
        previous = recall

    logs, missed = 0.0, 0.0
    for exponent in range(9):
        allowed = 10 ** (-2 + exponent / 4)
        miss = 1 - max([recall for recall, _, fppi in points if fppi <= allowed], default=0.0)
        missed += miss
        logs += math.log(max(miss, 1e-10)) / 9

    means = []
    for threshold in range(10):
        values = [
            slow_jaccard(people, regions, [box for box, score in found if score >= threshold / 10])
            for people, regions, found in images
        ]
        counted = [value for value in values if value is not None]
        if counted:
            means.append(sum(counted) / len(counted))
    return {
        "AP": 100 * ap,
        "MR": 100 * math.exp(logs) if missed else 0.0,
        "JI": 100 * max(means, default=math.nan),
        "recall": 100 * sum(label == 1 for _, label in judged) / num_people,
    }


# A coarse grid and coarse scores: equal scores, exact halves and rival overlaps are frequent.
grid = st.integers(0, 5)
some_box = st.builds(
    lambda x, y, w, h: (x, y, x + w, y + h), grid, grid, st.integers(1, 6), st.integers(1, 6)
)
some_image = st.tuples(
    st.lists(some_box, max_size=4),
    st.lists(some_box, max_size=2),
    st.lists(st.tuples(some_box, st.integers(0, 20).map(lambda n: n / 20)), max_size=5),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(some_image, min_size=1, max_size=3).filter(lambda s: any(p for p, _, _ in s)))
def test_agrees_with_the_slow_implementation(images):
    scenes = [
        scene(people, regions, [box for box, _ in found], [score for _, score in found])
        for people, regions, found in images
    ]
    found = crowd_metrics(scenes)
    assert found == pytest.approx(slow_metrics(images), abs=1e-9, nan_ok=True)
    assert crowd_metrics(scenes[::-1]) == pytest.approx(found, abs=1e-9, nan_ok=True)
