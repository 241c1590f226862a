"""The config of a job is read once, in every process of it; users bring a trainer of their own."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer, PeriodicWriter
from detectron2.engine.launch import DEFAULT_TIMEOUT
from tiny_runs import TinyTeacher

from kd_det.config import load_config
from kd_det.engine import job as job_module
from kd_det.engine import launch as launch_module
from kd_det.engine.ending import StopWhenAsked
from kd_det.engine.job import Job
from kd_det.engine.launch import launch
from kd_det.engine.main import main
from kd_det.engine.run_files import ProgressFile, RunResult
from kd_det.engine.trainer import DistillationTrainer


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The config files read by the command line of a job."""
    files: list[str] = []
    original = job_module.load_config

    def load(path: str, opts: Any) -> Any:
        files.append(path)
        return original(path, opts)

    monkeypatch.setattr(job_module, "load_config", load)
    return files


def test_a_process_that_is_started_reads_the_config_itself(
    tmp_path: Path, reads: list[str]
) -> None:
    config = str(tiny_runs.write_config(tmp_path / "run.yaml", "fcos", {}))
    job = Job.from_command_line(["--config-file", config, "SEED", "5"])
    assert job.cfg.SEED == 5 and job.cfg is job.cfg
    assert reads == [config]
    started = pickle.loads(pickle.dumps(job))
    assert started.args == job.args and "cfg" not in vars(started)
    assert started.cfg == job.cfg
    assert reads == [config, config]


class CountingTrainer(DistillationTrainer):
    """A user's own trainer."""

    built: list[str] = []  # noqa: RUF012
    tested: list[str] = []  # noqa: RUF012

    @classmethod
    def build_model(cls, cfg: Any) -> Any:
        cls.built.append(Path(cfg.OUTPUT_DIR).name)
        return super().build_model(cfg)

    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str) -> Any:
        cls.tested.append(Path(cfg.OUTPUT_DIR).name)
        return super().build_evaluator(cfg, dataset_name)


def test_a_trainer_of_the_user_trains_and_evaluates_teacher_and_student(
    tiny_data: dict[str, str], tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CountingTrainer, "built", [])
    monkeypatch.setattr(CountingTrainer, "tested", [])
    keys = {"DATASETS.TEST": [tiny_runs.DATA], "SOLVER.MAX_ITER": 1}
    tiny_runs.write_config(tmp_path / "teacher.yaml", "fcos", keys, r50=True)
    teacher = TinyTeacher(Path("teacher.yaml"), Path("auto"))
    keys |= tiny_runs.distil_keys("fcos", teacher)
    config = str(tiny_runs.write_config(tmp_path / "student.yaml", "fcos", keys))
    metrics = main(["--config-file", config], trainer=CountingTrainer)
    # Both are built once more before that, untrained, to find mistakes early.
    assert len(CountingTrainer.built) == 4
    assert CountingTrainer.built[2:] == CountingTrainer.tested[2:] == ["teacher", "student"]
    assert reads == [config]
    again = main(["--config-file", config, "--eval-only"], trainer=CountingTrainer)
    assert CountingTrainer.built[4:] == CountingTrainer.tested[4:] == ["student"]
    assert str(again) == str(metrics)  # nan is not equal to itself


def test_a_step_ends_with_evaluation_checkpoint_logs_and_result(
    tiny_student: Callable[..., Any], tiny_data: dict[str, str]
) -> None:
    cfg = tiny_student("fcos", None, {"TEST.PRECISE_BN.ENABLED": True, "TEST.EVAL_PERIOD": 2})
    hooks = DistillationTrainer(cfg).build_hooks()
    kinds = [type(hook) for hook in hooks]
    last = [EvalHook, PeriodicCheckpointer, PeriodicWriter, RunResult, StopWhenAsked]
    assert kinds[-6:] == [ProgressFile, *last]
    assert [kind.__name__ for kind in kinds[:-6]] == ["IterationTimer", "LRScheduler", "PreciseBN"]


class AugmentingTrainer(DistillationTrainer):
    """A user's own trainer, with a mapper of its own."""

    mapped: list[int] = []  # noqa: RUF012

    @classmethod
    def build_train_loader(cls, cfg: Any) -> Any:
        mapper = DatasetMapper(cfg, is_train=True)

        def note(record: dict[str, Any]) -> Any:
            cls.mapped.append(record["image_id"])
            return mapper(record)

        return build_detection_train_loader(cfg, mapper=note)


def test_a_training_loader_of_the_users_own_is_trained_on(
    tmp_path: Path, tiny_teacher: Callable[[str], TinyTeacher]
) -> None:
    keys = {**tiny_runs.distil_keys("fcos", tiny_teacher("fcos")), "SOLVER.MAX_ITER": 2}
    path = tiny_runs.write_config(tmp_path / "run.yaml", "fcos", keys)
    AugmentingTrainer.mapped.clear()
    main(["--config-file", str(path)], AugmentingTrainer)
    assert len(AugmentingTrainer.mapped) >= 2 * load_config(str(path)).SOLVER.IMS_PER_BATCH


class FailingTrainer(DistillationTrainer):
    """One whose evaluation breaks in the middle of a run."""

    @classmethod
    def test(cls, cfg: Any, model: Any, evaluators: Any = None) -> Any:
        raise RuntimeError("the disk with the test images is gone")


def test_an_evaluation_that_fails_in_the_middle_costs_no_training(
    tmp_path: Path, tiny_data: dict[str, str]
) -> None:
    keys = {"DATASETS.TEST": [tiny_runs.DATA], "SOLVER.MAX_ITER": 4, "SOLVER.CHECKPOINT_PERIOD": 2}
    path = str(tiny_runs.write_config(tmp_path / "run.yaml", "fcos", keys))
    words = ["--config-file", path, "TEST.EVAL_PERIOD", "2"]
    with pytest.raises(RuntimeError, match="is gone"):
        main(words, FailingTrainer)
    folder = Path(load_config(path).OUTPUT_DIR)
    assert (folder / "model_0000001.pth").is_file()
    main([*words[:2], "--resume", *words[2:]])
    log = (folder / "log.txt").read_text()
    assert f"Resumed from {folder}/model_0000001.pth" in log
    assert (folder / "result.json").is_file()


@pytest.mark.parametrize("fails", [False, True])
def test_several_processes_part_only_after_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """On GPUs, parting waits for all processes, which may wait in an exchange for this one."""
    calls: list[Any] = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    note = lambda name: lambda *_, **options: calls.append((name, options.get("timeout")))  # noqa: E731
    monkeypatch.setattr(launch_module.dist, "init_process_group", note("join"))
    monkeypatch.setattr(launch_module.dist, "destroy_process_group", note("part"))
    monkeypatch.setattr(launch_module, "_create_local_group", lambda _: None)
    config = tiny_runs.write_config(tmp_path / "run.yaml", "fcos", {})
    job = Job.from_command_line(["--config-file", str(config)])

    def work(job: Job) -> str:
        if fails:
            raise RuntimeError("broken")
        return "done"

    if fails:
        with pytest.raises(RuntimeError, match="broken"):
            launch(work, job)
    else:
        assert launch(work, job) == "done"
    names = [name for name, _ in calls]
    assert names == (["join"] if fails else ["join", "part"])
    assert calls[0][1] == DEFAULT_TIMEOUT
