"""Test images with a model's boxes on them, as JPEG inside the page."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont, ImageOps

from kd_det.evaluation.matching import Matches
from kd_det.experiments.page.analysis import Insight
from kd_det.experiments.page.markup import Html, tag

_SIDE = 360  # pixels of the longer side, from which a page scales down
_QUALITY = 82
_MATCH, _WRONG, _OBJECT = "#56b4e9", "#ff7f2a", "#ffe14d"
KEY = ((_OBJECT, "object"), (_MATCH, "match at IoU 0.5"), (_WRONG, "no match"))
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Labelled:
    """A box x y width height to draw, with its colour and its words."""

    box: Box
    colour: str
    words: str


def most_changed(arm: Insight, baseline: Insight) -> list[tuple[str, int]]:
    """
    Return the images with the largest gain and the largest loss of an arm's score.

    Returns:
        "gain" and "loss" with the position of the image; neither where no image changed that way.
        Among equal changes the first image of the test set counts.
    """
    change = arm.scores - baseline.scores
    if not np.isfinite(change).any():
        return []
    best, worst = int(np.nanargmax(change)), int(np.nanargmin(change))
    found = [("gain", best)] if change[best] > 0 else []
    return [*found, *([("loss", worst)] if change[worst] < 0 else [])]


def objects_on(matches: Matches, image: int, names: Sequence[str]) -> list[Labelled]:
    """Return the objects of an image as they are drawn."""
    objects = matches.test_set
    return [
        Labelled(_box(objects.boxes[i]), _OBJECT, names[objects.label[i]])
        for i in objects.by_image[image]
    ]


def detections_on(insight: Insight, image: int, names: Sequence[str]) -> list[Labelled]:
    """Return the detections of an image above the arm's threshold as they are drawn."""
    matches = insight.first
    shown = (matches.image == image) & (matches.score >= insight.threshold) & matches.counted
    return [
        Labelled(
            _box(matches.boxes[i]),
            _MATCH if matches.target[i] >= 0 else _WRONG,
            f"{names[matches.label[i]]} {matches.score[i]:.2f}",
        )
        for i in np.flatnonzero(shown)[::-1]  # the surest on top
    ]


def picture(file: Path, boxes: Sequence[Labelled], *, title: str) -> Html:
    """
    Draw boxes on an image.

    Args:
        file: of the image.
        boxes: in its pixels.
        title: above the picture, and for those who do not see it.
    """
    with Image.open(file) as opened:
        pixels = ImageOps.exif_transpose(opened).convert("RGB")
    factor = _SIDE / max(pixels.size)
    width, height = pixels.size
    size = max(1, round(width * factor)), max(1, round(height * factor))
    pixels = pixels.resize(size, Image.Resampling.BICUBIC)
    canvas = ImageDraw.Draw(pixels)
    font = _font()
    for item in boxes:
        _draw(canvas, item, factor, font, pixels.size)
    content = io.BytesIO()
    pixels.save(content, "JPEG", quality=_QUALITY)
    encoded = base64.b64encode(content.getvalue()).decode()
    image = tag(
        "img", src=f"data:image/jpeg;base64,{encoded}", alt=title, width=size[0], height=size[1]
    )
    return tag("figure", tag("figcaption", title), image)


def _draw(
    canvas: ImageDraw.ImageDraw,
    item: Labelled,
    factor: float,
    font: ImageFont.FreeTypeFont,
    size: tuple[int, int],
) -> None:
    x, y, width, height = (factor * value for value in item.box)
    corners = (x, y, x + max(width, 1), y + max(height, 1))
    around = (corners[0] - 1, corners[1] - 1, corners[2] + 1, corners[3] + 1)
    canvas.rectangle(around, outline="#000000", width=5)
    canvas.rectangle(corners, outline=item.colour, width=3)
    words = " ".join(item.words.split())[:24]
    left, top, right, bottom = canvas.textbbox((0, 0), words, font=font)
    wide, high = right - left + 4, bottom - top + 4
    x = min(max(x, 0), max(size[0] - wide, 0))
    y = min(max(y - high, 0), max(size[1] - high, 0))
    canvas.rectangle((x, y, x + wide, y + high), fill=item.colour)
    canvas.text((x + 2 - left, y + 2 - top), words, fill="#000000", font=font)


def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), 11)


def _box(values: Sequence[float]) -> Box:
    x, y, width, height = (float(value) for value in values)
    return x, y, width, height


def image_files(coco: Mapping[str, Sequence[Mapping[str, str]]], root: Path) -> list[Path]:
    """Return the files of a test set's images, in order."""
    return [root / image["file_name"] for image in coco["images"]]
