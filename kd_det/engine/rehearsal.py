"""
What a run will build, built once before the first step of any training.

A misspelled distiller, a capture that is no module, pyramids that do not pair, a broken test set:
each would otherwise be found when the missing teacher has been trained, hours later.
"""

import contextlib
import logging
import os
import random
import tempfile
from collections.abc import Iterator

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine.hooks import PeriodicWriter
from detectron2.utils.file_io import PathManager
from torch import nn

from kd_det.checkpoint import KDCheckpointer
from kd_det.config import student_cfg
from kd_det.data import register_from_config
from kd_det.data.dataset_checks import check_datasets
from kd_det.data.test_set_checks import check_classes_tested, check_objects, check_test_files
from kd_det.distillation.teacher import teacher_weights
from kd_det.engine.auto_teacher import absent_teacher, expect_own_folder, what_lacks
from kd_det.engine.trainer import DistillationTrainer
from kd_det.engine.training_set import is_stock

_logger = logging.getLogger("kd_det.engine")
TrainerClass = type[DistillationTrainer]
# Detectron2's models that predict no classes of objects.
_WITHOUT_CLASSES = ("ProposalNetwork", "SemanticSegmentor")


def prepare(cfg: CfgNode) -> None:
    """
    Register a config's data sets and freeze it; fail now if its results could not be saved.

    Raises:
        PermissionError: OUTPUT_DIR cannot be written.
        FileNotFoundError, ValueError: from `register_from_config`.
    """
    register_from_config(cfg.KD.DATASETS)
    folder = cfg.OUTPUT_DIR
    try:
        PathManager.mkdirs(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(
            f"OUTPUT_DIR {folder} cannot be written ({error.strerror}); set OUTPUT_DIR to a folder "
            "that can."
        ) from error
    cfg.freeze()


def check_before_training(cfg: CfgNode, trainer: TrainerClass, *, resume: bool = False) -> None:
    """
    Find what would stop a run later: with its teacher absent, everything; else, its test sets.

    A run whose teacher is there builds all else at once itself. The random state stays.

    Args:
        cfg: full config, prepared.
        trainer: as for the run.
        resume: the run is to go on, which takes the teacher that it had.

    Raises:
        FileNotFoundError, KeyError, ValueError, ...: whatever the run itself would raise.
    """
    own_cfg = absent_teacher(cfg)
    if resume and own_cfg is not None:
        _expect_no_lesson(cfg, teacher_weights(cfg, own_cfg))
    with _without_trace(), tempfile.TemporaryDirectory(dir=cfg.OUTPUT_DIR) as folder:
        if own_cfg is None:
            expect_own_folder(cfg)
            _check_data(_in_folder(cfg, folder), trainer)
        else:
            _logger.warning("Checking the configs and data of teacher and student.")
            _rehearse_all(cfg, trainer, folder)


def _expect_no_lesson(cfg: CfgNode, weights: str) -> None:
    """Refuse to go on with a run whose teacher is gone: one that is trained anew is another."""
    checkpoint, content = KDCheckpointer(nn.Module(), cfg.OUTPUT_DIR).last_content()
    taught = content.get("kd", {}).get("teacher")
    if taught:
        raise ValueError(
            f"The run to resume from {checkpoint} was taught by {taught['weights']} (sha256 "
            f"{taught['sha256'][:12]}), but {weights} {what_lacks(weights)}. Put that file back; "
            f"or train the teacher again (train_net.py --config-file {cfg.KD.TEACHER.CONFIG_FILE}) "
            "where its run repeats itself bit for bit; or start afresh with MODEL.WEIGHTS set to "
            "the checkpoint."
        )


def rehearse_run(cfg: CfgNode, trainer: TrainerClass = DistillationTrainer) -> None:
    """
    Build once all that a run builds, that of its absent teachers included; nothing is trained.

    Args:
        cfg: full config, as loaded.
        trainer: as for the run.

    Raises:
        FileNotFoundError, KeyError, ValueError, ...: whatever the run itself would raise.
    """
    prepare(cfg)
    with _without_trace(), tempfile.TemporaryDirectory(dir=cfg.OUTPUT_DIR) as folder:
        _rehearse_all(cfg, trainer, folder)


def _rehearse_all(cfg: CfgNode, trainer: TrainerClass, folder: str) -> str:
    """Rehearse a run after those of absent teachers; return stand-in weights of its model."""
    expect_own_folder(cfg)
    own_cfg, teacher = absent_teacher(cfg), ""
    if own_cfg is not None:
        prepare(own_cfg)
        teacher = _rehearse_all(own_cfg, trainer, os.path.join(folder, "teacher"))
    return rehearse(cfg, trainer, folder=folder, teacher=teacher)


def rehearse(
    cfg: CfgNode,
    trainer: TrainerClass = DistillationTrainer,
    *,
    folder: str,
    teacher: str = "",
    of_teacher: bool = False,
) -> str:
    """
    Build once all that a run builds: data, evaluators, models with their first weights, optimizer.

    Args:
        cfg: full config, its data sets registered.
        trainer: as for the run.
        folder: for what is written meanwhile; the run's own is not touched.
        teacher: weights in place of KD.TEACHER.WEIGHTS; "": the config's.
        of_teacher: the run is that of a comparison's teacher, see `check_classes_tested`.

    Returns:
        A checkpoint of the untrained model, which can stand in for that of an absent teacher.

    Raises:
        FileNotFoundError, KeyError, ValueError, ...: whatever the run itself would raise.
    """
    os.makedirs(folder, exist_ok=True)
    cfg = _in_folder(cfg, folder, teacher)
    with _without_trace():
        _check_data(cfg, trainer, of_teacher=of_teacher)
        training = trainer(cfg)
        try:
            training.resume_or_load(resume=False)
        finally:
            _close_writers(training)
        weights = os.path.join(folder, "stand_in.pth")
        torch.save({"model": training.checkpointer.model.state_dict()}, weights)
    return weights


def rehearse_evaluation(
    cfg: CfgNode, trainer: TrainerClass = DistillationTrainer, *, folder: str
) -> None:
    """
    Build once all that an evaluation builds, and load MODEL.WEIGHTS if they name a file.

    Args:
        cfg, trainer, folder: as for `rehearse`.

    Raises:
        FileNotFoundError, KeyError, ValueError, ...: whatever the evaluation itself would raise.
    """
    cfg = _in_folder(cfg, folder)
    cfg.defrost()
    cfg.KD.DISTILLERS, cfg.KD.INHERIT = [], []
    with _without_trace():
        _check_data(cfg, trainer, trains=False)
        model = trainer.build_model(cfg)
        # From elsewhere they come when they are needed.
        if cfg.MODEL.WEIGHTS and "://" not in cfg.MODEL.WEIGHTS:
            KDCheckpointer(model, save_to_disk=False).load_student(cfg.MODEL.WEIGHTS, strict=True)


def _check_data(
    cfg: CfgNode, trainer: TrainerClass, *, trains: bool = True, of_teacher: bool = False
) -> None:
    found = check_datasets(cfg)
    # A loader or an evaluator of the user's own may read images and classes in its own way.
    if is_stock(trainer, DistillationTrainer, "build_test_loader"):
        check_test_files(cfg, found)
    if is_stock(trainer, DistillationTrainer, "build_evaluator"):
        check_objects(cfg, found)
        if trains and student_cfg(cfg).MODEL.META_ARCHITECTURE not in _WITHOUT_CLASSES:
            check_classes_tested(cfg, found, of_teacher=of_teacher)
    for name in cfg.DATASETS.TEST:
        metadata = MetadataCatalog.get(name)
        converts = not metadata.get("json_file")
        trainer.build_evaluator(cfg, name)
        if converts and metadata.get("json_file"):
            # Detectron2's evaluator wrote the set as a COCO file, which goes with this folder.
            del metadata.json_file


def _in_folder(cfg: CfgNode, folder: str, teacher: str = "") -> CfgNode:
    """Return the config with another output folder and, if given, other weights of the teacher."""
    out = cfg.clone()
    out.defrost()
    out.OUTPUT_DIR = folder
    if teacher:
        out.KD.TEACHER.WEIGHTS = teacher
    out.freeze()
    return out


def _close_writers(training: DistillationTrainer) -> None:
    for hook in training._hooks:
        if isinstance(hook, PeriodicWriter):
            for writer in hook._writers:
                writer.close()


@contextlib.contextmanager
def _without_trace() -> Iterator[None]:
    """Leave the generators' states as they were; of what is logged, keep warnings alone."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "kd_det")]
    levels = [logger.level for logger in loggers]
    python, arrays = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
