"""
One image of the built-in shapes set: what stands where, what hides what, and how it is lit.
"""

from typing import Any, NamedTuple

import cv2
import numpy as np

from kd_det.data.drawing import (
    Array,
    Points,
    as_array,
    blend,
    clip_polygon,
    coverage,
    outline,
    polygon_area,
    smooth_field,
    stroke,
    texture,
)
from kd_det.data.styles import Style


class DrawnObject(NamedTuple):
    """An object as drawn: its place among the classes and its outline."""

    category: int
    outline: Points  # (P, 2) pixels, may leave the image
    clipped: Points  # (Q, 2) inside the image


class Scene:
    """One image in the making: its pixels, and which object is on top at every pixel."""

    def __init__(self, width: int, height: int, rng: np.random.Generator, style: Style) -> None:
        self.width, self.height, self.rng, self.style = width, height, rng, style
        cells = int(rng.integers(2, 7))
        field = smooth_field(3, cells, width, height, rng)
        image = rng.uniform(50, 205, 3) + rng.uniform(*style.field) * field
        # Muted: pure colours are left to the objects.
        image += 0.35 * (image.mean(2, keepdims=True) - image)
        self.image: Array = image.astype(np.float32)
        self.owner = np.full((height, width), -1, np.int64)
        self.objects: list[DrawnObject] = []
        self.inside: list[int] = []  # pixels of each object inside the image, hidden or not

    def add_clutter(self, count: int, thickness: float) -> None:
        """Draw strokes, open arcs and soft blobs, which are no objects."""
        rng = self.rng
        shape = (self.width, self.height)
        for _ in range(count):
            centre, reach = rng.uniform(0, 1, 2) * shape, rng.uniform(0.06, 0.3) * max(shape)
            colour = rng.uniform(20, 235, 3).astype(np.float32)
            kind = rng.integers(3)
            if kind == 0:  # an arc with a gap of a quarter turn and more: not a ring
                angles = rng.uniform(0, 2 * np.pi) + np.linspace(0, rng.uniform(1.5, 4.7), 24)
                points = centre + 0.6 * reach * np.stack([np.cos(angles), np.sin(angles)], 1)
                alpha = stroke(points, thickness * rng.uniform(0.5, 1), *shape)
            elif kind == 1:  # a bent stroke
                a, b, c = centre + rng.uniform(-1, 1, (3, 2)) * reach * 1.5
                t = np.linspace(0, 1, 24)[:, None]
                points = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c
                alpha = stroke(points, thickness * rng.uniform(0.4, 1), *shape)
            else:  # a soft blob
                points = centre + outline("disc", rng) * reach
                alpha = as_array(cv2.GaussianBlur(coverage(points, *shape), (0, 0), reach / 6))
            blend(self.image, colour, alpha * np.float32(rng.uniform(0.3, 0.8)))

    def add_object(self, size: float) -> None:
        """Draw one object of the given longer side in pixels, or nothing if it finds no place."""
        rng = self.rng
        shape = (self.width, self.height)
        classes = self.style.classes
        category = int(rng.integers(len(classes)))
        form, textures = self.style.kinds[classes[category]]
        if len(textures) == 1:
            size = max(size, self.style.smallest_textured)
        centred = outline(form, rng, self.style.turn) * size
        for _ in range(6):
            centre = rng.uniform(0.03, 0.97, 2) * shape
            points = centred + centre
            clipped = clip_polygon(points, *shape)
            if polygon_area(clipped) < self.style.least_inside * polygon_area(points):
                continue
            alpha = coverage(points, *shape)
            if self._claim(alpha > 0.5):
                self.objects.append(DrawnObject(category, points, clipped))
                self._paint(points, alpha, str(rng.choice(textures)), size)
                return

    def _claim(self, body: Any) -> bool:
        """Put a new object, bool (H, W), on top unless it hides an earlier one too far."""
        if not body.any():
            return False
        owner = np.where(body, len(self.objects), self.owner)
        visible = np.bincount(owner.ravel() + 1, minlength=len(self.objects) + 2)[1:-1]
        if (visible < self.style.least_visible * np.array(self.inside)).any():
            return False
        self.owner = owner
        self.inside.append(int(body.sum()))
        return True

    def _paint(self, points: Points, alpha: Array, kind: str, size: float) -> None:
        rng = self.rng
        if rng.random() < 0.5:
            step = 1 + int(size / 30)
            shadow = np.zeros_like(alpha)
            shadow[step:, step:] = alpha[:-step, :-step]
            shadow = as_array(cv2.GaussianBlur(shadow, (0, 0), 1 + size / 25))
            self.image *= 1 - 0.35 * (shadow * (1 - alpha))[..., None]
        behind = (alpha[..., None] * self.image).sum((0, 1)) / alpha.sum()
        first = _colour_away_from(behind, rng.uniform(*self.style.contrast), rng)
        second = _colour_away_from(first, rng.uniform(70, 140), rng)
        mix = texture(kind, points.mean(0), size, self.width, self.height, rng)[..., None]
        blend(self.image, first + mix * (second - first), alpha)

    def finish(self) -> Array:
        """Return the image after uneven light, blur and sensor noise, uint8 values as float32."""
        rng = self.rng
        light = 1 + rng.uniform(0, 0.18) * smooth_field(1, 2, self.width, self.height, rng)
        image = self.image * light
        if rng.random() < 0.6:
            image = as_array(cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.9)))
        noise = rng.standard_normal(image.shape, dtype=np.float32)
        return np.clip(image + rng.uniform(*self.style.noise) * noise, 0, 255)


def _colour_away_from(colour: Array, distance: float, rng: np.random.Generator) -> Array:
    """Draw a colour (3,) about `distance` or more (Euclidean) from another."""
    candidates = rng.uniform(10, 245, (12, 3)).astype(np.float32)
    gaps = np.linalg.norm(candidates - colour, axis=1)
    # The nearest one that is far enough; the farthest if none is.
    return candidates[np.argmin(np.where(gaps >= distance, gaps, 1e3 - gaps))]


def compose(width: int, height: int, rng: np.random.Generator, style: Style) -> Scene:
    """Draw a whole scene; sides in pixels."""
    scene = Scene(width, height, rng, style)
    scene.add_clutter(int(rng.integers(*style.clutter)), thickness=7)
    largest = style.largest * min(width, height)
    count = int(rng.integers(*style.objects))
    # Log-uniform: as many objects from 8 to 16 pixels as from 40 to 80.
    sizes = np.exp(rng.uniform(np.log(style.smallest), np.log(largest), count))
    # Mostly large before small, as small ones in front hide less, with some disorder.
    for size in sizes[np.argsort(-sizes * np.exp(rng.normal(0, 0.5, count)))]:
        scene.add_object(float(size))
    scene.add_clutter(int(rng.integers(*style.clutter_in_front)), thickness=1.5)
    return scene
