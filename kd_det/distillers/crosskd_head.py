"""The rest of a frozen teacher's head, run on a student's features (CrossKD)."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from detectron2.layers import CycleBatchNormList
from torch import Tensor, nn

from kd_det.distillers.base import Pair
from kd_det.distillers.built import TeacherModule
from kd_det.distillers.predictions import DensePredictions, decode_dense
from kd_det.functional.crosskd import align_statistics
from kd_det.functional.level_grid import same_stride
from kd_det.functional.moments import Scope

# The two towers of Detectron2's dense heads, and what predicts from them.
TOWERS = {"cls": ("cls_subnet", "cls_score"), "reg": ("bbox_subnet", "bbox_pred")}
# What predicts, from the boxes' tower, how good a box is.
QUALITY = "quality"


def cross_predict(
    teacher: TeacherModule,
    entries: Mapping[str, Sequence[Pair]],
    own: DensePredictions,
    *,
    head: str,
    reuse_from: int,
    scope: Scope,
    quality: bool = False,
) -> DensePredictions:
    """
    Run the rest of the teacher's head on the student's features, level by level.

    Args:
        teacher: the whole model.
        entries: per tower, "cls" and "reg", the features that enter it and the teacher's own.
        own: what the teacher predicts itself.
        head: module path of the head in the teacher.
        reuse_from: convolutions of a tower that the features have passed.
        scope: see `align_statistics`.
        quality: whether the boxes' quality is predicted too.

    Returns:
        The predictions, in the loaded image's pixels; nothing may be read of levels that `entries`
        lacks.
    """
    module = teacher.module.get_submodule(head)
    predictors = {part: [predictor] for part, (_, predictor) in TOWERS.items()}
    if quality:
        predictors["reg"].append(QUALITY)
    outputs: list[list[Tensor]] = []
    for part, names in predictors.items():
        rest = _rest_of(module.get_submodule(TOWERS[part][0]), reuse_from)
        maps: dict[str, dict[int, Tensor]] = {name: {} for name in names}
        for pair in entries[part]:
            level = level_of(pair, own)
            features = align_statistics(pair.student, pair.teacher, scope=scope)
            with teacher.autocast(), _at_level(rest, level):
                for layer in rest:
                    features = layer(features)
                for name in names:
                    maps[name][level] = module.get_submodule(name)(features)
                scales = getattr(module, "scales", None)
                if part == "reg" and scales is not None:
                    maps[names[0]][level] = maps[names[0]][level] * scales[level]
        for found in maps.values():
            some = next(iter(found.values()))
            # Of levels without a partner nothing is read.
            absent = some.new_zeros(*some.shape[:2], 1, 1)
            outputs.append([found.get(i, absent) for i in range(len(own.strides))])
    return decode_dense(teacher.module, outputs).scaled(teacher.view_factor)


def level_of(pair: Pair, own: DensePredictions) -> int:
    """Return which of the teacher's own levels a pair is."""
    return next(i for i, stride in enumerate(own.strides) if same_stride(stride, pair.stride))


@contextlib.contextmanager
def _at_level(modules: Sequence[nn.Module], level: int) -> Iterator[None]:
    """Tell norms that count their calls which level they see, and set them back."""
    norms = [x for x in modules if isinstance(x, CycleBatchNormList)]
    for norm in norms:
        norm._pos = level
    yield
    for norm in norms:
        norm._pos = 0


def _rest_of(tower: nn.Module, reuse_from: int) -> list[nn.Module]:
    """Return the layers after a number of convolutions, from the activation of the last one on."""
    layers = list(tower.children())
    if reuse_from == 0:
        return layers
    activations = [i for i, layer in enumerate(layers) if isinstance(layer, nn.ReLU)]
    return layers[activations[reuse_from - 1] :]
