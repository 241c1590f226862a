"""
What every distiller has to do, whatever its formula.

A test class derives from `DistillerContract` and gets these tests; a variant of a distiller is one
more derived class with other `options`. The inputs are a `Scene`: two images of different size on
two levels, with boxes and a dense teacher's predictions.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from torch import Tensor

from kd_det.config import add_kd_config
from kd_det.distillers import (
    DISTILLER_REGISTRY,
    CaptureSpec,
    Distiller,
    LevelShape,
    Pair,
    PredictionPair,
    Step,
    Targets,
    TeacherMap,
    TeacherModule,
    build_distiller,
)
from kd_det.distillers.predictions import DensePredictions
from kd_det.functional.focal import distribution_mean
from kd_det.functional.level_grid import Grid
from kd_det.functional.precision import at_least_float32, working_dtype

STRIDES = (8.0, 16.0)
SIDES = ((6, 8), (3, 4))  # cells of each level: images padded to 48 x 64
IMAGE_SIZES = [(48, 64), (32, 40)]
BOXES = [torch.tensor([[4.0, 4.0, 40.0, 36.0], [30.0, 10.0, 62.0, 46.0]])]
BOXES += [torch.tensor([[2.0, 6.0, 34.0, 30.0]])]
CLASSES = [torch.tensor([0, 2]), torch.tensor([1])]
K = 3
CAPTURES = ("features", "cls", "reg")
# Raw outputs of dense heads among the maps of a scene: they become predictions.
DENSE = ("logits", "offsets", "bins")
BINS = 5
CHANNELS = 4

Maps = list[Tensor]


@dataclass(frozen=True)
class Scene:
    """
    The inputs of one step.

    Attributes:
        student, teacher: per capture, one (N, C, H, W) map per level. Names of DENSE are raw
            outputs of a dense head; names of the teacher alone are its own pyramids.
        logits, offsets: the teacher's predictions, (N, K, H, W) and (N, 4, H, W) per level; the
            latter are distances in pixels from the position to the sides of its box.
        boxes, classes, image_sizes: ground truth.
    """

    student: dict[str, Maps]
    teacher: dict[str, Maps]
    logits: Maps
    offsets: Maps
    boxes: list[Tensor]
    classes: list[Tensor]
    image_sizes: list[tuple[int, int]]
    normalizer: float | None = 3.0

    def step(self) -> Step:
        """Return what a distiller is given; it may take what it asked for and no more."""
        sizes = torch.tensor(self.image_sizes, dtype=torch.float32)
        pairs = {
            name: [
                Pair(f"p{i}~p{i}", stride, s, t, sizes)
                for i, stride, s, t in zip((3, 4), STRIDES, own, self.teacher[name], strict=True)
            ]
            for name, own in self.student.items()
            if name not in DENSE
        }
        targets = Targets(
            self.boxes, self.classes, self.image_sizes, [torch.zeros(0, 4)] * len(self.boxes)
        )
        return Step(
            pairs,
            {"predictions": self.predictions()},
            targets,
            maps={
                name: [TeacherMap(stride, x) for stride, x in zip(STRIDES, maps, strict=True)]
                for name, maps in self.teacher.items()
                if name not in self.student
            },
            predictions=self.paired_predictions(sizes) if "logits" in self.student else {},
            loss_normalizer=self.normalizer,
        )

    def predictions(self) -> DensePredictions:
        """Return the teacher's predictions at the centre of each cell."""
        return predicted({"logits": self.logits, "offsets": self.offsets})

    def paired_predictions(self, sizes: Tensor) -> dict[str, list[PredictionPair]]:
        """Return what both heads predict."""
        own, other = (predicted(maps) for maps in (self.student, self.teacher))
        pairs = []
        for i, (size, stride) in enumerate(zip(own.sizes, STRIDES, strict=True)):
            grid = Grid(*size, stride)
            levels = own.level(i, size), other.level(i, size)
            anchor = torch.tensor([[4 * stride, 4 * stride]])
            pairs.append(PredictionPair(f"stride {stride:g}", grid, *levels, anchor, sizes))
        return {"predictions": pairs}

    def maps(self, change: Callable[[Tensor], Tensor], roles: str = "student teacher") -> "Scene":
        """Return the scene with every feature map of these roles changed."""
        changed = {
            role: {name: [change(x) for x in maps] for name, maps in getattr(self, role).items()}
            for role in roles.split()
        }
        return dataclasses.replace(self, **changed)

    def image(self, index: int) -> "Scene":
        """Return one image of the batch, with the batch's padding."""
        part = slice(index, index + 1)
        return dataclasses.replace(
            self.maps(lambda x: x[part]),
            logits=[x[part] for x in self.logits],
            offsets=[x[part] for x in self.offsets],
            boxes=self.boxes[part],
            classes=self.classes[part],
            image_sizes=self.image_sizes[part],
        )

    def padded(self) -> "Scene":
        """Return the same images in a batch with 16 pixels more of padding, filled with junk."""

        def pad(maps: Maps, scale: float = 3.0, seed: int = 99) -> Maps:
            out = []
            for x, more in zip(maps, (2, 1), strict=True):
                height, width = x.shape[-2:]
                larger = scale * noise(*x.shape[:2], height + more, width + more, seed=seed)
                larger = larger.to(x.dtype)
                larger[..., :height, :width] = x
                out.append(larger)
            return out

        features = {
            role: {name: pad(maps, seed=seed) for name, maps in getattr(self, role).items()}
            for role, seed in (("student", 98), ("teacher", 99))
        }
        return dataclasses.replace(
            self, logits=pad(self.logits), offsets=pad(self.offsets, 20.0), **features
        )

    def empty(self) -> "Scene":
        """Return the scene without any object."""
        return dataclasses.replace(
            self,
            boxes=[torch.zeros(0, 4) for _ in self.boxes],
            classes=[torch.zeros(0, dtype=torch.int64) for _ in self.boxes],
        )

    def leaves(self, role: str) -> list[Tensor]:
        """Return all feature maps of a role."""
        return [x for maps in getattr(self, role).values() for x in maps]


