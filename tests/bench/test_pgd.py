import argparse
import json

import pytest

from kd_det.bench.pgd import add_arguments, main


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(options)


def test_quick_run_measures_everything(capsys):
    report = json.loads(json.dumps(main(parse("--quick"))))
    assert report["size"] == [96, 128]
    assert report["positions"] == 12 * 16 + 6 * 8 + 3 * 4 + 2 * 2 + 1
    assert [row["boxes"] for row in report["targets"]] == [1, 10]
    for row in report["targets"]:
        assert row["speedup"] == pytest.approx(row["loop_ms"] / row["batched_ms"])
        assert 0 < row["batched_extra_mb"] < 10
    assert report["targets"][1]["batched_over_10_boxes"] == 1
    assert 0 < report["losses"]["share"] < 10
    assert "share" in capsys.readouterr().out
