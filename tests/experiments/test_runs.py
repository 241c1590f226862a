"""Plans and their execution: what runs, in which order, what is kept, what a failure says."""

import io
import itertools
import json
import os
import zipfile
from pathlib import Path

import pytest

from kd_det.config import load_config
from kd_det.distillation.teacher import teacher_config
from kd_det.distillers import FeatureLp
from kd_det.experiments import digests
from kd_det.experiments import plan as plan_module
from kd_det.experiments.plan import make_plan
from kd_det.experiments.progress import Display, Estimator
from kd_det.experiments.recipe import RecipeError, read_recipe
from kd_det.experiments.runs import RunFailed, cores, execute


def plan_of(lab, recipe=None):
    return make_plan(read_recipe(recipe or lab.recipe), lab.out)


def run(lab, plan, jobs=2):
    stream = io.StringIO()
    execute(plan.runs, jobs, Display(stream), lab.runner, poll_seconds=0.01)
    return stream.getvalue()


def test_the_teacher_comes_first_and_alone_and_ancestors_before_descendants(lab):
    lab.behave({"none": {"sleep": 0.1}, "l2": {"sleep": 0.1}, "teacher": {"sleep": 0.1}})
    run(lab, plan_of(lab))
    calls = [(c["event"], c["run"].rsplit("-", 1)[0]) for c in lab.calls("all")]
    assert calls[:2] == [("start", "teacher"), ("end", "teacher")]
    for seed in (0, 1):
        none, again = (f"{name}-seed{seed}" for name in ("none", "again"))
        assert calls.index(("end", none)) < calls.index(("start", again))
    # Two at a time: the second student starts before the first one ends.
    assert [event for event, _ in calls[2:4]] == ["start", "start"]
    assert len(calls) == 2 * 7


