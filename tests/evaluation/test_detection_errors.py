"""Kinds of mistakes and what they cost, worked out by hand on boxes of 10 pixels."""

from typing import Any

import numpy as np
import pytest
from random_detections import random_results, random_truth

from kd_det.evaluation.detection_errors import KINDS, find_mistakes, kinds_of
from kd_det.evaluation.matching import Matches, Objects, match

Box = tuple[int, int, int]  # x, y, class


def truth_of(objects: list[Box], crowds: list[Box] = []) -> dict[str, Any]:  # noqa: B006
    entries = [(box, 0) for box in objects] + [(box, 1) for box in crowds]
    return {
        "images": [{"id": "a"}, {"id": "empty"}],
        "categories": [{"id": 5, "name": "x"}, {"id": 2, "name": "y"}],
        "annotations": [
            {"image_id": "a", "category_id": c, "bbox": [x, y, 10, 10], "iscrowd": crowd}
            for (x, y, c), crowd in entries
        ],
    }


def matched(
    objects: list[Box],
    detections: list[tuple[int, int, int, float]],
    crowds: list[Box] = [],  # noqa: B006
) -> Matches:
    results = [
        {"image_id": "a", "category_id": c, "bbox": [x, y, 10, 10], "score": score}
        for x, y, c, score in detections
    ]
    return match(Objects.from_coco(truth_of(objects, crowds)), results)


def names(matches: Matches) -> list[str]:
    return ["right" if kind < 0 else KINDS[kind] for kind in kinds_of(matches)]


def test_each_kind_once() -> None:
    # Moved by 1 of 10 pixels: IoU 9 / 11; by 6: 4 / 16.
    objects = [(0, 0, 2), (20, 0, 2), (80, 0, 2), (40, 0, 5), (60, 0, 5)]
    found = [
        (0, 0, 2, 0.9),
        (1, 0, 2, 0.8),
        (26, 0, 2, 0.7),
        (40, 0, 2, 0.6),
        (66, 0, 2, 0.5),
        (0, 50, 2, 0.4),
    ]
    matches = matched(objects, found)
    assert names(matches) == [
        "right", "duplicate", "localisation", "classification", "both", "background",
    ]  # fmt: skip
    mistakes = find_mistakes(matches)
    # Missed: the third (80, 0), and (60, 0), at which only "both" points.
    assert mistakes.counts == {**dict.fromkeys(KINDS, 1), "missed": 2}
    # Of three objects one is found at once: 34 of 101 recalls up to 1/3. Of the other class, none.
    assert mistakes.ap50 == pytest.approx(100 * 34 / 101 / 2)
    assert mistakes.costs == pytest.approx(
        {
            # One of two objects of the other class: 51 recalls up to 1/2.
            "classification": 100 * 51 / 101 / 2,
            # Two of three after one mistake: precision 2/3 at the 33 recalls from 0.34 to 0.66.
            "localisation": 100 * 33 * (2 / 3) / 101 / 2,
            "both": 0.0,
            "duplicate": 0.0,
            "background": 0.0,
            # One of two objects is left to ask for in each class.
            "missed": 100 * (51 - 34) / 101 / 2,
        }
    )


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [("background", (0, 50, 2, 0.9)), ("both", (66, 0, 2, 0.9)), ("duplicate", (1, 0, 2, 0.4))],
)
def test_what_is_taken_away_raises_precision(kind: str, wrong: tuple[int, int, int, float]) -> None:
    """A mistake ahead of the only match: precision 1/2 becomes 1, in one of two classes."""
    first = (0, 0, 2, 0.95 if kind == "duplicate" else 0.5)
    matches = matched([(0, 0, 2), (60, 0, 5), (30, 30, 2)], [first, wrong, (30, 30, 2, 0.3)])
    assert sorted(names(matches)) == sorted(["right", kind, "right"])
    # A duplicate stands between both matches: precision 2/3 at the 50 recalls above 1/2.
    before = (51 + 50 * 2 / 3) / 101 if kind == "duplicate" else 2 / 3
    mistakes = find_mistakes(matches)
    assert mistakes.ap50 == pytest.approx(100 * before / 2)
    assert mistakes.costs[kind] == pytest.approx(100 * (1 - before) / 2)


def test_only_the_best_of_several_mistakes_becomes_the_match() -> None:
    # Two badly placed detections of one object, and one of an object that has a match.
    matches = matched([(0, 0, 2), (40, 0, 2)], [(6, 0, 2, 0.9), (0, 6, 2, 0.8), (40, 0, 2, 0.7)])
    assert names(matches) == ["localisation", "localisation", "right"]
    mistakes = find_mistakes(matches)
    assert mistakes.counts["missed"] == 0
    assert mistakes.ap50 == pytest.approx(100 * 51 / 101 / 3)
    assert mistakes.ap50 + mistakes.costs["localisation"] == pytest.approx(100)
    taken = matched([(0, 0, 2)], [(6, 0, 2, 0.9), (0, 0, 2, 0.8)])
    assert find_mistakes(taken).costs["localisation"] == pytest.approx(50)  # it goes


def test_crowds_are_no_mistakes_and_no_objects() -> None:
    matches = matched([(0, 0, 2)], [(50, 0, 2, 0.9), (50, 0, 5, 0.8)], crowds=[(50, 0, 2)])
    assert names(matches) == ["right", "background"]  # the region is of class 2
    assert find_mistakes(matches).counts["missed"] == 1


def test_nothing_found_and_nothing_there() -> None:
    nothing = find_mistakes(matched([(0, 0, 2)], []))
    assert nothing.ap50 == 0 and nothing.counts == {**dict.fromkeys(KINDS, 0), "missed": 1}
    assert nothing.costs["missed"] == 0.0  # no class is left to have an AP
    empty = find_mistakes(matched([], [(0, 0, 2, 0.5)]))
    assert np.isnan(empty.ap50) and empty.counts["background"] == 1


@pytest.mark.parametrize("seed", range(4))
def test_every_mistake_has_one_kind(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = random_truth(rng, images=20)
    matches = match(Objects.from_coco(truth), random_results(rng, truth, quality=0.3))
    kinds = kinds_of(matches)
    assert ((kinds < 0) == ((matches.target >= 0) | ~matches.counted)).all()
    counts = find_mistakes(matches).counts
    assert sum(counts.values()) - counts["missed"] == (kinds >= 0).sum()
    assert counts["missed"] <= (~matches.found).sum()
