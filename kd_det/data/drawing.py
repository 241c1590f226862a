"""
Outlines, textures and strokes of the built-in shapes set: pure numpy and OpenCV on one image.

Everything is anti-aliased: coverage is rasterised four times finer and averaged down, textures have
edges one pixel wide. Coordinates are continuous, x to the right and y down, pixel (i, j) covering
[j, j + 1) x [i, i + 1). Images are float32 of shape (H, W, 3), B G R, 0 to 255.
"""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Points = NDArray[np.float64]

_SUPERSAMPLING = 4
_CIRCLE = np.linspace(0.0, 2 * np.pi, 41)


def as_array(values: Any) -> Array:
    """Return an image as float32; OpenCV's own annotations promise no element type."""
    return np.asarray(values, np.float32)


def _polar(radii: Points, angles: Points) -> Points:
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _ring(inner: float) -> Points:
    # COCO polygons have no holes: one path runs around the outside, crosses the body, and returns
    # around the inside, so both rasterisers and the signed area see the hole.
    around = _polar(np.ones_like(_CIRCLE), _CIRCLE)
    return np.concatenate([around, inner * around[::-1]])


def _cross(arm: float) -> Points:
    end = np.array([(1, -arm), (1, arm), (arm, arm)])
    quarter_turn = np.array([[0, 1], [-1, 0]])
    turns = [np.linalg.matrix_power(quarter_turn, k) for k in range(4)]
    return np.concatenate([end @ turn for turn in turns])


def outline(
    form: str, rng: np.random.Generator, turn: tuple[float, float] = (0, 2 * np.pi)
) -> Points:
    """
    Draw a random outline of a form, up to position and size.

    Args:
        form: "disc", "ring", "triangle", "square", "star" or "cross".
        rng: source of the proportions, the stretch (up to 1.4) and the rotation.
        turn: range of the rotation in radians.

    Returns:
        Closed polygon around the origin, (P, 2), the longer side of its bounding box being 1.
    """
    if form == "disc":
        points = _polar(np.ones(40), _CIRCLE[:-1])
    elif form == "ring":
        points = _ring(inner=rng.uniform(0.45, 0.68))
    elif form == "cross":
        points = _cross(arm=rng.uniform(0.25, 0.4))
    elif form == "star":
        radii = np.tile([1.0, rng.uniform(0.4, 0.52)], 5)
        points = _polar(radii, np.arange(10) * np.pi / 5)
    elif form in ("triangle", "square"):
        corners = 3 if form == "triangle" else 4
        points = _polar(np.ones(corners), np.arange(corners) * 2 * np.pi / corners + np.pi / 4)
    else:
        raise ValueError(f"unknown form {form!r}")
    points = points * (1.0, rng.uniform(0.72, 1.0))
    angle = rng.uniform(*turn)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = points @ rotation.T
    low, high = points.min(0), points.max(0)
    return (points - (low + high) / 2) / (high - low).max()


def clip_polygon(points: Points, width: int, height: int) -> Points:
    """
    Clip a polygon to the image (Sutherland and Hodgman, 1974), one border after the other.

    Args:
        points: (P, 2); may be concave, in which case pieces stay joined by edges of zero area.
        width, height: of the image, in pixels.

    Returns:
        (Q, 2), Q = 0 when nothing is inside.
    """
    for axis, bound, sign in ((0, 0, 1), (0, width, -1), (1, 0, 1), (1, height, -1)):
        if len(points) == 0:
            break
        following = np.roll(points, -1, axis=0)
        depth, next_depth = sign * (points[:, axis] - bound), sign * (following[:, axis] - bound)
        kept: list[Points] = []
        for a, b, da, db in zip(points, following, depth, next_depth, strict=True):
            if da >= 0:
                kept.append(a)
            if (da >= 0) != (db >= 0):
                kept.append(a + (b - a) * (da / (da - db)))
        points = np.array(kept).reshape(-1, 2)
    return points


def polygon_area(points: Points) -> float:
    """Return the area in square pixels; a ring's path counts its hole as outside."""
    x, y = points[:, 0], points[:, 1]
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


def coverage(points: Points, width: int, height: int) -> Array:
    """
    Rasterise a polygon.

    Args:
        points: (P, 2), may reach outside the image.
        width, height: of the image, in pixels.

    Returns:
        Covered fraction of every pixel, (H, W), 0 to 1.
    """
    fine = np.zeros((height * _SUPERSAMPLING, width * _SUPERSAMPLING), np.uint8)
    # OpenCV puts pixel centres on whole numbers.
    vertices = np.round(points * _SUPERSAMPLING - 0.5).astype(np.int32)
    cv2.fillPoly(fine, [vertices], 255)
    return _reduce(fine, width, height)


def stroke(points: Points, thickness: float, width: int, height: int) -> Array:
    """Rasterise an open line, `thickness` pixels wide; the rest as in `coverage`."""
    fine = np.zeros((height * _SUPERSAMPLING, width * _SUPERSAMPLING), np.uint8)
    vertices = np.round(points * _SUPERSAMPLING - 0.5).astype(np.int32)
    cv2.polylines(fine, [vertices], False, 255, max(1, round(thickness * _SUPERSAMPLING)))
    return _reduce(fine, width, height)


def _reduce(fine: NDArray[np.uint8], width: int, height: int) -> Array:
    return as_array(cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)) / np.float32(
        255
    )


def texture(
    kind: str, centre: Points, size: float, width: int, height: int, rng: np.random.Generator
) -> Array:
    """
    Compute how much of an object's second colour shows at every pixel.

    Args:
        kind: "plain", "gradient", "striped" or "dotted".
        centre: of the object, (2,).
        size: longer side of the object in pixels; sets the period of stripes and dots.
        width, height: of the image, in pixels.
        rng: source of direction, phase and period.

    Returns:
        (H, W), 0 to 1.
    """
    angle, phase = rng.uniform(0, 2 * np.pi), rng.uniform(0, 1, 2)
    period = max(3.5, size / rng.uniform(3.5, 5.5))
    x = (np.arange(width, dtype=np.float32) + 0.5 - centre[0])[None, :]
    y = (np.arange(height, dtype=np.float32) + 0.5 - centre[1])[:, None]
    u = np.cos(angle) * x + np.sin(angle) * y
    v = np.cos(angle) * y - np.sin(angle) * x
    if kind == "plain":
        out = np.zeros((height, width))
    elif kind == "gradient":
        out = 0.5 + u / size
    elif kind == "striped":
        # The sine's slope at its zeros is 2 pi / period, so this edge is one pixel wide.
        out = 0.5 + np.sin(2 * np.pi * (u / period + phase[0])) * period / (2 * np.pi)
    elif kind == "dotted":
        du = (u / period + phase[0]) % 1 - 0.5
        dv = (v / period + phase[1]) % 1 - 0.5
        out = 0.5 + (0.33 - np.hypot(du, dv)) * period
    else:
        raise ValueError(f"unknown texture {kind!r}")
    return np.clip(out, 0, 1).astype(np.float32)


def smooth_field(
    channels: int, cells: int, width: int, height: int, rng: np.random.Generator
) -> Array:
    """Return smooth noise of (H, W, channels), about -1 to 1, varying over 1/cells of the image."""
    coarse = rng.uniform(-1, 1, (cells, cells, channels)).astype(np.float32)
    fine = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return as_array(fine).reshape(height, width, channels)


def blend(image: Array, colour: Array, alpha: Array) -> None:
    """Lay a colour, (3,) or (H, W, 3), over the image in place, opaque where alpha (H, W) is 1."""
    image += alpha[..., None] * (colour - image)
