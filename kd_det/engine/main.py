"""
From the command line to a trained or evaluated model; `train_net.py` is made of these parts.
"""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from kd_det.checkpoint import KDCheckpointer
from kd_det.checkpoint.damaged import set_damaged_aside
from kd_det.distillation.teacher import teacher_weights
from kd_det.engine.auto_teacher import absent_teacher, what_lacks
from kd_det.engine.console import settle_handlers
from kd_det.engine.folder_lock import claimed
from kd_det.engine.job import Job
from kd_det.engine.launch import launch
from kd_det.engine.lazy import trainer_of
from kd_det.engine.rehearsal import (
    TrainerClass,
    check_before_training,
    prepare,
)
from kd_det.engine.run_files import write_result
from kd_det.engine.trainer import DistillationTrainer
from kd_det.files import read_json

_logger = logging.getLogger("kd_det.engine")


def main(argv: Sequence[str] | None = None, trainer: TrainerClass = DistillationTrainer) -> Any:
    """
    Parse the command line, start the processes, train or evaluate.

    Args:
        argv: arguments of train_net.py; None: those of this process.
        trainer: `DistillationTrainer` or a class derived from it, importable by its name if there
            are to be several processes.

    Returns:
        Metrics by task, in the main process of a single-process job.
    """
    return launch(functools.partial(run, trainer=trainer), Job.from_command_line(argv))


def run(job: Job, trainer: TrainerClass = DistillationTrainer) -> Any:
    """Do what each process of a job does; return metrics by task."""
    cfg, trainer = set_up(job), trainer_of(job, trainer)
    if job.args.eval_only:
        return evaluate(cfg, trainer, last=job.args.resume or not job.gives_weights)
    return train(cfg, trainer, resume=job.args.resume)


def set_up(job: Job) -> CfgNode:
    """
    Register the config's data sets, open the output folder and the logs, seed.

    Returns:
        The full config, frozen.

    Raises:
        PermissionError: OUTPUT_DIR cannot be written.
        FileNotFoundError, KeyError, ValueError: from the config and its data sets.
    """
    cfg = job.cfg
    prepare(cfg)
    # Detectron2's set-up makes no second handlers, and logs the config in colours.
    for name in ("fvcore", "kd_det"):
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name=name)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank())
    settle_handlers()
    default_setup(cfg if job.lazy is None else job.lazy, job.args)
    return cfg


def train(cfg: CfgNode, trainer: TrainerClass = DistillationTrainer, *, resume: bool) -> Any:
    """
    Train what the config names, its teacher first if that is absent.

    Args:
        cfg: full config.
        trainer: trains the student, and an absent teacher.
        resume: continue from the last checkpoint in OUTPUT_DIR, if there is one.

    Returns:
        Metrics by task of the final evaluation.

    Raises:
        FileNotFoundError, KeyError, ValueError: config or data cannot be trained on; of the teacher
            and the student, before either is trained.
    """
    check_before_training(cfg, trainer, resume=resume)
    return _train(cfg, trainer, resume=resume)


def _train(cfg: CfgNode, trainer: TrainerClass, *, resume: bool, mend: bool = False) -> Any:
    train_missing_teacher(cfg, trainer)
    with claimed(cfg.OUTPUT_DIR):
        if mend:
            set_damaged_aside(cfg.OUTPUT_DIR)
        if cfg.SEED >= 0:
            seed_all_rng(cfg.SEED + comm.get_rank())
        training = trainer(cfg)
        training.resume_or_load(resume=resume)
        return training.train()


def train_missing_teacher(cfg: CfgNode, trainer: TrainerClass = DistillationTrainer) -> None:
    """Train the teacher where KD.TEACHER.WEIGHTS "auto" finds no checkpoint, or a damaged one."""
    own_cfg = absent_teacher(cfg)
    if own_cfg is None:
        return
    weights = teacher_weights(cfg, own_cfg)
    _logger.warning(
        "The teacher's checkpoint %s %s: training it first.", weights, what_lacks(weights)
    )
    prepare(own_cfg)
    _train(own_cfg, trainer, resume=True, mend=True)
    comm.synchronize()  # the main process has written the file
    _logger.warning("The teacher is trained (%s); now the student.", weights)


def evaluate(cfg: CfgNode, trainer: TrainerClass = DistillationTrainer, *, last: bool) -> Any:
    """
    Evaluate the student alone; no teacher is built.

    Args:
        cfg: full config; MODEL.WEIGHTS is any checkpoint of kd_det or Detectron2.
        trainer: builds the model, the test loader and the evaluator.
        last: take the last checkpoint in OUTPUT_DIR instead, if there is one.

    Raises:
        FileNotFoundError: there is no checkpoint.
        RuntimeError: there are checkpoints in OUTPUT_DIR, and none is readable.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.KD.DISTILLERS, cfg.KD.INHERIT = [], []
    # Every tensor comes from the checkpoint: nothing to download, no package to install.
    cfg.MODEL.TIMM.PRETRAINED, cfg.MODEL.TIMM.WEIGHTS = False, ""
    model = trainer.build_model(cfg)
    checkpointer = KDCheckpointer(model, cfg.OUTPUT_DIR)
    weights = (checkpointer.last_readable() if last else "") or cfg.MODEL.WEIGHTS
    if not weights:
        raise FileNotFoundError(
            f"Nothing to evaluate: MODEL.WEIGHTS is empty and {cfg.OUTPUT_DIR} holds no checkpoint."
        )
    checkpointer.load_student(weights, strict=True)
    metrics = trainer.test(cfg, model)
    trained = (read_json(Path(cfg.OUTPUT_DIR, "result.json")) or {}).get("iterations")
    if comm.is_main_process() and not trained:  # a training run's own result stays
        write_result(
            cfg.OUTPUT_DIR, metrics=metrics, seed=cfg.SEED, iterations=0, sec_per_step=None
        )
    return metrics
