"""LazyConfig: composed from Python objects, a run is the yaml's, bit for bit, promises included."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import tiny_vit
import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import build_model

from kd_det.config import load_config, student_cfg
from kd_det.engine.main import main

# A LazyConfig that composes what the yaml file YAML says; models are built from yaml for brevity.
_CONFIG = """
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.data import get_detection_dataset_dicts
from detectron2.modeling import build_model
from detectron2.solver import WarmupParamScheduler, get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler
import torch

from kd_det import Weighted, distill, load_teacher
from kd_det.config import load_config, student_cfg
from kd_det.data import CheckedDatasetMapper
from kd_det.data.catalog import register_from_config
from kd_det.distillers import FeatureLp
from kd_det.evaluation.coco import COCODetectionEvaluator

register_from_config(load_config("YAML").KD.DATASETS)

def student(yaml):
    return build_model(student_cfg(load_config(yaml)))

def mapper(yaml, training):
    return CheckedDatasetMapper(load_config(yaml), training)

model = L(distill)(
    student=L(student)(yaml="YAML"),
    teacher=L(load_teacher)(config_file="TEACHER", weights="WEIGHTS"),
    distillers=[L(Weighted)(distiller=L(FeatureLp)(), weight=WEIGHT)],
    max_iter=4,
    grad_share_period=0,
)
dataloader = dict(
    train=L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="DATA"),
        mapper=L(mapper)(yaml="YAML", training=True),
        total_batch_size=2,
        aspect_ratio_grouping=False,
        num_workers=0,
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="DATA", filter_empty=False),
        mapper=L(mapper)(yaml="YAML", training=False),
        num_workers=0,
    ),
    evaluator=L(COCODetectionEvaluator)(dataset_name="DATA", tasks=["bbox"]),
)
optimizer = L(torch.optim.SGD)(
    params=L(get_default_optimizer_params)(base_lr=0.001, weight_decay_norm=0.0),
    lr=0.001, momentum=0.9, weight_decay=0.0001,
)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0], milestones=[], num_updates=4),
    warmup_factor=0.001, warmup_length=2 / 4, warmup_method="linear",
)
train = dict(
    output_dir="OUTPUT", init_checkpoint="", max_iter=4, amp=dict(enabled=False),
    checkpointer=dict(period=2, max_to_keep=3), eval_period=0, log_period=1, device="cpu", seed=7,
)
"""


@pytest.fixture
def pair(
    tiny_data: dict[str, str],
    tiny_teacher: Callable[[str], tiny_runs.TinyTeacher],
    tiny_student: Callable[..., CfgNode],
    tmp_path: Path,
) -> Callable[..., tuple[Path, Path]]:
    """Write a yaml run and its LazyConfig: `pair(detector, weight, teacher)`."""

    def get(
        detector: str = "retinanet",
        weight: float | None = 0.001,
        teacher: tiny_runs.TinyTeacher | None = None,
    ) -> tuple[Path, Path]:
        teacher = teacher or tiny_teacher(detector)
        keys = {
            "KD.DATASETS": [tiny_data],
            "KD.FEATURE_LP.WEIGHT": weight,
            "SOLVER.MAX_ITER": 4,
            "SOLVER.CHECKPOINT_PERIOD": 2,
            "DATASETS.TEST": [tiny_data["name"]],
        }
        tiny_student(detector, teacher, keys, "yaml_run")
        text = _CONFIG
        for word, value in {
            "YAML": tmp_path / "yaml_run.yaml",
            "TEACHER": teacher.config_file,
            "WEIGHTS": teacher.weights,
            "WEIGHT": weight,
            "DATA": tiny_data["name"],
            "OUTPUT": tmp_path / "lazy_run",
        }.items():
            text = text.replace(f'"{word}"', f'"{value}"').replace(f"={word})", f"={value})")
        (tmp_path / "lazy.py").write_text(text)
        return tmp_path / "yaml_run.yaml", tmp_path / "lazy.py"

    return get


def losses(folder: Path) -> dict[str, float]:
    """The last ones logged."""
    lines = [json.loads(x) for x in (folder / "metrics.json").read_text().splitlines()]
    return {k: v for line in lines for k, v in line.items() if "loss" in k}


def checkpoint(folder: Path, name: str = "model_final") -> Any:
    return torch.load(folder / f"{name}.pth", weights_only=True)


def train_in_parts(words: list[str], out: Path) -> None:
    """Train into a folder, interrupted and resumed."""
    other = [f"train.output_dir={out}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kd_det.engine.lazy.LazyTrainer.build_hooks", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            main([*words, *other])
    main([*words, "--resume", *other])


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
class TestRuns:
    @pytest.mark.parametrize("weight", [0.001, None], ids=["given", "sets itself"])
    def test_it_is_the_yaml_run_bit_for_bit(
        self, weight: float | None, pair: Callable[..., tuple[Path, Path]], tmp_path: Path
    ) -> None:
        yaml_file, lazy_file = pair(weight=weight)
        one = main(["--config-file", str(yaml_file)])
        two = main(["--config-file", str(lazy_file)])
        ours, theirs = checkpoint(tmp_path / "lazy_run"), checkpoint(tmp_path / "yaml_run")
        assert tiny_runs.equal_states(ours["model"], theirs["model"])
        assert tiny_runs.equal_states(ours["kd"], theirs["kd"])
        assert one["bbox"] == pytest.approx(two["bbox"], nan_ok=True)
        assert losses(tmp_path / "lazy_run") == losses(tmp_path / "yaml_run")
        assert losses(tmp_path / "lazy_run")["loss_kd_feature_lp"] > 0
        stock = build_model(student_cfg(load_config(str(yaml_file))))
        stock.load_state_dict(ours["model"], strict=True)

    def test_it_resumes_and_evaluates_the_student_alone(
        self,
        pair: Callable[..., tuple[Path, Path]],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        _, file = pair()
        words = ["--config-file", str(file)]
        whole = main(words)
        train_in_parts(words, tmp_path / "parts")
        states = [checkpoint(tmp_path / name)["model"] for name in ("lazy_run", "parts")]
        assert tiny_runs.equal_states(*states)
        monkeypatch.setattr("kd_det.distillation.api.build_teacher", _no_teacher)
        again = main([*words, "--eval-only"])
        assert again["bbox"] == pytest.approx(whole["bbox"], nan_ok=True)
        last = f"train.init_checkpoint={tmp_path / 'parts' / 'model_0000001.pth'}"
        assert main([*words, "--eval-only", last])["bbox"]

    def test_it_teaches_a_yaml_student(
        self,
        pair: Callable[..., tuple[Path, Path]],
        tiny_student: Callable[..., CfgNode],
        tmp_path: Path,
    ) -> None:
        """The teacher's config is a LazyConfig whose own run has made the weights."""
        _, file = pair()
        main(["--config-file", str(file)])
        teacher = tiny_runs.TinyTeacher(file, Path("auto"))
        keys = {"KD.TEACHER.WEIGHTS": "auto", "KD.DISTILLERS": ["CWD"], "KD.CWD.WEIGHT": 1.0}
        trainer, recorder = tiny_runs.train(tiny_student("fcos", teacher, keys, "taught"))
        assert recorder.steps[-1]["loss_kd_cwd"] > 0
        own = checkpoint(tmp_path / "lazy_run")["model"]
        model = trainer._plain_model().teacher.model
        assert tiny_runs.equal_states({k: model.state_dict()[k] for k in own}, own)

    def test_it_does_not_replace_its_teacher(
        self, pair: Callable[..., tuple[Path, Path]], tmp_path: Path
    ) -> None:
        """As with two LazyConfigs that both keep Detectron2's ./output."""
        _, file = pair()
        text = file.read_text()
        (tmp_path / "shared").mkdir()
        (weights,) = re.findall(r'weights="([^"]+)"', text)
        there = tmp_path / "shared" / "model_final.pth"
        there.write_bytes(Path(weights).read_bytes())
        file.write_text(text.replace(weights, str(there)))
        with pytest.raises(ValueError, match=r"is the folder of the teacher's checkpoint"):
            main(["--config-file", str(file), f"train.output_dir={there.parent}"])
        assert there.read_bytes() == Path(weights).read_bytes()

    def test_the_length_of_its_courses_is_that_of_the_run(
        self, pair: Callable[..., tuple[Path, Path]]
    ) -> None:
        _, file = pair()
        words = ["--config-file", str(file), "train.max_iter=3", "model.max_iter=90000"]
        with pytest.raises(ValueError, match=r"model\.max_iter is 90000, .* train\.max_iter 3\."):
            main(words)

    def test_an_absent_teacher_is_not_trained_by_the_way(
        self, pair: Callable[..., tuple[Path, Path]], tiny_student: Callable[..., CfgNode]
    ) -> None:
        _, file = pair()
        teacher = tiny_runs.TinyTeacher(file, Path("auto"))
        tiny_student("fcos", teacher, {"KD.TEACHER.WEIGHTS": "auto"}, "taught")
        with pytest.raises(FileNotFoundError, match=r"do not exist\. Train it first.*lazy\.py"):
            main(["--config-file", str(file.parent / "taught.yaml")])


