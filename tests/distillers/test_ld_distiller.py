"""LD on paired predictions; `functional.ld` has tests of its own."""

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from contract import BINS, DistillerContract, Scene

from kd_det.distillers import LD
from kd_det.functional.scores import confidence


class TestLD(DistillerContract):
    name = "LD"
    parts_of_mean = ("main", "vlr")
    # Losses of the size that the contract's thresholds are for.
    options: ClassVar[dict[str, Any]] = {"ld_weight": 10.0, "vlr_weight": 10.0}
    other: ClassVar[dict[str, Any]] = {
        "HEAD": "dense_head",
        "LD_WEIGHT": 0.5,
        "VLR_WEIGHT": 0.125,
        "KD_WEIGHT": 0.0,
        "TAU": 5.0,
        "KD_TAU": 8.0,
        "GAMMA": 0.5,
        "TOPK": 4,
        "KD_SCOPE": "all",
        "MASK_PADDING": False,
    }

    def test_a_batch_is_the_mean_of_its_images(self, scene: Scene) -> None:
        """2 / N: a batch of two has both sums at weight 1, an image alone at weight 2."""
        super().test_a_batch_is_the_mean_of_its_images(scene)

    def test_gradient_reaches_the_student_alone(self, scene: Scene) -> None:
        """Boxes are positive where their size is: the class logits of other levels get none."""
        scene = scene.maps(lambda x: x.clone().requires_grad_())
        self.total(scene).backward()
        for x in scene.student["bins"]:
            assert x.grad is not None and x.grad.any()
        assert any(x.grad is not None and x.grad.any() for x in scene.student["logits"])
        assert all(x.grad is None for x in scene.leaves("teacher"))

    def test_more_padding_changes_nothing_where_padding_is_masked(self, scene: Scene) -> None:
        """A box at the border has a wide ring beyond it."""
        boxes = [torch.tensor([[32.0, 16.0, 64.0, 48.0]]), torch.tensor([[8.0, 2.0, 40.0, 32.0]])]
        scene = dataclasses.replace(scene, boxes=boxes)
        masked, bare = (
            [self.total(x, mask_padding=m, gamma=0.0).item() for x in (scene, scene.padded())]
            for m in (True, False)
        )
        assert masked[0] == pytest.approx(masked[1])
        assert abs(bare[0] - bare[1]) > 1e-4

    def test_no_gradient_on_padding_where_it_is_masked(self, scene: Scene) -> None:
        scene = scene.padded().maps(lambda x: x.clone().requires_grad_(), "student")
        self.total(scene).backward()
        for x, more in zip(scene.student["bins"], (2, 1), strict=True):
            assert x.grad is not None and x.grad.any()
            assert not x.grad[..., -more:, :].any()
            assert not x.grad[..., -more:].any()

    def test_gradcheck(self, scene: Scene) -> None:
        """The scores that weigh the positives give no gradient."""
        self.check_gradient(scene, ("bins",), ("main", "vlr"))
        self.check_gradient(scene, ("logits",), ("kd",))

    def test_regions_stay_on_the_images(self, scene: Scene) -> None:
        step = scene.step()
        pairs = step.predictions["predictions"]
        found = LD().regions(pairs, step.targets.boxes)
        for pair, (main, vlr) in zip(pairs, found, strict=True):
            assert main.shape == vlr.shape == pair.valid().shape
            assert not (main * (1 - pair.valid())).any()
            assert not (vlr * (1 - pair.valid())).any()
        assert sum(main.sum() for main, _ in found) > 0
        assert sum(vlr.sum() for _, vlr in found) > 0

    def test_is_the_loop_over_its_regions(self, scene: Scene) -> None:
        step = scene.step()
        pairs = step.predictions["predictions"]
        expected = {"main": 0.0, "vlr": 0.0}
        for pair, (main, vlr) in zip(pairs, LD().regions(pairs, step.targets.boxes), strict=True):
            own, other = pair.student.distributions, pair.teacher.distributions
            assert own is not None and other is not None
            p, q = (own / 10).softmax(-1), (other / 10).softmax(-1)
            divergence = (q * (q.log() - p.log())).sum((2, 3)) * 100 / BINS
            score = confidence(pair.student.logits)
            expected["main"] += (main * score * divergence).sum().item() / 4
            expected["vlr"] += (vlr * divergence).sum().item() / 16
        found = self.losses(scene)
        for part, value in expected.items():
            assert found[part].item() == pytest.approx(10 * value)


class TestMeanOfAllPositives(TestLD):
    options: ClassVar[dict[str, Any]] = {**TestLD.options, "kd_scope": "all"}


class TestSidesAlone(TestLD):
    options: ClassVar[dict[str, Any]] = {**TestLD.options, "kd_weight": 0.0}
    test_gradient_reaches_the_student_alone = None  # type: ignore[assignment]
    test_finite_and_on_the_graph_without_ground_truth = None  # type: ignore[assignment]
    test_computed_in_float32_under_autocast = None  # type: ignore[assignment]

    def test_gradcheck(self, scene: Scene) -> None:
        self.check_gradient(scene, ("bins",), ("main", "vlr"))

    def test_classes_may_differ(self) -> None:
        assert LD().uses_class_scores
        assert not LD(kd_weight=0.0).uses_class_scores


def test_the_regions_of_one_image_without_boxes_are_empty() -> None:
    from contract import scene_for

    step = scene_for(LD().captures()).empty().step()
    for main, vlr in LD().regions(step.predictions["predictions"], step.targets.boxes):
        assert not torch.cat([main, vlr]).any()
