"""Automatic weights: the specification's vectors, the course of the calibration, and its edges."""

import json
import logging
import math

import pytest
import torch
from torch import Tensor
from waves import wave

from kd_det.distillation.auto_weight import HIGH, LOW, AutoWeight, default_start
from kd_det.distillation.pull import Pull, Reading, combine, measure_pull

NAN, INF = math.nan, math.inf
# r of two processes, step by step.
RATIOS = [(2.0, 8.0), (6.0, 6.0), (0.0, 9.0), (NAN, NAN), (32.0, 0.5)]
LOGS = [1.386294361, 1.791759469, 2.197224577, None, 1.386294361]
WEIGHTS = [0.125, 0.102062073, 0.083333333, 0.083333333, 0.102062073]
NOTHING = Reading(None, 0.0, 1.0)


def pull(ratio: float, detection: float = 2.0) -> Pull:
    return Pull(torch.tensor(ratio * detection), torch.tensor(detection))


def reading(log_ratio: float | None) -> Reading:
    return Reading(log_ratio, 3.0, 1.5)


def auto(**changes: object) -> AutoWeight:
    options: dict = {"name": "PKD", "captures": ["backbone"], "share": 0.5, "start": 0, "steps": 4}
    return AutoWeight(**{**options, **changes})


def on_two_processes(first: list[Pull], second: list[Pull]) -> tuple[list[Reading], list[Reading]]:
    """Combine on both, each given what the other sends."""
    sent: list[Tensor] = []

    def record(x: Tensor) -> Tensor:
        sent.append(x)
        return x

    combine(first, record)
    combine(second, record)
    total = sent[0] + sent[1]
    return combine(first, lambda _: total), combine(second, lambda _: total)


class TestMeasurement:
    def test_log_ratios_of_two_processes(self) -> None:
        for (a, b), expected in zip(RATIOS, LOGS, strict=True):
            (one,), (other,) = on_two_processes([pull(a)], [pull(b)])
            assert one.log_ratio == other.log_ratio
            assert one.log_ratio == (None if expected is None else pytest.approx(expected))

    def test_one_process_and_many_distillers(self) -> None:
        pulls = [pull(4.0), pull(0.0), pull(0.25), Pull(torch.tensor(1.0), torch.tensor(0.0))]
        found = combine(pulls)
        assert [x.log_ratio for x in found] == [
            pytest.approx(math.log(4)),
            None,
            pytest.approx(-math.log(4)),
            None,
        ]
        assert found[0] == (pytest.approx(math.log(4)), 8.0, 2.0)

    @pytest.mark.parametrize("norms", [(INF, 1.0), (1.0, INF), (INF, INF), (NAN, 1.0)])
    def test_overflow_is_no_measurement(self, norms: tuple[float, float]) -> None:
        bad = Pull(*(torch.tensor(x) for x in norms))
        assert combine([bad])[0].log_ratio is None

    def test_ratio_of_two_quadratic_losses(self) -> None:
        features = wave((2, 3), 1, 0.5, 0).requires_grad_()
        distilled = 0.5 * (features - 0.2).square().sum()
        detection = 0.25 * (features + 0.4).square().sum()
        (found,) = combine([measure_pull("PKD", distilled, detection, [features])])
        assert found.log_ratio is not None
        assert math.exp(found.log_ratio) == pytest.approx(1.011901787, abs=1e-9)
        weight = auto(share=0.3)
        weight.add(found)
        assert weight.weight == pytest.approx(0.296471460, abs=1e-9)

    def test_only_features_that_the_distiller_reaches_count_in_either_norm(self) -> None:
        a, b = torch.tensor([3.0, 4.0], requires_grad=True), torch.ones(2, requires_grad=True)
        frozen = torch.ones(2)
        detection = (a * 2).sum() + (b * 100).sum() + frozen.sum()
        found = measure_pull("PKD", a.square().sum() / 2 + frozen.sum(), detection, [a, b, frozen])
        assert found.distilled.item() == pytest.approx(5)
        assert found.detection.item() == pytest.approx(2 * math.sqrt(2))

    def test_both_graphs_stay(self) -> None:
        a = torch.ones(2, requires_grad=True)
        distilled, detection = a.square().sum(), (3 * a).sum()
        measure_pull("PKD", distilled, detection, [a])
        (distilled + detection).backward()
        assert a.grad is not None and a.grad.tolist() == [5, 5]

    def test_a_loss_that_reaches_nothing_has_no_pull(self) -> None:
        a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        for distilled in (b.sum(), torch.zeros(()), 0 * a.sum()):
            (found,) = combine([measure_pull("PKD", distilled, a.sum(), [a])])
            assert found.log_ratio is None
            assert found.distilled == 0

    def test_small_gradients_of_float16_maps_survive(self) -> None:
        a = torch.ones(4, dtype=torch.float16, requires_grad=True)
        found = measure_pull("PKD", (a.float() * 1e-8).sum(), (a.float() * 1e-6).sum(), [a])
        assert (found.distilled / found.detection).item() == pytest.approx(0.01, rel=0.01)

    def test_frozen_features_are_refused(self) -> None:
        a = torch.ones(2, requires_grad=True)
        with pytest.raises(ValueError, match=r"KD\.PKD\.SHARE.*no gradient.*or set WEIGHT"):
            measure_pull("PKD", a.sum(), a.sum(), [torch.ones(2)])


