"""MGD on paired levels; `functional.mgd` has tests of its own."""

import copy
from typing import Any, ClassVar

import pytest
import torch
from contract import DistillerContract, Scene
from waves import wave

from kd_det.distillers import MGD, Distiller, LevelShape, Pair, Step, Targets
from kd_det.functional.mgd import draw_masks, mask_seed

S, T = wave((2, 2, 3, 4), 1, 0.4, 0.1), wave((2, 2, 3, 4), 1.5, 0.55, 0.7)


class TestMGD(DistillerContract):
    name = "MGD"
    # G is no identity.
    zero_at_equality = False
    # Without masks, which depend on the shape of the batch.
    options: ClassVar[dict[str, Any]] = {"masked_ratio": 0.0}
    other: ClassVar[dict[str, Any]] = {
        "LEVELS": 3,
        "MASKED_RATIO": 0.45,
        "MASK_PADDING": True,
        "STUDENT_CAPTURE": "backbone@0",
        "TEACHER_CAPTURE": "neck",
        "ADAPTER": "never",
    }

    def build(self, **options: Any) -> Distiller:
        return super().build(**options).eval()  # in which its stream stands still


class TestMasked(TestMGD):
    options: ClassVar[dict[str, Any]] = {}
    parts_of_mean = ()
    test_more_padding_changes_nothing_where_padding_is_masked = None  # type: ignore[assignment]

    def test_every_step_and_every_process_has_its_own_masks(self, scene: Scene) -> None:
        step = scene.step()
        distiller = self.build().train()
        first, second = (distiller(step)[""].item() for _ in range(2))
        assert first != second
        again = self.build().train()
        assert again(step)[""].item() == first
        step.rank = 1
        assert self.build().train()(step)[""].item() not in (first, second)

    def test_goes_on_where_it_was(self, scene: Scene) -> None:
        step = scene.step()
        distiller = self.build().train()
        distiller(step)
        state = copy.deepcopy(distiller.state_dict())
        second = distiller(step)[""].item()
        other = self.build().train()
        for _ in range(3):
            other(step)
        other.load_state_dict(state)
        assert other(step)[""].item() == second

    def test_processes_agree_on_one_base(self, scene: Scene) -> None:
        step = scene.step()
        distiller = self.build()
        step.mean = lambda values: (values + 11) / 2  # with a process that drew 11
        drawn = int(distiller.state_dict()["base"])
        distiller(step)
        assert int(distiller.state_dict()["base"]) == round((drawn + 11) / 2)

    def test_the_global_stream_stays(self, scene: Scene) -> None:
        distiller = self.build().train()
        before = torch.get_rng_state()
        distiller(scene.step())
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("ratio", "expected"), [(0.0, 32.276085724), (1.0, 27.446233293)])
def test_vectors(ratio: float, expected: float) -> None:
    """All cells kept, and none: then the blocks' biases alone speak."""
    distiller = MGD(masked_ratio=ratio)
    distiller.build({"features": [LevelShape("p3~p3", 8.0, 2)]}, {})
    distiller.double()
    values = [
        wave((2, 2, 3, 3), 0.3, 0.7, 0.1),
        torch.tensor([0.05, -0.05]).double(),
        wave((2, 2, 3, 3), 0.3, 0.9, 0.2),
        torch.tensor([0.02, 0.03]).double(),
    ]
    with torch.no_grad():
        for parameter, value in zip(distiller.blocks[0].parameters(), values, strict=True):
            parameter.copy_(value)
    sizes = torch.tensor([[24.0, 32.0], [24.0, 32.0]])
    step = Step({"features": [Pair("p3~p3", 8.0, S, T, sizes)]}, {}, Targets([], [], [], []))
    # The base stays a number, whatever the type of the weights.
    assert distiller.base.dtype == torch.int64
    assert distiller(step)[""].item() == pytest.approx(expected, abs=5e-7)


def test_masks_are_those_of_base_rank_and_step() -> None:
    assert mask_seed(7, rank=2, step=5) == 7 + 2 * 1000003 + 5
    (a,), (b,) = (draw_masks([(2, 6, 8)], 0.65, seed=seed) for seed in (7, 8))
    assert not torch.equal(a, b)
