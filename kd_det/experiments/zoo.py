"""The list of teachers that ship, and how a maintainer adds what a training run made."""

import os
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import nn

from kd_det.config import load_config, student_cfg
from kd_det.data import register_from_config
from kd_det.distillation.teacher import load_strictly
from kd_det.engine.trainer import DistillationTrainer
from kd_det.files import read_json, sha256_of
from kd_det.zoo.export import export_weights
from kd_det.zoo.index import Entry, read_entries, write_entry


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


def add(
    name: str,
    *,
    config_file: str,
    run: Path,
    test: list[str],
    summary: str,
    licence: str,
    folder: Path | None = None,
) -> None:
    """
    Ship the final checkpoint of a run: export it, measure what ships, write its index entry.

    Args:
        name: such as "shapes2/fcos_r18".
        config_file: of the run, from the root of the repository.
        run: folder of the finished run.
        test: data sets to report AP of.
        summary: what net it is, in a few words.
        licence: SPDX name.
        folder: another zoo's folder, instead of the package's.

    Raises:
        FileNotFoundError: the run has not ended.
    """
    cfg = load_config(config_file)
    result = read_json(run / "result.json")
    if not result or not result["iterations"]:
        raise FileNotFoundError(
            f"{run} holds no result.json of a training run; give the OUTPUT_DIR of a run of "
            f"{config_file} that has ended."
        )
    register_from_config(cfg.KD.DATASETS)
    DatasetCatalog.get(cfg.DATASETS.TRAIN[0])  # fills in the names of its classes
    path = export_weights(run / "model_final.pth", name, folder)
    model = build_model(student_cfg(cfg))
    load_strictly(model, str(path))
    # What ships is measured, not what was trained: half precision rounds.
    ap = {name: _ap(cfg, model, name) for name in test}
    entry = Entry(
        name=name,
        sha256=sha256_of(path),
        size_bytes=os.path.getsize(path),
        summary=summary,
        parameters=sum(p.numel() for p in model.parameters()),
        classes=list(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes),
        trained_on=list(cfg.DATASETS.TRAIN),
        ap=ap,
        licence=licence,
        config=config_file,
        command=f"python train_net.py --config-file {config_file}",
        seed=result["seed"],
        iterations=result["iterations"],
        hours=round(result["iterations"] * result["sec_per_step"] / 3600, 2),
    )
    write_entry(entry, folder)


def _ap(cfg: CfgNode, model: nn.Module, data_set: str) -> float:
    cfg = cfg.clone()
    cfg.DATASETS.TEST = (data_set,)
    metrics = DistillationTrainer.test(cfg, model)
    return round(float(metrics["bbox"]["AP"]), 2)
