"""Processes in which kd_det is not there."""

from pathlib import Path


def without_kd_det(code: str) -> str:
    """Return code for a process that has Detectron2 as if it were whole, and never kd_det."""
    repairs = Path(__file__).parents[1] / "kd_det" / "compat.py"
    return "\n".join(
        [
            f"import runpy; runpy.run_path({str(repairs)!r})['install']()",
            code,
            "import sys; assert not any(name.split('.')[0] == 'kd_det' for name in sys.modules)",
        ]
    )
