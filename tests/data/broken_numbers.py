"""Broken numbers, segmentations and keypoints in annotation files."""

from __future__ import annotations

from typing import Any

from broken_annotations import HEIGHT, WIDTH, Case, drop, put, set_value

NAN, INF = float("nan"), float("inf")
# What JSON may hold where a number is expected, by the word that a message shows.
NO_NUMBERS: dict[str, Any] = {
    "None": None,
    "'1'": "1",
    "True": True,
    r"\[1\]": [1],
    r"\{\}": {},
    "nan": NAN,
    "inf": INF,
    "-inf": -INF,
}
FAR: dict[str, Any] = {"1000000000.0": 1e9, "-1000000000.0": -1e9, "10{50}": 10**400}


def numbers() -> list[Case]:
    """Numbers that are none, or far off the image."""
    cases = []
    for shown, value in {**NO_NUMBERS, **FAR, "0": 0, "-3": -3, "70000": 70000}.items():
        for key in ("width", "height") if shown in ("nan", "0", "70000") else ("width",):
            message = f"image 1 .'1.png'. has {key} {shown}.*; expected its {key} in pixels"
            cases.append(Case(f"{key} {shown}", set_value("images", 1, key, value), message))
    of_box = r"annotation 10 has bbox .*{}.*; expected \[x, y, width, height\], numbers from -240"
    for shown, value in {**NO_NUMBERS, **FAR}.items():
        for i in (0, 3):
            name = f"bbox[{i}] {shown}"
            cases.append(Case(name, put(("bbox", i), value), of_box.format(shown)))
    for shown, value in {"None": None, "'a'": "a", r"\[\]": [], r"\[1, 2, 3\]": [1, 2, 3]}.items():
        cases.append(Case(f"bbox {shown}", put(("bbox",), value), of_box.format(shown)))
    cases.append(Case("bbox negative", put(("bbox", 2), -1), of_box.format("-1")))
    cases.append(Case("bbox empty", put(("bbox", 2), 0)))
    cases.append(Case("bbox off the image", put(("bbox",), [-30, -20, 8, 6])))
    for shown, value in {**NO_NUMBERS, "1000000000.0": 1e9, "-1": -1}.items():
        message = f"annotation 10 has area {shown}; expected pixels"
        cases.append(Case(f"area {shown}", put(("area",), value), message))
    for shown, value in {"None": None, "'0'": "0", "2": 2, "nan": NAN, r"\[0\]": [0]}.items():
        message = f"annotation 10 has iscrowd {shown}; expected the number 0 or 1"
        cases.append(Case(f"iscrowd {shown}", put(("iscrowd",), value), message))
    cases.append(Case("iscrowd false", put(("iscrowd",), False)))
    cases.append(Case("ignore 1", put(("ignore",), 1), "has ignore 1, which Detectron2 does not"))
    cases.append(Case("ignore 0", put(("ignore",), 0)))
    return cases


