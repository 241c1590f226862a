"""Reading config files: keys, base files, paths, overrides; the student's plain config."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg

from kd_det.config import (
    add_kd_config,
    changed_settings,
    is_distillation,
    load_config,
    starts_trained,
    student_cfg,
)
from kd_det.text import nearest

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a yaml file, a mapping or plain text, and gives its path."""

    def save(content: Any, name: str = "config.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)

    return save


def defaults() -> CfgNode:
    cfg = get_cfg()
    add_kd_config(cfg)
    return cfg


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def added_keys() -> list[tuple[str, Any]]:
    stock = dict(leaves(get_cfg()))
    return [(key, value) for key, value in leaves(defaults()) if key not in stock]


def other(value: Any) -> Any:
    """Another value of the same type."""
    if value is None:
        return 0.5
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return "other" if isinstance(value, str) else type(value)([*value, *value, 1.0])


def get(cfg: CfgNode, key: str) -> Any:
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


class TestKeys:
    def test_stock_keys_keep_their_defaults(self) -> None:
        ours = dict(leaves(defaults()))
        assert {key: ours[key] for key, _ in leaves(get_cfg())} == dict(leaves(get_cfg()))

    def test_every_key_is_reached_by_yaml_and_by_override(self, write: Write) -> None:
        added = added_keys()
        assert len(added) > 100
        names = ("KD.DATASETS", "KD.PLUGINS")  # read before the keys are
        changed = {key: other(value) for key, value in added if key not in names}
        changed["KD.DISTILLERS"] = ["SSIM"]  # names alone
        nested: dict[str, Any] = {}
        for key, value in changed.items():
            *parents, leaf = key.split(".")
            node = nested
            for name in parents:
                node = node.setdefault(name, {})
            node[leaf] = list(value) if isinstance(value, tuple) else value
        # Distillation keys are refused where nothing distils.
        nested["MODEL"]["META_ARCHITECTURE"] = "DistillationDetector"
        opts = [word for key, value in changed.items() for word in (key, str(value))]
        opts += ["MODEL.META_ARCHITECTURE", "DistillationDetector"]
        # Words, as from a command line; numbers and lists are read from them.
        for cfg in (load_config(write(nested)), load_config(write("SEED: 1", "b.yaml"), opts)):
            for key, value in changed.items():
                found = get(cfg, key)
                if key in ("KD.TEACHER.CONFIG_FILE", "KD.TEACHER.WEIGHTS"):
                    assert Path(found).is_absolute()
                    found = Path(found).name
                assert found == value, key

    def test_changed_settings(self, write: Write) -> None:
        cfg = load_config(write({"SEED": 3, "KD": {"SSIM": {"WINDOW_SIZE": 7}}}))
        changed = changed_settings(cfg)
        changed.pop("MODEL.DEVICE", None)  # set where there is no GPU
        assert changed == {"SEED": 3, "KD.SSIM.WINDOW_SIZE": 7}


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("content", "key", "near"),
        [
            ({"KD": {"DISTILERS": []}}, "KD.DISTILERS", "KD.DISTILLERS"),
            ({"KD": {"PGD": {"ALPA": 1.0}}}, "KD.PGD.ALPA", "KD.PGD.ALPHA"),
            ({"KD": {"SIM": {"SIGMA": 1.0}}}, "KD.SIM.SIGMA", "KD.SSIM.SIGMA"),
            ({"SOLVR": {"BASE_LR": 1.0}}, "SOLVR.BASE_LR", "SOLVER.BASE_LR"),
            ({"DISTILLERS": []}, "DISTILLERS", "KD.DISTILLERS"),
        ],
    )
    def test_name_the_nearest(
        self, write: Write, content: dict[str, Any], key: str, near: str
    ) -> None:
        path = write(content)
        with pytest.raises(KeyError) as error:
            load_config(path)
        text = str(error.value)
        assert f"{path}: no config key is called {key}; the nearest valid names are " in text
        assert near in text.rsplit(" are ")[1].strip("\"'.").split(", ")

        with pytest.raises(KeyError) as error:
            load_config(write("SEED: 1"), [key, "1"])
        assert f"the command line: no config key is called {key};" in str(error.value)
        assert near in str(error.value)

    def test_the_file_of_a_chain_is_named(self, write: Write) -> None:
        base = write({"SEEED": 1}, "base.yaml")
        with pytest.raises(KeyError, match=rf"{base}: no config key is called SEEED"):
            load_config(write({"_BASE_": "base.yaml"}))

    @pytest.mark.parametrize("content", ["KD:\n", "KD: 3\n", "KD:\n  TEACHER: file.yaml\n"])
    def test_a_group_takes_no_value(self, write: Write, content: str) -> None:
        with pytest.raises(ValueError, match=r"KD(.TEACHER)? is a group of keys"):
            load_config(write(content))

    def test_a_group_takes_no_override(self, write: Write) -> None:
        with pytest.raises(ValueError, match=r"the command line: KD.PGD is a group of keys"):
            load_config(write("SEED: 1"), ["KD.PGD", "0.1"])

    def test_wrong_type_names_the_key(self, write: Write) -> None:
        with pytest.raises(ValueError, match=r"for config key: KD.DISTILLERS"):
            load_config(write({"KD": {"DISTILLERS": "SSIM"}}))

    @pytest.mark.parametrize("name", ["abc", "SIGMA"])
    def test_nearest(self, name: str) -> None:
        valid = ["KD.SSIM.SIGMA", "abd", "zzz"]
        expected = {"abc": "abd", "SIGMA": "KD.SSIM.SIGMA"}[name]
        assert nearest(name, valid) == f"the nearest valid names are {expected}"
        assert nearest("qqqqqq", valid) == "the nearest valid names are KD.SSIM.SIGMA, abd, zzz"

    def test_nearest_in_any_case(self) -> None:
        valid = ["AlignedPyramid", "CWD", "Ssim", "SSIM"]
        assert nearest("ssim", valid) == "the nearest valid names are SSIM, Ssim"


