"""The whole of `kd-det compare` on stand-in runs: numbers, pages and figure."""

import json
import re

import pytest
from PIL import Image

from kd_det.experiments import compare, runs
from kd_det.experiments.compare import _claimed
from kd_det.experiments.environment import shown_command
from kd_det.experiments.figure import pick_images
from kd_det.experiments.ground_truth import GroundTruth
from kd_det_cli import main

# Boxes 40, 38 (class disc) and 36 (class ring) pixels wide, moved by 8: IoU 32/48, 30/46 and 28/44
# reach 4, 4 and 3 of the 10 thresholds, so AP is (40 + 30) / 2.
SHIFTED = {"shift": 8, "ap": 35.0}


def compare_lab(lab, *extra, recipe=None, out=None):
    words = ["--recipe", recipe or lab.recipe, "--out", str(out or lab.out), "--jobs", "4", *extra]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "RUNNER", lab.runner)
        # The stand-in engine takes configs that are none of a detector.
        patch.setattr(compare, "rehearse_runs", lambda *_: None)
        patch.setattr(compare, "html_page", lambda *_: "")  # test_page.py looks at it
        return main(["compare", *words])


def test_report_holds_what_can_be_worked_out_by_hand(lab, capsys):
    lab.behave(
        {
            "none-seed0": {**SHIFTED, "ap": 34.0, "sec_per_step": 0.2},
            "none-seed1": {**SHIFTED, "ap": 36.0, "sec_per_step": 0.2},
            "again": SHIFTED,
            "l2": {"ap": 100.0, "sec_per_step": 0.3},
            "teacher": {"ap": 165.0},
        }
    )
    text = (lab.root / "recipe.yaml").read_text() + "comparisons: [[again, l2]]\n"
    assert compare_lab(lab, recipe=lab.write("pairs.yaml", text)) == 0

    report = json.loads((lab.out / "report.json").read_text())
    none, l2, again = report["arms"]
    assert (none["name"], l2["name"], again["name"]) == ("none", "l2", "again")
    assert none["seeds"] == [0, 1] and none["AP"] == [34.0, 36.0]
    assert none["mean"]["AP"] == 35.0 and none["std"]["AP"] == pytest.approx(2**0.5)
    assert none["APs"] == [None, None] and none["mean"]["APs"] is None
    assert none["delta"] is None and none["gap_closed"] is None
    # All images and seeds are alike, so nothing spreads.
    assert [l2["delta"][key] for key in ("mean", "low", "high")] == pytest.approx([65.0] * 3)
    assert (l2["delta"]["verdict"], l2["delta"]["seeds"]) == ("gain", 2)
    assert l2["delta"]["method"] == "seeds and test images" and l2["delta"]["holm"] < 0.05
    assert l2["gap_closed"] == pytest.approx(65.0 / (165.0 - 35.0))
    assert again["delta"]["mean"] == pytest.approx(0.0)
    (pair,) = report["comparisons"]
    assert (pair["arm"], pair["against"]) == ("again", "l2")
    assert pair["delta"]["mean"] == pytest.approx(-65.0)
    assert pair["delta"]["verdict"] == "loss"
    assert report["power"]["seeds"] == 3 and report["power"]["seed_sd"] == pytest.approx(0)
    assert report["practical"] == 0.3
    assert [(c["name"], c["baseline"], c["AP"]) for c in l2["classes"]] == [
        ("disc", pytest.approx(40), pytest.approx(100)),
        ("ring", pytest.approx(30), pytest.approx(100)),
    ]
    assert [c["mean"] for c in l2["classes"]] == pytest.approx([60, 70])  # the worst first
    assert [(s["name"], s["mean"], s["low"], s["high"]) for s in l2["sizes"]] == [
        ("medium", pytest.approx(65), 64, 66),
        ("large", pytest.approx(65), 64, 66),
    ]
    assert report["teacher"]["AP"] == [165.0] and report["other_teachers"] == []
    assert report["environment"]["kd_det"] and report["environment"]["cores"] >= 1

    shown = capsys.readouterr().out
    assert "+65.00 [+65.00, +65.00]" in shown and "50 %" in shown
    assert "s/step" not in shown  # the runs shared the machine
    page = (lab.out / "report.md").read_text()
    assert "35.0 ± 1.4" in page and "L2 on features" in page and "(report.png)" in page
    held = "holds after Holm's correction for 3 comparisons"
    assert f"again minus L2 on features: -65.00 [-65.00, -65.00] AP, loss ({held})" in page
    assert "(80 % power, two-sided 5 %) takes 3 seeds" in page and "docs/intervals.md" in page
    assert str(lab.root) not in page + (lab.out / "report.json").read_text()
    with Image.open(lab.out / "report.png") as figure:
        assert figure.width == 1500 and figure.height > 500


