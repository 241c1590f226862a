"""A made-up crowd in the format of CrowdHuman: simple figures in dense, overlapping groups.

Small enough to train on in minutes without a download, yet with what makes crowds hard: people
hidden behind people, people cut by the image border, ignored people and regions. Everything follows
from the seed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 256, 192

# Less of a person than this in sight, and nobody can be asked to find them.
_LEAST_VISIBLE = 0.08

Color = tuple[int, ...]
Box = list[int]


@dataclass(frozen=True)
class _Figure:
    """A standing person; x, y, w, h is the full body, beyond the image border if need be."""

    x: int
    y: int
    w: int
    h: int

    @property
    def head(self) -> Box:
        size = max(self.h // 6, 2)
        return [self.x + (self.w - size) // 2, self.y, size, size]

    def draw(self, canvas: ImageDraw.ImageDraw, skin: Color, shirt: Color, legs: Color) -> None:
        x0, x1, neck = self.x, self.x + self.w - 1, self.y + self.h // 6
        waist, foot = self.y + self.h * 11 // 20, self.y + self.h - 1
        gap = max(self.w // 10, 1)
        middle = (x0 + x1) // 2
        canvas.rectangle((x0 + gap, waist, middle - gap // 2, foot), fill=legs)
        canvas.rectangle((middle + gap - gap // 2, waist, x1 - gap, foot), fill=legs)
        canvas.rounded_rectangle((x0, neck, x1, waist), radius=self.w // 4, fill=shirt)
        left, top, size, _ = self.head
        canvas.ellipse((left, top, left + size - 1, top + size - 1), fill=skin)


def _stand(rng: np.random.Generator, center: float) -> _Figure:
    """Somebody of the group around a horizontal position; lower is nearer and larger."""
    foot = rng.uniform(0.5, 1.1) * HEIGHT
    height = foot * rng.uniform(0.45, 0.6)
    width = height * rng.uniform(0.36, 0.46)
    middle = np.clip(center + rng.normal(0, 0.1 * WIDTH), 0, WIDTH)
    return _Figure(int(middle - width / 2), int(foot - height), int(width), int(height))


def _color(rng: np.random.Generator, low: int, high: int) -> Color:
    return tuple(int(c) for c in rng.integers(low, high, 3))


def _draw_person(canvas: ImageDraw.ImageDraw, figure: _Figure, rng: np.random.Generator) -> None:
    skin = tuple(int(c * rng.uniform(0.5, 1.0)) for c in (250, 205, 170))
    figure.draw(canvas, skin, _color(rng, 30, 255), _color(rng, 10, 120))


def _distant_crowd(canvas: ImageDraw.ImageDraw, rng: np.random.Generator) -> Box:
    """Figures too small to tell apart, annotated as one region."""
    x, y = int(rng.integers(0, WIDTH // 2)), int(rng.integers(4, 20))
    w, h = int(rng.integers(50, 100)), int(rng.integers(16, 26))
    for _ in range(w // 4):
        _draw_person(canvas, _Figure(x + int(rng.integers(0, w - 7)), y, 7, h), rng)
    return [x, y, w, h]


def _annotation(tag: str, number: int, fbox: Box, vbox: Box, hbox: Box, *, ignore: bool) -> dict:
    occluded = int(vbox != fbox)
    return {
        "tag": tag,
        "fbox": fbox,
        "vbox": vbox,
        "hbox": hbox,
        "head_attr": {"ignore": int(ignore), "occ": occluded, "unsure": 0},
        "extra": {"box_id": number, "occ": occluded, "ignore": int(ignore)},
    }


def _make_image(rng: np.random.Generator) -> tuple[Image.Image, list[dict[str, Any]]]:
    ground = np.linspace(_color(rng, 120, 230), _color(rng, 60, 160), HEIGHT)[:, None, :]
    noise = rng.normal(0, 8, (HEIGHT, WIDTH, 3))
    image = Image.fromarray(np.clip(ground + noise, 0, 255).astype(np.uint8))
    canvas = ImageDraw.Draw(image)

    annotations = []
    if rng.random() < 0.5:
        region = _distant_crowd(canvas, rng)
        annotations.append(_annotation("mask", 0, region, region, region, ignore=True))

    centers = rng.uniform(0.1, 0.9, rng.integers(1, 4)) * WIDTH
    figures = [_stand(rng, rng.choice(centers)) for _ in range(rng.integers(5, 15))]
    figures.sort(
        key=lambda figure: figure.y + figure.h
    )  # the nearest is drawn last, over the others
    owners = Image.new("L", image.size)  # which figure is seen at a pixel; 0 is none
    owner_canvas = ImageDraw.Draw(owners)
    for number, figure in enumerate(figures, start=1):
        _draw_person(canvas, figure, rng)
        figure.draw(owner_canvas, (number,), (number,), (number,))
    seen_by = np.asarray(owners)

    for number, figure in enumerate(figures, start=1):
        rows, columns = np.nonzero(seen_by == number)
        if not len(rows):
            continue  # entirely hidden: no annotator would know
        left, top = int(columns.min()), int(rows.min())
        vbox = [left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1]
        fbox = [figure.x, figure.y, figure.w, figure.h]
        hidden = len(rows) < _LEAST_VISIBLE * figure.w * figure.h
        annotations.append(_annotation("person", number, fbox, vbox, figure.head, ignore=hidden))
    return image, annotations


def make_synthetic_crowd(root: str | os.PathLike[str], *, num_images: int, seed: int) -> None:
    """Writes a data set, `annotation.odgt` and `Images/{ID}.jpg`, complete or not at all.

    Args:
        root: folder to make; its parents are made if need be.
        num_images: how many images of 256 x 192 pixels.
        seed: decides everything; an image depends on the seed and its own number alone.

    Raises:
        ValueError: if num_images is not positive.
        FileExistsError: if root exists and is not empty.
    """
    root = Path(root)
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}; expected at least 1")
    if root.exists() and any(root.iterdir()):
        raise FileExistsError(f"{root} is not empty; remove it to make the crowd again")
    root.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its place and moved there as the last step, so that no reader sees half of it.
    draft = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        draft.chmod(0o755)  # mkdtemp keeps others out; a data set is for everybody
        (draft / "Images").mkdir()
        with open(draft / "annotation.odgt", "w", encoding="utf-8") as odgt:
            for number in range(num_images):
                image, annotations = _make_image(np.random.default_rng((seed, number)))
                name = f"crowd-{seed}-{number:04d}"
                image.save(draft / "Images" / f"{name}.jpg", quality=92)
                odgt.write(json.dumps({"ID": name, "gtboxes": annotations}) + "\n")
        try:
            draft.rename(root)
        except OSError as error:
            if not root.exists():
                raise
            raise FileExistsError(f"{root} was made by another process meanwhile") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
