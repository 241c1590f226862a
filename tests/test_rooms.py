"""The rooms of the package: imports go one way, and importing it leaves the process as it was."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kd_det"

# Each room may import those before it. Rooms of one line know nothing of each other.
TIERS = [
    ["compat", "files", "text"],
    ["reading"],
    ["functional", "zoo"],
    ["distillers", "modeling", "data", "evaluation"],
    ["config"],
    ["distillation"],
    ["checkpoint"],
    ["engine"],
    ["experiments", "bench"],
]
TIER = {room: i for i, rooms in enumerate(TIERS) for room in rooms}
TIER[""] = TIER["engine"]  # the package as a whole, for its version
# Detectors say what their heads predict in the distillers' words.
CONTRACT = {("modeling", "kd_det.distillers.predictions")}


def imports_of(file: Path) -> list[str]:
    """Return the modules of kd_det that a file imports, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
            found += names if module == "kd_det" else [module]
    return [name for name in found if name.split(".")[0] in ("kd_det", "kd_det_cli")]


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_one_way(file: Path) -> None:
    relative = file.relative_to(PACKAGE)
    room = relative.parts[0].removesuffix(".py")
    if room == "__init__":
        return  # the package itself registers what is in its rooms
    for module in imports_of(file):
        assert not module.startswith("kd_det_cli"), "the command comes after all rooms"
        other = room_of(module)
        allowed = other == room or TIER[other] < TIER[room] or (room, module) in CONTRACT
        assert allowed, f"{relative} imports {module}"


def test_every_room_has_its_place() -> None:
    rooms = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in FILES}
    assert rooms - {"__init__"} <= set(TIER)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_files_stay_readable(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 300


def test_importing_it_leaves_the_process_as_it_was() -> None:
    """Detectron2's own import may do what it does; kd_det adds the filters that compat lists."""
    script = """
import warnings
import matplotlib, torch
before = matplotlib.get_backend(), torch.get_num_threads(), torch.get_default_dtype()
import kd_det
after = matplotlib.get_backend(), torch.get_num_threads(), torch.get_default_dtype()
assert after == before, (before, after)
print(len([f for f in warnings.filters if f[1] is not None and f[1].pattern == r"`torch\\.jit"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"