@pytest.mark.slow
def test_several_processes_take_the_yamls_steps_and_resume(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    yaml_file, lazy_file = pair()
    tiny_runs.torchrun(yaml_file)
    tiny_runs.torchrun(lazy_file)
    parts = f"train.output_dir={tmp_path / 'parts'}"
    tiny_runs.torchrun(lazy_file, parts)
    for file in (tmp_path / "parts").glob("model_*.pth"):
        if file.name != "model_0000001.pth":  # as if it had been killed after the second step
            file.unlink()
    (tmp_path / "parts" / "last_checkpoint").write_text("model_0000001.pth")
    tiny_runs.torchrun(lazy_file, "--resume", parts)
    ours = [checkpoint(tmp_path / name) for name in ("yaml_run", "lazy_run", "parts")]
    assert tiny_runs.equal_states(ours[0]["model"], ours[1]["model"])
    assert tiny_runs.equal_states(ours[0]["kd"], ours[1]["kd"])
    assert tiny_runs.equal_states(ours[1]["model"], ours[2]["model"])


@pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning",
    "ignore:Importing from timm.models.layers:FutureWarning",  # Detectron2's ViT
)
def test_a_vitdet_teaches_a_retinanet(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is a LazyConfig; what it teaches trains, resumes, evaluates and ships alone."""
    config = Path(tiny_vit.__file__)
    torch.manual_seed(1)
    weights = tmp_path / "vit.pth"
    torch.save({"model": instantiate(LazyConfig.load(str(config)).model).state_dict()}, weights)
    yaml_file, file = pair(teacher=tiny_runs.TinyTeacher(config, weights))
    words = ["--config-file", str(file)]
    whole = main(words)
    train_in_parts(words, tmp_path / "parts")
    ours = checkpoint(tmp_path / "lazy_run")
    assert tiny_runs.equal_states(ours["model"], checkpoint(tmp_path / "parts")["model"])
    assert losses(tmp_path / "lazy_run")["loss_kd_feature_lp"] > 0
    levels = {key.rsplit(".", 1)[0] for key in ours["kd"]["adapters"]}
    assert levels == {f"FeatureLp-features.{i}" for i in range(3)}  # p3, p4, p5
    build_model(student_cfg(load_config(str(yaml_file)))).load_state_dict(ours["model"])
    monkeypatch.setattr("kd_det.distillation.api.build_teacher", _no_teacher)
    again = main([*words, "--eval-only"])
    assert again["bbox"] == pytest.approx(whole["bbox"], nan_ok=True)


def _interrupted(self: Any) -> Any:
    from kd_det.engine.lazy import LazyTrainer
    from kd_det.engine.trainer import DistillationTrainer

    assert isinstance(self, LazyTrainer)
    return [*DistillationTrainer.build_hooks(self), tiny_runs.Interrupt(3)]


def _no_teacher(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("an evaluation needs no teacher")


class TestRefusals:
    def test_overrides_are_written_differently(
        self, pair: Callable[..., tuple[Path, Path]]
    ) -> None:
        _, file = pair()
        with pytest.raises(ValueError, match=r"path\.key=value; found \['SEED', '1'\]"):
            main(["--config-file", str(file), "SEED", "1"])

    def test_a_file_without_a_model(self, tmp_path: Path) -> None:
        (tmp_path / "empty.py").write_text("train = dict(max_iter=1)\n")
        with pytest.raises(ValueError, match=r"empty\.py has no `model`"):
            main(["--config-file", str(tmp_path / "empty.py")])

    def test_a_file_that_lacks_what_a_run_needs(self, tmp_path: Path) -> None:
        (tmp_path / "half.py").write_text("model = dict()\ntrain = dict(max_iter=1)\n")
        with pytest.raises(ValueError, match=r"no optimizer, lr_multiplier, dataloader; expected"):
            main(["--config-file", str(tmp_path / "half.py")])

    def test_an_absent_file(self) -> None:
        with pytest.raises(FileNotFoundError, match=r"no_such\.py does not exist"):
            main(["--config-file", "no_such.py"])
