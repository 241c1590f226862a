"""
The contract between a distiller and the rest of kd_det.

A distiller is one published technique. It brings its keys (`add_config`), says which captures it
needs, and maps what was captured in one step to named losses. It knows nothing of trainers,
checkpoints or how models run. Weights and their schedules, adapters, level pairing and views are
applied around it.

Shapes: N images, C channels, H W of a level, M boxes of an image.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from detectron2.config import CfgNode
from fvcore.common.registry import Registry
from torch import Tensor, nn

from kd_det.distillers.built import LevelShape, TeacherModule
from kd_det.distillers.predictions import DensePredictions, PredictionPair
from kd_det.functional.level_grid import Grid, cells_on_images
from kd_det.text import nearest

DISTILLER_REGISTRY = Registry("DISTILLER")
DISTILLER_REGISTRY.__doc__ = "Distillers by the name that KD.DISTILLERS lists."

CaptureKind = Literal["pyramid", "predictions", "module"]
AdapterMode = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class CaptureSpec:
    """
    Something a distiller wants to see of both models.

    Attributes:
        name: the distiller's own word for it; key in the `Step`.
        student: module path in the student ("backbone", "head.cls_subnet.0", "backbone@1" for the
            second call, "head.cls_subnet#0" for the first ReLU inside, "head.cls_subnet^0" for what
            enters it), or None if only the teacher's is wanted.
        teacher: the same for the teacher.
        kind: "pyramid" pairs the levels of both sides into `Step.pairs`, or hands the teacher's
            alone to `Step.maps`; "predictions" decodes what dense heads return: the teacher's alone
            to `Step.teacher`, or that of both, paired, to `Step.predictions`; "module" hands the
            frozen teacher's module itself (the whole model for "") to `Step.modules`.
        levels: of what both models give, only the finest n pairs; 0 for all.
        adapter: of a pyramid; None for the distiller's.
        bins: of predictions of both, the distributions of the boxes' sides are compared.
        advice: what to change where a model lacks it or, with an `adapter`, has another width.
    """

    name: str
    student: str | None
    teacher: str | None
    kind: CaptureKind = "pyramid"
    levels: int = 0
    adapter: AdapterMode | None = None
    bins: bool = False
    advice: str = ""


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
        masks: `valid` of every grid asked for so far; the pairs of a step share it.
    """

    name: str
    stride: float
    student: Tensor
    teacher: Tensor
    image_sizes: Tensor
    masks: dict[Grid, Tensor] = field(default_factory=dict, repr=False)

    def valid(self) -> Tensor:
        """Return (N, 1, H, W) float32 in {0, 1}: 1 where a cell's centre lies on the image."""
        height, width = self.student.shape[-2:]
        grid = Grid(height, width, self.stride)
        if grid not in self.masks:
            self.masks[grid] = cells_on_images(grid, self.image_sizes)[:, None].float()
        return self.masks[grid]


class TeacherMap(NamedTuple):
    """
    A level of the teacher alone.

    Args:
        stride: pixels of the loaded image per cell.
        map: (N, C, H, W), no gradient.
    """

    stride: float
    map: Tensor


@dataclass
class Targets:
    """
    Ground truth of the batch in the loaded image's frame, as loaded: on the CPU, since its geometry
    decides the sizes of what is computed from it, and each such decision would wait for a device.

    Attributes:
        boxes: per image (M, 4) absolute x0 y0 x1 y1 in pixels.
        classes: per image (M,) int64 in [0, K).
        image_sizes: per image (height, width) without padding.
        ignored: per image (I, 4), regions of objects not annotated one by one; [] if not known.
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
        teacher: per "predictions" capture of the teacher alone, what it predicts, in the loaded
            image's pixels.
        targets: ground truth in the loaded image's frame.
        features: the student's captured tensors, before adapters and cuts; pulls compare there.
        maps: per "pyramid" capture of the teacher alone, its levels from fine to coarse.
        predictions: per "predictions" capture of both, the paired levels from fine to coarse.
        modules: per "module" capture, the teacher's module.
        loss_normalizer: what the student divides its own losses by, if it has such a number.
        rank: of this process.
        mean: mean of a tensor over all processes, each of which has to call it.
    """

    pairs: dict[str, list[Pair]]
    teacher: dict[str, DensePredictions]
    targets: Targets
    features: Sequence[Tensor] = ()
    maps: dict[str, list[TeacherMap]] = field(default_factory=dict)
    predictions: dict[str, list[PredictionPair]] = field(default_factory=dict)
    modules: dict[str, TeacherModule] = field(default_factory=dict)
    loss_normalizer: float | None = None
    rank: int = 0
    mean: Callable[[Tensor], Tensor] = lambda values: values

    def normalizer(self, confidence: Callable[[], Tensor]) -> float | Tensor:
        """
        Return N+, what losses of a dense head are divided by.

        Args:
            confidence: gives, where the student has no number of its own, this process's sum of the
                teacher's highest class probabilities over all positions on an image.

        Returns:
            The student's moving average of positives, or the mean of `confidence()` over processes;
            at least 1.
        """
        if self.loss_normalizer is not None:
            return max(1.0, self.loss_normalizer)
        return self.mean(confidence().detach()).clamp(min=1)


