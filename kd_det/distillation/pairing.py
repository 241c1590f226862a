"""
Pairing the levels of two pyramids, and the adapters between them.

A level is known by its stride in the loaded image's frame: pixels of the loaded image per cell,
measured from a real forward pass. A student of a half-resolution view has its p2 at stride 8 there,
so it pairs with a full-resolution teacher's p3, and every distiller works across resolutions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from kd_det.distillation.capture import CapturePath
from kd_det.functional.level_grid import same_stride
from kd_det.functional.precision import at_least_float32


@dataclass(frozen=True)
class Level:
    """A pyramid map: its name, channels, and stride in pixels of the loaded image."""

    name: str
    channels: int
    stride: float

    def __str__(self) -> str:
        return f"{self.name} (stride {self.stride:g}, {self.channels} channels)"


@dataclass(frozen=True)
class LevelPair:
    """
    A student and a teacher level that are compared.

    Attributes:
        student, teacher: their indices.
        name: e.g. "p2~p3".
        stride: pixels of the loaded image per cell of the student's level.
        scale: student cells per teacher cell; exactly 1 where both lie on one grid.
    """

    student: int
    teacher: int
    name: str
    stride: float
    scale: float

    @property
    def resample(self) -> bool:
        """Whether the teacher's map is brought to the student's grid by interpolation."""
        return self.scale != 1


def levels_of(calls: Sequence[Any], path: CapturePath) -> list[tuple[str, Tensor]]:
    """
    Read captured outputs as a pyramid.

    Args:
        calls: outputs, one entry per call: a dict or list of maps from one call, or one map per
            call.
        path: where they were captured, for the error message.

    Returns:
        (name, (N, C, H, W)) per level, in the order captured.

    Raises:
        ValueError: something captured is no map.
    """
    named: list[tuple[str, Any]] = []
    for index, output in enumerate(calls):
        if isinstance(output, dict):
            named += list(output.items())
        elif isinstance(output, (list, tuple)):
            named += [(f"[{i}]", item) for i, item in enumerate(output)]
        else:
            named.append((f"call {index}", output))
    for name, item in named:
        if not isinstance(item, Tensor) or item.dim() != 4:
            found = tuple(item.shape) if isinstance(item, Tensor) else type(item).__name__
            raise ValueError(
                f"Capture '{path.module}', output {name}: expected a pyramid of (N, C, H, W) maps, "
                f"found {found}; capture a neck or a convolution instead."
            )
    return named


def measure_levels(
    maps: Sequence[tuple[str, Tensor]], input_side: int, view_factor: float
) -> list[Level]:
    """
    Measure each level's stride from maps of a square input.

    Args:
        maps: (name, (N, C, H, W)).
        input_side: pixels of the model's own square input.
        view_factor: pixels of the loaded image per pixel of that input.
    """
    return [
        Level(name, x.shape[1], input_side / max(x.shape[-2:]) * view_factor) for name, x in maps
    ]


def pair_levels(
    student: Sequence[Level], teacher: Sequence[Level], *, resample: bool = False
) -> list[LevelPair]:
    """
    Pair each student level with the teacher level on the same grid.

    Args:
        student, teacher: the two pyramids.
        resample: pair a student level without partner with the teacher level of the nearest stride
            within a factor of sqrt(2).

    Returns:
        Pairs from fine to coarse. Levels without a partner stay out.

    Raises:
        ValueError: nothing pairs; the message lists both pyramids.
    """
    pairs = []
    for i, level in enumerate(student):
        gaps = [abs(math.log2(level.stride / other.stride)) for other in teacher]
        j = min(range(len(gaps)), key=gaps.__getitem__, default=-1)
        same = j >= 0 and same_stride(level.stride, teacher[j].stride)
        if same or (resample and j >= 0 and gaps[j] <= 0.5):
            name = f"{level.name}~{teacher[j].name}"
            scale = 1.0 if same else teacher[j].stride / level.stride
            pairs.append(LevelPair(i, j, name, level.stride, scale))
    if not pairs:
        raise ValueError(
            "No level of the student's pyramid lies on the grid of a teacher level.\n"
            f"  student: {', '.join(map(str, student)) or 'no levels'}\n"
            f"  teacher: {', '.join(map(str, teacher)) or 'no levels'}\n"
            "Capture pyramids that share strides, use a KD.STUDENT.VIEW_FACTOR that is a power of "
            "two, or set KD.RESAMPLE_LEVELS True."
        )
    return sorted(pairs, key=lambda pair: pair.stride)


def build_adapters(
    pairs: Sequence[LevelPair],
    student: Sequence[Level],
    teacher: Sequence[Level],
    mode: str,
    *,
    kernel: int = 1,
    bias: bool = False,
) -> nn.ModuleList:
    """
    Build the convolutions from student to teacher channels, one per pair.

    Args:
        pairs: as paired.
        student, teacher: the two pyramids.
        mode: "auto" (where channels differ), "always" or "never".
        kernel: odd side of the convolutions; zeros surround the map.
        bias: whether they have one. A loss that normalises each channel gives it no gradient.

    Returns:
        One module per pair; `nn.Identity` where there is no adapter.

    Raises:
        ValueError: channels differ and the mode is "never", or the mode is unknown.
    """
    if mode not in ("auto", "always", "never"):
        raise ValueError(f"ADAPTER is {mode!r}, expected 'auto', 'always' or 'never'.")
    adapters = nn.ModuleList()
    for pair in pairs:
        inputs, outputs = student[pair.student].channels, teacher[pair.teacher].channels
        if mode == "never" and inputs != outputs:
            raise ValueError(
                f"Levels {pair.name} have {inputs} and {outputs} channels and adapters are off."
            )
        needed = mode == "always" or inputs != outputs
        adapters.append(
            nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
            if needed
            else nn.Identity()
        )
    return adapters


def on_one_grid(
    student: Tensor, teacher: Tensor, pair: LevelPair, image_sizes: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """
    Bring two maps of a pair to the same height and width.

    Both models pad their batch to their own divisor, at the right and the bottom; the maps agree
    cell by cell from the top left, and what one has more is padding only, which is cut off.

    Args:
        student, teacher: (N, C, H, W), (N, C', H', W').
        image_sizes: (height, width) of every loaded image without padding.

    Returns:
        Both maps with equal H, W.

    Raises:
        RuntimeError: the cut would remove cells that lie on an image.
    """
    if pair.resample:
        # By the ratio of strides and not to the student's size, which depends on its own padding.
        # The cells are rounded down: one more at the end, so that a map of one cell does not
        # vanish.
        teacher = F.interpolate(
            F.pad(at_least_float32(teacher), (0, 1, 0, 1), mode="replicate"),
            scale_factor=pair.scale,
            mode="bilinear",
            align_corners=False,
        )
    if student.shape[-2:] == teacher.shape[-2:]:
        return student, teacher
    own, other = ((x.shape[-2], x.shape[-1]) for x in (student, teacher))
    height, width = common_size(own, other, pair, image_sizes)
    return student[..., :height, :width], teacher[..., :height, :width]


def common_size(
    student: tuple[int, int],
    teacher: tuple[int, int],
    pair: LevelPair,
    image_sizes: Sequence[tuple[int, int]],
) -> tuple[int, int]:
    """
    Return the height and width in cells that both maps of a pair have.

    Args:
        student, teacher: height and width of each.
        pair: for its stride and name.
        image_sizes: (height, width) of every loaded image without padding.

    Raises:
        RuntimeError: there are images beyond it.
    """
    height, width = min(student[0], teacher[0]), min(student[1], teacher[1])
    needed_height = max(size[0] for size in image_sizes) / pair.stride
    needed_width = max(size[1] for size in image_sizes) / pair.stride
    # A cell more or less may hang over the edge: strided layers round sizes up.
    if height + 1 < needed_height or width + 1 < needed_width:
        raise RuntimeError(
            f"Levels {pair.name}: the student's map is {student}, the teacher's {teacher}, but the "
            f"images need {needed_height:.1f} x {needed_width:.1f} cells of stride "
            f"{pair.stride:g}; the two models do not see the same image."
        )
    return height, width
