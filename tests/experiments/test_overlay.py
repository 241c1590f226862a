"""Maps over images, drawn without touching the user's matplotlib."""

import importlib
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from kd_det.experiments import figure, overlay


def test_each_map_lies_over_its_image(tmp_path: Path) -> None:
    picture = np.full((32, 48, 3), 90, np.uint8)
    values = torch.zeros(2, 4, 6)
    values[:, :2] = 1  # the upper half
    boxes = [torch.tensor([[4.0, 4, 20, 20]])] * 2
    overlay.draw_grid([picture] * 2, boxes, {"map": (values, 8.0)}, tmp_path / "a.png")
    shown = np.asarray(Image.open(tmp_path / "a.png").convert("L"), dtype=float)
    height, width = shown.shape
    assert height == pytest.approx(2 * 2.3 * 130, abs=1) and width == pytest.approx(2 * 286, abs=1)
    # The upper half of each map is bright, the lower dark.
    column = shown[:, round(0.9 * width)]
    rows = column[: height // 2]
    inside = rows[rows < 250]
    assert inside[: len(inside) // 3].mean() > inside[-len(inside) // 3 :].mean() + 100


def test_imports_leave_the_backend_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(matplotlib, "use", lambda name, **options: chosen.append(name))
    for module in (overlay, figure):
        importlib.reload(module)
    assert chosen == []
