"""
`kd-det zoo`: the teachers that ship with kd_det.

    kd-det zoo                   list them
    kd-det zoo add NAME ...      for maintainers: ship what a training run made

Name one as KD.TEACHER.WEIGHTS (with its config as KD.TEACHER.CONFIG_FILE) or as MODEL.WEIGHTS.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from tabulate import tabulate

from kd_det.config import load_config, student_cfg
from kd_det.data import register_from_config
from kd_det.distillation.teacher import load_strictly
from kd_det.engine.trainer import DistillationTrainer
from kd_det.files import read_json, sha256_of
from kd_det.zoo.export import export_weights
from kd_det.zoo.index import Entry, read_entries, write_entry


def main(argv: Sequence[str]) -> int:
    """List the teachers, or add one; return the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="kd-det zoo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="add")
    add = commands.add_parser("add", help="for maintainers: ship what a training run made")
    add.add_argument("name", metavar="NAME", help="such as shapes2/fcos_r18")
    add.add_argument("--config-file", required=True, help="config of the run, from the root")
    add.add_argument("--run", required=True, type=Path, help="folder of the finished run")
    add.add_argument("--test", required=True, nargs="+", help="data sets to report AP of")
    add.add_argument("--summary", required=True, help="what net it is, in a few words")
    add.add_argument("--licence", default="Apache-2.0", help="SPDX name; default: Apache-2.0")
    add.add_argument("--folder", type=Path, help="another zoo's folder, instead of the package's")
    args = parser.parse_args(argv)
    if args.command == "add":
        _add(args)
    print(table(args.folder if args.command else None))
    return 0


def table(folder: Path | None = None) -> str:
    """Return the list as text; `folder` as in `read_entries`."""
    rows = [
        {
            "weights": entry.address,
            "net": entry.summary,
            "classes": len(entry.classes),
            "MB": f"{entry.size_bytes / 1e6:.1f}",
            "AP": ", ".join(f"{ap:.1f} ({name})" for name, ap in entry.ap.items()),
            "licence": entry.licence,
            "config": entry.config,
            "hours": f"{entry.hours:.1f}",
        }
        for entry in read_entries(folder).values()
    ]
    return tabulate(rows, headers="keys", disable_numparse=True)


def _add(args: argparse.Namespace) -> None:
    cfg = load_config(args.config_file)
    result = read_json(args.run / "result.json")
    if not result or not result["iterations"]:
        raise FileNotFoundError(
            f"{args.run} holds no result.json of a training run; give the OUTPUT_DIR of a run of "
            f"{args.config_file} that has ended."
        )
    register_from_config(cfg.KD.DATASETS)
    path = export_weights(args.run / "model_final.pth", args.name, args.folder)
    model = build_model(student_cfg(cfg))
    load_strictly(model, str(path))
    # What ships is measured, not what was trained: half precision rounds.
    ap = {name: _ap(cfg, model, name) for name in args.test}
    entry = Entry(
        name=args.name,
        sha256=sha256_of(path),
        size_bytes=os.path.getsize(path),
        summary=args.summary,
        parameters=sum(p.numel() for p in model.parameters()),
        classes=list(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes),
        trained_on=list(cfg.DATASETS.TRAIN),
        ap=ap,
        licence=args.licence,
        config=args.config_file,
        command=f"python train_net.py --config-file {args.config_file}",
        seed=result["seed"],
        iterations=result["iterations"],
        hours=round(result["iterations"] * result["sec_per_step"] / 3600, 2),
    )
    write_entry(entry, args.folder)


def _ap(cfg: CfgNode, model: object, data_set: str) -> float:
    cfg = cfg.clone()
    cfg.DATASETS.TEST = (data_set,)
    metrics = DistillationTrainer.test(cfg, model)
    return round(float(metrics["bbox"]["AP"]), 2)
