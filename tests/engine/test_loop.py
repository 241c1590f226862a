"""One optimisation step: mixed precision, and broken losses."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_runs
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from tiny_runs import TinyTeacher
from torch import nn

from kd_det.engine.loop import TrainingLoop

Student = Callable[..., CfgNode]
MakeTeacher = Callable[[str], TinyTeacher]

pytestmark = pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy:UserWarning")


class Model(nn.Module):
    """Loss (w - x)^2, or what the batch says."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        loss = (self.w - batch[0]["x"]).square()
        return {"loss_a": loss, "loss_b": self.w * batch[0].get("factor", 0.0)}


def step(*batches: list[dict[str, Any]], iteration: int = 0) -> Model:
    model = Model()
    loop = TrainingLoop(model, list(batches), torch.optim.SGD(model.parameters(), lr=0.1))
    with EventStorage(iteration):
        for loop.iter in range(iteration, iteration + len(batches)):
            loop.run_step()
    return model


def test_takes_the_gradient_step() -> None:
    """w = 1 - 0.1 * 2 * (1 - 3) = 1.4, then 1.4 - 0.1 * 2 * (1.4 - 3) = 1.72."""
    assert step([{"x": 3.0}]).w.item() == pytest.approx(1.4)
    assert step([{"x": 3.0}], [{"x": 3.0}]).w.item() == pytest.approx(1.72)


def test_clips_the_norm_of_all_gradients_together() -> None:
    """The gradient 2 * (1 - 3) = -4 is cut to -1: w = 1 + 0.1."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loop = TrainingLoop(model, [[{"x": 3.0}]], optimizer, clip_norm=1.0)
    with EventStorage(0):
        loop.run_step()
    assert model.w.item() == pytest.approx(1.1)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_loss_names_loss_iteration_and_images(factor: float) -> None:
    broken = [
        {"x": 3.0, "factor": factor, "image_id": 41},
        {"image_id": 7},
        {"file_name": "a.png"},
    ]
    with pytest.raises(FloatingPointError) as error:
        step([{"x": 3.0}], broken, iteration=12)
    message = str(error.value)
    assert message.startswith("Not finite at iteration 13: {'loss_b':")
    assert "[41, 7, 'a.png']" in message
    assert "SOLVER.BASE_LR" in message
    assert "'loss_a': 2.56" in message.replace("2.559", "2.56")


class TestAssertions:
    """What a model finds wrong in the middle of a step, as Detectron2's do when they diverge."""

    def fail(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        original = Model.forward

        def forward(self: Model, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            if "fail" in batch[0]:
                raise error
            return original(self, batch)

        monkeypatch.setattr(Model, "forward", forward)

    @pytest.mark.parametrize("kind", [AssertionError, FloatingPointError])
    def test_are_raised_again_with_iteration_losses_and_images(
        self, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
    ) -> None:
        self.fail(monkeypatch, kind("bad box: x1 larger than x2"))
        batch = [{"fail": True, "image_id": 41}, {"file_name": "a.png"}]
        with pytest.raises(FloatingPointError) as error:
            step([{"x": 3.0}], batch, iteration=12)
        message = str(error.value)
        assert "at iteration 13 (" in message
        assert f"({kind.__name__}: bad box: x1 larger than x2)" in message
        assert "Images of the batch: [41, 'a.png']" in message
        assert "Losses of the step before: {'loss_a': 4.0, 'loss_b': 0.0}" in message
        assert "SOLVER.BASE_LR" in message
        assert isinstance(error.value.__cause__, kind)

    def test_in_the_first_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fail(monkeypatch, AssertionError())
        with pytest.raises(FloatingPointError, match=r"at iteration 0 .*\[5\]. First step"):
            step([{"fail": True, "image_id": 5}])

    @pytest.mark.parametrize("kind", [RuntimeError, ValueError])
    def test_other_complaints_get_iteration_and_images(
        self, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
    ) -> None:
        self.fail(monkeypatch, kind("Expected more than 1 value per channel"))
        message = r"^Expected more .* channel \(iteration 0, images of the batch: \['a.png'\]\)$"
        with pytest.raises(kind, match=message):
            step([{"fail": True, "file_name": "a.png"}])

    def test_kinds_of_errors_are_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fail(monkeypatch, torch.cuda.OutOfMemoryError("memory"))
        with pytest.raises(torch.cuda.OutOfMemoryError, match=r"^memory$"):
            step([{"fail": True}])

    def test_other_errors_stay_as_they_are(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fail(monkeypatch, KeyError("a"))
        with pytest.raises(KeyError, match="'a'"):
            step([{"fail": True}])

    def test_a_diverged_detector(self, tiny_student: Student) -> None:
        """FCOS asserts that its boxes are boxes; weights of NaN give none."""
        trainer = tiny_runs.DistillationTrainer(tiny_student("fcos"))
        with torch.no_grad():
            trainer.model.student.head.bbox_pred.weight.fill_(float("nan"))
        with pytest.raises(
            FloatingPointError, match=r"iteration 0 \(AssertionError: bad box.*batch: \[\d"
        ):
            trainer.train()


def test_a_non_finite_loss_never_reaches_the_weights() -> None:
    model = Model()
    batch = [{"x": 3.0, "factor": float("nan")}]
    loop = TrainingLoop(model, [batch], torch.optim.SGD(model.parameters(), lr=0.1))
    with EventStorage(), pytest.raises(FloatingPointError):
        loop.run_step()
    assert model.w.item() == 1


def test_evaluation_mode_is_refused() -> None:
    model = Model()
    loop = TrainingLoop(model, [[{"x": 1.0}]], torch.optim.SGD(model.parameters(), lr=0.1))
    model.eval()
    with pytest.raises(RuntimeError, match="switched to evaluation mode"):
        loop.run_step()


@pytest.mark.parametrize("detector", ["fcos", "retinanet", "faster_rcnn", "keypoint_rcnn"])
def test_mixed_precision(tiny_student: Student, tiny_teacher: MakeTeacher, detector: str) -> None:
    """bfloat16 on the CPU: activations are half, weights and the distiller's loss are not."""
    cfg = tiny_student(detector, tiny_teacher("fcos"), {"SOLVER.AMP.ENABLED": True})
    trainer = tiny_runs.DistillationTrainer(cfg)
    seen: set[torch.dtype] = set()
    trainer.model.student.backbone.register_forward_hook(
        lambda m, a, out: seen.update(x.dtype for x in out.values())
    )
    losses: set[torch.dtype] = set()
    trainer.model.register_forward_hook(
        lambda m, a, out: losses.add(out["loss_kd_feature_lp"].dtype)
    )
    recorder = tiny_runs.Recorder()
    trainer.register_hooks([recorder])
    trainer.train()
    assert seen == {torch.bfloat16}
    assert losses == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert all(0 < x["loss_kd_feature_lp"] < float("inf") for x in recorder.steps)
