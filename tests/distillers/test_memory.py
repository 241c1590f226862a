"""A long training takes no more memory than a short one."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_runs
from all_distillers import SHALLOW, write_student

from kd_det.files import read_json

STEPS, SETTLED = 2000, 200

pytestmark = pytest.mark.slow


def resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (found,) = (line.split()[1] for line in lines if line.startswith("VmRSS"))
    return int(found) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system has no /proc")
@pytest.mark.timeout(3600)
def test_2000_steps_of_all_distillers(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Resident memory grows by less than 1 % after step 200."""
    entry = tiny_runs.make_data(tmp_path / "data", images=4, sizes=[(32, 32), (48, 32)])
    keys = {"KD.DATASETS": [entry], "SOLVER.MAX_ITER": STEPS, "SOLVER.BASE_LR": 1e-6}
    config = write_student(tmp_path, both=SHALLOW, **keys, **{"SOLVER.IMS_PER_BATCH": 1})
    command = [sys.executable, "-m", "kd_det.engine", "--config-file", str(config)]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        )
    first = last = 0.0
    while process.poll() is None:
        progress = read_json(config.with_suffix("") / "progress.json") or {}
        if progress.get("phase") == "train" and progress["iteration"] >= SETTLED:
            last = resident_mib(process.pid)
            first = first or last
        time.sleep(0.5)
    assert process.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    growth = last / first - 1
    record_property(
        "tried",
        f"{STEPS} steps of all distillers: {first:.0f} MiB after {SETTLED} steps, "
        f"{last:.0f} MiB at the end ({100 * growth:+.2f} %)",
    )
    assert growth < 0.01
