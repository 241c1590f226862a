"""A tiny distilled training with evaluation, and what it gives when nothing happens to it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from faults.nursery import Nursery, nursery

from kd_det.files import read_json


@dataclass(frozen=True)
class Tiny:
    """A config and the folder of its uninterrupted run."""

    config: Path
    reference: Path

    def same(self, folder: Path) -> bool:
        """Return whether a finished run equals the uninterrupted one, bit for bit."""
        return outcome(folder) == outcome(self.reference) and equal_checkpoints(
            folder / "model_final.pth", self.reference / "model_final.pth"
        )


def outcome(folder: Path) -> str:
    """The metrics and detections of a finished run."""
    result = read_json(folder / "result.json")
    assert result is not None, f"{folder} has no result"
    found = (folder / "inference" / "coco_instances_results.json").read_text()
    return f"{result['metrics']} {result['iterations']} {found}"


def equal_checkpoints(a: Path, b: Path) -> bool:
    """Return whether two checkpoints hold the same student, adapters, optimizer and state."""
    contents: list[Any] = [torch.load(path, weights_only=True) for path in (a, b)]
    return all(
        tiny_runs.equal_states(contents[0][key], contents[1][key])
        for key in ("model", "kd", "trainer")
    )


@pytest.fixture(scope="session")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with nursery(tmp_path_factory.mktemp("nursery")) as made:
        yield made


@pytest.fixture(scope="session")
def tiny(
    tiny_data: dict[str, str], tmp_path_factory: pytest.TempPathFactory, children: Nursery
) -> Tiny:
    folder = tmp_path_factory.mktemp("uninterrupted")
    keys = {
        **tiny_runs.distil_keys("fcos", tiny_runs.make_teacher(folder, "fcos")),
        "KD.DATASETS": [tiny_data],
        "DATASETS.TEST": [tiny_runs.DATA],
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.0,
        "SOLVER.MAX_ITER": 12,
        "SOLVER.CHECKPOINT_PERIOD": 3,
        "TEST.EVAL_PERIOD": 6,
    }
    config = tiny_runs.write_config(folder / "run.yaml", "fcos", keys)
    assert children.run("--config-file", config) == 0, children.said()
    return Tiny(config, folder / "run")
