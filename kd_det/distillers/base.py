"""
The contract between a distiller and the rest of kd_det.

A distiller is one published technique. It says which captures it needs, and maps what was captured
in one step to named losses. It knows nothing of yaml beyond its own `from_config`, nothing of
trainers, checkpoints or how models run. Weights and their schedules, adapters, level pairing and
views are applied around it.

Shapes: N images, C channels, H W of a level, M boxes of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from detectron2.config import CfgNode
from fvcore.common.registry import Registry
from torch import Tensor, nn

from kd_det.functional.level_grid import Grid, cells_on_images
from kd_det.text import nearest

DISTILLER_REGISTRY = Registry("DISTILLER")
DISTILLER_REGISTRY.__doc__ = "Distillers by the name that KD.DISTILLERS lists."

CaptureKind = Literal["pyramid", "raw", "predictions"]
AdapterMode = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class CaptureSpec:
    """
    Something a distiller wants to see of both models.

    Attributes:
        name: the distiller's own word for it; key in `Step.pairs`, `Step.student`, `Step.teacher`.
        student: module path in the student ("backbone", "head.cls_subnet.0", "backbone@1" for the
            second call), or None if only the teacher's is wanted.
        teacher: the same for the teacher.
        kind: "pyramid" pairs the levels of both sides into `Step.pairs`; "raw" hands over the
            outputs, one entry per call; "predictions" hands over the teacher's dense head outputs
            decoded to `DensePredictions` (teacher only).
    """

    name: str
    student: str | None
    teacher: str | None
    kind: CaptureKind = "pyramid"


@dataclass
class Pair:
    """
    A student level and the teacher level on the same grid.

    Attributes:
        name: e.g. "p2~p3": the student's and the teacher's level.
        stride: pixels of the loaded image per cell.
        student: (N, C, H, W), after the adapter if there is one; carries the graph.
        teacher: (N, C', H, W), no gradient.
        image_sizes: (N, 2) float, height and width of each loaded image without padding.
    """

    name: str
    stride: float
    student: Tensor
    teacher: Tensor
    image_sizes: Tensor

    def valid(self) -> Tensor:
        """Return (N, 1, H, W) float32 in {0, 1}: 1 where a cell's centre lies on the image."""
        height, width = self.student.shape[-2:]
        grid = Grid(height, width, self.stride)
        return cells_on_images(grid, self.image_sizes)[:, None].float()


@dataclass
class Targets:
    """
    Ground truth of the batch in the loaded image's frame, as loaded: on the CPU.

    It stays there because its geometry decides the sizes of what is computed from it; read from a
    device, every such decision would wait for it.

    Attributes:
        boxes: per image (M, 4) absolute x0 y0 x1 y1 in pixels.
        classes: per image (M,) int64 in [0, K).
        image_sizes: per image (height, width) without padding.
        ignored: per image (I, 4), regions whose objects are not annotated one by one.
    """

    boxes: list[Tensor]
    classes: list[Tensor]
    image_sizes: list[tuple[int, int]]
    ignored: list[Tensor]


@dataclass
class Step:
    """
    What a distiller sees of one training step.

    Attributes:
        pairs: per "pyramid" capture, the paired levels from fine to coarse.
        student: per "raw" capture, the student's outputs, one entry per call.
        teacher: the same for the teacher; `DensePredictions` for "predictions".
        targets: ground truth in the loaded image's frame.
    """

    pairs: dict[str, list[Pair]]
    student: dict[str, Any]
    teacher: dict[str, Any]
    targets: Targets


class Distiller(nn.Module):
    """
    Base class of all distillers.

    Subclasses take explicit keyword arguments, translate the config in `from_config` (with
    Detectron2's `@configurable`), and are registered with `@DISTILLER_REGISTRY.register()`.

    Attributes:
        config_key: name of the distiller's node under KD; its lower case names the losses.
        uses_class_scores: whether the teacher's class scores are read, so that both models' classes
            must agree.
        adapter: when paired student maps pass a 1x1 convolution to the teacher's channels.
    """

    config_key: ClassVar[str]
    uses_class_scores: ClassVar[bool] = False
    adapter: AdapterMode = "never"

    @property
    def slug(self) -> str:
        """Its name in loss keys and logged scalars."""
        return self.config_key.lower()

    def captures(self) -> Sequence[CaptureSpec]:
        """Return what this distiller needs to see."""
        raise NotImplementedError

    def forward(self, step: Step) -> dict[str, Tensor]:
        """
        Compute the unweighted losses of one step.

        Returns:
            Scalars by part name; "" for a distiller with a single loss. Float32 at least, attached
            to the student's graph even when there is nothing to distil.
        """
        raise NotImplementedError


def loss_key(distiller: Distiller, part: str) -> str:
    """Return the key of a loss in the model's loss dict: `loss_kd_<distiller>[_<part>]`."""
    name = f"loss_kd_{distiller.slug}"
    return f"{name}_{part}" if part else name


def build_distiller(name: str, cfg: CfgNode) -> Distiller:
    """
    Build a registered distiller from the full config.

    Raises:
        KeyError: no distiller has that name; the message lists the nearest ones.
    """
    names = [key for key, _ in DISTILLER_REGISTRY]
    if name not in names:
        raise KeyError(f"KD.DISTILLERS: no distiller is called {name}; {nearest(name, names)}.")
    return DISTILLER_REGISTRY.get(name)(cfg)
