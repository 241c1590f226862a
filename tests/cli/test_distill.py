"""`kd-det distill`: one line, an ordinary yaml, the run that train_net.py makes of it."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_runs
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from tiny_runs import TinyTeacher

from kd_det.config import load_config
from kd_det.config.commented import commented_yaml
from kd_det.config.own_data import OwnData
from kd_det.config.writing import resolve_methods, write_distillation
from kd_det.engine.main import main as train_net
from kd_det_cli import main

Words = list[str]


@pytest.fixture
def project(
    tiny_data: dict[str, str],
    tiny_teacher: Callable[[str], TinyTeacher],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A folder with student.yaml, teacher.yaml and teacher.pth, in which the command is typed."""
    teacher = tiny_teacher("retinanet")
    (tmp_path / "teacher.yaml").write_text(f"_BASE_: {teacher.config_file}\nOUTPUT_DIR: taught\n")
    (tmp_path / "teacher.pth").write_bytes(teacher.weights.read_bytes())
    keys = {"KD.DATASETS": [tiny_data], "SOLVER.MAX_ITER": 2, "OUTPUT_DIR": "alone"}
    tiny_runs.write_config(tmp_path / "student.yaml", "retinanet", keys)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def own_names() -> object:
    yield None
    for name in OwnData.NAMES:
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def words(*more: str, method: str = "ssim") -> Words:
    return [
        "distill", "--teacher", "teacher.yaml", "--student", "student.yaml", "--method", method,
        "--out", "output/mine", *more,
    ]  # fmt: skip


WEIGHTS = ("KD.TEACHER.WEIGHTS", "teacher.pth")
FILE = Path("output/mine/distill.yaml")


def test_the_line_trains_and_leaves_a_yaml_that_trains(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(*WEIGHTS, "KD.GRAD_SHARE_PERIOD", "1", method="ssim,FeatureLP")) == 0
    assert f"{FILE} is this run's config: train_net.py --config-file {FILE}" in (
        capsys.readouterr().out
    )
    result = Path("output/mine/result.json")
    assert json.loads(result.read_text())["iterations"] == 2
    content = yaml.safe_load(FILE.read_text())
    assert content["_BASE_"] == "../../student.yaml"
    assert content["KD"]["TEACHER"] == {
        "CONFIG_FILE": "../../teacher.yaml",
        "WEIGHTS": "../../teacher.pth",
    }
    assert content["KD"]["DISTILLERS"] == ["SSIM", "FeatureLp"]
    assert content["KD"]["GRAD_SHARE_PERIOD"] == 1
    assert FILE.read_text().startswith("# SSIM + FeatureLp: teacher.yaml teaches student.yaml.")

    result.unlink()
    weights = Path("output/mine/model_final.pth").read_bytes()
    train_net(["--config-file", str(FILE)])  # word for word what the comment says
    assert json.loads(result.read_text())["iterations"] == 2
    assert Path("output/mine/model_final.pth").read_bytes() == weights


def test_own_data_and_an_absent_teacher(
    project: Path, tiny_data: dict[str, str], own_names: None
) -> None:
    """The teacher without a checkpoint is trained first, on the same data, inside the folder."""
    Path("data").symlink_to(Path(tiny_data["json"]).parent)
    data = "data/data.json,data/data.json,data/images"
    short = ["SOLVER.MAX_ITER", "1"]
    Path("teacher.yaml").write_text(Path("teacher.yaml").read_text() + "SOLVER: {MAX_ITER: 1}\n")
    assert main(words("--data", data, *short, method="Ssim")) == 0
    content = yaml.safe_load(FILE.read_text())
    assert [item["name"] for item in content["KD"]["DATASETS"]] == ["own_train", "own_val"]
    assert content["KD"]["DATASETS"][0]["images"] == "../../data/images"
    assert content["DATASETS"] == {"TRAIN": ["own_train"], "TEST": ["own_val"]}
    metrics = json.loads(Path("output/mine/result.json").read_text())["metrics"]
    assert "AP" in metrics["bbox"]
    assert Path("output/mine/teacher/model_final.pth").is_file()
    assert not Path("taught").exists()
    # The teacher is there now; the line still says the same.
    before = FILE.read_bytes()
    assert main(words("--data", data, "--resume", *short, method="SSIM")) == 0
    assert FILE.read_bytes() == before


def test_a_dry_run_builds_everything_and_trains_nothing(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words("--dry-run", *WEIGHTS)) == 0
    assert "Nothing was trained" in capsys.readouterr().out
    assert [path.name for path in FILE.parent.iterdir()] == [FILE.name]
    FILE.unlink()
    (project / "teacher.pth").write_bytes(b"no checkpoint")
    with pytest.raises(SystemExit):
        main(words("--dry-run", *WEIGHTS))
    assert "could not be read" in capsys.readouterr().err


