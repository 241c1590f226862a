"""report.html: self-contained, escaped, and in a browser without a complaint."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kd_det.experiments import compare, runs
from kd_det.experiments.page.markup import Html, table, tag
from kd_det.experiments.training_curves import loss_curves
from kd_det_cli import main

EVIL = """<script>document.title = 'run'</script> & "q" 'r' </style> $x_$ $y$ onload=1"""
RECIPE = """
name: {evil}
teacher: teacher.yaml
baseline: none
seeds: [0, 1]
arms:
  - {{name: none, config: student.yaml, label: {evil}}}
  - {{name: l2, config: distilled.yaml, label: "L2 {plain}"}}
"""
# Written at the end of the page, for the browser to say what it drew.
PROBE = """<script>
const all = [...document.querySelectorAll("svg")].map(s => s.getBoundingClientRect());
parent.document.body.setAttribute("data-seen", JSON.stringify({
  width: innerWidth, scroll: document.documentElement.scrollWidth, images: document.images.length,
  broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).length,
  svgs: all.length, empty: all.filter(r => r.width < 100 || r.height < 50).length,
  drawn: [...document.querySelectorAll("svg")].filter(s => s.querySelector("path")).length,
}));
</script>"""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Elements(HTMLParser):
    """Names, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += f" {data}"


@pytest.fixture(scope="module")
def page(shared_lab: Any) -> Path:
    """The report of a recipe and of classes whose names try to break it."""
    lab = shared_lab
    truth = json.loads((lab.root / "truth.json").read_text())
    truth["categories"][1]["name"] = EVIL
    lab.write("truth.json", json.dumps(truth))
    lab.behave({"none": {"shift": 8, "ap": 35.0}})
    recipe = lab.write("evil.yaml", RECIPE.format(evil=json.dumps(EVIL), plain="<b>&amp;</b>"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "RUNNER", lab.runner)
        patch.setattr(compare, "rehearse_runs", lambda *_: None)
        words = ["compare", "--recipe", recipe, "--out", str(lab.out), "--practical", "0.5"]
        assert main([*words, "--jobs", "4"]) == 0
    return Path(lab.out / "report.html")


def test_the_page_is_whole_and_harmless(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = Elements(text)
    assert found.open == []
    names = {name for name, _ in found.tags}
    assert not names & {"script", "link", "iframe", "object", "base", "b", "form"}
    for _, attributes in found.tags:
        assert not [key for key in attributes if key.startswith("on")]
        for key in ("src", "href", "xlink:href"):
            assert (attributes.get(key) or "#").startswith(("#", "data:image/jpeg;base64,"))
    assert not re.findall(r"url\((?!#)", text) and "@import" not in text
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(|href=")#([^")]+)', text)
    assert used and set(used) <= set(ids)
    assert str(page.parent) not in text
    words = " ".join(found.words.split())
    assert EVIL in words and "L2 <b>&amp;</b>" in words
    assert "+65.00 [+65.00, +65.00] AP" in words and "Gain L2" in words
    assert "nothing as large as 0.5 AP" in words
    # IoU 32/48, 28/44 and 30/46. All images are alike: the first is shown, once; there is no loss.
    assert "largest gain, 0.65 → 1.00 on a.png" in words and "largest loss," not in words
    assert "evil.yaml --out out --practical 0.5" in words
    folder = next((page.parent / "runs").glob("l2-seed1-*")).name
    assert folder in words and "KD.DISTILLERS" in words
    assert [name for name, _ in found.tags].count("img") == 4
    assert [name for name, _ in found.tags].count("svg") == 7


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_all_of_it(page: Path, tmp_path: Path, width: int) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed (apt-get install chromium)")
    text = page.read_text(encoding="utf-8")
    assert 'content="default-src &#x27;none&#x27;; ' in text
    probed = text.replace("style-src", "script-src 'unsafe-inline'; style-src", 1)
    probed = html.escape(probed.replace("</body>", f"{PROBE}</body>"))
    # A window may not be as narrow as a telephone; a frame may.
    frame = tmp_path / "frame.html"
    style = f"width: {width}px; height: 800px; border: 0"
    frame.write_text(
        f'<!doctype html><meta charset="utf-8"><iframe style="{style}" srcdoc="{probed}"></iframe>',
        encoding="utf-8",
    )
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
        "--window-size=1400,900", frame.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    (body,) = (attributes for name, attributes in Elements(done.stdout).tags if name == "body")
    seen = json.loads(str(body["data-seen"]))
    assert seen["broken"] == seen["empty"] == 0
    assert (seen["images"], seen["svgs"], seen["drawn"]) == (4, 7, 7)
    assert seen["scroll"] <= seen["width"] == width  # wide tables scroll in their boxes


def test_everything_but_html_is_escaped() -> None:
    assert tag("p", "<b>", Html("<i></i>"), 3, class_='"x"') == (
        '<p class="&quot;x&quot;">&lt;b&gt;<i></i>3</p>'
    )
    assert tag("img", alt="a&b", hidden=True, title=None) == '<img alt="a&amp;b" hidden>'
    assert '<td class="n">&lt;1</td>' in table(("", "<"), [("a", "<1")])


def test_losses_are_summed_by_kind(tmp_path: Path) -> None:
    def run(name: str, text: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(text)
        return tmp_path / name

    lines = [
        {"iteration": 0, "total_loss": 9.0, "loss_a": 1, "loss_b": 2.0, "loss_kd_ssim": 6.0},
        {"iteration": 1, "loss_kd_ssim_idle": 0.0},
        {"iteration": 20, "total_loss": 1.0, "loss_a": 1.0},
    ]
    whole = run("a", "\n".join(json.dumps(line) for line in lines) + '\n{"iteration": 40, "tot')
    other = run("b", json.dumps({**lines[0], "loss_b": 4.0}))
    assert loss_curves([whole]) == {"detection": {0: 3.0, 20: 1.0}, "distillation": {0: 6.0}}
    assert loss_curves([whole, other])["detection"] == {0: 4.0, 20: 1.0}
    assert loss_curves([tmp_path]) == {}
