"""Distillation from Python: what a script, or a LazyConfig, composes."""

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, get_cfg
from torch import nn

from kd_det.config import add_kd_config
from kd_det.distillation.auto_weight import auto_weights
from kd_det.distillation.detector import DistillationDetector
from kd_det.distillation.schedule import Schedule
from kd_det.distillation.teacher import Teacher, build_teacher, has_net_of
from kd_det.distillation.unchanged import unchanged_rng
from kd_det.distillation.views import View
from kd_det.distillers import Distiller, distiller_class, node_name
from kd_det.text import nearest


class Weighted:
    """
    A distiller with its weight, and that weight's course: what KD.<DISTILLER> holds in a yaml file.

    Args:
        distiller: built from its own arguments.
        weight: scalar in front of its losses; None: it sets itself by `share`.
        share: wanted ratio of gradients at first; None: the distiller's own.
        label: sets a second one of a kind apart.
        schedule: keys of `KD.<DISTILLER>.SCHEDULE` in lower case, e.g. `warmup_iters=500`.

    Attributes:
        name: what its entry of KD.DISTILLERS would be.
        node: what its node of a config would be.

    Raises:
        KeyError: the distiller's class is not registered, or a schedule has no such key.
    """

    # No dataclass: omegaconf, which holds LazyConfigs, would take one for a config.
    def __init__(
        self,
        distiller: Distiller,
        weight: float | None = None,
        *,
        share: float | None = None,
        label: str = "",
        **schedule: Any,
    ) -> None:
        self.distiller = distiller
        self.name = type(distiller).__name__ + (f":{label}" if label else "")
        distiller_class(self.name)
        self.node = CfgNode()
        distiller.add_config(self.node)
        self.node.WEIGHT = weight
        if share is not None:
            self.node.SHARE = share
        for key, value in schedule.items():
            if key.upper() not in self.node.SCHEDULE:
                known = [name.lower() for name in self.node.SCHEDULE]
                raise KeyError(f"{self.name}: no schedule has {key!r}; {nearest(key, known)}.")
            is_list = isinstance(self.node.SCHEDULE[key.upper()], list)
            self.node.SCHEDULE[key.upper()] = list(value) if is_list else value


def distill(
    student: nn.Module,
    teacher: Teacher | None,
    distillers: Sequence[Weighted | Distiller],
    *,
    max_iter: int = 0,
    from_random: bool = False,
    view_factor: float = 1.0,
    view_interpolation: str = "bilinear",
    inherit: Sequence[str] = (),
    resample_levels: bool = False,
    grad_share_period: int = 200,
) -> DistillationDetector:
    """
    Wrap a student and its teacher: a model whose losses are the student's own and `loss_kd_*`.

    Args:
        student: any Detectron2 model, unmodified.
        teacher: from `load_teacher`, or a `Teacher` around any model.
        distillers: with their weights; one alone has a weight that sets itself.
        max_iter: iterations of the run; needed by weights that set themselves and by cosines.
        from_random: the student starts from random weights, and some distillers pull harder then.
        view_factor, view_interpolation: of what the student sees, see KD.STUDENT.
        inherit, resample_levels, grad_share_period: see KD.INHERIT, KD.RESAMPLE_LEVELS and
            KD.GRAD_SHARE_PERIOD.

    Raises:
        KeyError: a distiller's class is not registered.
        ValueError: two are of one name, `max_iter` is missing, or the models do not fit.
    """
    active = [d if isinstance(d, Weighted) else Weighted(d) for d in distillers]
    names = [one.name for one in active]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Two distillers are called {name!r}; give one of them a label.")
    cfg = CfgNode({"KD": {}, "SOLVER": {"MAX_ITER": max_iter}})
    for one in active:
        node = one.node
        if max_iter <= 0 and (node.WEIGHT is None or node.SCHEDULE.DECAY == "cosine"):
            raise ValueError(
                f"{one.name}: its weight depends on the length of the run; give max_iter (the "
                "iterations), or a weight with another decay than 'cosine'."
            )
        cfg.KD[node_name(one.name)] = node
    by_name = {one.name: one.distiller for one in active}
    return DistillationDetector(
        student=student,
        teacher=teacher,
        distillers=by_name,
        schedules={name: Schedule.of(name, cfg) for name in by_name},
        autos=auto_weights(
            cfg,
            by_name,
            trained=not from_random,
            kin=teacher is not None and has_net_of(student, teacher.model),
        ),
        view=View(view_factor, view_interpolation),
        inherit_patterns=list(inherit),
        resample_levels=resample_levels,
        grad_share_period=grad_share_period,
    )


def load_teacher(
    config_file: str,
    weights: str = "auto",
    *,
    overrides: Sequence[str] = (),
    input_format: str = "BGR",
    precision: str = "float32",
    ignore_keys: Sequence[str] = (),
    same_classes_as: nn.Module | None = None,
) -> Teacher:
    """
    Build, load strictly and freeze a teacher from its own config file.

    Args:
        config_file: yaml, or a LazyConfig (.py), which is run.
        weights: checkpoint; "auto" is the final one of the config's own run.
        overrides: of its config: KEY, value, ... for yaml, "path.key=value" for a LazyConfig.
        input_format: of the images that the student's loader gives, "BGR" or "RGB".
        precision: "float32", "float16" or "bfloat16" of its forward pass.
        ignore_keys: patterns of the checkpoint's keys that may stay unmatched.
        same_classes_as: the student, for distillers that read class scores.

    Returns:
        The teacher, on the CPU; it moves with the student that it teaches.

    Raises:
        FileNotFoundError: no config file or no weights.
        ValueError: the weights are another model's, or the classes differ.
    """
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.INPUT.FORMAT = input_format
    node = cfg.KD.TEACHER
    node.CONFIG_FILE, node.WEIGHTS, node.PRECISION = config_file, weights, precision
    node.OPTS, node.IGNORE_KEYS = list(overrides), list(ignore_keys)
    with unchanged_rng():
        return build_teacher(cfg, same_classes_as=same_classes_as)