class Distiller(nn.Module):
    """
    Base class of all distillers; subclasses are registered with `@DISTILLER_REGISTRY.register()`.

    A subclass takes explicit keyword arguments, each of which is a key of its node of the config in
    lower case.

    Attributes:
        config_key: name of the distiller's node under KD; its lower case names the losses.
        uses_class_scores: whether the teacher's class scores are read, so that both models' classes
            must agree.
        needs_boxes: whether `Step.targets` must hold the ground truth's boxes and classes.
        adapter: when paired student maps pass a convolution to the teacher's channels.
        adapter_kernel, adapter_bias: of that convolution.
        share: what SHARE None means for a student that starts from random weights.
        share_of_trained: the same for a student that starts from trained ones.
        share_of_kin: the same for such a student whose teacher has its net; None: as any teacher's.
        guide: name of the capture of the teacher's predictions by which the student's own ground
            truth is assigned while the distiller has a weight; None leaves that to the student.
    """

    config_key: ClassVar[str]
    uses_class_scores: bool = False
    needs_boxes: bool = False
    adapter: AdapterMode = "never"
    adapter_kernel: int = 1
    adapter_bias: bool = False
    share: ClassVar[float] = 0.3
    share_of_trained: ClassVar[float] = 0.3
    share_of_kin: ClassVar[float | None] = None
    guide: str | None = None

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        """
        Add this distiller's keys and their defaults to its node; subclasses extend it.

        What all distillers have: a weight, and that weight's course over the iterations.
        """
        # Scalar in front of the distiller's losses. None: it sets itself by SHARE.
        node.WEIGHT = None
        # Without a WEIGHT: how hard the distiller pulls on the student at first, as the ratio of
        # its gradient's norm at the captured features to that of the detection losses. None: the
        # method's own, which for some depends on whether the student starts from random weights.
        node.SHARE = None
        node.SCHEDULE = CfgNode()
        # Iterations of linear growth from 0 to the full weight; 0: none.
        node.SCHEDULE.WARMUP_ITERS = 0
        # "constant", or "cosine": from the full weight to FINAL_FACTOR of it at SOLVER.MAX_ITER.
        # "auto": cosine where the weight sets itself, constant where a WEIGHT is given.
        node.SCHEDULE.DECAY = "auto"
        node.SCHEDULE.FINAL_FACTOR = 0.3
        # First iteration with weight 0; negative: never.
        node.SCHEDULE.STOP_AT = -1
        # Piecewise factors: FACTORS[i] holds from iteration STEPS[i] on; 1 before the first step.
        node.SCHEDULE.STEPS = []
        node.SCHEDULE.FACTORS = []

    @classmethod
    def from_config(cls, node: CfgNode) -> dict[str, Any]:
        """Translate the distiller's node: keyword arguments are its keys in lower case."""
        common = CfgNode()
        Distiller.add_config(common)
        return {key.lower(): value for key, value in node.items() if key not in common}

    def captures(self) -> Sequence[CaptureSpec]:
        """Return what this distiller needs to see."""
        raise NotImplementedError

    def build(
        self,
        levels: Mapping[str, Sequence[LevelShape]],
        modules: Mapping[str, TeacherModule],
    ) -> None:
        """
        Make the trainable modules of its own, and refuse models that it cannot serve.

        Called once, when captures are resolved and paired; the random state that first weights are
        drawn from is restored afterwards.

        Args:
            levels: per "pyramid" capture, its pairs; of what is the teacher's alone, its levels.
            modules: per "module" capture, the teacher's module.

        Raises:
            ValueError: the models do not fit the technique; the message names the remedy.
        """

    def forward(self, step: Step) -> dict[str, Tensor]:
        """
        Compute the unweighted losses of one step.

        Returns:
            Scalars by part name; "" for a distiller with a single loss. Float32 at least, attached
            to the student's graph even when there is nothing to distil.
        """
        raise NotImplementedError


def distiller_class(name: str) -> type[Distiller]:
    """
    Return the class that an entry of KD.DISTILLERS names, "<registered name>" or "<it>:<label>".

    Raises:
        KeyError: no distiller has that name; the message lists the nearest ones.
    """
    registered = name.partition(":")[0]
    names = [key for key, _ in DISTILLER_REGISTRY]
    if registered not in names:
        raise KeyError(f"KD.DISTILLERS: no distiller is called {name}; {nearest(name, names)}.")
    found: type[Distiller] = DISTILLER_REGISTRY.get(registered)
    return found


def node_name(name: str) -> str:
    """Return the key under KD of an entry of KD.DISTILLERS: "SSIM", or "SSIM:head"."""
    _, colon, label = name.partition(":")
    return f"{distiller_class(name).config_key}{colon}{label}"


def build_distiller(name: str, cfg: CfgNode) -> Distiller:
    """
    Build the distiller of an entry of KD.DISTILLERS from the full config.

    Raises:
        KeyError: no distiller has that name; the message lists the nearest ones.
    """
    cls = distiller_class(name)
    return cls(**cls.from_config(cfg.KD[node_name(name)]))
