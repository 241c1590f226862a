"""Training what a LazyConfig composes."""

import copy
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import build_detection_train_loader
from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicCheckpointer, PeriodicWriter
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from torch import nn

from kd_det.distillation import DistillationDetector
from kd_det.distillation.lazy import plain_model
from kd_det.engine.auto_teacher import expect_other_folder
from kd_det.engine.job import Job
from kd_det.engine.processes import share_buffers
from kd_det.engine.trainer import DistillationTrainer, ResumableSampler


class LazyTrainer(DistillationTrainer):
    """
    kd_det's trainer for what a LazyConfig composes: same steps, checkpoints, resuming and files.

    Attributes:
        lazy: the config.
        evaluating: build the student alone.
    """

    lazy: ClassVar[Any]
    evaluating: ClassVar[bool] = False

    def __init__(self, cfg: CfgNode) -> None:
        _evaluator_of(self.lazy)  # what it lacks is better known before the first step
        length = self.lazy.model.get("max_iter") if "distillers" in self.lazy.model else None
        if length and length != cfg.SOLVER.MAX_ITER:
            raise ValueError(
                f"model.max_iter is {length}, by which weights set themselves and fade, and "
                f"train.max_iter {cfg.SOLVER.MAX_ITER}. Let the former follow the latter in the "
                'LazyConfig, max_iter="${train.max_iter}", or override model.max_iter too.'
            )
        super().__init__(cfg)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model; for an evaluation no teacher is built."""
        if cls.evaluating:
            plain = plain_model(cls.lazy)
            model: nn.Module = DistillationDetector(student=plain.model, view=plain.view)
        else:
            model = instantiate(cls.lazy.model)
            teacher = getattr(model, "teacher", None)
            if teacher is not None and teacher.identity is not None:
                expect_other_folder(teacher.identity.weights, cfg.OUTPUT_DIR)
        return model.to(cfg.MODEL.DEVICE)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer of the model's parameters."""
        node = copy.deepcopy(cls.lazy.optimizer)
        node.params.model = model
        optimizer: torch.optim.Optimizer = instantiate(node)
        return optimizer

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        """Build the course of the learning rate."""
        return LRMultiplier(optimizer, instantiate(cls.lazy.lr_multiplier), cfg.SOLVER.MAX_ITER)

    def _build_train_loader(self, cfg: CfgNode, model: nn.Module) -> Any:
        node = self.lazy.dataloader.train
        if node._target_ is not build_detection_train_loader or node.get("sampler") is not None:
            return instantiate(node)
        # A list of records does not go through a config, which would copy each of them.
        options = {k: instantiate(v) for k, v in node.items() if k not in ("_target_", "dataset")}
        dataset = instantiate(node.dataset)
        self._sampler = options["sampler"] = ResumableSampler.like_stock(cfg, dataset)
        return build_detection_train_loader(dataset, **options)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> Any:
        """Evaluate, if there is an evaluator; return metrics by task."""
        evaluator = evaluators or _evaluator_of(cls.lazy)
        if evaluator is None:
            return {}
        share_buffers(model)
        metrics = inference_on_dataset(model, instantiate(cls.lazy.dataloader.test), evaluator)
        if comm.is_main_process():
            print_csv_format(metrics)
        return metrics

    def build_hooks(self) -> list[HookBase]:
        """Take the periods that yaml configs have no key for from the LazyConfig."""
        hooks, train = super().build_hooks(), self.lazy.train
        for hook in hooks:
            if isinstance(hook, PeriodicCheckpointer):
                hook.max_to_keep = train.get("checkpointer", {}).get("max_to_keep")
            if isinstance(hook, PeriodicWriter):
                hook._period = train.get("log_period", 20)
        return hooks


def trainer_of(job: Job, default: type[DistillationTrainer]) -> type[DistillationTrainer]:
    """
    Return what trains, or evaluates, a job.

    Args:
        job: from the command line.
        default: for a yaml file; a LazyConfig composes its parts itself.
    """
    if job.lazy is None:
        return default
    parts = {"lazy": job.lazy, "evaluating": job.args.eval_only}
    return type("LazyTrainer", (LazyTrainer,), parts)


def _evaluator_of(lazy: Any) -> Any:
    node = lazy.dataloader.get("evaluator")
    return None if node is None else instantiate(node)
