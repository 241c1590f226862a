"""Teachers that ship: refused when damaged or foreign, loaded strictly, half the size."""

import json
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from tiny_runs import TinyTeacher, distil_keys, write_config

from kd_det import zoo
from kd_det.checkpoint import KDCheckpointer
from kd_det.config import load_config, student_cfg
from kd_det.distillation.teacher import build_teacher, load_strictly, teacher_weights
from kd_det.experiments.plan import make_plan
from kd_det.experiments.recipe import read_recipe
from kd_det.files import sha256_of
from kd_det.zoo import index
from kd_det.zoo.export import export_weights, halve
from kd_det_cli import main

ROOT = Path(__file__).parents[2]
SHIPPED = zoo.read_entries()
Student = Callable[..., CfgNode]
MakeTeacher = Callable[[str], TinyTeacher]
NAME = "tiny/fcos"


@pytest.fixture
def tiny_zoo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_teacher: MakeTeacher
) -> tuple[Path, TinyTeacher]:
    """A zoo with one tiny teacher in place of the package's."""
    teacher = tiny_teacher("fcos")
    folder = tmp_path / "zoo"
    monkeypatch.setattr(index, "FOLDER", folder)
    path = export_weights(teacher.weights, NAME)
    entry = zoo.Entry(
        name=NAME,
        sha256=sha256_of(path),
        size_bytes=path.stat().st_size,
        summary="a tiny net",
        parameters=1,
        classes=["a", "b"],
        trained_on=["tiny_coco"],
        ap={"tiny_coco": 12.25},
        licence="Apache-2.0",
        config=str(teacher.config_file),
        command="train it again",
        seed=0,
        iterations=3,
        hours=0.1,
    )
    index.write_entry(entry)
    return path, teacher


def test_weights_survive_the_way_through_half_precision(
    tiny_zoo: tuple[Path, TinyTeacher],
) -> None:
    path, teacher = tiny_zoo
    model = build_model(student_cfg(load_config(str(teacher.config_file))))
    assert load_strictly(model, "kd_det://tiny/fcos") == str(path)
    trained = torch.load(teacher.weights)["model"]
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == trained[key].dtype
        if tensor.dim() > 1:
            assert torch.equal(tensor, trained[key].half().float()), key
        else:
            assert torch.equal(tensor, trained[key]), key
    assert path.stat().st_size < 0.65 * teacher.weights.stat().st_size


def test_a_student_is_taught_by_an_address(
    tiny_zoo: tuple[Path, TinyTeacher], tiny_student: Student
) -> None:
    path, teacher = tiny_zoo
    cfg = tiny_student("fcos", teacher, {"KD.TEACHER.WEIGHTS": "kd_det://tiny/fcos"})
    identity = build_teacher(cfg, same_classes_as=build_model(student_cfg(cfg))).identity
    assert identity is not None
    assert (identity.weights, identity.sha256) == ("kd_det://tiny/fcos", sha256_of(str(path)))
    auto = tiny_student("fcos", teacher, {"KD.TEACHER.WEIGHTS": "auto"}, name="auto")
    own = load_config(str(teacher.config_file))
    assert teacher_weights(auto, own).endswith("model_final.pth")


