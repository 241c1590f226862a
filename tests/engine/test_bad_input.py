"""Whatever is wrong with the input, the run stops and says what was found, expected, to change."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from tiny_runs import TinyTeacher

from kd_det.data import register_from_config
from kd_det.distillers import FeatureLp
from kd_det.engine.main import main

MakeTeacher = Callable[[str], TinyTeacher]


@pytest.fixture
def run(tiny_data: dict[str, str], tmp_path: Path) -> Callable[..., None]:
    """Run `train_net.py` in this process on a tiny FCOS student with the given keys."""

    def start(
        teacher: TinyTeacher | None = None,
        keys: dict[str, Any] | None = None,
        words: list[str] | None = None,
    ) -> None:
        merged = {**tiny_runs.distil_keys("fcos", teacher), **(keys or {})}
        path = tiny_runs.write_config(tmp_path / "run.yaml", "fcos", merged)
        main(["--config-file", str(path), *(words or [])])

    return start


def data(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Config keys of a data set of its own, spoilt by `change`."""
    entry = tiny_runs.make_data(folder / name, images=4, name=name)
    content = json.loads(Path(entry["json"]).read_text())
    change(content)
    Path(entry["json"]).write_text(json.dumps(content))
    return {"KD.DATASETS": [entry], "DATASETS.TRAIN": [name]}


