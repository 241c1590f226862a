"""
Draw docs/figures/trajectory.png: how near the student's pyramid is to the teacher's, by SSIM and by
L2, and its AP, over training without distillation, under L2 and under SSIM.

    kd-det compare --recipe configs/evidence/trajectory_recipe.yaml --out output/trajectory
    python benchmarks/trajectory_figure.py output/trajectory
    python benchmarks/trajectory_figure.py

Both distances are measured on the same 64 training images, at every checkpoint that a run has kept.
What was measured goes to benchmarks/results/trajectory.json; without the runs, that is drawn.
"""

import json
from pathlib import Path
from typing import Any

import kd_det  # noqa: F401  first: it makes Detectron2 fit for a recent Pillow

# isort: split
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import get_detection_dataset_dicts
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measured import measured

from kd_det import Weighted, distill, load_teacher
from kd_det.config import load_config, student_cfg
from kd_det.data.mapper import CheckedDatasetMapper
from kd_det.distillers import SSIM, FeatureLp

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "trajectory.json"
TEACHER = ROOT / "configs" / "shapes2" / "teacher.yaml", "kd_det://shapes2/fcos_r18"
COURSES = {
    "AP": "AP on shapes2_val",
    "ssim": "SSIM's loss, sum of both levels",
    "l2": "L2, sum of both levels",
}
COLOURS = {"none": "#6b7785", "l2": "#0072b2", "ssim": "#d55e00"}


def measure(folder: Path) -> dict[str, Any]:
    """
    Return the course of every run under a folder that `kd-det compare` has written.

    Returns:
        Arm to label, iterations, and at each of them the AP and both distances.
    """
    teacher = load_teacher(str(TEACHER[0]), TEACHER[1], input_format="RGB")
    report = json.loads((folder / "report.json").read_text())
    courses = {}
    for arm in report["arms"]:
        (run,) = (folder / "runs").glob(f"{arm['name']}-seed0-*")
        cfg = student_cfg(load_config(str(run / "config.yaml")))
        cfg.MODEL.DEVICE = "cpu"
        model = distill(
            build_model(cfg),
            teacher,
            [Weighted(SSIM(), 1.0), Weighted(FeatureLp(), 1.0)],
            grad_share_period=0,
        ).train()
        cfg.INPUT.RANDOM_FLIP = "none"
        mapper = CheckedDatasetMapper(cfg, is_train=True)
        batch = [mapper(record) for record in _records(cfg.DATASETS.TRAIN)]
        rows = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
        ap = {row["iteration"] + 1: row["bbox/AP"] for row in rows if "bbox/AP" in row}
        keys = ("iterations", *COURSES)
        course: dict[str, Any] = {"label": arm["label"], **{key: [] for key in keys}}
        for file in sorted(run.glob("model_0*.pth")):
            iteration = int(file.stem.removeprefix("model_")) + 1
            if iteration not in ap:  # saved when the run was interrupted
                continue
            DetectionCheckpointer(model.student).load(str(file))
            with EventStorage():
                losses = model(batch)
            course["iterations"].append(iteration)
            course["AP"].append(ap[iteration])
            course["ssim"].append(float(losses["loss_kd_ssim"].detach()))
            course["l2"].append(float(losses["loss_kd_feature_lp"].detach()))
        courses[arm["name"]] = course
    return courses


def draw(courses: dict[str, Any], file: Path) -> None:
    """Draw three charts over the iterations, a line for each arm."""
    figure = Figure(figsize=(10, 3), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (key, title) in zip(figure.subplots(1, 3), COURSES.items(), strict=True):
        for name, course in courses.items():
            axes.plot(
                course["iterations"],
                course[key],
                color=COLOURS[name],
                label=course["label"],
                marker="o",
                markersize=3,
            )
        if key == "l2":
            axes.set_yscale("log")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("iteration", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(file)


def _records(names: list[str]) -> list[Any]:
    """Return 64 records of the training set, evenly spaced."""
    records = get_detection_dataset_dicts(names)
    return records[:: len(records) // 64][:64]


def main() -> None:
    """Measure, or read what was measured, and draw."""
    courses = measured("Draw docs/figures/trajectory.png.", RESULT, measure)
    draw(courses, ROOT / "docs" / "figures" / "trajectory.png")


if __name__ == "__main__":
    main()
