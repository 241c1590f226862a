"""Detectron2's default trainer for plain detectors and for `DistillationDetector`."""

import itertools
import logging
import os
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.data.build import _train_loader_from_config
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer, PeriodicWriter
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver import build_optimizer, get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch import nn

from kd_det.checkpoint import KDCheckpointer
from kd_det.data import CheckedDatasetMapper
from kd_det.data.dataset_checks import check_proposals
from kd_det.distillation import DistillationDetector
from kd_det.engine.ending import StopWhenAsked, saved_where_it_fails
from kd_det.engine.launch import distribute
from kd_det.engine.loop import TrainingLoop
from kd_det.engine.optimizer import slow_bottom_up
from kd_det.engine.processes import (
    GatherProcessStates,
    random_state,
    set_process_state,
    set_random_state,
    share_buffers,
)
from kd_det.engine.run_files import ProgressFile, RunResult
from kd_det.engine.training_set import checked_training_set, is_stock
from kd_det.evaluation.build import build_evaluator

_logger = logging.getLogger(__name__)
# What a step ends with. Evaluating draws random numbers: the state that a checkpoint saves must be
# the one from which the next step starts. The result needs the last evaluation and all files.
_LAST_HOOKS = (
    ProgressFile,
    EvalHook,
    GatherProcessStates,
    PeriodicCheckpointer,
    PeriodicWriter,
    RunResult,
    StopWhenAsked,
)
_PROCESSES = "processes"


class ResumableSampler(TrainingSampler):
    """Detectron2's training sampler, which can start in the middle of its endless stream."""

    #: Samples of this process to skip.
    skip = 0

    def __iter__(self) -> Iterator[int]:
        yield from itertools.islice(super().__iter__(), self.skip, None)

    @classmethod
    def like_stock(cls, cfg: CfgNode, dataset: Sequence[Any]) -> "ResumableSampler":
        """
        Build one that gives the order of Detectron2's own.

        Detectron2 0.6 draws its seed, later versions take cfg.SEED.
        """
        cfg = cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.SAMPLER_TRAIN = "TrainingSampler"
        stock = _train_loader_from_config(cfg, mapper=dict, dataset=dataset)["sampler"]
        return cls(len(dataset), seed=stock._seed)