def test_methods_are_found_in_any_case() -> None:
    assert resolve_methods("ssim, PGD,alignedpyramid,Ssim:head") == [
        "SSIM", "PGD", "AlignedPyramid", "SSIM:head",
    ]  # fmt: skip
    with pytest.raises(KeyError, match=r"no distiller is called 'sim'.* ssim.*all: .*crosskd"):
        resolve_methods("sim")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["KD.SSIM.WIGHT", "1"], "no config key is called KD.SSIM.WIGHT; .*KD.SSIM.WEIGHT"),
        (["OUTPUT_DIR", "x"], "OUTPUT_DIR cannot be overridden, use --out"),
        (["KD.SSIM.WEIGHT"], "Overrides come in pairs"),
        (["--data", "a.json,b.json"], "expected TRAIN.json,VAL.json,IMAGES"),
        (["--data", "a.json,b.json,images"], "names a.json, but there is no such file"),
        (["--teacher", "big.yaml"], "Config file big.yaml does not exist"),
        (["--teacher", "kd_det://shapes/fcos"], "No teacher called 'shapes/fcos' ships"),
        (["--method", "ssim,ssim"], "names 'SSIM' twice; give the second one a label"),
    ],
)
def test_wrong_words_leave_nothing_behind(
    project: Path, more: Words, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(*more)) == 2
    assert not FILE.exists()
    error = capsys.readouterr().err
    assert error.startswith("kd-det distill: ")
    assert re.search(message, error), error


def test_a_file_that_says_something_else_is_kept(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words("--dry-run", *WEIGHTS)) == 0
    before = FILE.read_text()
    assert main(words("--dry-run", *WEIGHTS, "KD.SSIM.SHARE", "0.5")) == 2
    assert "holds another distillation, or was changed by hand" in capsys.readouterr().err
    assert FILE.read_text() == before


def test_a_teacher_of_the_zoo_brings_its_config(project: Path) -> None:
    file = write_distillation(
        teacher="kd_det://shapes2/fcos_r18",
        student="student.yaml",
        methods="pkd",
        out=Path("output/zoo"),
        opts=["KD.PKD.WEIGHT", "2", "INPUT.MIN_SIZE_TRAIN", "(64, 72)"],
        command="kd-det\ndistill",
    )
    cfg = load_config(str(file))
    assert cfg.KD.TEACHER.WEIGHTS == "kd_det://shapes2/fcos_r18"
    assert cfg.KD.TEACHER.CONFIG_FILE.endswith("configs/shapes2/teacher.yaml")
    assert (cfg.KD.PKD.WEIGHT, cfg.INPUT.MIN_SIZE_TRAIN) == (2.0, (64, 72))
    assert "SHARE" not in file.read_text()


def test_tuples_in_tuples_are_read_back_as_the_same(project: Path) -> None:
    sizes = "((32,), (64,), (128,), (256,), (512,))"
    for _ in range(2):
        assert main(words("--dry-run", *WEIGHTS, "MODEL.ANCHOR_GENERATOR.SIZES", sizes)) == 0
    assert load_config(str(FILE)).MODEL.ANCHOR_GENERATOR.SIZES[1] == [64]


def test_a_teacher_of_the_zoo_is_found_in_a_wheel(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which has the configs inside the package."""
    shipped = project / "site-packages" / "kd_det" / "shipped"
    shipped.mkdir(parents=True)
    (shipped / "configs").symlink_to(Path(__file__).parents[2] / "configs")
    monkeypatch.setattr("kd_det.config.writing.shipped_root", lambda: shipped)
    assert main(words("--dry-run", "--teacher", "kd_det://shapes2/fcos_r18")) == 0
    config = load_config(str(FILE)).KD.TEACHER.CONFIG_FILE
    assert config.endswith("shipped/configs/shapes2/teacher.yaml")


def test_a_weight_that_sets_itself_is_left_to_the_run(project: Path) -> None:
    """Its share depends on how the student starts, which overrides may change."""
    opts = ["KD.INHERIT", "['*']", *WEIGHTS]
    file = write_distillation(
        teacher="teacher.yaml", student="student.yaml", methods="ssim,pgd", out=Path("o"),
        opts=opts, command="",
    )  # fmt: skip
    cfg = load_config(str(file))
    assert cfg.KD.SSIM.SHARE is None and cfg.KD.PGD.SHARE is None
    assert "SHARE" not in file.read_text()


def test_a_student_that_is_wrapped_already_keeps_its_view(project: Path) -> None:
    text = "_BASE_: student.yaml\nMODEL: {META_ARCHITECTURE: DistillationDetector}\n"
    text += "KD: {STUDENT: {META_ARCHITECTURE: RetinaNet, VIEW_FACTOR: 2.0}, SSIM: {WEIGHT: 4.0}}\n"
    Path("half.yaml").write_text(text)
    file = write_distillation(
        teacher="teacher.yaml", student="half.yaml", methods="ssim", out=Path("o"), command=""
    )
    cfg = load_config(str(file))
    assert cfg.KD.STUDENT.META_ARCHITECTURE == "RetinaNet" and cfg.KD.STUDENT.VIEW_FACTOR == 2.0
    assert cfg.KD.SSIM.WEIGHT == 4.0 and cfg.KD.TEACHER.WEIGHTS == "auto"


def test_rendered_yaml_reads_back() -> None:
    content = {
        "A": {"B": {"x: y": "# no comment", "C": [], "D": None, "E": 1e-05, "F": "auto: 1"}},
        "G": [{"name": "a, b}", "json": "ä'\".json"}, {"name": "x"}],
        "H": ["SSIM:head", 1, True],
    }
    text = commented_yaml(content, {"A.B.D": "why", "G": "own"})
    assert yaml.safe_load(text) == content
    assert "D: null  # why\n" in text and "G:  # own\n" in text
