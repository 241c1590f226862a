"""The figure of a comparison: what stands above the chart."""

import json
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from kd_det.experiments.figure import _draw_boxes, _draw_chart

REPORT = Path(__file__).parents[2] / "benchmarks/results/weights_inherit_courses/report.json"


@pytest.mark.parametrize("inches", [2.0, 12.0])
def test_headers_stand_close_above_a_chart_of_any_height(inches: float) -> None:
    """The figure leaves 0.3 inches above the chart."""
    figure = Figure(figsize=(10, inches + 2), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.2, 1 / (inches + 2), 0.5, inches / (inches + 2)))
    _draw_chart(axes, json.loads(REPORT.read_text()))
    tops = [
        (text.get_window_extent().y1 - axes.bbox.y1) / 100
        for text in axes.texts
        if text.get_text().startswith(("teacher 66.9", "AP", "gain ["))
    ]
    assert len(tops) == 3 and all(0.1 < top < 0.3 for top in tops)


def test_boxes_stand_on_the_upright_photograph(tmp_path: Path) -> None:
    """A telephone writes it on its side, and how to turn it (EXIF orientation 6)."""
    file = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (40, 20)).save(file, exif=exif)
    axes = Figure().add_subplot()
    _draw_boxes(axes, file, [{"bbox": [1, 2, 10, 30], "category_id": 1}], {1: "red"})
    (drawn,) = axes.get_images()
    assert drawn.get_array().shape[:2] == (40, 20)