def test_a_comparison_evaluates_the_teacher_that_ships(
    tiny_zoo: tuple[Path, TinyTeacher], tmp_path: Path
) -> None:
    keys = distil_keys("fcos", tiny_zoo[1]) | {"KD.TEACHER.WEIGHTS": "kd_det://tiny/fcos"}
    write_config(tmp_path / "student.yaml", "fcos", keys)
    recipe = {
        "teacher": str(tiny_zoo[1].config_file),
        "baseline": "l2",
        "arms": [{"name": "l2", "config": "student.yaml"}],
        "overrides": ["DATASETS.TEST", "('tiny_coco',)"],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    folders = []
    for sha256 in (sha256_of(tiny_zoo[0]), "f" * 64):
        index.write_entry(replace(zoo.find(NAME), sha256=sha256))
        plan = make_plan(read_recipe(str(tmp_path / "recipe.yaml")), tmp_path / "out")
        assert plan.teacher.iterations == 0
        assert "kd_det://tiny/fcos" in plan.teacher.opts
        assert "kd_det://tiny/fcos" in plan.students["l2", 0].opts
        folders += [run.folder for run in plan.runs]
    assert len(set(folders)) == 4, "another file is another teacher"


def test_it_is_not_trained_for_arms_that_do_not_need_it(
    tiny_zoo: tuple[Path, TinyTeacher], tmp_path: Path
) -> None:
    """Its address stands in an arm that is left out."""
    keys = distil_keys("fcos", tiny_zoo[1]) | {"KD.TEACHER.WEIGHTS": "kd_det://tiny/fcos"}
    write_config(tmp_path / "student.yaml", "fcos", keys)
    alone = {"name": "none", "config": str(tiny_zoo[1].config_file)}
    recipe = {
        "teacher": str(tiny_zoo[1].config_file),
        "baseline": "none",
        "arms": [alone, {"name": "l2", "config": "student.yaml"}],
        "overrides": ["DATASETS.TEST", "('tiny_coco',)"],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    whole = read_recipe(str(tmp_path / "recipe.yaml"))
    plans = [make_plan(x, tmp_path / "out") for x in (whole, whole.select(["none"]))]
    assert [len(plan.students) for plan in plans] == [2, 1]
    assert plans[0].teacher == plans[1].teacher
    assert plans[1].teacher.iterations == 0


def test_a_model_starts_from_an_address(tiny_zoo: tuple[Path, TinyTeacher], tmp_path: Path) -> None:
    path, teacher = tiny_zoo
    model = build_model(student_cfg(load_config(str(teacher.config_file))))
    KDCheckpointer(model, str(tmp_path)).load_student("kd_det://tiny/fcos", strict=True)
    saved = torch.load(path)["model"]["backbone.fpn_output3.weight"]
    assert torch.equal(model.state_dict()["backbone.fpn_output3.weight"], saved.float())


def test_loading_is_strict(tiny_zoo: tuple[Path, TinyTeacher], tiny_teacher: MakeTeacher) -> None:
    other = build_model(student_cfg(load_config(str(tiny_teacher("retinanet").config_file))))
    with pytest.raises(ValueError, match=r"kd_det://tiny/fcos do not fit the model"):
        load_strictly(other, "kd_det://tiny/fcos")


@pytest.mark.parametrize("damage", ["one bit", "cut", "another model's"])
def test_a_damaged_or_foreign_file_is_refused_by_name(
    tiny_zoo: tuple[Path, TinyTeacher], damage: str, tmp_path: Path
) -> None:
    path, teacher = tiny_zoo
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    other = teacher.weights.read_bytes()
    damaged = {"one bit": bytes(content), "cut": path.read_bytes()[:-9], "another model's": other}
    path.write_bytes(damaged[damage])
    model = build_model(student_cfg(load_config(str(teacher.config_file))))
    message = r"kd_det://tiny/fcos is .*fcos.pth, whose sha256 is .* expected .*train it again"
    with pytest.raises(ValueError, match=message):
        load_strictly(model, "kd_det://tiny/fcos")
    with pytest.raises(ValueError, match=message):
        KDCheckpointer(model, str(tmp_path)).load_student("kd_det://tiny/fcos", strict=True)


def test_an_unknown_name_gives_the_nearest(tiny_zoo: tuple[Path, TinyTeacher]) -> None:
    message = "'tiny/fcoss'.*nearest valid names are tiny/fcos.*kd-det zoo"
    with pytest.raises(FileNotFoundError, match=message):
        PathManager.get_local_path("kd_det://tiny/fcoss")


def test_a_file_that_is_gone(tiny_zoo: tuple[Path, TinyTeacher]) -> None:
    tiny_zoo[0].unlink()
    assert not PathManager.isfile("kd_det://tiny/fcos")
    with pytest.raises(FileNotFoundError, match=r"kd_det://tiny/fcos should be .*fcos.pth"):
        PathManager.get_local_path("kd_det://tiny/fcos")


def test_the_path_manager_reads_and_does_not_write(tiny_zoo: tuple[Path, TinyTeacher]) -> None:
    assert PathManager.exists("kd_det://tiny/fcos")
    with PathManager.open("kd_det://tiny/fcos", "rb") as file:
        assert file.read() == tiny_zoo[0].read_bytes()
    with pytest.raises(ValueError, match="not written to"):
        PathManager.open("kd_det://tiny/fcos", "wb")


def test_numbers_that_half_precision_cannot_hold_are_refused(tmp_path: Path) -> None:
    state = {"a.weight": torch.full((2, 2), 7e4), "a.bias": torch.full((2,), 7e4)}
    with pytest.raises(ValueError, match=r"a.weight holds 70000"):
        halve(state)
    torch.save({"weights": state}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a.pth has no `model`"):
        export_weights(tmp_path / "a.pth", "a", tmp_path)


def test_a_finished_run_becomes_an_entry(
    tiny_teacher: MakeTeacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, run = tiny_teacher("fcos"), tmp_path / "run"
    run.mkdir()
    words = ["add", "t/net", "--config-file", str(teacher.config_file), "--run", str(run)]
    words += ["--test", "tiny_coco", "--summary", "a tiny net", "--folder", str(tmp_path / "zoo")]
    with pytest.raises(FileNotFoundError, match=r"no result.json of a training run"):
        main(["zoo", *words])
    (run / "model_final.pth").write_bytes(teacher.weights.read_bytes())
    result = {"iterations": 7200, "sec_per_step": 0.5, "seed": 3}
    (run / "result.json").write_text(json.dumps(result))
    assert main(["zoo", *words]) == 0
    entry = zoo.read_entries(tmp_path / "zoo")["t/net"]
    assert (entry.hours, entry.seed, entry.licence) == (1.0, 3, "Apache-2.0")
    assert entry.classes == list(MetadataCatalog.get("tiny_coco").thing_classes)
    assert 0 <= entry.ap["tiny_coco"] <= 100
    assert index.checked_path("kd_det://t/net", tmp_path / "zoo").is_file()
    assert "kd_det://t/net" in capsys.readouterr().out


def test_the_list_shows_every_teacher(
    tiny_zoo: tuple[Path, TinyTeacher], capsys: pytest.CaptureFixture[str]
) -> None:
    index.write_entry(replace(zoo.find(NAME), name="tiny/other"))
    assert main(["zoo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["kd_det://tiny/fcos", "kd_det://tiny/other"]
    assert "12.2 (tiny_coco)" in lines[2] and "Apache-2.0" in lines[2]


class TestShipped:
    @pytest.mark.parametrize("name", SHIPPED)
    def test_the_file_is_the_index_s_and_fits_its_config(self, name: str) -> None:
        entry = zoo.find(name)
        path = zoo.checked_path(entry.address)
        assert path.stat().st_size == entry.size_bytes < 10e6
        cfg = load_config(str(ROOT / entry.config))
        model = build_model(student_cfg(cfg))
        load_strictly(model, entry.address)
        assert sum(p.numel() for p in model.parameters()) == entry.parameters
        assert list(cfg.DATASETS.TRAIN) == entry.trained_on
        metadata = MetadataCatalog.get(entry.trained_on[0])
        if metadata.get("thing_classes") is None:
            DatasetCatalog.get(entry.trained_on[0])  # Detectron2 fills them in
        assert entry.classes == list(metadata.thing_classes)
        assert (cfg.SEED, cfg.SOLVER.MAX_ITER) == (entry.seed, entry.iterations)

    @pytest.mark.parametrize("name", SHIPPED)
    def test_no_test_image_trained_it(self, name: str) -> None:
        entry = zoo.find(name)
        assert not set(entry.ap) & set(entry.trained_on)

    def test_every_address_in_a_config_ships(self) -> None:
        asked = {
            config.get("KD", {}).get("TEACHER", {}).get("WEIGHTS", "")
            for path in (ROOT / "configs").rglob("*.yaml")
            if isinstance(config := yaml.safe_load(path.read_text()), dict)
        }
        addresses = {a for a in asked if a.startswith(zoo.PREFIX)}
        assert addresses <= {entry.address for entry in SHIPPED.values()}

    def test_the_wheel_takes_index_and_weights_along(self) -> None:
        # Read as text: Python 3.10 has no parser of it.
        text = (ROOT / "pyproject.toml").read_text()
        line = next(line for line in text.splitlines() if line.startswith('"kd_det.zoo"'))
        patterns = json.loads(line.split("=", 1)[1])
        for file in ("index.json", *(f"{name}.pth" for name in SHIPPED)):
            assert (index.FOLDER / file).is_file()
            assert any(fnmatch(file, pattern.replace("**", "*")) for pattern in patterns), file