def test_a_pair_with_the_baseline_counts_once(lab):
    text = (lab.root / "recipe.yaml").read_text() + "comparisons: [[l2, none], [none, again]]\n"
    lab.behave({"none": SHIFTED})
    assert compare_lab(lab, recipe=lab.write("pairs.yaml", text)) == 0
    report = json.loads((lab.out / "report.json").read_text())
    assert report["comparisons"] == []
    assert "for 2 comparisons" in (lab.out / "report.md").read_text()


@pytest.mark.parametrize(
    ("images", "annotations", "message"),
    [(4, 0, "lists no annotations"), (1, 3, "has 1 image; an interval .* takes at least 2")],
)
def test_a_test_set_that_cannot_be_judged_on_stops_before_anything_runs(
    lab, capsys, images, annotations, message
):
    truth = {**lab.truth, "images": lab.truth["images"][:images]}
    truth["annotations"] = truth["annotations"][:annotations]
    (lab.root / "truth.json").write_text(json.dumps(truth))
    assert compare_lab(lab) == 2
    assert re.search(message, capsys.readouterr().err) and lab.calls() == []


def test_a_teacher_done_again_makes_all_that_follows_afresh(lab):
    text = (lab.root / "recipe.yaml").read_text().replace("init_from: none", "init_from: l2")
    recipe = lab.write("chain.yaml", text)
    assert compare_lab(lab, recipe=recipe) == 0
    lab.calls()
    lab.behave({name: {"weights": "trained otherwise"} for name in ("teacher", "l2")})
    (checkpoint,) = lab.out.glob("teachers/*/model_final.pth")
    checkpoint.unlink()
    assert compare_lab(lab, recipe=recipe) == 0
    names = [call["run"].rsplit("-", 1)[0].partition("-seed")[0] for call in lab.calls()]
    assert sorted(names) == ["again", "again", "l2", "l2", "teacher"]


def test_a_long_comparison_says_how_far_it_is(lab, capsys, monkeypatch):
    monkeypatch.setattr(compare, "_SECONDS_BETWEEN_LINES", 0.0)
    assert compare_lab(lab) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if " arms, " in line]
    assert len(told) > 1 and told[-1].endswith(" arms, 0:00 left")
    assert [line.split(" of ")[0] for line in told] == [str(i + 1) for i in range(len(told))]


def test_arms_and_seeds_can_be_chosen(lab):
    assert compare_lab(lab, "--arms", "l2", "--seeds", "3") == 0
    report = json.loads((lab.out / "report.json").read_text())
    assert [arm["name"] for arm in report["arms"]] == ["none", "l2"]
    assert all(arm["seeds"] == [3] and arm["std"]["AP"] is None for arm in report["arms"])
    assert report["arms"][1]["delta"]["verdict"] == "no verdict (one seed)"
    assert report["arms"][1]["delta"]["method"] == "test images only" and report["power"] is None
    page = (lab.out / "report.md").read_text()
    assert "over test images only" in page and "no verdict (one seed)" in page
    starts = {call["run"].rsplit("-", 1)[0] for call in lab.calls()}
    assert starts == {"teacher", "none-seed3", "l2-seed3"}


def test_a_teacher_worse_than_the_baseline_leaves_no_gap(lab):
    lab.behave({"teacher": {"ap": 1.0}, "none": {"ap": 35.0, "shift": 8}})
    assert compare_lab(lab, "--seeds", "0", "--arms", "l2") == 0
    report = json.loads((lab.out / "report.json").read_text())
    assert report["arms"][1]["delta"]["mean"] == pytest.approx(65.0)
    assert report["arms"][1]["gap_closed"] is None


