"""A tiny recipe, and a stand-in for training runs that takes milliseconds."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

# Takes the engine's arguments and leaves what the engine leaves. Behaviour per run comes from
# RECIPE/fake.json: {"<folder name's start>": {"fail": bool, "shift": pixels, "sleep": seconds,
# "weights": content}}.
FAKE_ENGINE = """
import json, os, sys, time, zipfile
from pathlib import Path

root = Path(sys.argv[1])
words = sys.argv[2:]
flags = [w for w in ("--resume", "--eval-only") if w in words]
config = words[words.index("--config-file") + 1]
rest = words[words.index("--config-file") + 2 + len(flags):]
opts = dict(zip(rest[::2], rest[1::2]))
out = Path(opts["OUTPUT_DIR"])
plans = json.loads((root / "fake.json").read_text())
plan = next((v for k, v in plans.items() if out.name.startswith(k)), {})

def call(event):
    with open(root / "calls.jsonl", "a") as file:
        record = {"event": event, "run": out.name, "flags": flags, "opts": opts,
                  "config": os.path.basename(config), "threads": os.environ["OMP_NUM_THREADS"]}
        file.write(json.dumps(record) + "\\n")

call("start")
for key in ("KD.TEACHER.WEIGHTS", "MODEL.WEIGHTS"):
    if key in opts and not os.path.isfile(opts[key]):
        sys.exit(f"{key} {opts[key]} does not exist")
progress = {"iteration": 1, "max_iter": 4, "phase": "train", "eta_seconds": 0.3}
(out / "progress.json").write_text(json.dumps(progress))
time.sleep(plan.get("sleep", 0))
if plan.get("fail"):
    (out / "last_checkpoint").write_text("model_0000001.pth")
    print("the learning rate exploded")
    sys.exit(3)
truth = json.loads((root / "truth.json").read_text())
shift = plan.get("shift", 0)
found = [
    {"image_id": a["image_id"], "category_id": a["category_id"], "score": 0.9,
     "bbox": [a["bbox"][0] + shift, *a["bbox"][1:]]}
    for a in truth["annotations"]
]
(out / "inference").mkdir(exist_ok=True)
(out / "inference" / "coco_instances_results.json").write_text(json.dumps(found))
with zipfile.ZipFile(out / "model_final.pth", "w") as weights:
    # The same bytes at any time, unless told otherwise.
    weights.writestr(zipfile.ZipInfo("data"), plan.get("weights", out.name))
ap = plan.get("ap", 100.0)
metrics = {"AP": ap, "AP50": 100.0, "AP75": 100.0, "APs": None, "APm": ap, "APl": ap}
result = {"metrics": {"bbox": metrics}, "sec_per_step": plan.get("sec_per_step", 0.1),
          "peak_memory_mb": 100.0, "iterations": 4, "config_file": config,
          "seed": int(opts["SEED"])}
(out / "result.json").write_text(json.dumps(result))
losses = {"total_loss": 3.0, "loss_cls": 2.0, "loss_kd_feature_lp": 1.0}
lines = [json.dumps({"iteration": i, **losses}) for i in (0, 2, 3)]
(out / "metrics.json").write_text("\\n".join(lines))
call("end")
"""

RECIPE = """
name: tiny
teacher: teacher.yaml
baseline: none
seeds: [0, 1]
arms:
  - {name: none, config: student.yaml}
  - {name: l2, config: distilled.yaml, label: L2 on features}
  - {name: again, config: student.yaml, init_from: none}
"""


class Lab:
    """A folder with a recipe, its configs, a test set, and the stand-in engine."""

    def __init__(self, root: Path, data: str) -> None:
        self.root = root
        self.recipe = self.write("recipe.yaml", RECIPE)
        base = f"DATASETS: {{TRAIN: ['{data}'], TEST: ['{data}']}}\nSOLVER: {{MAX_ITER: 4}}\n"
        self.write("base.yaml", base)
        self.write("teacher.yaml", "_BASE_: base.yaml\nSOLVER: {MAX_ITER: 8}\n")
        self.write("student.yaml", "_BASE_: base.yaml\n")
        self.write(
            "distilled.yaml",
            "_BASE_: base.yaml\nMODEL: {META_ARCHITECTURE: DistillationDetector}\n"
            "KD: {DISTILLERS: [FeatureLp], TEACHER: {CONFIG_FILE: teacher.yaml}}\n",
        )
        self.write("fake_engine.py", FAKE_ENGINE)
        self.behave({})
        self.truth = _write_test_set(root)
        register_coco_instances(data, {}, str(root / "truth.json"), str(root))

    @property
    def runner(self) -> list[str]:
        return [sys.executable, str(self.root / "fake_engine.py"), str(self.root)]

    @property
    def out(self) -> Path:
        return self.root / "out"

    def write(self, name: str, text: str) -> str:
        (self.root / name).write_text(text)
        return str(self.root / name)

    def behave(self, plans: dict) -> None:
        self.write("fake.json", json.dumps(plans))

    def calls(self, event: str = "start") -> list[dict]:
        """Return what the stand-in was called with since the last look, and forget it."""
        file = self.root / "calls.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [c for c in map(json.loads, lines) if c["event"] == event or event == "all"]


def _write_test_set(root: Path) -> dict:
    boxes = [[4, 4, 40, 40], [50, 10, 36, 40], [8, 56, 38, 38]]
    names = ["a.png", "b.png", "c.png", "d.png"]
    truth = {
        "images": [
            {"id": i, "file_name": name, "width": 100, "height": 100}
            for i, name in enumerate(names)
        ],
        "categories": [{"id": 7, "name": "disc"}, {"id": 9, "name": "ring"}],
        "annotations": [
            {
                "id": 1 + 3 * i + k,
                "image_id": i,
                "category_id": (7, 9)[k % 2],
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for i in range(len(names))
            for k, box in enumerate(boxes)
        ],
    }
    for name in names:
        Image.fromarray(np.full((100, 100, 3), 120, np.uint8)).save(root / name)
    (root / "truth.json").write_text(json.dumps(truth))
    return truth


@pytest.fixture
def lab(tmp_path, request, monkeypatch):
    monkeypatch.setenv("KD_DET_CACHE", str(tmp_path / "cache"))  # digests of these files
    data = f"cli_{request.node.name}"
    yield Lab(tmp_path, data)
    DatasetCatalog.remove(data)
    MetadataCatalog.remove(data)


@pytest.fixture(scope="module")
def shared_lab(tmp_path_factory, request):
    """One for all tests of a file."""
    data = f"cli_{request.module.__name__}"
    yield Lab(tmp_path_factory.mktemp("lab"), data)
    DatasetCatalog.remove(data)
    MetadataCatalog.remove(data)
