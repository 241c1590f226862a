"""Aligned teachers for the tests of MSAD."""

from typing import Any

import pytest
import tiny_msad
import tiny_runs
from tiny_msad import MakeAligned
from tiny_runs import TinyTeacher


@pytest.fixture(scope="session")
def aligned_teacher(
    tiny_data: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> MakeAligned:
    """Return an aligned tiny teacher: `aligned_teacher(detector, factor, {KEY: value})`."""
    made: dict[str, TinyTeacher] = {}

    def get(
        detector: str = "fcos", factor: int = 2, keys: dict[str, Any] | None = None
    ) -> TinyTeacher:
        name = f"{detector} {factor} {keys}"
        if name not in made:
            merged = {**tiny_msad.teacher_keys(detector, factor), **(keys or {})}
            folder = tmp_path_factory.mktemp("aligned")
            made[name] = tiny_runs.make_teacher(folder, detector, **merged)
        return made[name]

    return get
