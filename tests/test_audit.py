"""What CI says of known holes in the packages that uv.lock pins."""

import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "audit"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_an_index_out_of_reach_is_not_a_clean_bill(script: dict[str, Any]) -> None:
    entries = [{"name": "torch", "skip_reason": "could not be audited"}] * 2
    assert script["summary"](entries) == "NOT DONE: the index of advisories could not be reached."


def test_holes_and_what_was_left_out_are_named(script: dict[str, Any]) -> None:
    entries = [
        {"name": "torch", "version": "2.5.0", "vulns": [{"id": "X-1", "fix_versions": ["2.6.0"]}]},
        {"name": "numpy", "version": "2.0.0", "vulns": []},
        {"name": "mine", "skip_reason": "unknown"},
    ]
    assert script["summary"](entries).splitlines() == [
        "2 packages looked up, 1 known holes.",
        "  torch 2.5.0: X-1, mended in 2.6.0",
        "  not looked up: mine",
    ]


def test_it_asks_for_one_package_before_all(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def audit(pins: list[str]) -> list[dict[str, Any]]:
        asked.append(len(pins))
        return [{"name": "a", "skip_reason": "no answer"}]

    class Done:
        stdout = "# made by uv\na==1 ; python_version > '3'\n    # via b\nb==2\n"
        stderr = ""

    main = script["report"].__globals__
    monkeypatch.setitem(main, "audit", audit)
    monkeypatch.setattr(main["subprocess"], "run", lambda *words, **rest: Done)
    assert script["report"]().startswith("NOT DONE")
    assert asked == [1]
