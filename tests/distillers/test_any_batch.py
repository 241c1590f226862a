"""Every distiller on batches that nobody would think of: finite, with finite gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_runs
import torch
from all_distillers import NAMES, write_student
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kd_det.config import load_config

# Of a setting for Intel GPUs that switching oneDNN off touches too.
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")

quick = settings(max_examples=8, deadline=None, derandomize=True, database=None)
thorough = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], nn.Module]:
    """A GFL with all distillers, whose student sees the image reduced by a factor."""
    folder = tmp_path_factory.mktemp("any_batch")
    made: dict[int, nn.Module] = {}

    def get(factor: int) -> nn.Module:
        if factor not in made:
            cfg = load_config(str(write_student(folder, factor=factor)))
            made[factor] = build_model(cfg).train()
        return made[factor]

    return get


def boxes_of(width: int, height: int, count: int, kind: str, seed: int) -> torch.Tensor:
    """Boxes (count, 4): inside, of no width, on one spot, or far beyond the image."""
    generator = torch.Generator().manual_seed(seed)
    reach = {"beyond": 10.0}.get(kind, 1.0)
    frame = torch.tensor([width, height], dtype=torch.float32) * reach
    low, other = (torch.rand(count, 2, generator=generator) * frame for _ in range(2))
    low, high = torch.minimum(low, other), torch.maximum(low, other)
    if kind == "of no width":
        high[:, 0] = low[:, 0]
    if kind == "on one spot" and count:
        low, high = low[:1].expand(count, 2), low[:1].expand(count, 2)
    return torch.cat([low, high], dim=1)


side = st.one_of(st.integers(1, 700), st.sampled_from([1, 2, 31, 32, 33, 64, 700]))
kinds = st.sampled_from(["inside", "inside", "of no width", "on one spot", "beyond"])
images = st.lists(st.tuples(side, side, st.integers(0, 50), kinds), min_size=1, max_size=4)


def batch_of(drawn: list[tuple[int, int, int, str]], seed: int) -> list[dict[str, Any]]:
    batch = []
    for number, (width, height, count, kind) in enumerate(drawn):
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(boxes_of(width, height, count, kind, seed + number))
        instances.gt_classes = torch.arange(count) % 2
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        name = f"{number}.png"
        batch.append({"image": image, "instances": instances, "file_name": name, "image_id": name})
    return batch


def check(model: nn.Module, batch: list[dict[str, Any]], amp: bool) -> None:
    # oneDNN's bfloat16 weight gradient of a convolution over one pixel reads memory that nobody
    # wrote (torch 2.15): now and then a NaN, with or without distillation.
    with torch.backends.mkldnn.flags(enabled=False):
        check_with(model, batch, amp)


def check_with(model: nn.Module, batch: list[dict[str, Any]], amp: bool) -> None:
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        losses, _ = tiny_runs.losses_at(model, batch, iteration=100)
    distilled = {key for key in losses if key.startswith("loss_kd_")}
    assert len(distilled) >= len(NAMES)
    assert {key: value for key, value in losses.items() if not value.isfinite()} == {}
    torch.stack([value.float() for value in losses.values()]).sum().backward()
    broken = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.isnan().any()]
    assert broken == []


@pytest.mark.parametrize("factor", [1, 2])
def test_any_batch(model: Callable[[int], nn.Module], factor: int) -> None:
    @quick
    @given(images, st.booleans(), st.integers(0, 99))
    def run(drawn: list[tuple[int, int, int, str]], amp: bool, seed: int) -> None:
        check(model(factor), batch_of(drawn, seed), amp)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1, 2])
def test_many_batches(model: Callable[[int], nn.Module], factor: int) -> None:
    @thorough
    @given(images, st.booleans(), st.integers(0, 99))
    def run(drawn: list[tuple[int, int, int, str]], amp: bool, seed: int) -> None:
        check(model(factor), batch_of(drawn, seed), amp)

    run()