class DistillationTrainer(DefaultTrainer):
    """
    Trains what a config names, with kd_det's checkpoints, data checks and launchers.

    With one process, SEED >= 0, DATALOADER.NUM_WORKERS 0 and ASPECT_RATIO_GROUPING False, a resumed
    run equals the uninterrupted one.

    Args:
        cfg: full config, from `load_config`.
    """

    def __init__(self, cfg: CfgNode) -> None:
        # Detectron2's own __init__ asserts CUDA for mixed precision and for several processes.
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        self.cfg = cfg
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self._sampler: ResumableSampler | None = None
        loader = self._build_train_loader(cfg, model)
        self._trainer = TrainingLoop(
            distribute(model),
            loader,
            optimizer,
            amp=cfg.SOLVER.AMP.ENABLED,
            clip_norm=clip_norm(cfg),
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = KDCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """
        Build the optimizer that SOLVER.OPTIMIZER names.

        Raises:
            ValueError: the name is neither "SGD" nor "AdamW", or SOLVER.BOTTOM_UP_LR_FACTOR is not
                1 with SGD, or with a model without such a net.
        """
        if clip_norm(cfg) is not None:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False  # the loop does it, over all parameters
        factor = cfg.SOLVER.BOTTOM_UP_LR_FACTOR
        if cfg.SOLVER.OPTIMIZER == "SGD":
            if factor != 1:
                raise ValueError(
                    f"SOLVER.BOTTOM_UP_LR_FACTOR is {factor}, which SGD does not know; set it to "
                    "1, or SOLVER.OPTIMIZER to AdamW."
                )
            return build_optimizer(cfg, model)
        if cfg.SOLVER.OPTIMIZER != "AdamW":
            raise ValueError(
                f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER!r}, expected 'SGD' or 'AdamW'."
            )
        parameters = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        )
        if factor != 1:
            parameters = slow_bottom_up(parameters, model, factor)
        adamw = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
        return adamw(parameters, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)

    def _build_train_loader(self, cfg: CfgNode, model: nn.Module) -> Any:
        if not is_stock(type(self), DefaultTrainer, "build_train_loader"):
            return self.build_train_loader(cfg)
        evaluated = is_stock(type(self), DistillationTrainer, "build_evaluator")
        dataset = checked_training_set(cfg, model, evaluated=evaluated)
        if cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler":
            self._sampler = ResumableSampler.like_stock(cfg, dataset)
        return build_detection_train_loader(
            cfg, mapper=CheckedDatasetMapper(cfg, True), dataset=dataset, sampler=self._sampler
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Build the loader of a test set; an image that cannot be read is named."""
        check_proposals(cfg)
        mapper = CheckedDatasetMapper(cfg, False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Build the evaluator of a dataset; its files go to OUTPUT_DIR/inference."""
        return build_evaluator(cfg, dataset_name, os.path.join(cfg.OUTPUT_DIR, "inference"))

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> Any:
        """Evaluate what ships, in every process; return metrics by task."""
        share_buffers(model)
        return super().test(cfg, model, evaluators)

    def build_hooks(self) -> list[HookBase]:
        """Add the progress and result files to Detectron2's hooks, each at its place in a step."""
        hooks: list[HookBase] = super().build_hooks()
        if comm.is_main_process():
            hooks.append(ProgressFile(self.cfg.OUTPUT_DIR))
            hooks.append(RunResult(self.cfg.OUTPUT_DIR, self.cfg.SEED))
        if comm.get_world_size() > 1:
            period = self.cfg.SOLVER.CHECKPOINT_PERIOD
            hooks.append(GatherProcessStates(self._plain_model(), period))
        hooks.append(StopWhenAsked())
        for hook in hooks:
            if isinstance(hook, EvalHook):
                hook._func = saved_where_it_fails(self, hook._func)
        return sorted(hooks, key=_place)  # hooks of one place keep their order

    def resume_or_load(self, resume: bool = True) -> None:
        """
        Continue the run in OUTPUT_DIR, or start afresh.

        A fresh start loads MODEL.WEIGHTS into the student and then inherits from the teacher; a
        resumed run does neither.

        Args:
            resume: continue from the last checkpoint, if there is one.
        """
        if resume and self.checkpointer.resume():
            self.start_iter = self.iter + 1
            self._skip_seen_data()
            return
        if self.cfg.MODEL.WEIGHTS:
            self.checkpointer.load_student(self.cfg.MODEL.WEIGHTS, strict=False)
        model = self._plain_model()
        if isinstance(model, DistillationDetector):
            model.inherit_from_teacher()

    def train(self) -> dict[str, Any]:
        """Train to the end; return metrics by task of the final evaluation, in the main process."""
        if self.start_iter >= self.max_iter:
            self._save_final()
        super().train()
        return getattr(self, "_last_eval_results", {})

    def _save_final(self) -> None:
        """Write what a run lacks that was stopped after its last step: no step writes it again."""
        name = "model_final"
        if os.path.basename(self.checkpointer.resumed_from) != f"{name}.pth":
            self.checkpointer.save(name, iteration=self.start_iter - 1)

    def _plain_model(self) -> nn.Module:
        model: nn.Module = self._trainer.model
        return getattr(model, "module", model)

    def _skip_seen_data(self) -> None:
        if self._sampler is None:
            _logger.warning(
                "DATALOADER.SAMPLER_TRAIN %s starts over on resume; the run sees the data in "
                "another order than an uninterrupted one.",
                self.cfg.DATALOADER.SAMPLER_TRAIN,
            )
            return
        per_process = self.cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
        self._sampler.skip = self.start_iter * per_process

    def state_dict(self) -> dict[str, Any]:
        """Return iteration, hooks, optimizer, loss scale and random state."""
        return {
            **super().state_dict(),
            "_trainer": self._trainer.state_dict(),
            "random": random_state(),
            **self._gathered(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])
        states = state_dict.get(_PROCESSES, [])
        if len(states) == comm.get_world_size():
            set_process_state(self._plain_model(), states[comm.get_rank()])
        elif comm.is_main_process():
            set_random_state(state_dict["random"])
        elif self.cfg.SEED >= 0:
            _logger.warning(
                "This checkpoint holds no state of process %d of %d (it was written after Ctrl-C, "
                "or by another number of processes): its random numbers start anew.",
                comm.get_rank(),
                comm.get_world_size(),
            )
            seed_all_rng(self.cfg.SEED + comm.get_rank() + self.iter * comm.get_world_size())

    def _gathered(self) -> dict[str, Any]:
        """Return the states of several processes, if they were gathered in this iteration."""
        hooks = (hook for hook in self._hooks if isinstance(hook, GatherProcessStates))
        states = [state for hook in hooks for state in hook.at(self.iter)]
        return {_PROCESSES: states} if states else {}


def _place(hook: HookBase) -> int:
    """Return where a hook stands among those of a step."""
    return next((i for i, kind in enumerate(_LAST_HOOKS, 1) if isinstance(hook, kind)), 0)


def clip_norm(cfg: CfgNode) -> float | None:
    """
    Return the largest norm of all gradients together, None where they are not clipped so.

    SOLVER.CLIP_GRADIENTS.CLIP_TYPE "full_model" is kd_det's; Detectron2's "norm" and "value" clip
    each parameter on its own.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    return float(clip.CLIP_VALUE) if clip.ENABLED and clip.CLIP_TYPE == "full_model" else None
