"""Weights that set themselves: calibration, course, freezing, several processes, resume."""

import logging
import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tiny_runs import TinyTeacher
from waves import wave

from kd_det import distill
from kd_det.config import load_config
from kd_det.distillation import active, gradient_share
from kd_det.distillation.auto_weight import AutoWeight
from kd_det.distillation.gradient_share import Pull, pull
from kd_det.distillers import MGD, PKD, SSIM

Student = Callable[..., CfgNode]
MakeTeacher = Callable[[str], TinyTeacher]


def ratio(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _process(rank: int, folder: str) -> None:
    """Measure the first vector as one of two gloo processes."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    auto = AutoWeight("x", 0.5, steps=99)
    weights = []
    for step in [(2, 8), (6, 6), (0, 9), (math.nan, math.nan), (32, 0.5)]:
        auto.measure(ratio(step[rank]))
        weights.append(auto.weight)
    torch.save(weights, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


class TestVectors:
    """Numbers of the specification."""

    def test_two_processes(self) -> None:
        """A step counts with the mean of the logs of those processes that measured one."""
        steps = [(2, 8), (6, 6), (0, 9), (math.nan, math.nan), (32, 0.5)]
        other: list[float] = []

        def add_the_other(values: torch.Tensor) -> torch.Tensor:
            log = ratio(other[-1]).log()
            finite = log.isfinite()
            mine = torch.stack([log.where(finite, torch.zeros_like(log)), finite.double()])
            return values + mine

        auto = AutoWeight("x", 0.5, steps=99, reduce=add_the_other)
        weights = []
        for first, second in steps:
            other.append(second)
            auto.measure(ratio(first))
            weights.append(auto.weight)
        logs = auto.state_dict()["logs"]
        assert logs == pytest.approx([1.386294361, 1.791759469, 2.197224577, 1.386294361])
        assert weights[:3] == pytest.approx([0.125, 0.102062073, 0.083333333])
        assert weights[4] == pytest.approx(0.102062073)

    def test_two_real_processes(self, tmp_path: Path) -> None:
        # By fork: a fresh interpreter would have to find this test's module by its name.
        workers = [
            multiprocessing.get_context("fork").Process(target=_process, args=(rank, str(tmp_path)))
            for rank in range(2)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
        assert found[0] == found[1]  # bit for bit
        assert found[0] == pytest.approx(
            [0.125, 0.102062073, 0.083333333, 0.083333333, 0.102062073]
        )

    @pytest.mark.parametrize(("value", "weight"), [(1e-12, 1e6), (1e12, 1e-9)])
    def test_clamped(self, value: float, weight: float, caplog: pytest.LogCaptureFixture) -> None:
        auto = AutoWeight("x", 1.0)
        auto.measure(ratio(value), {"its": ratio(value * 4), "the other's": ratio(4.0)})
        with caplog.at_level(logging.WARNING):
            assert (auto.weight, auto.weight) == (weight, weight)
        (message,) = (r.getMessage() for r in caplog.records)
        assert message.startswith("x: a share of 1 would need the weight")
        assert f"gradient {value * 4:.3g}, the other's gradient 4)" in message

    def test_ratio_of_two_losses(self) -> None:
        feature = wave((2, 3), 1, 0.5, 0).requires_grad_()
        distilled = 0.5 * (feature - 0.2).square().sum()
        detection = 0.25 * (feature + 0.4).square().sum()
        found = pull(distilled, detection, [feature])
        assert found.ratio.item() == pytest.approx(1.011901787, rel=1e-6)
        auto = AutoWeight("x", 0.3)
        auto.measure(found.ratio)
        assert auto.weight == pytest.approx(0.296471460, rel=1e-6)


class TestCourse:
    def test_rests_then_measures_then_freezes(self) -> None:
        auto = AutoWeight("x", 1.0, start=2, steps=3)
        assert [auto.rests() for _ in range(4)] == [True, True, False, False]
        for value in (1.0, 4.0, 2.0):
            assert auto.calibrating
            auto.measure(ratio(value))
        assert not auto.calibrating
        assert auto.weight == pytest.approx(0.5)

    def test_once_measured_it_does_not_rest_again(self) -> None:
        """A run of 1,000 iterations rests for 10, the same one made longer for 500."""
        short, long = AutoWeight("x", 1.0, start=1, steps=2), AutoWeight("x", 1.0, start=9, steps=2)
        assert short.rests() and not short.rests()
        for value, calibrating in ((2.0, True), (2.0, False)):
            short.measure(ratio(value))
            long.load_state_dict(short.state_dict())
            assert long.calibrating == calibrating
            assert not long.rests() and long.weight == pytest.approx(0.5)

    def test_steps_without_a_gradient_do_not_count(self) -> None:
        auto = AutoWeight("x", 1.0, steps=2)
        for value in (0.0, math.nan, math.inf, 2.0, 0.0):
            auto.measure(ratio(value))
        assert auto.calibrating and auto.weight == pytest.approx(0.5)
        auto.measure(ratio(8.0))
        assert not auto.calibrating and auto.weight == pytest.approx(0.25)

    def test_a_step_whose_float16_gradients_overflow_does_not_count(self) -> None:
        """As with mixed precision: 100 times 1024 is more than float16 holds."""
        feature = torch.ones(1, dtype=torch.float16, requires_grad=True)
        auto = AutoWeight("x", 1.0, steps=1)
        auto.measure(pull((feature.float() * 100).sum(), feature.float().sum(), [feature]).ratio)
        assert auto.calibrating and auto.weight == 0
        auto.measure(pull((feature.float() * 4).sum(), feature.float().sum(), [feature]).ratio)
        assert not auto.calibrating and auto.weight == pytest.approx(0.25)

    def test_never_a_gradient_is_an_error_that_says_where(self) -> None:
        auto = AutoWeight("SSIM", 1.0, captured="backbone", steps=2)
        for _ in range(19):
            auto.measure(ratio(0.0))
        assert auto.weight == 0
        message = r"SSIM: its loss has had no gradient at backbone in 20 steps.*set its WEIGHT"
        with pytest.raises(ValueError, match=message):
            auto.measure(ratio(0.0))

    def test_stopped_early_is_frozen_by_what_there_is(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        auto = AutoWeight("x", 1.0)
        auto.freeze()
        assert auto.calibrating and "was never active" in caplog.text
        auto.measure(ratio(4.0))
        auto.freeze()
        assert not auto.calibrating and auto.weight == pytest.approx(0.25)

    def test_a_wide_spread_is_warned_about(self, caplog: pytest.LogCaptureFixture) -> None:
        auto = AutoWeight("x", 1.0, steps=2)
        auto.measure(ratio(0.01))
        auto.measure(ratio(2.0))
        assert "up to 200 times apart" in caplog.text

    @pytest.mark.parametrize("share", [0.0, -1.0, math.nan, math.inf])
    def test_share_out_of_range(self, share: float) -> None:
        with pytest.raises(ValueError, match="SHARE must be finite and > 0"):
            AutoWeight("x", share)


def test_resume_in_the_middle_equals_the_uninterrupted_one() -> None:
    values = [3.0, 0.0, 5.0, 0.2, 7.0, 1.0]
    whole = AutoWeight("x", 0.7, start=1, steps=4)
    weights = []
    for i in range(7):
        if not whole.rests() and i <= 6:
            whole.measure(ratio(values[i - 1]))
        weights.append(whole.weight)

    first, second = (AutoWeight("x", 0.7, start=1, steps=4) for _ in range(2))
    resumed = []
    for i in range(7):
        auto = first if i < 3 else second
        if i == 3:
            second.load_state_dict(first.state_dict())
        if not auto.rests():
            auto.measure(ratio(values[i - 1]))
        resumed.append(auto.weight)
    assert resumed == weights
    assert not second.calibrating


def test_another_share_after_resume_rescales_exactly(caplog: pytest.LogCaptureFixture) -> None:
    auto = AutoWeight("x", 1.0, steps=1)
    auto.measure(ratio(3.0))
    other = AutoWeight("x", 2.0, steps=1)
    with caplog.at_level(logging.INFO):
        other.load_state_dict(auto.state_dict())
    assert other.weight == 2 * auto.weight
    assert "SHARE was 1 and is 2 now" in caplog.text


@pytest.mark.parametrize(
    ("share", "told"), [(0.001, "sleep"), (0.01, ""), (3.0, ""), (100.0, "command")]
)
def test_an_unusual_share_is_told_at_the_start(
    share: float,
    told: str,
    tiny_student: Student,
    tiny_teacher: MakeTeacher,
    caplog: pytest.LogCaptureFixture,
) -> None:
    keys = {"KD.FEATURE_LP.WEIGHT": None, "KD.FEATURE_LP.SHARE": share}
    build_model(tiny_student("fcos", tiny_teacher("fcos"), keys))
    warned = [r.getMessage() for r in caplog.records if "is usual" in r.getMessage()]
    assert len(warned) == bool(told) and all(f"lets it {told}" in text for text in warned)


class TestInARun:
    def keys(self, **more: Any) -> dict[str, Any]:
        return {"KD.FEATURE_LP.WEIGHT": None, "SOLVER.MAX_ITER": 5, **more}

    def test_the_share_is_reached_at_once(
        self,
        tiny_student: Student,
        tiny_teacher: MakeTeacher,
        tiny_records: list[dict[str, Any]],
    ) -> None:
        keys = self.keys(**{"KD.FEATURE_LP.SHARE": 0.4, "KD.GRAD_SHARE_PERIOD": 1})
        cfg = tiny_student("fcos", tiny_teacher("fcos"), keys)
        model = build_model(cfg)
        _, storage = tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records), 0)
        assert storage.history("kd/feature_lp/grad_share").latest() == pytest.approx(0.4, rel=1e-4)
        assert -1 <= storage.history("kd/feature_lp/cosine").latest() <= 1

    def test_measures_nothing_once_the_weight_is_set(
        self,
        tiny_student: Student,
        tiny_teacher: MakeTeacher,
        tiny_records: list[dict[str, Any]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Calibration is 3 steps long here, and the first 2 are logged."""
        cfg = tiny_student("fcos", tiny_teacher("fcos"), self.keys(**{"KD.GRAD_SHARE_PERIOD": 200}))
        model = build_model(cfg)
        model.active["FeatureLp"].auto.steps = 3
        monkeypatch.setattr(gradient_share, "FIRST", 2)
        pulls: list[Pull] = []

        def measured(*inputs: Any) -> Pull:
            pulls.append(pull(*inputs))
            return pulls[-1]

        monkeypatch.setattr(active, "pull", measured)
        batch = tiny_runs.batch_of(cfg, tiny_records)
        found = []
        for iteration in range(1, 7):
            _, storage = tiny_runs.losses_at(model, batch, iteration)
            found.append((len(pulls), "kd/feature_lp/grad_share" in storage.histories()))
        assert found == [(1, True), (2, True), (3, False), (3, False), (3, False), (3, False)]

    def test_killed_in_calibration_it_goes_on_as_if_nothing_were(
        self, tiny_student: Student, tiny_teacher: MakeTeacher, tmp_path: Path
    ) -> None:
        keys = {
            "KD.DISTILLERS": ["FeatureLp", "SSIM"],
            "SOLVER.CHECKPOINT_PERIOD": 1,
            "INPUT.RANDOM_FLIP": "none",
        }
        runs = []
        for name in ("whole", "killed"):
            folder = {"OUTPUT_DIR": str(tmp_path / name)}
            cfg = tiny_student("fcos", tiny_teacher("fcos"), self.keys(**keys, **folder), name)
            runs.append(cfg)
        whole, recorder = tiny_runs.train(runs[0])
        tiny_runs.train(runs[1], until=3)
        killed, rest = tiny_runs.train(runs[1], resume=True)
        assert [len(recorder.steps), len(rest.steps)] == [5, 2]
        for key in ("kd/feature_lp/weight", "kd/ssim/weight"):
            weights = [step[key] for step in recorder.steps]
            assert all(w > 0 for w in weights)
            assert [step[key] for step in rest.steps] == weights[3:]
        states = [t._trainer.model.state_dict() for t in (whole, killed)]
        assert tiny_runs.equal_states(*states)
        saved = torch.load(tmp_path / "killed" / "model_final.pth")["kd"]["auto_weights"]
        assert {name: len(state["logs"]) for name, state in saved.items()} == {
            "FeatureLp": 5,
            "SSIM": 5,
        }

    @pytest.mark.parametrize(
        "course",
        [{"STOP_AT": 4}, {"STEPS": [0], "FACTORS": [0.0]}, {"STEPS": [0, 497], "FACTORS": [0, 1]}],
    )
    def test_a_course_without_time_to_measure_is_refused(
        self, tiny_student: Student, tiny_teacher: MakeTeacher, course: dict[str, Any]
    ) -> None:
        """Of 500 iterations the first five active ones rest."""
        keys = {f"KD.FEATURE_LP.SCHEDULE.{key}": value for key, value in course.items()}
        keys = self.keys(**keys, **{"SOLVER.MAX_ITER": 500})
        message = r"measured after 5 active iterations, and KD.FEATURE_LP.SCHEDULE .* no more"
        with pytest.raises(ValueError, match=message):
            build_model(tiny_student("fcos", tiny_teacher("fcos"), keys))

    def test_it_is_frozen_where_the_distiller_stops(
        self, tiny_student: Student, tiny_teacher: MakeTeacher
    ) -> None:
        keys = self.keys(**{"KD.FEATURE_LP.SCHEDULE.STOP_AT": 2})
        trainer, recorder = tiny_runs.train(tiny_student("fcos", tiny_teacher("fcos"), keys))
        auto = trainer._trainer.model.active["FeatureLp"].auto
        assert not auto.calibrating and len(auto.state_dict()["logs"]) == 2
        assert ["loss_kd_feature_lp" in step for step in recorder.steps] == [True] * 2 + [False] * 3

    def test_the_order_of_distillers_is_no_matter(
        self,
        tiny_student: Student,
        tiny_teacher: MakeTeacher,
        tiny_records: list[dict[str, Any]],
    ) -> None:
        """Each is measured against the detection losses alone."""
        found = []
        for names in (["FeatureLp", "SSIM"], ["SSIM", "FeatureLp"], ["SSIM"]):
            keys = {"KD.DISTILLERS": names, "KD.FEATURE_LP.ADAPTER": "never"}
            wide = {"MODEL.FPN.OUT_CHANNELS": 48, "KD.SSIM.ADAPTER": "never"}
            cfg = tiny_student("fcos", tiny_teacher("fcos"), self.keys(**keys, **wide), names[0])
            torch.manual_seed(1)
            model = build_model(cfg)
            _, storage = tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records), 0)
            found.append(
                {
                    name: storage.history(f"kd/{name}/weight").latest()
                    for name in (x.lower().replace("lp", "_lp") for x in names)
                }
            )
        assert found[0] == found[1]
        assert found[2]["ssim"] == found[0]["ssim"]

    def test_a_start_from_a_checkpoint_measures_anew(
        self, tiny_student: Student, tiny_teacher: MakeTeacher, tmp_path: Path
    ) -> None:
        tiny_runs.train(tiny_student("fcos", tiny_teacher("fcos"), self.keys(), "first"))
        (first,) = tmp_path.rglob("first/model_final.pth")
        keys = self.keys(**{"MODEL.WEIGHTS": str(first)})
        trainer, _ = tiny_runs.train(
            tiny_student("fcos", tiny_teacher("fcos"), keys, "second"), until=1
        )
        auto = trainer._trainer.model.active["FeatureLp"].auto
        assert len(auto.state_dict()["logs"]) == 1

    def test_says_which_weights_are_in_force(
        self,
        tiny_student: Student,
        tiny_teacher: MakeTeacher,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        keys = self.keys(**{"KD.DISTILLERS": ["FeatureLp", "SSIM"], "KD.SSIM.WEIGHT": 4.0})
        with caplog.at_level(logging.INFO):
            build_model(tiny_student("fcos", tiny_teacher("fcos"), keys))
        told = [r.getMessage() for r in caplog.records]
        assert "FeatureLp: its weight sets itself, by a SHARE of 0.3." in told
        assert "SSIM: weight 4, as given." in told

    def test_a_step_warns_at_once_of_a_weight_that_commands(
        self,
        tiny_student: Student,
        tiny_teacher: MakeTeacher,
        tiny_records: list[dict[str, Any]],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        keys = {"KD.FEATURE_LP.WEIGHT": 1e4, "KD.GRAD_SHARE_PERIOD": 200}
        cfg = tiny_student("fcos", tiny_teacher("fcos"), keys)
        model = build_model(cfg)
        tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records), 1)
        assert "feature_lp: the gradient of its loss" in caplog.text
        assert "lower its WEIGHT, or remove it" in caplog.text

    def test_a_weight_and_a_share_are_refused(
        self, tiny_student: Student, tiny_teacher: MakeTeacher
    ) -> None:
        keys = {"KD.FEATURE_LP.WEIGHT": 2.0, "KD.FEATURE_LP.SHARE": 0.5}
        message = r"KD.FEATURE_LP.WEIGHT is 2.0 and KD.FEATURE_LP.SHARE 0.5"
        with pytest.raises(ValueError, match=message):
            build_model(tiny_student("fcos", tiny_teacher("fcos"), keys))

    def test_a_share_of_its_own_follows_how_the_student_starts(
        self, tiny_student: Student, tiny_teacher: MakeTeacher
    ) -> None:
        """SSIM leads where features are still to be learnt; a given SHARE always holds."""
        keys = {**self.keys(), "KD.DISTILLERS": ["SSIM", "FeatureLp"]}
        keys["KD.FEATURE_LP.SHARE"] = None
        found = []
        for more in ({}, {"MODEL.WEIGHTS": "any.pth"}, {"KD.SSIM.SHARE": 0.7}):
            model = build_model(
                tiny_student("fcos", tiny_teacher("fcos"), {**keys, **more}, name=str(len(found)))
            )
            found.append({name: active.auto.share for name, active in model.active.items()})
        assert found == [
            {"SSIM": 3.0, "FeatureLp": 0.3},
            {"SSIM": 0.3, "FeatureLp": 0.3},
            {"SSIM": 0.7, "FeatureLp": 0.3},
        ]

    def test_a_teacher_with_the_students_net_leads_harder(
        self, tiny_student: Student, tmp_path: Path
    ) -> None:
        config = tiny_runs.write_config(tmp_path / "kin.yaml", "fcos", {"MODEL.FCOS.NUM_CONVS": 3})
        weights = tiny_runs.save_random_weights(load_config(str(config)), tmp_path / "kin.pth")
        keys = {**self.keys(), "KD.DISTILLERS": ["SSIM", "PKD", "MGD"], "MODEL.WEIGHTS": "any.pth"}
        model = build_model(tiny_student("fcos", TinyTeacher(config, weights), keys))
        found = {name: active.auto.share for name, active in model.active.items()}
        assert found == {"SSIM": 3.0, "PKD": 3.0, "MGD": 0.3}
        again = distill(model.student, model.teacher, [SSIM(), PKD(), MGD()], max_iter=9)
        assert {name: x.auto.share for name, x in again.active.items()} == found

    @pytest.mark.parametrize("weight", [None, 2.0])
    def test_what_cannot_be_moved_is_refused_at_the_first_step(
        self,
        tiny_student: Student,
        tiny_teacher: MakeTeacher,
        tiny_records: list[dict[str, Any]],
        weight: float | None,
    ) -> None:
        keys = self.keys(**{"KD.FEATURE_LP.STUDENT_CAPTURE": "backbone.bottom_up"})
        keys["KD.FEATURE_LP.WEIGHT"] = weight
        keys["KD.FEATURE_LP.TEACHER_CAPTURE"] = "backbone.bottom_up"
        cfg = tiny_student("fcos", tiny_teacher("fcos"), keys)
        model = build_model(cfg)
        model.student.backbone.bottom_up.requires_grad_(False)
        message = (
            r"^FeatureLp: .*student \(backbone\.bottom_up\) carries no gradient, so the distiller "
            r"cannot move"
        )
        with pytest.raises(ValueError, match=message):
            tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records), 0)

    def test_bfloat16_gives_nearly_the_same_weight(
        self,
        tiny_student: Student,
        tiny_teacher: MakeTeacher,
        tiny_records: list[dict[str, Any]],
    ) -> None:
        cfg = tiny_student("fcos", tiny_teacher("fcos"), self.keys())
        batch = tiny_runs.batch_of(cfg, tiny_records)
        weights = []
        for enabled in (False, True):
            torch.manual_seed(1)
            model = build_model(cfg)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                _, storage = tiny_runs.losses_at(model, batch, 0)
            weights.append(storage.history("kd/feature_lp/weight").latest())
        assert weights[1] == pytest.approx(weights[0], rel=0.1)
