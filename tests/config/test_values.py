"""Values of the wrong kind are refused with the file, the key and what would do."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from kd_det.config import load_config

_NUMBER = "expected a number, or leave it out."


@pytest.mark.parametrize(
    ("kd", "message"),
    [
        ({"SSIM": {"WEIGHT": "auto"}}, f"'auto' for config key: KD.SSIM.WEIGHT; {_NUMBER}"),
        ({"SSIM": {"SHARE": "abc"}}, f"'abc' for config key: KD.SSIM.SHARE; {_NUMBER}"),
        ({"SSIM": {"SHARE": True}}, f"True for config key: KD.SSIM.SHARE; {_NUMBER}"),
        ({"SSIM": {"WINDOW_SIZE": "a"}}, "KD.SSIM.WINDOW_SIZE; expected a whole number."),
        ({"SSIM": {"SIGMA": True}}, "True for config key: KD.SSIM.SIGMA; expected a number."),
        ({"RESAMPLE_LEVELS": 1}, "1 for config key: KD.RESAMPLE_LEVELS; expected True or False."),
        ({"TEACHER": {"WEIGHTS": 3}}, "3 for config key: KD.TEACHER.WEIGHTS; expected a text."),
        ({"DISTILLERS": "SSIM"}, "KD.DISTILLERS; expected a list, as \"['SSIM']\"."),
        ({"DISTILLERS": None}, "None for config key: KD.DISTILLERS; expected a list."),
        ({"DISTILLERS": [{"SSIM": {"WEIGHT": 1}}]}, "KD.DISTILLERS holds {'SSIM': {'WEIGHT': 1}};"),
        ({"DISTILLERS": [["SSIM"]]}, "KD.DISTILLERS holds ['SSIM']; expected names alone, as ['"),
        ({"PLUGINS": [["a.b"]]}, "KD.PLUGINS holds ['a.b']; expected names alone, as ['my_"),
    ],
)
def test_in_a_file(tmp_path: Path, kd: dict[str, Any], message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({"KD": kd}))
    with pytest.raises(ValueError) as error:
        load_config(str(path))
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SOLVER.BASE_LR", "fast"], "'fast' for config key: SOLVER.BASE_LR; expected a number."),
        (["KD.SSIM.WEIGHT", "auto"], f"'auto' for config key: KD.SSIM.WEIGHT; {_NUMBER}"),
        (["KD.DISTILLERS", "[SSIM, PGD]"], "expected a list, as \"['SSIM', 'PGD']\"."),
        (["KD.DISTILLERS", "['SSIM'"], "KD.DISTILLERS is \"['SSIM'\", expected a list of names"),
        (["KD.DISTILLERS", "[['SSIM']]"], "KD.DISTILLERS holds ['SSIM']; expected names alone"),
    ],
)
def test_in_overrides(tmp_path: Path, words: list[str], message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("SEED: 1")
    with pytest.raises(ValueError) as error:
        load_config(str(path), words)
    assert str(error.value).startswith("the command line: ")
    assert message in str(error.value)


def test_what_reads_as_a_number_is_one(tmp_path: Path) -> None:
    """PyYAML takes 1e-3 for a text."""
    path = tmp_path / "a.yaml"
    path.write_text("SOLVER: {BASE_LR: 1e-3, STEPS: [5]}\nKD: {SSIM: {WEIGHT: 2e-1}}")
    cfg = load_config(str(path), ["SOLVER.WARMUP_FACTOR", "inf", "KD.SSIM.SHARE", "1e-2"])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_FACTOR) == (0.001, float("inf"))
    assert (cfg.KD.SSIM.WEIGHT, cfg.KD.SSIM.SHARE) == (0.2, 0.01)


@pytest.mark.parametrize("word", ["2.5", "3", 2.5, 3, "None", None])
def test_a_whole_weight_of_a_base_takes_any_other(tmp_path: Path, word: Any) -> None:
    kd = {"DISTILLERS": ["SSIM"], "SSIM": {"WEIGHT": 4}}
    content = {"MODEL": {"META_ARCHITECTURE": "DistillationDetector"}, "KD": kd}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(content))
    assert load_config(str(tmp_path / "base.yaml")).KD.SSIM.WEIGHT == 4.0
    (tmp_path / "a.yaml").write_text("_BASE_: base.yaml\nKD: {SSIM: {WEIGHT: 2.5}}\n")
    assert load_config(str(tmp_path / "a.yaml")).KD.SSIM.WEIGHT == 2.5
    found = load_config(str(tmp_path / "base.yaml"), ["KD.SSIM.WEIGHT", word]).KD.SSIM.WEIGHT
    assert found == (None if word in (None, "None") else float(word))