class TestCourse:
    def test_weight_follows_the_running_median(self) -> None:
        weight = auto()
        assert (weight.weight, weight.phase) == (0.0, "measuring")
        found = []
        for log_ratio in LOGS:
            assert weight.phase == "measuring"
            weight.add(reading(log_ratio))
            found.append(weight.weight)
        assert found == pytest.approx(WEIGHTS, abs=1e-9)
        assert weight.phase == "frozen"

    def test_rests_until_start(self) -> None:
        weight = auto(start=2, steps=1)
        phases = []
        for _ in range(4):
            phases.append(weight.phase)
            if weight.phase == "waiting":
                weight.wait()
            elif weight.phase == "measuring":
                weight.add(reading(0.0))
        assert phases == ["waiting", "waiting", "measuring", "frozen"]
        assert weight.weight == 0.5

    @pytest.mark.parametrize(("max_iter", "start"), [(90000, 500), (50000, 500), (600, 6), (50, 0)])
    def test_start_by_the_length_of_the_run(self, max_iter: int, start: int) -> None:
        assert default_start(max_iter) == start

    @pytest.mark.parametrize(("ratio", "expected"), [(1e-12, HIGH), (1e12, LOW), (1e-300, HIGH)])
    def test_extreme_ratios_are_clamped_with_one_warning(
        self, ratio: float, expected: float, caplog: pytest.LogCaptureFixture
    ) -> None:
        weight = auto(share=1.0)
        for _ in range(2):
            weight.add(reading(math.log(ratio)))
        assert weight.weight == expected
        assert len(caplog.messages) == 1
        assert f"held at {expected:g}" in caplog.text
        assert "norms 3 and 1.5" in caplog.text

    def test_freezing_logs_once(self, caplog: pytest.LogCaptureFixture) -> None:
        weight = auto(steps=2)
        with caplog.at_level(logging.INFO):
            weight.add(reading(1.0))
            assert not caplog.messages
            weight.add(reading(2.0))
        expected = 0.5 * math.exp(-1.5)
        assert caplog.messages == [
            f"KD.PKD: automatic weight {expected:.4g} (log {math.log(expected):.3f}) for a share "
            "of 0.5, from 2 measurements: median of the log ratio at unit weight 1.500, spread "
            "1.000."
        ]

    @pytest.mark.parametrize(("spread", "warns"), [(99.0, False), (101.0, True)])
    def test_a_wide_spread_warns(
        self, spread: float, warns: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        weight = auto(steps=2)
        weight.add(reading(0.0))
        weight.add(reading(math.log(spread)))
        assert ("varied by a factor of" in caplog.text) is warns

    def test_no_gradient_at_all_is_an_error_that_names_what_was_captured(self) -> None:
        weight = auto(start=3, captures=["backbone", "head.cls_score"])
        for _ in range(3):
            weight.wait()
        for _ in range(39):
            weight.add(NOTHING)
        with pytest.raises(
            RuntimeError,
            match=r"KD\.PKD\.SHARE: its loss has no gradient at backbone, head\.cls_score .* any "
            r"of 40 iterations; last norms 0 and 1\. Set WEIGHT instead",
        ):
            weight.add(NOTHING)

    def test_rare_measurements_are_waited_for(self) -> None:
        weight = auto()
        for i in range(200):
            weight.add(reading(0.0) if i in (30, 150) else NOTHING)
        assert (weight.phase, weight.weight) == ("measuring", 0.5)

    def test_a_schedule_that_stops_early_freezes_what_was_measured(self) -> None:
        weight = auto()
        weight.add(reading(math.log(4)))
        weight.stop()
        assert (weight.phase, weight.weight) == ("frozen", pytest.approx(0.125))

    def test_a_schedule_that_stops_before_anything_was_measured_warns_once(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        weight = auto(start=5)
        weight.wait()
        weight.stop()
        weight.stop()
        assert weight.weight == 0
        assert len(caplog.messages) == 1
        assert "KD.PKD: its schedule stopped before" in caplog.text

    @pytest.mark.parametrize("share", [0.0, -1.0, NAN, INF])
    def test_shares_that_are_none(self, share: float) -> None:
        with pytest.raises(ValueError, match=r"KD\.PKD\.SHARE is .*, expected a number above 0"):
            auto(share=share)

    def test_courses_that_are_none(self) -> None:
        for wrong in ({"steps": 0}, {"start": -1}):
            with pytest.raises(ValueError, match="expected at least 0 and 1"):
                auto(**wrong)


class TestState:
    @pytest.mark.parametrize("stop", range(7))
    def test_resuming_anywhere_gives_the_same_weights(self, stop: int) -> None:
        course = [None, 1.0, 0.2, None, 3.0, 0.7, 9.0]

        def go(weight: AutoWeight, steps: list[float | None]) -> list[float]:
            found = []
            for value in steps:
                if weight.phase == "waiting":
                    weight.wait()
                elif weight.phase == "measuring":
                    weight.add(reading(value))
                found.append(weight.weight)
            return found

        expected = go(auto(start=1), course)
        first, second = auto(start=1), auto(start=1)
        found = go(first, course[:stop])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert found + go(second, course[stop:]) == expected
        assert second.phase == "frozen"

    def test_another_share_rescales_exactly(self, caplog: pytest.LogCaptureFixture) -> None:
        first, second = auto(share=0.25), auto(share=1.0)
        for value in (0.3, 1.7, 0.9, 0.4):
            first.add(reading(value))
        with caplog.at_level(logging.INFO):
            second.load_state_dict(first.state_dict())
        assert second.weight == 4 * first.weight
        assert "KD.PKD.SHARE is now 1, it was 0.25" in caplog.text

    def test_the_patience_goes_on(self) -> None:
        first, second = auto(steps=1), auto(steps=1)
        for _ in range(9):
            first.add(NOTHING)
        second.load_state_dict(first.state_dict())
        with pytest.raises(RuntimeError, match="no gradient"):
            second.add(NOTHING)

    def test_fewer_steps_after_resuming_freeze_at_once(self) -> None:
        first, second = auto(), auto(steps=2)
        for value in (0.0, 1.0, 2.0):
            first.add(reading(value))
        second.load_state_dict(first.state_dict())
        assert second.phase == "frozen"
        assert second.weight == first.weight

    def test_the_weight_is_not_in_the_state(self) -> None:
        weight = auto(steps=1)
        weight.add(reading(1.0))
        assert weight.state_dict() == {"share": 0.5, "seen": 1, "measured": [1.0], "median": 1.0}