def test_runs_get_seed_weights_and_threads(lab):
    plan = plan_of(lab)
    run(lab, plan)
    calls = {c["run"].rsplit("-", 1)[0]: c for c in lab.calls()}
    assert calls["teacher"]["threads"] == str(cores())
    assert calls["none-seed1"]["threads"] == str(max(1, cores() // 2))
    assert calls["none-seed1"]["opts"]["SEED"] == "1"
    assert "KD.TEACHER.WEIGHTS" not in calls["none-seed1"]["opts"]
    assert calls["l2-seed1"]["opts"]["KD.TEACHER.WEIGHTS"] == str(plan.teacher.checkpoint)
    first = plan.students["none", 1].checkpoint
    assert calls["again-seed1"]["opts"]["MODEL.WEIGHTS"] == str(first)


def test_finished_runs_are_kept_and_only_changed_ones_are_repeated(lab):
    run(lab, plan_of(lab))
    lab.calls()
    assert "l2 seed 0: AP 100.0 (kept)" in run(lab, plan_of(lab))
    assert lab.calls() == []

    lab.write(
        "distilled.yaml", (lab.root / "distilled.yaml").read_text() + "SOLVER: {BASE_LR: 0.7}\n"
    )
    run(lab, plan_of(lab))
    assert sorted(c["run"].rsplit("-", 1)[0] for c in lab.calls()) == ["l2-seed0", "l2-seed1"]


def test_hashes_follow_the_teacher_and_the_ancestor_but_not_the_place(lab):
    def names(plan):
        return {r.folder.name.rsplit("-", 1)[0]: r.folder.name for r in plan.runs}

    before = names(plan_of(lab))
    assert names(make_plan(read_recipe(lab.recipe), lab.root / "elsewhere")) == before
    lab.write("teacher.yaml", "_BASE_: base.yaml\nSOLVER: {MAX_ITER: 9}\n")
    after = names(plan_of(lab))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"teacher", "l2-seed0", "l2-seed1"}
    lab.write("student.yaml", "_BASE_: base.yaml\nSOLVER: {BASE_LR: 0.7}\n")
    assert {k for k, v in names(plan_of(lab)).items() if after[k] != v} == {
        f"{name}-seed{seed}" for name in ("none", "again") for seed in (0, 1)
    }


def test_each_config_and_each_checkpoint_is_read_once(lab, monkeypatch):
    lab.write("given.pth", "one")
    text = (lab.root / "recipe.yaml").read_text()
    weights = "overrides: [KD.TEACHER.WEIGHTS, given.pth]"
    text = text.replace("label: L2 on features", weights)
    text += f"  - {{name: more, config: distilled.yaml, {weights}}}\n"
    read = {"load_config": [], "sha256_of": []}

    def note(name):
        original = getattr(plan_module, name)

        def reader(path, *rest, **named):
            read[name].append(Path(path).name)
            return original(path, *rest, **named)

        monkeypatch.setattr(plan_module, name, reader)

    note("load_config")
    monkeypatch.setitem(
        digests._READERS, "sha256", lambda path: read["sha256_of"].append(Path(path).name) or "0"
    )
    plan_of(lab, lab.write("given.yaml", text))
    assert sorted(read["sha256_of"]) == ["given.pth", "truth.json"]
    assert sorted(read["load_config"]) == ["distilled.yaml", "student.yaml", "teacher.yaml"]


def test_a_failure_stops_with_the_log_and_the_next_call_resumes(lab):
    lab.behave({"l2-seed0": {"fail": True, "sleep": 0.5}, "none-seed1": {"sleep": 60}})
    plan = plan_of(lab)
    with pytest.raises(RunFailed) as error:
        run(lab, plan, jobs=3)  # and does not wait for the sleeping run
    text = str(error.value)
    assert "The run l2 seed 0 ended with exit code 3" in text
    assert "the learning rate exploded" in text and "run.log" in text
    assert "Repeat the same command" in text

    lab.calls()
    lab.behave({})
    run(lab, plan_of(lab))
    calls = {c["run"].rsplit("-", 1)[0]: c["flags"] for c in lab.calls()}
    assert "teacher" not in calls and "none-seed0" not in calls
    assert calls["l2-seed0"] == ["--resume"]
    assert calls["none-seed1"] == []  # it had written no checkpoint


def test_a_run_without_a_result_is_a_failure(lab):
    lab.write("fake_engine.py", "print('nothing to do')")
    with pytest.raises(RunFailed, match=r"ended without writing its result.json[\s\S]*nothing to"):
        run(lab, plan_of(lab))


def test_an_arm_with_a_teacher_of_its_own_gets_it_trained_too(lab):
    lab.write("big.yaml", "_BASE_: teacher.yaml\nSOLVER: {BASE_LR: 0.3}\n")
    text = (lab.root / "recipe.yaml").read_text()
    text += "  - {name: own, config: distilled.yaml, overrides: [KD.TEACHER.CONFIG_FILE, big.yaml]}"
    plan = plan_of(lab, lab.write("two.yaml", text))
    assert [teacher.name for teacher in plan.teachers] == ["teacher", "big"]
    (own_teacher,) = plan.students["own", 0].needs
    assert own_teacher.config_file == lab.root / "big.yaml"
    assert plan.students["l2", 0].needs == (plan.teacher,)
    run(lab, plan)


def test_given_teacher_weights_are_evaluated_and_not_trained(lab):
    weights = lab.write("given.pth", "one")
    text = (
        (lab.root / "recipe.yaml")
        .read_text()
        .replace("label: L2 on features", "overrides: [KD.TEACHER.WEIGHTS, given.pth]")
    )
    path = lab.write("given.yaml", text)
    before = plan_of(lab, path)
    run(lab, before)
    calls = {c["run"].rsplit("-", 1)[0]: c for c in lab.calls()}
    assert calls["teacher"]["flags"] == ["--eval-only"]
    assert calls["teacher"]["opts"]["MODEL.WEIGHTS"] == weights
    assert calls["l2-seed0"]["opts"]["KD.TEACHER.WEIGHTS"] == weights
    lab.write("given.pth", "two")
    after = plan_of(lab, path)
    assert before.students["l2", 0].folder != after.students["l2", 0].folder
    (lab.root / "given.pth").unlink()
    with pytest.raises(RecipeError, match=r"given.pth do not exist"):
        plan_of(lab, path)


def test_another_config_of_a_teacher_with_given_weights_makes_other_students(lab):
    """Its weights are the same; what it sees of an image is not."""
    lab.write("given.pth", "one")
    text = (lab.root / "distilled.yaml").read_text()
    given = "CONFIG_FILE: teacher.yaml, WEIGHTS: given.pth"
    lab.write("distilled.yaml", text.replace("CONFIG_FILE: teacher.yaml", given))
    before = folders(plan_of(lab))
    schedule = "_BASE_: base.yaml\nSOLVER: {MAX_ITER: 9}\n"
    lab.write("teacher.yaml", schedule)
    assert folders(plan_of(lab))["l2 seed 0"] == before["l2 seed 0"]
    lab.write("teacher.yaml", schedule + "INPUT: {FORMAT: RGB}\n")
    after = folders(plan_of(lab))
    assert {t for t in before if before[t] != after[t]} == {"teacher", "l2 seed 0", "l2 seed 1"}


def test_a_teacher_teaches_with_the_overrides_it_was_trained_with(lab):
    text = (lab.root / "recipe.yaml").read_text()
    words = "overrides: [INPUT.FORMAT, RGB, DATASETS.TRAIN, \"('a', 'b')\"]\nseeds"
    own = "KD: {DISTILLERS: [FeatureLp], TEACHER: {OPTS: [MODEL.RESNETS.DEPTH, 18], "
    distilled = (lab.root / "distilled.yaml").read_text()
    lab.write("distilled.yaml", distilled.replace("KD: {DISTILLERS: [FeatureLp], TEACHER: {", own))
    plan = plan_of(lab, lab.write("more.yaml", text.replace("seeds", words)))
    run = plan.students["l2", 0]
    cfg = load_config(str(run.config_file), run.opts)
    taught = teacher_config(cfg)
    (trained,) = [run for run in plan.teachers if run in plan.students["l2", 0].needs]
    alone = load_config(str(trained.config_file), trained.opts)
    for one in (taught, alone):
        assert (one.INPUT.FORMAT, one.MODEL.RESNETS.DEPTH) == ("RGB", 18)
        assert one.DATASETS.TRAIN == ("a", "b")


def test_another_code_of_a_plugin_makes_other_runs(lab, monkeypatch):
    for folder in ("one", "two/inside"):
        (lab.root / folder).mkdir(parents=True)
    (lab.root / "two/__init__.py").write_text("")
    files = {"kd_alone": "one/kd_alone.py", "two.kd_part": "two/kd_part.py"}
    for file in (*files.values(), "one/beside.py", "two/inside/helper.py"):
        (lab.root / file).write_text("A = 1\n")
    for folder in (lab.root, lab.root / "one"):
        monkeypatch.syspath_prepend(str(folder))
    text = (lab.root / "distilled.yaml").read_text()
    lab.write("distilled.yaml", text.replace("KD: {", f"KD: {{PLUGINS: {list(files)}, "))
    plans = [folders(plan_of(lab))]
    for file in (*files.values(), "two/inside/helper.py"):
        (lab.root / file).write_text("A = 2\n")
        plans.append(folders(plan_of(lab)))
        changed = {title for title in plans[-1] if plans[-1][title] != plans[-2][title]}
        assert changed == {"l2 seed 0", "l2 seed 1"}, file
    (lab.root / "one/beside.py").write_text("A = 2\n")
    assert folders(plan_of(lab)) == plans[-1]


def test_configs_that_cannot_be_compared_are_refused_before_anything_runs(lab):
    lab.write("student.yaml", "_BASE_: base.yaml\nDATASETS: {TEST: [other]}\n")
    with pytest.raises(RecipeError, match=r"same one test set.*student.yaml \(none\): \['other'\]"):
        plan_of(lab)
    lab.write("student.yaml", "_BASE_: base.yaml\nSOLVER: {MAXITER: 3}\n")
    with pytest.raises(KeyError, match=r"SOLVER.MAXITER.*SOLVER.MAX_ITER"):
        plan_of(lab)


def test_a_distilling_arm_without_teacher_is_refused(lab):
    text = (lab.root / "distilled.yaml").read_text()
    lab.write("distilled.yaml", text.replace(", TEACHER: {CONFIG_FILE: teacher.yaml}", ""))
    with pytest.raises(RecipeError, match=r"l2.*KD\.TEACHER\.CONFIG_FILE"):
        plan_of(lab)


def test_estimates_use_measured_speeds_and_spread_students_over_jobs(lab):
    plan = plan_of(lab)
    teacher, none, l2 = plan.teacher, plan.students["none", 0], plan.students["l2", 0]
    estimator = Estimator(plan.runs, jobs=2)
    assert estimator.eta() is None and estimator.fraction() == 0.0

    estimator.start(teacher)
    progress = {"iteration": 4, "max_iter": 8, "phase": "train", "eta_seconds": 40.0}
    estimator.observe(teacher, progress)
    # Students are guessed from the teacher's 10 s per iteration.
    assert estimator.eta() > 40 and 0 < estimator.fraction() < 0.5
    result = {"sec_per_step": 10.0}
    estimator.finish(teacher, result, seconds=100.0)  # 80 s of steps and 20 s around them
    for student, seconds in ((none, 1.0), (l2, 3.0)):
        estimator.start(student)
        estimator.finish(student, {"sec_per_step": seconds}, seconds=4 * seconds + 20.0)
    # Left: none 1, l2 1 (4 and 12 s) and again 0, 1 (4 steps of 2 s on average), each with 20 s.
    total = (4 + 20) + (12 + 20) + 2 * (8 + 20)
    chain = (4 + 20) + (8 + 20)  # again 1 waits for none 1
    assert estimator.eta() == pytest.approx(max(total / 2, chain))
    for student in plan.students.values():
        estimator.start(student)
        estimator.finish(student, {"sec_per_step": 1.0}, seconds=None)
    assert estimator.eta() == 0 and estimator.fraction() == 1.0


def test_half_written_results_do_not_count(lab):
    plan = plan_of(lab)
    plan.teacher.folder.mkdir(parents=True)
    (plan.teacher.folder / "result.json").write_text('{"metrics": {"bb')
    run(lab, plan)
    assert "teacher" in {c["run"].rsplit("-", 1)[0] for c in lab.calls()}
    assert json.loads((plan.teacher.folder / "result.json").read_text())["iterations"] == 4


def test_an_arm_without_iterations_is_evaluated(lab):
    text = (lab.root / "recipe.yaml").read_text()
    arm = "{name: look, config: student.yaml, init_from: l2, overrides: [SOLVER.MAX_ITER, 0]}"
    plan = plan_of(lab, lab.write("look.yaml", f"{text}  - {arm}\n"))
    run(lab, plan)
    looked = [c for c in lab.calls() if c["run"].startswith("look")]
    assert [c["flags"] for c in looked] == [["--eval-only"]] * 2
    assert looked[0]["opts"]["MODEL.WEIGHTS"] == str(plan.students["l2", 0].checkpoint)
    assert plan.students["look", 0].iterations == 0


def flipped_archive() -> bytes:
    """An archive whose directory is whole, and of whose content one byte is another."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("data", "weights")
    return content.getvalue().replace(b"weights", b"weighte")


RESULT = "result.json"
FOUND = "inference/coco_instances_results.json"
FINAL = "model_final.pth"
DAMAGE = [
    (RESULT, b"{}", "its result.json is damaged"),
    (RESULT, b'{"metrics": {}, "iterations": 4}', "its result.json is damaged"),
    (RESULT, b'{"metrics": [], "sec_per_step": 1}', "its result.json is damaged"),
    (RESULT, b"\xff\xfe{}", "its result.json is damaged"),
    (RESULT, b"[" * 100_000, "its result.json is damaged"),
    (RESULT, b"", "its result.json is damaged"),
    (FOUND, b'[{"image_id": 1, "bbox": [1, 2', "its detections are missing or damaged"),
    (FOUND, b"", "its detections are missing or damaged"),
    (FOUND, None, "its detections are missing or damaged"),
    (FINAL, flipped_archive(), "its model_final.pth is missing or damaged"),
    (FINAL, b"PK\x03\x04 and then nothing", "its model_final.pth is missing or damaged"),
    (FINAL, None, "its model_final.pth is missing or damaged"),
]


@pytest.mark.parametrize("arm", ["teacher", "student"])
def test_what_is_damaged_is_done_again_and_said(lab, arm):
    plan = plan_of(lab)
    run(lab, plan)
    damaged = plan.teacher if arm == "teacher" else plan.students["none", 0]
    for name, content, told in DAMAGE:
        lab.calls()
        file = damaged.folder / name
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        assert f"{damaged.title}: {told}; that part is done again" in run(lab, plan_of(lab))
        (call,) = lab.calls()
        assert call["run"] == damaged.folder.name
        # It has a final checkpoint to go on from, unless that is what was damaged.
        assert call["flags"] == ([] if name == FINAL else ["--resume"])
        aside = damaged.folder / "model_final.pth.damaged"
        assert aside.exists() == (name == FINAL and content is not None)
        aside.unlink(missing_ok=True)
    assert "done again" not in run(lab, plan_of(lab))
    assert lab.calls() == []


def folders(plan):
    return {run.title: run.folder.name for run in plan.runs}


def test_changed_data_and_weights_make_other_runs(lab):
    """A result is never kept when what it was made from is another file now."""
    plans = [folders(plan_of(lab))]
    assert folders(plan_of(lab)) == plans[0]

    truth = json.loads((lab.root / "truth.json").read_text())
    truth["annotations"][0]["bbox"][2] += 1
    (lab.root / "truth.json").write_text(json.dumps(truth))
    plans.append(folders(plan_of(lab)))

    image = lab.root / "b.png"
    image.write_bytes(image.read_bytes() + b"tail")
    plans.append(folders(plan_of(lab)))

    status = image.stat()
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    plans.append(folders(plan_of(lab)))
    for before, after in itertools.pairwise(plans):
        assert all(before[title] != after[title] for title in before)

    weights = lab.write("start.pth", "one")
    lab.write("student.yaml", f"_BASE_: base.yaml\nMODEL: {{WEIGHTS: '{weights}'}}\n")
    one = folders(plan_of(lab))
    lab.write("start.pth", "another")
    two = folders(plan_of(lab))
    assert {title for title in one if one[title] != two[title]} == {
        f"{name} seed {seed}" for name in ("none", "again") for seed in (0, 1)
    }


def test_another_default_share_makes_other_runs(lab, monkeypatch):
    before = folders(plan_of(lab))
    monkeypatch.setattr(FeatureLp, "share_of_trained", 0.4)
    after = folders(plan_of(lab))
    changed = {title for title in before if before[title] != after[title]}
    assert changed == {"l2 seed 0", "l2 seed 1"}
    text = (lab.root / "distilled.yaml").read_text()
    given = text.replace("[FeatureLp]", "[FeatureLp], FEATURE_LP: {SHARE: 0.3}")
    lab.write("distilled.yaml", given)
    after = folders(plan_of(lab))
    monkeypatch.undo()
    assert folders(plan_of(lab)) == after, "a share that is given is none of a default's"


def test_another_checkpoint_of_the_teacher_makes_its_students_afresh(lab):
    plan = plan_of(lab)
    run(lab, plan)
    lab.calls()
    with zipfile.ZipFile(plan.teacher.checkpoint, "w") as weights:
        weights.writestr("data", "trained otherwise")
    shown = run(lab, plan_of(lab))
    told = "l2 seed 0: it was made from another checkpoint of teacher; now in l2-seed0-"
    assert told in shown and ".stale-1, done afresh" in shown
    calls = lab.calls()
    assert sorted(c["run"].rsplit("-", 1)[0] for c in calls) == ["l2-seed0", "l2-seed1"]
    assert all(call["flags"] == [] for call in calls)
    student = plan.students["l2", 0].folder
    assert (student.with_name(f"{student.name}.stale-1") / "result.json").exists()
    assert "afresh" not in run(lab, plan_of(lab)) and lab.calls() == []