def predicted(maps: dict[str, Maps]) -> DensePredictions:
    """
    Read a head's outputs at the centre of each cell.

    Args:
        maps: "logits" (N, K, H, W), and "offsets" (N, 4, H, W), distances in pixels to the sides of
            the box, or "bins" (N, 4 * BINS, H, W), logits of those distances in strides.
    """
    boxes, bins = [], None
    if "bins" in maps:
        bins = [x.flatten(2).transpose(1, 2).unflatten(2, (4, BINS)) for x in maps["bins"]]
    for i, stride in enumerate(STRIDES):
        height, width = maps["logits"][i].shape[-2:]
        y, x = (torch.arange(n) * stride + stride / 2 for n in (height, width))
        centres = torch.cartesian_prod(y, x).flip(1)  # (H * W, 2)
        if bins is None:
            distances = at_least_float32(maps["offsets"][i]).flatten(2).transpose(1, 2)
        else:
            distances = distribution_mean(at_least_float32(bins[i])) * stride
        boxes.append(torch.cat([centres - distances[..., :2], centres + distances[..., 2:]], 2))
    return DensePredictions(
        logits=[x.flatten(2).transpose(1, 2) for x in maps["logits"]],
        boxes=boxes,
        strides=list(STRIDES),
        sizes=[(x.shape[-2], x.shape[-1]) for x in maps["logits"]],
        offset=0.5,
        distributions=bins,
    )


def scene_for(specs: Sequence[CaptureSpec]) -> Scene:
    """Draw what these captures see."""
    pyramids = [spec for spec in specs if spec.kind == "pyramid"]
    scene = make_scene(tuple(spec.name for spec in pyramids if spec.student is not None))
    alone = [spec.name for spec in pyramids if spec.student is None]
    for i, name in enumerate(alone):
        scene.teacher[name] = _draw(K, 300 + 10 * i)
    for spec in specs:
        if spec.kind != "predictions" or spec.student is None:
            continue
        for i, maps in enumerate((scene.student, scene.teacher)):
            maps["logits"] = _draw(K, 200 + 5 * i)
            if spec.bins:
                maps["bins"] = _draw(4 * BINS, 240 + 5 * i)
            else:
                maps["offsets"] = [16 + 4 * x for x in _draw(4, 220 + 5 * i)]
    return scene


def _draw(count: int, seed: int) -> Maps:
    return [noise(len(IMAGE_SIZES), count, *side, seed=seed + i) for i, side in enumerate(SIDES)]


def noise(*shape: int, seed: int) -> Tensor:
    """Return normally distributed float64 numbers, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_scene(names: tuple[str, ...], channels: int = CHANNELS) -> Scene:
    """Draw the features of the named captures in float64, the teacher's predictions in float32."""
    return Scene(
        student={name: _draw(channels, 10 * i) for i, name in enumerate(names)},
        teacher={name: _draw(channels, 10 * i + 5) for i, name in enumerate(names)},
        logits=[x.float() for x in _draw(K, 100)],
        offsets=[16 + 4 * x.float() for x in _draw(4, 110)],
        boxes=BOXES,
        classes=CLASSES,
        image_sizes=IMAGE_SIZES,
    )