class TestTeacher:
    def test_missing_weights(self, run: Any, tiny_teacher: MakeTeacher, tmp_path: Path) -> None:
        teacher = TinyTeacher(tiny_teacher("fcos").config_file, tmp_path / "gone.pth")
        with pytest.raises(
            FileNotFoundError, match=r"gone.pth' do not exist\. Train it first"
        ) as e:
            run(teacher)
        assert "set KD.TEACHER.WEIGHTS to its checkpoint" in str(e.value)

    def test_missing_config(self, run: Any, tiny_teacher: MakeTeacher, tmp_path: Path) -> None:
        teacher = TinyTeacher(tmp_path / "gone.yaml", tiny_teacher("fcos").weights)
        message = r"KD.TEACHER.CONFIG_FILE: Config file .*gone.yaml does not exist"
        with pytest.raises(FileNotFoundError, match=message):
            run(teacher)

    def test_weights_of_another_architecture(self, run: Any, tiny_teacher: MakeTeacher) -> None:
        teacher = TinyTeacher(tiny_teacher("fcos").config_file, tiny_teacher("faster_rcnn").weights)
        with pytest.raises(
            ValueError, match=r"do not fit the model of its config: \d+ of"
        ) as error:
            run(teacher)
        assert "missing in the file" in str(error.value)
        assert "in the file but not in the model" in str(error.value)
        assert "Give the config the weights were trained with" in str(error.value)

    def test_other_classes_where_scores_are_used(
        self, run: Any, tiny_teacher: MakeTeacher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(FeatureLp, "uses_class_scores", True)
        with pytest.raises(ValueError, match=r"predicts 3 classes, the teacher 2.*same classes"):
            run(tiny_teacher("fcos"), {"MODEL.FCOS.NUM_CLASSES": 3})

    def test_student_weights_given_as_teacher_config(
        self, run: Any, tiny_teacher: MakeTeacher
    ) -> None:
        weights = tiny_teacher("fcos").weights
        message = r"KD.TEACHER.CONFIG_FILE: .*fcos.pth is not a yaml config.*as \.\.\.WEIGHTS"
        with pytest.raises(ValueError, match=message):
            run(TinyTeacher(weights, weights))

    def test_misspelled_key_in_its_overrides(self, run: Any, tiny_teacher: MakeTeacher) -> None:
        with pytest.raises(
            KeyError, match=r"KD.TEACHER.CONFIG_FILE: KD.TEACHER.OPTS: .*INPUT.FROMAT.*INPUT.FORMAT"
        ):
            run(tiny_teacher("fcos"), {"KD.TEACHER.OPTS": ["INPUT.FROMAT", "RGB"]})

    def test_pixel_format_that_cannot_be_converted(
        self, run: Any, tiny_teacher: MakeTeacher
    ) -> None:
        with pytest.raises(ValueError, match=r"INPUT.FORMAT is 'BGR', the teacher's 'L'"):
            run(tiny_teacher("fcos"), {"KD.TEACHER.OPTS": ["INPUT.FORMAT", "L"]})


class TestConfig:
    def test_misspelled_capture_path(self, run: Any, tiny_teacher: MakeTeacher) -> None:
        for key in ("STUDENT_CAPTURE", "TEACHER_CAPTURE"):
            with pytest.raises(ValueError, match=r"no module 'backbone.fpn_output_3'") as error:
                run(tiny_teacher("fcos"), {f"KD.FEATURE_LP.{key}": "backbone.fpn_output_3"})
            assert "backbone.fpn_output3" in str(error.value)
            assert str(error.value).startswith(f"KD.FEATURE_LP.{key}: ")

    def test_an_aligned_pyramid_of_an_ordinary_teacher(
        self, run: Any, tiny_teacher: MakeTeacher
    ) -> None:
        message = r"no module 'fusion'.*set KD.ALIGNED_PYRAMID.TEACHER_CAPTURE to 'backbone'\.$"
        with pytest.raises(ValueError, match=message):
            run(tiny_teacher("fcos"), {"KD.DISTILLERS": ["AlignedPyramid"]})

    def test_misspelled_config_key(self, run: Any) -> None:
        with pytest.raises(KeyError, match=r"run.yaml: no config key is called KD.TEACHER.WEIGTHS"):
            run(None, {"KD.TEACHER.WEIGTHS": "a.pth"})
        with pytest.raises(KeyError, match=r"the command line: .*SOLVER.BASELR; .*SOLVER.BASE_LR"):
            run(None, words=["SOLVER.BASELR", "0.1"])

    def test_misspelled_distiller(self, run: Any, tiny_teacher: MakeTeacher) -> None:
        with pytest.raises(KeyError, match=r"no distiller is called FeatureLP; .*FeatureLp"):
            run(tiny_teacher("fcos"), {"KD.DISTILLERS": ["FeatureLP"]})

    def test_pyramids_that_do_not_pair(self, run: Any, tiny_teacher: MakeTeacher) -> None:
        with pytest.raises(ValueError, match=r"No level of the student's pyramid") as error:
            run(tiny_teacher("fcos"), {"KD.STUDENT.VIEW_FACTOR": 1.5})
        message = str(error.value)
        assert "student: p3 (stride 12" in message
        assert "teacher: p3 (stride 8, 48 channels)" in message
        assert "KD.RESAMPLE_LEVELS True" in message

    def test_a_capture_that_is_no_pyramid(self, run: Any, tiny_teacher: MakeTeacher) -> None:
        message = r"Capture 'roi_heads.box_head', .*expected a pyramid of .* found \(\d+, 32\)"
        with pytest.raises(ValueError, match=message):
            run(
                tiny_teacher("faster_rcnn"),
                {"KD.FEATURE_LP.TEACHER_CAPTURE": "roi_heads.box_head"},
            )

    def test_optimizer(self, run: Any) -> None:
        with pytest.raises(ValueError, match=r"SOLVER.OPTIMIZER is 'Adam', expected 'SGD' or"):
            run(None, {"SOLVER.OPTIMIZER": "Adam"})

    def test_output_folder_not_writable(self, run: Any, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        for folder in (tmp_path / "file", tmp_path / "file" / "out"):
            message = rf"OUTPUT_DIR {folder} cannot be written \(.*set OUTPUT_DIR to a folder"
            with pytest.raises(PermissionError, match=message):
                run(None, {"OUTPUT_DIR": str(folder)})

    def test_no_config_file(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main([])
        assert "--config-file is required" in capsys.readouterr().err

    def test_missing_student_weights(self, run: Any) -> None:
        with pytest.raises(FileNotFoundError, match=r"MODEL.WEIGHTS: /nowhere.pth does not exist"):
            run(None, {"MODEL.WEIGHTS": "/nowhere.pth"})


class TestData:
    def test_empty(self, run: Any, tmp_path: Path) -> None:
        keys = data(tmp_path, "without_images", lambda c: c["images"].clear())
        with pytest.raises(ValueError, match=r"'without_images' .*is empty: it lists no images"):
            run(None, keys)

    def test_images_without_any_annotation(self, run: Any, tmp_path: Path) -> None:
        keys = data(tmp_path, "without_boxes", lambda c: c["annotations"].clear())
        with pytest.raises(ValueError, match=r"without_boxes'\] holds no image with an annotation"):
            run(None, keys)

    def test_category_that_is_not_in_the_file(self, run: Any, tmp_path: Path) -> None:
        def change(content: dict[str, Any]) -> None:
            content["annotations"][3]["category_id"] = 9

        keys = data(tmp_path, "odd_category", change)
        message = r"annotation 4 has category_id 9; the file's categories are \[1, 2\]"
        with pytest.raises(ValueError, match=message):
            run(None, keys)

    @pytest.mark.parametrize("role", ["TRAIN", "TEST"])
    def test_corrupt_image(self, run: Any, tmp_path: Path, role: str) -> None:
        name = f"corrupt_{role.lower()}"
        keys = data(tmp_path, name, lambda content: None)
        for image in (tmp_path / name / "images").glob("*.png"):
            image.write_bytes(image.read_bytes()[:200])
        keys["DATASETS.TRAIN"] = [name if role == "TRAIN" else tiny_runs.DATA]
        keys["DATASETS.TEST"] = [name if role == "TEST" else tiny_runs.DATA]
        with pytest.raises(RuntimeError, match=rf"cannot read .*png of data set {name}: .*replace"):
            run(None, keys)

    def test_a_class_the_model_does_not_have(self, run: Any) -> None:
        """Two classes in the data, one in the model: the second would be background."""
        message = r"objects of class index 1, but the FCOS .* predicts 1 classes; .* to 2 or more"
        with pytest.raises(ValueError, match=message):
            run(None, {"MODEL.FCOS.NUM_CLASSES": 1})

    def test_none_named(self, run: Any) -> None:
        with pytest.raises(ValueError, match=r"DATASETS.TRAIN is empty; name the data sets"):
            run(None, {"DATASETS.TRAIN": []})

    def test_registered_twice_with_other_paths(self, tiny_data: dict[str, str]) -> None:
        with pytest.raises(ValueError, match="choose another name"):
            register_from_config([{**tiny_data, "images": str(Path(tiny_data["json"]).parent)}])


class TestRun:
    def test_non_finite_loss(
        self, run: Any, tiny_teacher: MakeTeacher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = FeatureLp.forward

        def broken(self: FeatureLp, step: Any) -> dict[str, torch.Tensor]:
            from detectron2.utils.events import get_event_storage

            factor = float("nan") if get_event_storage().iter == 1 else 1.0
            return {key: value * factor for key, value in original(self, step).items()}

        monkeypatch.setattr(FeatureLp, "forward", broken)
        with pytest.raises(FloatingPointError, match=r"Not finite at iteration 1: ") as error:
            run(tiny_teacher("fcos"))
        message = str(error.value)
        assert "{'loss_kd_feature_lp': nan}" in message
        assert "Images of the batch: [" in message

    def test_resume_from_a_truncated_checkpoint(self, run: Any, tmp_path: Path) -> None:
        run()
        path = tmp_path / "run" / "model_final.pth"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(RuntimeError, match=r"None of the checkpoints.*model_final.pth"):
            run(words=["--resume"])

    def test_more_gpus_than_there_are(self, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(RuntimeError, match=r"--num-gpus 3, but this machine has 1.*torchrun"):
            run(words=["--num-gpus", "3"])
