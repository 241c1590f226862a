"""PKD on paired levels; `functional.pkd` has tests of its own."""

from typing import Any, ClassVar

import pytest
import torch
from contract import DistillerContract, Scene
from waves import SIZES, standard_pair, wave

from kd_det.distillers import PKD, Pair, Step, Targets
from kd_det.functional.pkd import pearson_distance

SHORT = wave((2, 3, 2, 3), 1, 0.1, 0), wave((2, 3, 2, 3), 1.2, 0.17, 0.3)


class TestPKD(DistillerContract):
    name = "PKD"
    # One batch has one mean and deviation.
    parts_of_mean = ()
    other: ClassVar[dict[str, Any]] = {
        "LEVELS": 0,
        "SCOPE": "image",
        "MASK_PADDING": True,
        "STUDENT_CAPTURE": "backbone@0",
        "TEACHER_CAPTURE": "neck",
        "ADAPTER": "never",
    }

    def test_is_the_sum_over_levels_of_the_functional_form(self, scene: Scene) -> None:
        pairs = scene.step().pairs["features"]
        scope = self.build().scope
        expected = sum(pearson_distance(p.student, p.teacher, scope=scope) for p in pairs)
        torch.testing.assert_close(self.losses(scene), {"": expected})


class TestScopeImage(TestPKD):
    options: ClassVar[dict[str, Any]] = {"scope": "image"}
    # All cells count equally, and both images have as many.
    parts_of_mean = ("",)


def step(*maps: tuple[torch.Tensor, torch.Tensor]) -> Step:
    sizes = torch.tensor(SIZES, dtype=torch.float32)
    pairs = [Pair("p3~p3", 8.0, s, t, sizes) for s, t in maps]
    return Step({"features": pairs}, {}, Targets([], [], list(SIZES), []))


@pytest.mark.parametrize(
    ("options", "maps", "expected"),
    [
        ({}, [standard_pair()], 0.902945285),
        ({"scope": "image"}, [standard_pair()], 1.055871721),
        ({"mask_padding": True}, [standard_pair()], 1.171052043),
        ({"mask_padding": True, "scope": "image"}, [standard_pair()], 1.447848295),
        ({}, [standard_pair(), SHORT], 1.681771640),
    ],
)
def test_vectors(options: dict[str, Any], maps: Any, expected: float) -> None:
    assert PKD(**options)(step(*maps))[""].item() == pytest.approx(expected, abs=1e-9)


def test_the_finest_levels_of_both() -> None:
    (spec,) = PKD(levels=3).captures()
    assert spec.levels == 3
    with pytest.raises(ValueError, match=r"KD.PKD.LEVELS is -1, expected a number from 0 on"):
        PKD(levels=-1)
    with pytest.raises(ValueError, match=r"KD.PKD.SCOPE is 'level', expected 'batch' or 'image'"):
        PKD(scope="level")  # type: ignore[arg-type]