def test_exit_codes_and_messages(lab, capsys, tmp_path):
    lab.behave({"none": {"fail": True}})
    assert compare_lab(lab) == 1
    assert "the learning rate exploded" in capsys.readouterr().err
    assert compare_lab(lab, "--arms", "l3") == 2
    assert "no arm is called l3" in capsys.readouterr().err
    assert compare_lab(lab, "--seeds", "-1") == 2
    assert compare_lab(lab, "--practical", "0") == 2
    assert "--practical must be AP points above 0, found 0.0" in capsys.readouterr().err
    lab.write("student.yaml", "SOLVER: {MAXITER: 3}\n")
    assert compare_lab(lab) == 2
    assert "SOLVER.MAX_ITER" in capsys.readouterr().err
    text = (lab.root / "recipe.yaml").read_text()
    for name, message in (
        ("shapes_vall", "no registered data set; the nearest valid names are shapes_val"),
        ("crowdhuman_val", "evaluated as crowdhuman"),
    ):
        lab.write("student.yaml", "_BASE_: base.yaml\n")
        path = lab.write("data.yaml", f"overrides: [DATASETS.TEST, [{name}]]\n{text}")
        assert compare_lab(lab, recipe=path) == 2
        assert message in capsys.readouterr().err
    assert not (lab.out / "report.json").exists()


def test_an_output_folder_that_is_taken_or_not_writable(lab, capsys):
    lab.out.mkdir()
    with _claimed(lab.out):
        assert compare_lab(lab) == 1
    assert "Another `kd-det compare` is at work" in capsys.readouterr().err
    (lab.root / "file").write_text("")
    assert compare_lab(lab, out=lab.root / "file" / "out") == 1
    assert "cannot be written" in capsys.readouterr().err
    assert lab.calls() == []


def test_another_recipe_does_not_replace_the_report(lab, capsys):
    assert compare_lab(lab, "--arms", "l2", "--seeds", "0") == 0
    first = (lab.out / "report.json").read_bytes()
    text = (lab.root / "recipe.yaml").read_text()
    other = lab.write("other.yaml", text.replace("name: tiny", "name: other"))
    lab.calls()
    capsys.readouterr()
    assert compare_lab(lab, recipe=other) == 2
    message = capsys.readouterr().err
    assert f"{lab.out} holds the report of recipe tiny on cli_test_another_recipe" in message
    files = "report.md, report.json, report.png, report.html"
    assert f"choose another --out, or move {files} away" in message
    assert lab.calls() == [] and (lab.out / "report.json").read_bytes() == first
    # The same recipe goes on where it was.
    assert compare_lab(lab, "--arms", "l2", "--seeds", "0") == 0
    assert lab.calls() == [] and (lab.out / "report.json").is_file()


def test_a_part_of_the_recipe_does_not_replace_the_whole_report(lab, capsys):
    assert compare_lab(lab) == 0
    whole = (lab.out / "report.json").read_bytes()
    capsys.readouterr()
    assert compare_lab(lab, "--arms", "l2", "--seeds", "1") == 2
    assert "has arms again and seeds 0, which this call leaves out" in capsys.readouterr().err
    assert (lab.out / "report.json").read_bytes() == whole


def test_images_are_chosen_by_their_annotations_alone():
    images = [{"id": i} for i in range(10)]
    few = [{"image_id": i} for i in range(10)]
    many = [{"image_id": i} for i in (2, 4, 6, 8) for _ in range(2)]

    def picked(annotations, count=2):
        coco = {"images": images, "annotations": annotations}
        truth = GroundTruth("t", json_file=None, coco=coco, image_root=None)
        return [image["id"] for image in pick_images(truth, count)]

    assert picked(few + many) == [4, 8]  # a quarter and three quarters into [2, 4, 6, 8]
    assert picked(few) == [2, 7]  # no image has three objects: all count
    assert picked(few + many, count=9) == [2, 4, 6, 8]


def test_reported_commands_name_no_folders_of_the_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--recipe", "configs/a.yaml", "--out", str(tmp_path / "out"), "/home/somebody/x.yaml"]
    assert shown_command("kd-det compare", argv) == (
        "kd-det compare --recipe configs/a.yaml --out out x.yaml"
    )
