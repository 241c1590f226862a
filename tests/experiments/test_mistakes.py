"""Mistakes in configs and overrides of a recipe: a message that names the place, exit code 2."""

import pytest

from kd_det_cli import main


def said(lab, capsys: pytest.CaptureFixture[str], recipe: str | None = None) -> str:
    """What a comparison ends with that cannot start."""
    assert main(["compare", "--recipe", recipe or lab.recipe, "--out", str(lab.out)]) == 2
    return capsys.readouterr().err


def test_a_plugin_that_cannot_be_imported(lab, capsys):
    lab.write("student.yaml", "_BASE_: base.yaml\nKD: {PLUGINS: [nope]}\n")
    text = said(lab, capsys)
    assert text.startswith("kd-det compare: ") and "KD.PLUGINS: 'nope' cannot be imported" in text
