"""`kd-det bench` around a benchmark: arguments in, a whole JSON file out."""

import json
import sys
import types
from pathlib import Path

import pytest

from kd_det_cli import main
from kd_det_cli.bench import bench_folder, find_benchmarks


def fake_bench(report):
    def add_arguments(parser):
        parser.add_argument("--size", type=int, default=8)

    return types.SimpleNamespace(
        add_arguments=add_arguments, main=lambda args: {**report, "size": args.size}
    )


def test_a_benchmark_gets_its_arguments_and_its_report_the_machine(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kd_det.bench.ssim", fake_bench({"rows": [1.5]}))
    out = tmp_path / "new" / "ssim.json"
    assert main(["bench", "ssim", "--out", str(out), "--size", "3"]) == 0
    report = json.loads(out.read_text())
    assert report["rows"] == [1.5] and report["size"] == 3
    assert report["command"] == "kd-det bench ssim --out ssim.json --size 3"
    assert {"cpu", "cores", "torch", "detectron2", "kd_det", "date"} <= set(report["environment"])


def test_what_a_benchmark_says_itself_is_kept(tmp_path, monkeypatch):
    own = {"command": "mine", "environment": {"cpu": "abacus"}}
    monkeypatch.setitem(sys.modules, "kd_det.bench.pgd", fake_bench(own))
    main(["bench", "pgd", "--out", str(tmp_path / "a.json")])
    assert json.loads((tmp_path / "a.json").read_text()) == {**own, "size": 8}


def test_unknown_benchmarks_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "speed", "--out", str(tmp_path / "a.json")])
    assert "ssim" in capsys.readouterr().err


def test_a_file_is_a_benchmark_by_its_two_functions(tmp_path):
    functions = "def add_arguments(parser): ...\ndef main(args): ...\n"
    (tmp_path / "fast.py").write_text(
        f'"""\nHow fast it is.\n\nMore.\n"""\nimport nowhere\n{functions}'
    )
    (tmp_path / "helper.py").write_text('"""Serves."""\ndef main(args): ...\n')
    assert find_benchmarks(tmp_path) == {"fast": "How fast it is"}


def test_every_benchmark_is_found_with_a_summary():
    found = find_benchmarks(bench_folder())
    assert {"msad", "pgd", "ssim", "step", "targets"} <= set(found)
    assert not {"measure", "options", "targets_scene", "targets_loops"} & set(found)
    assert all(10 < len(summary) < 90 for summary in found.values())
    assert bench_folder() == Path(__file__).parents[2] / "kd_det" / "bench"


def test_help_of_a_benchmark_has_its_own_arguments(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "msad", "--help"])
    assert "--widths" in capsys.readouterr().out
