"""
What the engine reads of a LazyConfig: the fields of Detectron2's tools/lazyconfig_train_net.py.

Used are `model`, `optimizer`, `lr_multiplier`, `dataloader.{train,test,evaluator}` and of `train`:
output_dir, init_checkpoint, max_iter, amp.enabled, checkpointer, eval_period, log_period, device,
seed and cudnn_benchmark.
"""

from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg

from kd_det.config import add_kd_config

_NEEDED = ("model", "optimizer", "lr_multiplier", "dataloader", "train")


def settings_of(lazy: Any, config_file: str) -> CfgNode:
    """
    Return what the engine reads of a LazyConfig, under the keys of a yaml config.

    Raises:
        ValueError: a field that Detectron2's LazyConfigs have is missing.
    """
    missing = [key for key in _NEEDED if key not in lazy]
    if missing:
        raise ValueError(
            f"{config_file} has no {', '.join(missing)}; expected the fields of Detectron2's "
            f"LazyConfigs: {', '.join(_NEEDED)}."
        )
    train = lazy.train
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.OUTPUT_DIR = train.get("output_dir", cfg.OUTPUT_DIR)
    cfg.SEED = train.get("seed", -1)
    cfg.CUDNN_BENCHMARK = train.get("cudnn_benchmark", False)
    cfg.MODEL.WEIGHTS = train.get("init_checkpoint", "")
    device = train.get("device", "cuda")
    cfg.MODEL.DEVICE = device if torch.cuda.is_available() else "cpu"
    cfg.SOLVER.MAX_ITER = train.max_iter
    cfg.SOLVER.AMP.ENABLED = bool(train.get("amp", {}).get("enabled", False))
    cfg.SOLVER.CHECKPOINT_PERIOD = train.get("checkpointer", {}).get("period", 5000)
    cfg.SOLVER.IMS_PER_BATCH = lazy.dataloader.train.get("total_batch_size", 0)
    cfg.TEST.EVAL_PERIOD = train.get("eval_period", 0)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()  # the loaders name theirs
    cfg.DATALOADER.SAMPLER_TRAIN = "of the LazyConfig"
    return cfg
