"""
From the command line to a trained or evaluated model; what `train_net.py` runs.
"""

import argparse
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from kd_det.checkpoint import KDCheckpointer
from kd_det.config import is_distillation, load_config
from kd_det.data import register_from_config
from kd_det.distillation.teacher import teacher_config, teacher_weights
from kd_det.engine.launch import launch
from kd_det.engine.progress import write_result
from kd_det.engine.trainer import DistillationTrainer
from kd_det.files import read_json

_logger = logging.getLogger("kd_det.engine")


_EPILOG = """
Train (the teacher first, if it is absent), continue, evaluate the student alone:
  train_net.py --config-file configs/quickstart/feature_lp.yaml
  train_net.py --config-file configs/quickstart/feature_lp.yaml --resume
  train_net.py --config-file configs/quickstart/feature_lp.yaml --eval-only

Override any key:
  train_net.py --config-file F SOLVER.BASE_LR 0.001 KD.SSIM.WEIGHT 2.0
"""


def main(argv: Sequence[str] | None = None) -> Any:
    """
    Parse the command line, start the processes, train or evaluate.

    Returns:
        Metrics by task, in the main process of a single-process job.
    """
    parser = default_argument_parser(epilog=_EPILOG)
    args = parser.parse_args(argv)
    if not args.config_file:
        parser.error("--config-file is required, e.g. configs/quickstart/feature_lp.yaml")
    device = load_config(args.config_file, args.opts).MODEL.DEVICE
    return launch(
        run,
        args,
        num_gpus=args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        device=device,
    )


def run(args: argparse.Namespace) -> Any:
    """Run one process of a job."""
    cfg = load_config(args.config_file, args.opts)
    register_from_config(cfg.KD.DATASETS)
    _check_writable(cfg.OUTPUT_DIR)
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="kd_det")
    if args.eval_only:
        given = "MODEL.WEIGHTS" in args.opts
        return evaluate(cfg, last=args.resume or not given)
    return train(cfg, resume=args.resume)


def train(cfg: CfgNode, *, resume: bool) -> Any:
    """
    Train what the config names, its teacher first if that is absent.

    Args:
        cfg: full config.
        resume: continue from the last checkpoint in OUTPUT_DIR, if there is one.

    Returns:
        Metrics by task of the final evaluation.
    """
    if is_distillation(cfg) and (cfg.KD.DISTILLERS or cfg.KD.INHERIT):
        _train_missing_teacher(cfg)
    if cfg.SEED >= 0:
        seed_all_rng(cfg.SEED + comm.get_rank())
    trainer = DistillationTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return getattr(trainer, "_last_eval_results", {})


def _train_missing_teacher(cfg: CfgNode) -> None:
    """Train the teacher where KD.TEACHER.WEIGHTS "auto" finds no checkpoint."""
    if cfg.KD.TEACHER.WEIGHTS != "auto":
        return
    own_cfg = teacher_config(cfg)
    weights = teacher_weights(cfg, own_cfg)
    if os.path.isfile(weights):
        return
    _logger.warning("The teacher has no checkpoint %s yet: training it first.", weights)
    register_from_config(own_cfg.KD.DATASETS)
    _check_writable(own_cfg.OUTPUT_DIR)
    own_cfg.freeze()
    train(own_cfg, resume=True)
    comm.synchronize()  # the main process has written the file
    _logger.warning("The teacher is trained (%s); now the student.", weights)


def evaluate(cfg: CfgNode, *, last: bool) -> Any:
    """
    Evaluate the student alone; no teacher is built.

    Args:
        cfg: full config; MODEL.WEIGHTS is any checkpoint of kd_det or Detectron2.
        last: take the last checkpoint in OUTPUT_DIR instead, if there is one.

    Raises:
        FileNotFoundError: there is no checkpoint.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.KD.DISTILLERS, cfg.KD.INHERIT = [], []
    # Every tensor comes from the checkpoint: nothing to download, no package to install.
    cfg.MODEL.TIMM.PRETRAINED, cfg.MODEL.TIMM.WEIGHTS = False, ""
    model = DistillationTrainer.build_model(cfg)
    checkpointer = KDCheckpointer(model, cfg.OUTPUT_DIR)
    weights = cfg.MODEL.WEIGHTS
    if checkpointer.has_checkpoint() and last:
        weights = checkpointer.get_checkpoint_file()
    if not weights:
        raise FileNotFoundError(
            f"Nothing to evaluate: MODEL.WEIGHTS is empty and {cfg.OUTPUT_DIR} holds no checkpoint."
        )
    checkpointer.load_student(weights, strict=True)
    metrics = DistillationTrainer.test(cfg, model)
    trained = (read_json(Path(cfg.OUTPUT_DIR, "result.json")) or {}).get("iterations")
    if comm.is_main_process() and not trained:  # a training run's own result stays
        write_result(
            cfg.OUTPUT_DIR, metrics=metrics, seed=cfg.SEED, iterations=0, sec_per_step=None
        )
    return metrics


def _check_writable(folder: str) -> None:
    """Fail before any work if a run could not save its results."""
    try:
        PathManager.mkdirs(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(
            f"OUTPUT_DIR {folder} cannot be written ({error.strerror}); set OUTPUT_DIR to a folder "
            "that can."
        ) from error
