"""The order of the training data is that of whichever Detectron2 is installed."""

import itertools
from typing import Any

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data.build import _train_loader_from_config
from detectron2.data.samplers import TrainingSampler

from kd_det.engine import trainer
from kd_det.engine.trainer import ResumableSampler

DATA = [{"width": 8, "height": 8}] * 10


def order(sampler: TrainingSampler) -> list[int]:
    return list(itertools.islice(iter(sampler), 25))


@pytest.mark.parametrize("seed", [-1, 5])
def test_it_is_the_installed_ones(seed: int) -> None:
    cfg = get_cfg()
    cfg.SEED = seed
    np.random.seed(3)
    stock = _train_loader_from_config(cfg, mapper=dict, dataset=DATA)["sampler"]
    after = np.random.randint(2**31)
    np.random.seed(3)
    ours = ResumableSampler.like_stock(cfg, DATA)
    assert order(ours) == order(stock)
    assert np.random.randint(2**31) == after, "a draw more would change the rest of the run"


def test_it_is_that_of_a_detectron2_that_seeds_with_the_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stock(cfg: Any, *, mapper: Any, dataset: Any) -> dict[str, Any]:
        return {"sampler": TrainingSampler(len(dataset), seed=cfg.SEED)}

    monkeypatch.setattr(trainer, "_train_loader_from_config", stock)
    cfg = get_cfg()
    cfg.SEED = 5
    ours = ResumableSampler.like_stock(cfg, DATA)
    assert order(ours) == order(TrainingSampler(len(DATA), seed=5))
    ours.skip = 7
    assert order(ours)[:18] == order(TrainingSampler(len(DATA), seed=5))[7:]
