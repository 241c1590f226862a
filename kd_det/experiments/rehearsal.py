"""All configs of a comparison built once, with untrained teachers, before the first run starts."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

from kd_det.config import load_config
from kd_det.data import register_from_config
from kd_det.engine.rehearsal import rehearse, rehearse_evaluation
from kd_det.experiments.plan import Run
from kd_det.experiments.recipe import RecipeError
from kd_det.text import message_of


def rehearse_runs(runs: Sequence[Run], folder: Path) -> None:
    """
    Build what runs will build, once for all seeds of an arm; progress goes to stderr.

    On the CPU, since the GPU's memory is the runs'; on their own device where a layer has no
    implementation there, as Detectron2's modulated deformable convolution.

    Args:
        runs: those without a result, each after those it needs.
        folder: where a folder is made for what is written meanwhile, and removed.

    Raises:
        RecipeError: a run would fail; the message names the arm or the teacher.
    """
    distinct = {_kind(run): run for run in reversed(runs)}
    stand_ins: dict[Run, str] = {}
    with tempfile.TemporaryDirectory(dir=folder, prefix="rehearsal-") as scratch:
        for number, run in enumerate(reversed(distinct.values()), 1):
            name = run.title if run.is_teacher else f"arm {run.name}"
            print(f"Checking {name} ({number} of {len(distinct)})", file=sys.stderr, flush=True)
            try:
                _rehearse(run, str(Path(scratch, str(number))), stand_ins)
            except Exception as error:  # whatever a config, its data or a plugin raise
                raise RecipeError(
                    f"{name} ({run.config_file}) would fail with {type(error).__name__}: "
                    f"{message_of(error)}\n"
                    "Nothing was trained."
                ) from error


def _kind(run: Run) -> tuple[str, ...]:
    """What the runs of an arm have in common; each teacher is one of its own."""
    return (str(run.folder),) if run.is_teacher else ("arm", run.name)


def _rehearse(run: Run, folder: str, stand_ins: dict[Run, str]) -> None:
    teacher = next((other for other in run.needs if other.is_teacher), None)
    weights = stand_ins.get(teacher, "") if teacher is not None else ""

    def build(cfg: CfgNode) -> None:
        if run.iterations:
            stand_ins[run] = rehearse(
                cfg, folder=folder, teacher=weights, of_teacher=run.is_teacher
            )
        else:
            rehearse_evaluation(cfg, folder=folder)

    own = _config(run)
    on_cpu = own.clone()
    on_cpu.MODEL.DEVICE = "cpu"
    try:
        build(on_cpu)
    except NotImplementedError:
        if own.MODEL.DEVICE == "cpu":
            raise
        build(own)


def _config(run: Run) -> CfgNode:
    cfg = load_config(str(run.config_file), run.opts)
    if not run.iterations and not cfg.MODEL.WEIGHTS:
        raise ValueError(
            "SOLVER.MAX_ITER is 0, so it is evaluated alone, and there are no weights to evaluate; "
            "give it `init_from` in the recipe, or MODEL.WEIGHTS, or train it (SOLVER.MAX_ITER)."
        )
    parents = [str(other.checkpoint) for other in run.needs if not other.is_teacher]
    if cfg.MODEL.WEIGHTS in parents:
        cfg.MODEL.WEIGHTS = ""  # not there yet
    register_from_config(cfg.KD.DATASETS)
    return cfg
