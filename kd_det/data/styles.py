"""
What sets the versions of the built-in shapes apart: classes, sizes, and how hard they are to see.

A class is decided by shape ("star"), or by shape and texture together ("disc" against
"striped_disc"), never by colour.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Range = tuple[float, float]
Count = tuple[int, int]  # the second is excluded
_ALL = ("plain", "gradient", "striped", "dotted")


@dataclass(frozen=True)
class Style:
    """
    One version of the set. Of every range, a value is drawn evenly.

    Args:
        version: part of every path and every random seed; another pixel is another version.
        size: mean side of the registered sets' images in pixels.
        kinds: of every class, its form and the textures it may wear.
        turn: rotation of the forms in radians.
        smallest: longer side of the smallest object in pixels.
        smallest_textured: the same where the texture decides the class: it has to be visible.
        largest: longer side of the largest object, in shorter sides of the image.
        least_visible: how much of every object is not hidden, of its part inside the image; what
            would hide an object further is not drawn.
        least_inside: how much of every object lies inside the image, of its area.
        objects: how many an image is meant to hold; those that find no place are not drawn.
        clutter: how many strokes, arcs and blobs lie behind the objects.
        clutter_in_front: how many thin ones lie over them.
        field: strength of the background's colours, in grey values.
        contrast: distance of an object's colour from what it lies on, in grey values.
        noise: standard deviation of the sensor noise, in grey values.
    """

    version: int
    size: int
    kinds: Mapping[str, tuple[str, Sequence[str]]]
    turn: Range
    smallest: float
    smallest_textured: float
    largest: float
    least_visible: float
    least_inside: float
    objects: Count
    clutter: Count
    clutter_in_front: Count
    field: Range
    contrast: Range
    noise: Range

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the order of their numbers."""
        return tuple(self.kinds)


V1 = Style(
    version=1,
    size=128,
    kinds={
        "disc": ("disc", ("plain", "gradient", "dotted")),
        "striped_disc": ("disc", ("striped",)),
        "ring": ("ring", _ALL),
        "triangle": ("triangle", _ALL),
        "square": ("square", ("plain", "gradient", "striped")),
        "dotted_square": ("square", ("dotted",)),
        "star": ("star", _ALL),
        "cross": ("cross", _ALL),
    },
    turn=(0, 2 * math.pi),
    smallest=8.0,
    smallest_textured=16.0,
    largest=0.85,
    least_visible=0.4,
    least_inside=0.6,
    objects=(2, 9),
    clutter=(3, 8),
    clutter_in_front=(0, 3),
    field=(10, 50),
    contrast=(55, 130),
    noise=(2, 10),
)
_FORMS = ("disc", "ring", "triangle", "square", "star", "cross")
V2 = Style(
    version=2,
    size=96,
    kinds={form: (form, ("plain", "gradient")) for form in _FORMS},
    turn=(-0.35, 0.35),
    smallest=14.0,
    smallest_textured=14.0,
    largest=0.45,
    least_visible=0.7,
    least_inside=0.8,
    objects=(2, 6),
    clutter=(0, 3),
    clutter_in_front=(0, 1),
    field=(5, 20),
    contrast=(90, 160),
    noise=(1, 3),
)
