"""
Draw docs/figures/latency.png: AP against what one image costs, with and without distillation.

    kd-det compare --recipe configs/evidence/recipe.yaml --out output/evidence
    python benchmarks/latency_figure.py output/evidence
    python benchmarks/latency_figure.py

Timed is the detection of one image of the second shapes, from pixels to boxes, on one thread; the
models take turns. What was measured goes to benchmarks/results/latency.json; without the runs, that
is drawn. APs are those of benchmarks/results/evidence/report.json.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import kd_det  # noqa: F401  first: it makes Detectron2 fit for a recent Pillow

# isort: split
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import get_detection_dataset_dicts
from detectron2.modeling import build_model
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measured import measured

from kd_det.bench.measure import device_name, ratio, take_turns
from kd_det.checkpoint.state import student_of
from kd_det.config import load_config
from kd_det.data.mapper import CheckedDatasetMapper

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RESULT = RESULTS / "latency.json"
TEACHER = ROOT / "configs" / "shapes2" / "teacher.yaml", "kd_det://shapes2/fcos_r18"
# Model: the arm without distillation, then those that learn from the teacher.
MODELS = {
    "student": ("none", "l2", "ssim", "pgd", "crosskd", "l2_crosskd"),
    "student, half size": ("half", "half_l2", "half_ssim", "half_pgd", "half_msad"),
}
COLOURS = ("#6b7785", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")
ROUNDS = 7


def measure(folder: Path) -> dict[str, Any]:
    """Return the milliseconds of each model for one image, and its ratio to the teacher's."""
    torch.set_num_threads(1)
    files = {"teacher": TEACHER}
    for name, (alone, *_) in MODELS.items():
        (run,) = (folder / "runs").glob(f"{alone}-seed0-*")
        files[name] = run / "config.yaml", str(run / "model_final.pth")
    seconds = take_turns({name: _detector(*file) for name, file in files.items()}, ROUNDS, "cpu")
    rows = {
        name: {
            "ms": 1000 * median(values),
            "of_teacher": ratio(values, seconds["teacher"]),
        }
        for name, values in seconds.items()
    }
    return {"device": device_name("cpu"), "threads": 1, "models": rows}


def draw(latency: dict[str, Any], report: dict[str, Any], file: Path) -> None:
    """Draw a column of APs at each model's cost."""
    figure = Figure(figsize=(8, 4), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    arms = {arm["name"]: arm for arm in report["arms"]}
    cost = {name: row["of_teacher"] for name, row in latency["models"].items()}
    axes.plot(cost["teacher"], report["teacher"]["mean"]["AP"], "k*", label="teacher")
    for name, names in MODELS.items():
        for number, (arm, colour) in enumerate(zip(names, COLOURS, strict=False)):
            side = 0.012 * (number - (len(names) - 1) / 2)  # so that none hides another
            axes.plot(
                cost[name] + side,
                arms[arm]["mean"]["AP"],
                marker="s" if number == 0 else "o",
                linestyle="",
                color=colour,
                label=arms[arm]["label"],
            )
    axes.set_xlabel("time of one image, the teacher's being 1", fontsize=9)
    axes.set_ylabel("AP", fontsize=9)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e8ec")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file)


def _detector(config: Path, weights: str) -> Callable[[], Any]:
    cfg = load_config(str(config))
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    DetectionCheckpointer(student_of(model)).load(weights)
    record = get_detection_dataset_dicts(["shapes2_test"])[0]
    inputs = [CheckedDatasetMapper(cfg, is_train=False)(record)]
    return partial(torch.no_grad()(model), inputs)


def main() -> None:
    """Measure, or read what was measured, and draw."""
    latency = measured("Draw docs/figures/latency.png.", RESULT, measure)
    report = json.loads((RESULTS / "evidence" / "report.json").read_text())
    draw(latency, report, ROOT / "docs" / "figures" / "latency.png")


if __name__ == "__main__":
    main()
