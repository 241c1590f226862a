"""Shared set-up of all tests."""

import os

# One test process a core: threads of their own would only take the cores from each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import kd_det  # noqa: F401  first, so that compat runs before any import of detectron2

# isort: split
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from kd_det.config import load_config
from kd_det.data.catalog import register_coco_style
from kd_det.data.shapes import make_shapes
from kd_det.data.styles import V1, Style


@pytest.fixture(autouse=True)
def _loggers_as_before() -> Iterator[None]:
    """Undo what Detectron2's `setup_logger` does, so that `caplog` hears every test's messages."""
    loggers = [logging.getLogger(name) for name in ("kd_det", "detectron2", "fvcore")]
    before = [(logger.propagate, logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (propagate, level, handlers) in zip(loggers, before, strict=True):
        logger.propagate, logger.level, logger.handlers = propagate, level, handlers


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The registered data of all tiny configs: 8 images, 2 classes, polygons, keypoints."""
    return tiny_runs.register_data(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="session")
def tiny_records(tiny_data: dict[str, str]) -> list[dict[str, Any]]:
    """Its records, as Detectron2 loads them."""
    return list(DatasetCatalog.get(tiny_data["name"]))


@pytest.fixture(scope="session")
def four_shapes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return the registered name of four images of the built-in shapes: `four_shapes(style)`."""
    folder = tmp_path_factory.mktemp("four")

    def get(style: Style = V1) -> str:
        name = f"shapes{style.version}_four"
        json_file = make_shapes(folder, split="four", num_images=4, size=style.size, style=style)
        register_coco_style(name, json_file, json_file.parent / "images")
        return name

    return get


@pytest.fixture(scope="session")
def tiny_teacher(
    tiny_data: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tiny_runs.TinyTeacher]:
    """Return the tiny R50 teacher of an architecture; made once a session, never changed."""
    made: dict[str, tiny_runs.TinyTeacher] = {}
    folder = tmp_path_factory.mktemp("teachers")

    def get(detector: str) -> tiny_runs.TinyTeacher:
        if detector not in made:
            made[detector] = tiny_runs.make_teacher(folder, detector)
        return made[detector]

    return get


@pytest.fixture
def tiny_student(tiny_data: dict[str, str], tmp_path: Path) -> Callable[..., CfgNode]:
    """Return the config of a tiny student: `tiny_student(detector, teacher, {KEY: value})`."""

    def get(
        detector: str,
        teacher: tiny_runs.TinyTeacher | None = None,
        keys: dict[str, Any] | None = None,
        name: str = "run",
    ) -> CfgNode:
        merged = {**tiny_runs.distil_keys(detector, teacher), **(keys or {})}
        path = tiny_runs.write_config(tmp_path / f"{name}.yaml", detector, merged)
        return load_config(str(path))

    return get


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what the suite of faults has tried, with counts."""
    reports = [
        report
        for group in terminalreporter.stats.values()
        for report in group
        if getattr(report, "when", "") == "call"
    ]
    tried = [value for r in reports for key, value in r.user_properties if key == "tried"]
    if tried:
        terminalreporter.section("what was tried")
        for line in sorted(tried):
            terminalreporter.line(line)
