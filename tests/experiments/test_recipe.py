"""Recipes: what is read, and what is refused with which words."""

import pytest

from kd_det.experiments.recipe import RecipeError, read_recipe


def test_paths_are_relative_to_the_recipe_and_defaults_fill_in(lab, monkeypatch):
    monkeypatch.chdir("/")
    recipe = read_recipe(lab.recipe)
    assert recipe.teacher == lab.root / "teacher.yaml"
    assert [arm.name for arm in recipe.arms] == ["none", "l2", "again"]
    assert recipe.arm("l2").config == lab.root / "distilled.yaml"
    assert recipe.arm("l2").label == "L2 on features" and recipe.arm("none").label == "none"
    assert recipe.seeds == (0, 1)
    assert recipe.overrides == () and recipe.comparisons == ()


def test_overrides_become_command_line_words_and_files_in_them_are_found(lab):
    path = lab.write(
        "other.yaml",
        "teacher: teacher.yaml\nbaseline: a\narms:\n"
        "  - {name: a, config: student.yaml, "
        "overrides: [SOLVER.STEPS, [3], KD.TEACHER.CONFIG_FILE, teacher.yaml]}\n",
    )
    recipe = read_recipe(path)
    teacher = str(lab.root / "teacher.yaml")
    assert recipe.arm("a").overrides == ("SOLVER.STEPS", "[3]", "KD.TEACHER.CONFIG_FILE", teacher)
    assert recipe.name == "other" and recipe.seeds == (0,)


def test_an_empty_path_and_a_folder_are_no_files_beside_the_recipe(lab):
    (lab.root / "auto").mkdir()
    words = "[MODEL.WEIGHTS, '', KD.TEACHER.WEIGHTS, auto]"
    text = f"teacher: teacher.yaml\nbaseline: a\noverrides: {words}\narms:\n"
    recipe = read_recipe(lab.write("w.yaml", text + "  - {name: a, config: student.yaml}\n"))
    assert recipe.overrides == ("MODEL.WEIGHTS", "", "KD.TEACHER.WEIGHTS", "auto")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("baseline: none", "base_line: none", "unknown key base_line.*baseline"),
        ("name: l2, config", "name: l2, confg", "unknown key confg.*config"),
        ("baseline: none\n", "", "key `baseline` is missing"),
        ("baseline: none", "baseline: non", "no arm is called non.*none"),
        ("name: l2", "name: none", "2 arms are called none"),
        ("name: l2", "name: l/2", "'l/2' must be a word"),
        ("config: distilled.yaml", "config: nowhere.yaml", "l2.*nowhere.yaml.*no file"),
        ("teacher: teacher.yaml", "teacher: nowhere.yaml", "teacher names nowhere.yaml"),
        ("seeds: [0, 1]", "seeds: [0, 0]", "distinct integers >= 0, found \\[0, 0\\]"),
        ("seeds: [0, 1]", "seeds: [-1]", "distinct integers >= 0"),
        ("seeds: [0, 1]", "overrides: [SOLVER.MAX_ITER]", "overrides must be a list"),
        ("seeds: [0, 1]", "overrides: [SEED, 3]", "SEED cannot be overridden.*seeds"),
        ("seeds: [0, 1]", "comparisons: [[l2, l3]]", "comparisons: no arm is called l3"),
        ("seeds: [0, 1]", "comparisons: [[l2, l2]]", r"pair \['l2', 'l2'\], of an arm with itself"),
        ("seeds: [0, 1]", "comparisons: [[l2, again], [again, l2]]", "pair .* given twice"),
        ("init_from: none", "init_from: nobody", "init_from of again: no arm is called nobody"),
        ("init_from: none", "init_from: again", "init_from goes in a circle"),
        ("arms:", "arms: []\nlegs:", "unknown key legs"),
    ],
)
def test_mistakes_are_named(lab, old, new, message):
    text = (lab.root / "recipe.yaml").read_text()
    assert text.count(old) == 1
    path = lab.write("wrong.yaml", text.replace(old, new))
    with pytest.raises(RecipeError, match=message):
        read_recipe(path)


def test_files_that_are_no_recipes(lab):
    with pytest.raises(RecipeError, match="does not exist"):
        read_recipe(str(lab.root / "absent.yaml"))
    with pytest.raises(RecipeError, match="expected a mapping"):
        read_recipe(lab.write("list.yaml", "[1, 2]"))
    with pytest.raises(RecipeError, match="not a yaml file"):
        read_recipe(lab.write("broken.yaml", "a: [1"))


def test_select_keeps_the_baseline_and_ancestors(lab):
    text = (lab.root / "recipe.yaml").read_text() + "comparisons: [[again, l2], [again, none]]\n"
    recipe = read_recipe(lab.write("more.yaml", text))
    assert [arm.name for arm in recipe.select(["l2"]).arms] == ["none", "l2"]
    cut = recipe.select(["again"])
    assert [arm.name for arm in cut.arms] == ["none", "again"]
    assert cut.comparisons == (("again", "none"),)
    with pytest.raises(RecipeError, match=r"--arms: no arm is called agan.*again"):
        recipe.select(["agan"])
    assert recipe.with_seeds([5]).seeds == (5,)
