"""Every arm of every recipe, and both of its models, trains from yaml alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_runs
from detectron2.config import CfgNode
from test_configs import FOLDER, is_recipe

from kd_det.config import load_config, needs_teacher
from kd_det.data.styles import V2
from kd_det.distillation.active import slug_of
from kd_det.distillation.teacher import teacher_config
from kd_det.distillers import distiller_class, node_name
from kd_det.experiments.recipe import read_recipe

# The seeds' own experiments run by default.
FAST = ("pgd_autoassign", "pgd_ddod", "ssim_fsaf", "ssim_reppoints")
Case = tuple[Path, tuple[str, ...]]


def arms() -> dict[str, Case]:
    """The different configs of all recipes, and those that no recipe has."""
    found = {f"detectors/{name}": (FOLDER / "detectors" / f"{name}.yaml", ()) for name in FAST}
    for path in filter(is_recipe, sorted(FOLDER.rglob("*.yaml"))):
        recipe = read_recipe(str(path))
        cases = [("teacher", recipe.teacher, ())]
        cases += [(arm.name, arm.config, arm.overrides) for arm in recipe.arms]
        for name, config, overrides in cases:
            case = config, (*recipe.overrides, *overrides)
            if case not in found.values():
                found[f"{path.parent.name}/{path.stem}/{name}"] = case
    return found


ARMS = arms()
PARAMS = [
    pytest.param(case, id=name, marks=() if case[0].stem in FAST else pytest.mark.slow)
    for name, case in ARMS.items()
]


@pytest.fixture(scope="module")
def data(four_shapes: Callable[..., str]) -> dict[str, str]:
    """By data set of a config, a small one in its place."""
    small = {"shapes_train": four_shapes(), "shapes2_train": four_shapes(V2)}
    photographs = ("aquarium_train", "aquarium_large_train", "aquarium_many_train")
    return {**small, **dict.fromkeys(photographs, "aquarium_val")}


@pytest.fixture(scope="module")
def weights_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[CfgNode], Path]:
    """Return random weights of the teacher that a config names; made once of each."""
    folder = tmp_path_factory.mktemp("teachers")

    def get(cfg: CfgNode) -> Path:
        own_cfg = teacher_config(cfg)
        key = f"{Path(cfg.KD.TEACHER.CONFIG_FILE).stem}{abs(hash(own_cfg.dump()))}"
        path = folder / f"{key}.pth"
        return path if path.is_file() else tiny_runs.save_random_weights(own_cfg, path)

    return get


@pytest.mark.parametrize("case", PARAMS)
def test_an_arm_trains_two_steps(
    case: Case, data: dict[str, str], weights_of: Callable[[CfgNode], Path], tmp_path: Path
) -> None:
    config, overrides = case
    cfg = load_config(str(config), [*overrides])
    (name,) = cfg.DATASETS.TRAIN
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (data[name],), ()
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.OUTPUT_DIR = 2, 2, str(tmp_path)
    for entry in cfg.KD.DISTILLERS:  # a late start is early enough to be seen
        schedule = cfg.KD[node_name(entry)].SCHEDULE
        schedule.STEPS = list(range(len(schedule.STEPS)))
    if needs_teacher(cfg):
        cfg.KD.TEACHER.WEIGHTS = str(weights_of(cfg))
    _, recorder = tiny_runs.train(cfg)
    first, last = recorder.steps
    assert all(abs(value) < float("inf") for value in (*first.values(), *last.values()))
    for entry in cfg.KD.DISTILLERS:
        key = slug_of(entry, distiller_class(entry))
        assert f"kd/{key}/weight" in last, key
        assert any(k.startswith(f"loss_kd_{key}") for k in (*first, *last)), key