def shapes() -> list[Case]:
    """Segmentations and keypoints."""
    cases = []
    for shown, value in {**NO_NUMBERS, **FAR}.items():
        message = f"annotation 10 has {shown}.* in its segmentation; expected numbers from -240 to"
        cases.append(Case(f"polygon {shown}", put(("segmentation", 0, 2), value), message))
        message = f"annotation 10 has keypoints .*{shown}.*; expected"
        cases.append(Case(f"keypoint {shown}", put(("keypoints", 0), value), message))
    points = "expected polygons of at least three points"
    for name, polygons in {
        "of no point": [[]],
        "of two points": [[1, 2, 3, 4]],
        "of half a point": [[1, 2, 3, 4, 5, 6, 7]],
    }.items():
        cases.append(Case(f"polygon {name}", put(("segmentation",), polygons), points))
    good = [3, 2, 11, 2, 11, 8]
    cases.append(Case("a short polygon beside", put(("segmentation",), [good, [1, 2, 3, 4]])))
    cases.append(Case("polygons without area", put(("segmentation",), [[1, 1] * 3])))
    for name, value in {"flat": good, "text": "a", "number": 0, "of texts": ["a"]}.items():
        message = "has segmentation .*; expected a list of polygons"
        cases.append(Case(f"segmentation {name}", put(("segmentation",), value), message))
    for name, change in {
        "missing": drop("annotations", 0, "segmentation"),
        "null": put(("segmentation",), None),
        "empty": put(("segmentation",), []),
    }.items():
        cases.append(Case(f"segmentation {name}, boxes only", change))
        message = "annotation 10 has segmentation .*, but the model is one of masks"
        cases.append(Case(f"segmentation {name}", change, message, masks=True))
    size, total = [HEIGHT, WIDTH], HEIGHT * WIDTH
    runs: dict[str, tuple[Any, str]] = {
        "{}": ({}, "of size None"),
        "without counts": ({"size": size}, "with the counts None"),
        "without size": ({"counts": [total]}, r"of size None; expected .*\[16, 24\]"),
        "size turned": ({"size": [WIDTH, HEIGHT], "counts": [total]}, r"of size \[24, 16\]"),
        "size of texts": ({"size": ["16", "24"], "counts": [total]}, "of size"),
        "size of floats": ({"size": [16.0, 24.0], "counts": [total]}, r"of size \[16.0"),
        "size huge": ({"size": [10**9, 10**9], "counts": [10**18]}, "of size"),
        "size null": ({"size": None, "counts": [total]}, "of size None"),
        "too few": ({"size": size, "counts": [total - 1]}, "add up to 383 pixels"),
        "too many": ({"size": size, "counts": [0, total, 1]}, "add up to 385 pixels"),
        "none": ({"size": size, "counts": []}, "add up to 0 pixels"),
        "negative": ({"size": size, "counts": [total + 5, -5]}, "the smallest being -5"),
        "huge": ({"size": size, "counts": [10**30]}, "add up to 10{30} pixels"),
        "floats": ({"size": size, "counts": [1.5, total - 1.5]}, "with the counts"),
        "texts": ({"size": size, "counts": ["1"]}, "with the counts"),
        "nan": ({"size": size, "counts": [NAN]}, "with the counts"),
        "null": ({"size": size, "counts": None}, "with the counts None"),
        "packed, empty": ({"size": size, "counts": ""}, "expected a text as pycocotools"),
        "packed, short": ({"size": size, "counts": "1"}, "add up to 1 pixels"),
        "packed, unfinished": ({"size": size, "counts": "oo"}, "expected a text as pycocotools"),
        "packed, endless": ({"size": size, "counts": "o" * 99 + "1"}, "expected a text as"),
        "packed, other letters": ({"size": size, "counts": "ä !"}, "expected a text as"),
        "packed, negative": ({"size": size, "counts": "@"}, "the smallest being -16"),
        "packed, long": ({"size": size, "counts": "0o" * 999 + "1"}, "add up to"),
    }
    for name, (value, message) in runs.items():
        cases.append(Case(f"run lengths {name}", put(("segmentation",), value), message))
    cases += [
        Case("keypoints cut", put(("keypoints",), [1, 2]), "expected .x, y, v, ...., numbers"),
        Case("keypoints text", put(("keypoints",), "a"), "has keypoints 'a'; expected"),
        Case("visibility 3", put(("keypoints", 2), 3), "each third number to be 0, 1 or 2"),
        Case("keypoints null", put(("keypoints",), None)),
        Case("no keypoints", put(("keypoints",), []), "but the model is one", keypoints=True),
        Case(
            "no number of keypoints",
            drop("annotations", 0, "num_keypoints"),
            "has num_keypoints None",
            keypoints=True,
        ),
        Case("number of keypoints", put(("num_keypoints",), "1"), "has num_keypoints '1'"),
    ]
    return cases