class TestFiles:
    def test_base_chain(self, write: Write, tmp_path: Path) -> None:
        """Relative to the file that names it; the later file wins key by key."""
        write({"SEED": 1, "SOLVER": {"MAX_ITER": 1, "STEPS": [9]}, "VERSION": 2}, "base/a.yaml")
        write({"_BASE_": "../base/a.yaml", "SOLVER": {"MAX_ITER": 2}, "SEED": 2}, "mid/b.yaml")
        cfg = load_config(write({"_BASE_": "mid/b.yaml", "SEED": 3}))
        assert (cfg.SEED, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (3, 2, (9,))
        absolute = write({"_BASE_": str(tmp_path / "mid" / "b.yaml")}, "far/away/c.yaml")
        assert load_config(absolute, ["SEED", 7]).SEED == 7
        assert load_config(absolute).SEED == 2

    @pytest.mark.parametrize("length", [1, 3])
    def test_circles_are_refused(self, write: Write, length: int) -> None:
        for i in range(length):
            write({"_BASE_": f"{(i + 1) % length}.yaml"}, f"{i}.yaml")
        start = write({"_BASE_": "0.yaml"})
        with pytest.raises(ValueError, match=rf"^{start}: its _BASE_ files form a circle through"):
            load_config(start)

    @pytest.mark.parametrize("content", [None, {"_BASE_": "missing.yaml"}])
    def test_missing_files(self, write: Write, tmp_path: Path, content: Any) -> None:
        path = write(content) if content else str(tmp_path / "missing.yaml")
        with pytest.raises(
            FileNotFoundError, match=r"missing.yaml does not exist \(working dir"
        ) as e:
            load_config(path)
        assert (f", the _BASE_ of {path}." in str(e.value)) == (content is not None)

    def test_base_is_one_path(self, write: Write) -> None:
        with pytest.raises(ValueError, match=r"_BASE_ is \['a.yaml'\], expected the path of one"):
            load_config(write({"_BASE_": ["a.yaml"]}))

    @pytest.mark.parametrize(
        "content", [b"\x80\x02}q\x00X\x05\x00\x00\x00model", b"PK\x03\x04", b"a: [1, 2", b"a: b: c"]
    )
    def test_what_is_no_yaml(self, tmp_path: Path, content: bytes) -> None:
        """A checkpoint given where a config file is meant."""
        path = tmp_path / "model.pth"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model.pth is not a yaml config file .*WEIGHTS"):
            load_config(str(path))

    def test_the_line_of_broken_yaml(self, write: Write) -> None:
        with pytest.raises(ValueError, match=r"\(ParserError, line 3: expected <block end>"):
            load_config(write("KD:\n  GRAD_SHARE_PERIOD: 1\n STUDENT:\n    VIEW_FACTOR: 2\n"))

    @pytest.mark.parametrize(
        ("content", "found"), [("", "NoneType"), ("- 1\n", "list"), ("text\n", "str")]
    )
    def test_what_is_no_mapping(self, write: Write, content: str, found: str) -> None:
        with pytest.raises(ValueError, match=rf"holds {found}, expected a yaml mapping"):
            load_config(write(content))


class TestOverrides:
    @pytest.mark.parametrize("opts", [["SEED"], ["SEED", 1, "KD.DISTILLERS"]])
    def test_odd_number(self, write: Write, opts: list[Any]) -> None:
        with pytest.raises(ValueError, match=r"pairs KEY VALUE, but an odd number of words"):
            load_config(write("SEED: 1"), opts)

    def test_they_win_over_the_file(self, write: Write) -> None:
        opts = ["SEED", "4", "KD.DISTILLERS", "['SSIM']", "KD.STUDENT.VIEW_FACTOR", "2.0"]
        opts += ["MODEL.META_ARCHITECTURE", "DistillationDetector"]
        cfg = load_config(write({"SEED": 1, "KD": {"DISTILLERS": ["PGD"]}}), opts)
        assert (cfg.SEED, cfg.KD.DISTILLERS, cfg.KD.STUDENT.VIEW_FACTOR) == (4, ["SSIM"], 2.0)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("KD.DISTILLERS", "['SSIM']"),
            ("KD.INHERIT", "['head']"),
            ("KD.STUDENT.VIEW_FACTOR", "2.0"),
        ],
    )
    def test_distillation_settings_of_a_plain_detector(
        self, write: Write, key: str, value: str
    ) -> None:
        plain = {"MODEL": {"META_ARCHITECTURE": "FCOS"}}
        with pytest.raises(ValueError, match=f"{key} would have no effect.*is FCOS. Set it to Dis"):
            load_config(write(plain), [key, value])


