#!/usr/bin/env python
"""
Train, resume or evaluate a detector, with or without distillation.

    train_net.py --config-file configs/quickstart/feature_lp.yaml [--resume | --eval-only]
                 [KEY VALUE ...]

A LazyConfig (x.py) with overrides path.key=value is taken as well: docs/lazyconfig.md.
To change more than a config can, copy this file and override what you need.
"""

from typing import Any

from kd_det.engine.console import plain_errors
from kd_det.engine.job import Job
from kd_det.engine.launch import launch
from kd_det.engine.lazy import trainer_of
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
    trainer = trainer_of(job, Trainer)  # a LazyConfig (.py) composes its own parts
    if job.args.eval_only:
        # Weights on the command line are evaluated; else the run's last, or the config's.
        return evaluate(cfg, trainer, last=job.args.resume or not job.gives_weights)
    return train(cfg, trainer, resume=job.args.resume)


if __name__ == "__main__":
    # Detectron2's arguments. Starts a process per GPU; under torchrun joins those that are there.
    # An error ends it with its message; the traceback is in OUTPUT_DIR/log.txt.
    with plain_errors():
        launch(run, Job.from_command_line())