def config() -> CfgNode:
    """Return all defaults."""
    cfg = get_cfg()
    add_kd_config(cfg)
    return cfg


def settings_of(distiller: Distiller) -> dict[str, Any]:
    """Return the attributes that the constructor set."""
    return {k: v for k, v in vars(distiller).items() if not k.startswith("_") and k != "training"}


class DistillerContract:
    """
    Tests of one distiller.

    Attributes:
        name: in the registry.
        other: for every key of its config node but WEIGHT and SCHEDULE, a value other than the
            default.
        along: keys that only count beside others, which are set with them.
        options: constructor arguments of the variant under test.
        zero_at_equality: whether the paper's loss is zero for a student that equals its teacher.
        parts_of_mean: loss parts that are, for a batch, the mean over its images.
    """

    name: ClassVar[str]
    other: ClassVar[dict[str, Any]]
    along: ClassVar[dict[str, dict[str, Any]]] = {}
    options: ClassVar[dict[str, Any]] = {}
    zero_at_equality: ClassVar[bool] = True
    parts_of_mean: ClassVar[tuple[str, ...]] = ("",)

    def build(self, **options: Any) -> Distiller:
        """Build the variant under test, with further options."""
        distiller: Distiller = DISTILLER_REGISTRY.get(self.name)(**{**self.options, **options})
        levels = {
            spec.name: [
                LevelShape(f"p{i}~p{i}", stride, CHANNELS)
                for i, stride in zip((3, 4), STRIDES, strict=True)
            ]
            for spec in distiller.captures()
            if spec.kind == "pyramid" or (spec.kind == "predictions" and spec.student is None)
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)  # of the distiller's own modules
            distiller.build(levels, self.modules())
        return distiller.double()

    def modules(self) -> dict[str, TeacherModule]:
        """Return what captures of kind "module" hand over."""
        return {}

    @pytest.fixture
    def scene(self) -> Scene:
        return scene_for(self.build().captures())

    def losses(self, scene: Scene, **options: Any) -> dict[str, Tensor]:
        """Return the losses of a scene."""
        maps = [x for role in ("student", "teacher") for x in scene.leaves(role)]
        return self.build(**options).to(working_dtype(*maps))(self.step(scene))

    def step(self, scene: Scene) -> Step:
        """Return what the distiller sees of a scene."""
        return scene.step()

    def total(self, scene: Scene, **options: Any) -> Tensor:
        """Return their sum."""
        return torch.stack(list(self.losses(scene, **options).values())).sum()

    def test_losses_are_named_scalars(self, scene: Scene) -> None:
        distiller = self.build()
        losses = distiller(self.step(scene))
        assert losses
        for part, value in losses.items():
            assert value.dim() == 0
            assert part == "" or part.isidentifier()

    def test_zero_exactly_where_the_student_equals_the_teacher(self, scene: Scene) -> None:
        assert self.total(scene).item() > 1e-4
        equal = dataclasses.replace(
            scene, student={name: scene.teacher[name] for name in scene.student}
        )
        if self.zero_at_equality:
            assert self.total(equal).abs().item() < 1e-12

    def test_gradient_reaches_the_student_alone(self, scene: Scene) -> None:
        scene = scene.maps(lambda x: x.clone().requires_grad_())
        self.total(scene).backward()
        for x in scene.leaves("student"):
            assert x.grad is not None
            assert torch.isfinite(x.grad).all()
            assert x.grad.abs().sum() > 0
        assert all(x.grad is None for x in scene.leaves("teacher"))

    def test_finite_and_on_the_graph_without_ground_truth(self, scene: Scene) -> None:
        scene = scene.empty().maps(lambda x: x.clone().requires_grad_(), "student")
        for value in self.losses(scene).values():
            assert torch.isfinite(value)
            assert value.requires_grad
        self.total(scene).backward()
        for x in scene.leaves("student"):
            assert x.grad is not None
            assert torch.isfinite(x.grad).all()

    def test_one_image_without_ground_truth_among_others(self, scene: Scene) -> None:
        mixed = dataclasses.replace(
            scene,
            boxes=[torch.zeros(0, 4), scene.boxes[1]],
            classes=[scene.classes[0][:0], scene.classes[1]],
        )
        assert torch.isfinite(self.total(mixed))

    def test_the_order_of_memory_changes_nothing(self, scene: Scene) -> None:
        def channels_last(x: Tensor) -> Tensor:
            return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

        torch.testing.assert_close(
            self.losses(scene.maps(channels_last)), self.losses(scene), rtol=1e-5, atol=1e-7
        )

    def test_a_batch_is_the_mean_of_its_images(self, scene: Scene) -> None:
        if not self.parts_of_mean:
            pytest.skip("its statistics or divisors are those of the whole batch")
        whole = self.losses(scene)
        single = [self.losses(scene.image(i)) for i in range(2)]
        for part in self.parts_of_mean:
            expected = torch.stack([losses[part] for losses in single]).mean()
            torch.testing.assert_close(whole[part], expected)
            assert single[0][part] != single[1][part]

    def test_more_padding_changes_nothing_where_padding_is_masked(self, scene: Scene) -> None:
        alone, padded = scene, scene.padded()
        torch.testing.assert_close(
            self.total(padded, mask_padding=True), self.total(alone, mask_padding=True)
        )
        # The test would notice: without the mask it changes.
        without = [self.total(x, mask_padding=False).item() for x in (alone, padded)]
        assert abs(without[0] - without[1]) > 1e-4

    def test_no_gradient_on_padding_where_it_is_masked(self, scene: Scene) -> None:
        scene = scene.padded().maps(lambda x: x.clone().requires_grad_(), "student")
        self.total(scene, mask_padding=True).backward()
        for x, more in zip(scene.leaves("student"), (2, 1) * 3, strict=False):
            assert x.grad is not None
            assert not x.grad[..., -more:, :].any()
            assert not x.grad[..., -more:].any()
            assert x.grad.any()

    def test_gradcheck(self, scene: Scene) -> None:
        self.check_gradient(scene, tuple(scene.student), tuple(self.losses(scene)))

    def check_gradient(self, scene: Scene, names: Sequence[str], parts: Sequence[str]) -> None:
        """Compare the gradient of some parts at some captures with finite differences."""
        distiller = self.build()

        def loss(*maps: Tensor) -> Tensor:
            left = iter(maps)
            given = {name: [next(left) for _ in scene.student[name]] for name in names}
            changed = dataclasses.replace(scene, student={**scene.student, **given})
            losses = distiller(self.step(changed))
            return torch.stack([losses[part] for part in parts]).sum()

        leaves = [x.clone().requires_grad_() for name in names for x in scene.student[name]]
        assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_computed_in_float32_under_autocast(self, scene: Scene, dtype: torch.dtype) -> None:
        low = scene.maps(lambda x: x.to(dtype))
        plain = self.losses(low)
        student = low.maps(lambda x: x.clone().requires_grad_(), "student")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = self.losses(student)
        for part, value in cast.items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, plain[part])
        # Rounding the inputs is all that differs from float64.
        exact = self.losses(low.maps(Tensor.double))
        for part, value in cast.items():
            torch.testing.assert_close(value.double(), exact[part], rtol=1e-4, atol=1e-5)
        torch.stack(list(cast.values())).sum().backward()
        for x in student.leaves("student"):
            assert x.grad is not None
            assert x.grad.dtype == dtype
            assert torch.isfinite(x.grad).all()

    def test_float64_stays_float64(self, scene: Scene) -> None:
        assert {x.dtype for x in self.losses(scene).values()} == {torch.float64}

    def test_a_student_in_half_precision_of_a_teacher_in_full(self, scene: Scene) -> None:
        mixed = scene.maps(Tensor.bfloat16, "student").maps(Tensor.float, "teacher")
        assert self.total(mixed).dtype == torch.float32

    def test_inputs_are_left_alone(self, scene: Scene) -> None:
        maps = scene.leaves("student") + scene.leaves("teacher")
        before = [x.clone() for x in maps]
        first, second = self.total(scene), self.total(scene)
        assert first == second
        assert all(torch.equal(a, b) for a, b in zip(before, maps, strict=True))

    def test_defaults_are_those_of_the_config(self) -> None:
        default = DISTILLER_REGISTRY.get(self.name)()
        assert settings_of(build_distiller(self.name, config())) == settings_of(default)

    def test_every_config_key_reaches_the_constructor(self) -> None:
        key_of_node = self.build().config_key
        assert set(self.other) == set(config().KD[key_of_node]) - {"WEIGHT", "SHARE", "SCHEDULE"}
        all_names = set(settings_of(build_distiller(self.name, config())))
        reached = set()
        for key, value in self.other.items():
            cfg = config()
            node = cfg.KD[key_of_node]
            node.update(self.along.get(key, {}))
            before = settings_of(build_distiller(self.name, cfg))
            assert node[key] != value
            node[key] = value
            after = settings_of(build_distiller(self.name, cfg))
            changed = {name for name in before if before[name] != after[name]}
            assert changed, f"{key} = {value!r} changes nothing"
            reached |= changed
        assert reached == all_names
