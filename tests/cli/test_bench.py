"""`kd-det bench` around a benchmark: arguments in, a whole JSON file out."""

import json
import sys
import types

import pytest

from kd_det.cli import bench


def fake_bench(report):
    def add_arguments(parser):
        parser.add_argument("--size", type=int, default=8)

    return types.SimpleNamespace(
        add_arguments=add_arguments, main=lambda args: {**report, "size": args.size}
    )


def test_a_benchmark_gets_its_arguments_and_its_report_the_machine(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kd_det.bench.ssim", fake_bench({"rows": [1.5]}))
    out = tmp_path / "new" / "ssim.json"
    assert bench.main(["ssim", "--out", str(out), "--size", "3"]) == 0
    report = json.loads(out.read_text())
    assert report["rows"] == [1.5] and report["size"] == 3
    assert report["command"] == "kd-det bench ssim --out ssim.json --size 3"
    assert {"cpu", "cores", "torch", "detectron2", "kd_det", "date"} <= set(report["environment"])


def test_what_a_benchmark_says_itself_is_kept(tmp_path, monkeypatch):
    own = {"command": "mine", "environment": {"cpu": "abacus"}}
    monkeypatch.setitem(sys.modules, "kd_det.bench.pgd", fake_bench(own))
    bench.main(["pgd", "--out", str(tmp_path / "a.json")])
    assert json.loads((tmp_path / "a.json").read_text()) == {**own, "size": 8}


def test_unknown_benchmarks_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench.main(["speed", "--out", str(tmp_path / "a.json")])
    assert "ssim" in capsys.readouterr().err
