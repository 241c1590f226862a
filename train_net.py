#!/usr/bin/env python
"""
Train, resume or evaluate a detector, with or without distillation.

    train_net.py --config-file configs/quickstart/feature_lp.yaml [--resume | --eval-only]
                 [KEY VALUE ...]

To change more than a config can, copy this file and override what you need.
"""

from typing import Any

from kd_det.engine.console import plain_errors
from kd_det.engine.job import Job
from kd_det.engine.launch import launch
from kd_det.engine.main import evaluate, set_up, train
from kd_det.engine.trainer import DistillationTrainer


class Trainer(DistillationTrainer):
    """
    Trains the student, and a teacher that is not there yet.

    A Detectron2 `DefaultTrainer`: override its `build_model`, `build_optimizer`,
    `build_lr_scheduler`, `build_train_loader`, `build_test_loader`, `build_evaluator` or
    `build_hooks`.
    """


def run(job: Job) -> Any:
    """Do what each process of the job does; return metrics by task."""
    # The config with its data sets registered, its output folder made, logs open, seeds set.
    cfg = set_up(job)
    if job.args.eval_only:
        # Weights on the command line are evaluated; else the run's last, or the config's.
        given = "MODEL.WEIGHTS" in job.args.opts
        return evaluate(cfg, Trainer, last=job.args.resume or not given)
    return train(cfg, Trainer, resume=job.args.resume)


if __name__ == "__main__":
    # Detectron2's arguments. Starts a process per GPU; under torchrun joins those that are there.
    # An error ends it with its message; the traceback is in OUTPUT_DIR/log.txt.
    with plain_errors():
        launch(run, Job.from_command_line())