class TestYaml:
    def test_whole_numbers_do_for_floats(self, write: Write) -> None:
        content = {"KD": {"SSIM": {"WEIGHT": 2}}}
        cfg = load_config(write(content), ["SOLVER.BASE_LR", "1"])
        assert (cfg.KD.SSIM.WEIGHT, cfg.SOLVER.BASE_LR) == (2.0, 1.0)

    def test_python_tags_of_detectron2s_own_files_are_read(self, write: Write) -> None:
        text = "MODEL: {ANCHOR_GENERATOR: {SIZES: !!python/object/apply:eval ['[[8, 8 * 2]]']}}"
        cfg = load_config(write(text))
        assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[8, 16]]


class TestPaths:
    """Relative to the yaml that names them where that exists, else to the working directory."""

    @pytest.fixture
    def folders(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
        beside, working = tmp_path / "configs", tmp_path / "work"
        beside.mkdir()
        working.mkdir()
        monkeypatch.chdir(working)
        return beside, working

    def teacher(self, content: dict[str, str], write: Write, opts: list[str] | None = None) -> Any:
        file = write({"KD": {"TEACHER": content}}, "configs/student.yaml")
        return load_config(file, opts or []).KD.TEACHER

    @pytest.mark.parametrize("key", ["CONFIG_FILE", "WEIGHTS"])
    def test_beside_the_yaml_wins_over_the_working_directory(
        self, write: Write, folders: tuple[Path, Path], key: str
    ) -> None:
        beside, working = folders
        assert self.teacher({key: "t.file"}, write)[key] == str(working / "t.file")
        (working / "t.file").touch()
        assert self.teacher({key: "t.file"}, write)[key] == str(working / "t.file")
        (beside / "t.file").touch()
        assert self.teacher({key: "t.file"}, write)[key] == str(beside / "t.file")
        assert self.teacher({key: "../configs/t.file"}, write)[key] == str(beside / "t.file")

    @pytest.mark.parametrize(
        "path", ["auto", "", "/abs/t.pth", "https://host/t.pth", "detectron2://x/model.pkl"]
    )
    def test_what_is_no_relative_path_stays(
        self, write: Write, folders: tuple[Path, Path], path: str
    ) -> None:
        assert self.teacher({"WEIGHTS": path}, write).WEIGHTS == path

    def test_variables_and_home(
        self, write: Write, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PLACE", "/somewhere")
        monkeypatch.setenv("HOME", "/house")
        assert self.teacher({"WEIGHTS": "$PLACE/t.pth"}, write).WEIGHTS == "/somewhere/t.pth"
        assert self.teacher({"WEIGHTS": "~/t.pth"}, write).WEIGHTS == "/house/t.pth"

    def test_a_base_files_paths_are_relative_to_the_base_file(
        self, write: Write, folders: tuple[Path, Path]
    ) -> None:
        beside, _ = folders
        (beside / "base").mkdir()
        (beside / "base" / "t.yaml").touch()
        write({"KD": {"TEACHER": {"CONFIG_FILE": "t.yaml"}}}, "configs/base/b.yaml")
        cfg = load_config(write({"_BASE_": "base/b.yaml"}, "configs/student.yaml"))
        assert cfg.KD.TEACHER.CONFIG_FILE == str(beside / "base" / "t.yaml")

    def test_overrides_mean_the_working_directory(
        self, write: Write, folders: tuple[Path, Path]
    ) -> None:
        beside, working = folders
        (beside / "t.pth").touch()
        found = self.teacher({"WEIGHTS": "x"}, write, ["KD.TEACHER.WEIGHTS", "t.pth"]).WEIGHTS
        assert found == str(working / "t.pth")

    def test_data_sets(self, write: Write, folders: tuple[Path, Path]) -> None:
        beside, working = folders
        (beside / "a.json").touch()
        (beside / "photos").mkdir()
        (working / "b.json").touch()
        entries = [
            {"name": "one", "json": "a.json", "images": "photos"},
            {"name": "two", "json": "b.json", "images": "/data/b"},
        ]
        cfg = load_config(write({"KD": {"DATASETS": entries}}, "configs/s.yaml"))
        assert cfg.KD.DATASETS == [
            {"name": "one", "json": str(beside / "a.json"), "images": str(beside / "photos")},
            {"name": "two", "json": str(working / "b.json"), "images": "/data/b"},
        ]


class TestStudent:
    @pytest.fixture
    def cfg(self, write: Write) -> CfgNode:
        return load_config(
            write(
                {
                    "MODEL": {"META_ARCHITECTURE": "DistillationDetector"},
                    "KD": {"STUDENT": {"META_ARCHITECTURE": "FCOS", "VIEW_FACTOR": 2.0}},
                    "INPUT": {"MIN_SIZE_TEST": 800, "MAX_SIZE_TEST": 1333},
                }
            )
        )

    @pytest.mark.parametrize(
        ("key", "value", "bottom_up", "trained"),
        [
            ("MODEL.WEIGHTS", "", "resnet", False),
            ("MODEL.WEIGHTS", "detectron2://any.pkl", "resnet", True),
            ("MODEL.TIMM.PRETRAINED", True, "timm", True),
            ("MODEL.TIMM.WEIGHTS", "package://any", "timm", True),
            ("MODEL.TIMM.WEIGHTS", "package://any", "resnet", False),
            ("KD.INHERIT", ["*"], "resnet", True),
            ("KD.INHERIT", ["head", "backbone"], "resnet", True),
            ("KD.INHERIT", ["backbone.bottom_up.*"], "resnet", True),
            ("KD.INHERIT", ["backbone.fpn_*", "head.*"], "resnet", False),
        ],
    )
    def test_whether_it_starts_trained(
        self, cfg: CfgNode, key: str, value: Any, bottom_up: str, trained: bool
    ) -> None:
        cfg.merge_from_list([key, value, "MODEL.FPN.BOTTOM_UP", bottom_up])
        assert starts_trained(cfg) is trained

    def test_is_plain(self, cfg: CfgNode) -> None:
        plain = student_cfg(cfg)
        assert "KD" not in plain
        assert plain.MODEL.META_ARCHITECTURE == "FCOS"
        assert not is_distillation(plain)
        assert (plain.INPUT.MIN_SIZE_TEST, plain.INPUT.MAX_SIZE_TEST) == (400, 666)
        # All else is as it was.
        changed = {"MODEL.META_ARCHITECTURE", "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST"}
        before, after = dict(leaves(cfg)), dict(leaves(plain))
        assert {k for k in before if k not in after} == {k for k in before if k.startswith("KD.")}
        assert {key for key in after if after[key] != before[key]} == changed

    def test_the_given_config_stays_as_it_is(self, cfg: CfgNode) -> None:
        cfg.freeze()
        student_cfg(cfg)
        assert cfg.is_frozen()
        assert is_distillation(cfg)
        assert cfg.INPUT.MIN_SIZE_TEST == 800

    def test_full_view_keeps_the_sizes(self, cfg: CfgNode) -> None:
        cfg.KD.STUDENT.VIEW_FACTOR = 1.0
        assert student_cfg(cfg).INPUT == cfg.INPUT

    def test_a_plain_model_has_no_view(self, cfg: CfgNode) -> None:
        """VIEW_FACTOR is a distilled student's; a plain model trains on the full image."""
        cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
        plain = student_cfg(cfg)
        assert plain.MODEL.META_ARCHITECTURE == "RetinaNet"
        assert plain.INPUT == cfg.INPUT
        assert "KD" not in plain


def test_a_given_weight_is_taken_back_by_none(write: Write) -> None:
    path = write({"KD": {"SSIM": {"WEIGHT": 4}}})
    assert load_config(path).KD.SSIM.WEIGHT == 4
    for none in (None, "None"):
        assert load_config(path, ["KD.SSIM.WEIGHT", none]).KD.SSIM.WEIGHT is None
    child = write({"_BASE_": path, "KD": {"SSIM": {"WEIGHT": None}}}, "child.yaml")
    assert load_config(child).KD.SSIM.WEIGHT is None
