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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "KD.SSIM.SHAER, 1",
            "recipe r, its overrides and those of arm l2: no config key is called",
        ),
        ("SOLVER.BASE_LR, fast", "recipe r, its overrides and those of arm l2: 'fast' for config"),
        ("KD.TEACHER.OPTS, [SEEED, 1]", "recipe r, KD.TEACHER.OPTS of arm l2: no config key is"),
        ("KD.TEACHER.WEIGHTS, gone.pth", "do not exist (KD.TEACHER.WEIGHTS of arm l2)."),
    ],
    ids=["key", "value", "teacher_key", "weights"],  # names of data sets
)
def test_overrides_of_an_arm(lab, capsys, words: str, message: str):
    recipe = lab.write(
        "r.yaml",
        "teacher: teacher.yaml\nbaseline: none\narms:\n  - {name: none, config: student.yaml}\n"
        f"  - {{name: l2, config: distilled.yaml, overrides: [{words}]}}\n",
    )
    text = said(lab, capsys, recipe)
    assert text.startswith("kd-det compare: ") and message in text


def test_overrides_of_the_whole_recipe(lab, capsys):
    text = (lab.root / "recipe.yaml").read_text() + "overrides: [SOLVER.MAXITER, 3]\n"
    shown = said(lab, capsys, lab.write("r.yaml", text))
    assert "recipe tiny, its overrides and those of arm none: no config key is called" in shown
