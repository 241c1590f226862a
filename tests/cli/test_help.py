"""Help at once: what is asked for most must not wait for torch and Detectron2."""

import subprocess
import sys

import pytest

from kd_det_cli import COMMANDS, main

PROGRAM = """
import sys
from kd_det_cli import main

try:
    main(sys.argv[1:])
except SystemExit:
    pass
heavy = {"kd_det", "torch", "detectron2", "numpy", "matplotlib", "PIL"} & set(sys.modules)
import resource
usage = resource.getrusage(resource.RUSAGE_SELF)
print(sorted(heavy), usage.ru_utime + usage.ru_stime, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--help"],
        ["distill", "--help"],
        ["train", "--help"],
        ["configs", "--help"],
        ["compare", "--help"],
        ["bench", "--help"],
        ["show", "pgd", "--help"],
    ],
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("usage: kd-det")
    heavy, seconds = done.stderr.rsplit(" ", 1)
    assert heavy == "[]"
    assert float(seconds) < 0.5


def test_help_says_what_each_command_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert set(COMMANDS) == {"distill", "train", "compare", "show", "bench", "zoo", "configs"}
    assert "compare Train what a recipe names, and report what each arm gains" in shown
    assert "bench Measure speed and memory side by side with other implementations" in shown


def test_unknown_commands_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["trian"])
    assert "compare" in capsys.readouterr().err
