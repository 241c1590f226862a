"""Yaml of other people: plain values and arithmetic are read, and nothing is run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from detectron2.config import CfgNode

from kd_det.config import load_config
from kd_det.config.arithmetic import evaluate
from kd_det.config.safe_yaml import RefusedYamlError, parse_yaml
from kd_det.distillation.teacher import teacher_config
from kd_det.experiments.recipe import RecipeError, read_recipe

RETINANET = "[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]"
SIZES = [[x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in [32, 64, 128, 256, 512]]

# What a value may be; {path} is the file that must not appear.
HOSTILE = {
    "open": '!!python/object/apply:open ["{path}", "w"]',
    "os.system": '!!python/object/apply:os.system ["touch {path}"]',
    "subprocess": '!!python/object/apply:subprocess.getoutput ["touch {path}"]',
    "exec": "!!python/object/apply:exec [\"open('{path}', 'w')\"]",
    "eval of a call": "!!python/object/apply:eval [\"open('{path}', 'w')\"]",
    "eval of an import": "!!python/object/apply:eval [\"__import__('os').system('touch {path}')\"]",
    "eval in a list": "!!python/object/apply:eval [\"[open('{path}', 'w') for x in [1]]\"]",
    "eval with state": "!!python/object/apply:eval {{args: [\"open('{path}', 'w')\"]}}",
    "eval with globals": '!!python/object/apply:eval ["1", {{}}]',
    "eval of a tag": '!!python/object/apply:eval [!!python/object/apply:open ["{path}", "w"]]',
    "builtins.eval": "!!python/object/apply:builtins.eval [\"open('{path}', 'w')\"]",
    "object/new": '!!python/object/new:os.system ["touch {path}"]',
    "new with state": "!!python/object/new:tuple [!!python/object/new:map [!!python/name:eval , "
    "[\"open('{path}', 'w')\"]]]",
    "object": "!!python/object:pathlib.Path {{}}",
    "name": "!!python/name:os.system",
    "module": "!!python/module:os",
    "in a tuple": '!!python/tuple [1, !!python/object/apply:open ["{path}", "w"]]',
    "as a key": '{{? !!python/object/apply:open ["{path}", "w"] : 1}}',
    "by an alias": '[&a !!python/object/apply:open ["{path}", "w"], *a]',
    "a tag of its own": "!evil [1]",
    "verbatim": '!<tag:yaml.org,2002:python/object/apply:open> ["{path}", "w"]',
    "bytes": "!!python/bytes aGk=",
    "a tuple of a mapping": "!!python/tuple {{a: 1}}",
}


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


class TestTags:
    @pytest.mark.parametrize("kind", list(HOSTILE))
    def test_hostile_ones_are_refused_and_not_run(self, canary: Path, kind: str) -> None:
        text = f"A: 1\nB: {HOSTILE[kind].format(path=canary)}\n"
        with pytest.raises(RefusedYamlError, match=r"^a.yaml, line 2: .*(!!python/|!evil)"):
            parse_yaml(text, "a.yaml")
        assert not canary.exists()

    def test_the_corpus_is_hostile(self, canary: Path) -> None:
        text = HOSTILE["open"].format(path=canary)
        yaml.unsafe_load(text).close()
        assert canary.exists()

    def test_those_of_detectron2(self) -> None:
        text = f'SIZES: !!python/object/apply:eval ["{RETINANET}"]\nB: !!python/tuple [1, [2]]'
        assert parse_yaml(text, "a.yaml") == {"SIZES": SIZES, "B": (1, [2])}
        assert parse_yaml(text, "a.yaml") == yaml.unsafe_load(text)

    def test_plain_yaml_is_read_as_before(self) -> None:
        text = "a: &x [1, 2.5, ~, yes, 2024-01-01, 'é']\nb: *x\nc: {<<: {d: 1}, e: 1.0e-3}\n"
        assert parse_yaml(text, "a.yaml") == yaml.safe_load(text)

    @pytest.mark.parametrize(
        ("text", "line"),
        [("KD: {A: 1}\nB: 2\nKD: {C: 3}", 3), ("x:\n- {B: 1,\n   B: 1}", 3), ("B: 1\n'B': 2", 2)],
    )
    def test_a_key_given_twice(self, text: str, line: int) -> None:
        """PyYAML would keep the last one, and the settings of the first would be lost."""
        first = 2 if "x" in text else 1
        with pytest.raises(
            RefusedYamlError, match=f"^a.yaml, line {line}: the key (KD|B) stands"
        ) as e:
            parse_yaml(text, "a.yaml")
        assert f"stands in line {first} already" in str(e.value)

    def test_a_key_that_wins_over_a_merged_one(self) -> None:
        text = (
            "a: &a {k: 1, l: 1}\nb: &b {<<: *a, k: 2}\nc: {<<: *b, k: 3}\nd: {<<: [*a, *b], l: 4}"
        )
        assert parse_yaml(text, "a.yaml") == yaml.safe_load(text)

    def test_broken_yaml(self) -> None:
        with pytest.raises(yaml.YAMLError):
            parse_yaml("a: [1", "a.yaml")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("\n".join(["a: &a [1, 1]"] + [f"{x}: &{x} [*{p}, *{p}]" for p, x in
             zip("abcdefghijklmnopqrst", "bcdefghijklmnopqrstu", strict=True)]), "aliases"),
            ("a: &a [*a]", "inside of what it names"),
            ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
            ("a: " + "9" * 5000, "out of its range"),
        ],
    )  # fmt: skip
    def test_what_would_take_for_ever(self, text: str, message: str) -> None:
        with pytest.raises(RefusedYamlError, match=f"^a.yaml.*{message}"):
            parse_yaml(text, "a.yaml")


class TestArithmetic:
    @pytest.mark.parametrize(
        ("expression", "value"),
        [
            (RETINANET, SIZES),
            ("1", 1),
            (" -2**2 ", -4),
            ("+(1 - 2) / 4", -0.25),
            ("(1,)", (1,)),
            ("[]", []),
            ("[x * y for x in [1, 2] for y in (3, x)]", [3, 1, 6, 4]),
            ("[[y for y in x] for x in [[1], [2, 3]]]", [[1], [2, 3]]),
            ("2**58 / 2**54", 16.0),
        ],
    )
    def test_values(self, expression: str, value: Any) -> None:
        found = evaluate(expression)
        assert (found, type(found)) == (value, type(value))
        assert found == eval(expression)

    @pytest.mark.parametrize(
        ("expression", "message"),
        [
            ("x", "'x' is no number, list or arithmetic"),
            ("print", "'print' is no number"),
            ("f(1)", r"'f\(1\)' is no number"),
            ("(1).__class__", "is no number, list or arithmetic"),
            ("[1][0]", "is no number, list or arithmetic"),
            ("'a'", "'a' is no number"),
            ("True", "True is no number"),
            ("1j", "1j is no number"),
            ("None", "None is no number"),
            ("lambda: 1", "is no number"),
            ("{1: 2}", "is no number"),
            ("f'{1}'", "is no number"),
            ("(x := 1)", "is no number"),
            ("1 if 1 else 2", "is no number"),
            ("1 < 2", "is no number"),
            ("1 @ 2", "is no number"),
            ("1 << 99", "is no number"),
            ("~1", "is no number"),
            ("[*[1]]", "is no number"),
            ("[1] * 9", r"\[1\] is no number"),
            ("[1] + [2]", r"\[1\] is no number"),
            ("(-1)**0.5", "is no number"),
            ("9**9**9", "the exponent 387420489"),
            ("2**64", r"not between -1e\+18"),
            ("9**64", r"not between -1e\+18"),
            ("1e999", r"not between -1e\+18"),
            ("1e308 * 10", r"not between -1e\+18"),
            ("1 / 0", "ZeroDivisionError"),
            ("0**-1", "ZeroDivisionError"),
            ("1 +", "SyntaxError"),
            ("1; 2", "SyntaxError"),
            ("", "SyntaxError"),
            ("(" * 400 + ")" * 400, "(SyntaxError|MemoryError)"),
            ("-" * 999 + "1", "(RecursionError|MemoryError|SyntaxError|steps)"),
            ("1 + " * 300 + "1", "at most 1000"),
            ("[x for x in [1] if x]", "only lists of the form"),
            ("[x for x, y in [1]]", "only lists of the form"),
            ("[x for x in 5]", "'5' is no list to go through"),
            ("[x for x in range(9)]", r"'range\(9\)' is no number"),
            ("{x for x in [1]}", "is no number"),
            ("[1 " + "for x in [1,2,3,4,5,6,7,8,9]" * 9 + "]", "more than 10000 steps"),
            ("1\x00", "(null|SyntaxError)"),
        ],
    )
    def test_everything_else_is_refused(self, expression: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            evaluate(expression)


class TestPlaces:
    """A hostile yaml in each place that names one."""

    @pytest.fixture
    def hostile(self, tmp_path: Path, canary: Path) -> Path:
        path = tmp_path / "hostile.yaml"
        path.write_text(f"OUTPUT_DIR: {HOSTILE['open'].format(path=canary)}\n")
        return path

    @pytest.fixture
    def refused(self, canary: Path) -> Callable[..., None]:
        def check(function: Callable[..., Any], *arguments: Any, kind: type = ValueError) -> None:
            with pytest.raises(kind, match=r"hostile.yaml, line 1: .* !!python/object/apply:open"):
                function(*arguments)
            assert not canary.exists()

        return check

    def test_config(self, hostile: Path, refused: Any) -> None:
        refused(load_config, str(hostile))

    def test_base(self, tmp_path: Path, hostile: Path, refused: Any) -> None:
        (tmp_path / "a.yaml").write_text("_BASE_: hostile.yaml\n")
        refused(load_config, str(tmp_path / "a.yaml"))

    def test_teacher(self, tmp_path: Path, hostile: Path, refused: Any) -> None:
        (tmp_path / "a.yaml").write_text("KD: {TEACHER: {CONFIG_FILE: hostile.yaml}}\n")
        cfg: CfgNode = load_config(str(tmp_path / "a.yaml"))
        refused(teacher_config, cfg)

    def test_a_key_given_twice_in_a_recipe(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("name: a\nseeds: [1]\nseeds: [2]\n")
        message = r"^Recipe .*a.yaml, line 3: the key seeds stands in line 2 already"
        with pytest.raises(RecipeError, match=message):
            read_recipe(str(tmp_path / "a.yaml"))

    def test_recipe(self, hostile: Path, refused: Any) -> None:
        refused(read_recipe, str(hostile), kind=RecipeError)
