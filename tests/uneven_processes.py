"""One batch whose objects are unevenly spread, as one process sees it and as two do."""

import dataclasses
from pathlib import Path
from typing import Any

import kd_det  # noqa: F401  first, so that compat runs before any import of detectron2

# isort: split
import torch
from contract import Scene, make_scene
from detectron2.utils.events import EventStorage
from tiny_dense import build_tiny, make_image, no_objects
from torch import Tensor, distributed

from kd_det.distillers import PGD

Result = dict[str, Tensor]
DETECTORS = ("atss", "gfl", "autoassign", "ddod", "fsaf", "reppoints")


def pgd(images: list[int]) -> Result:
    """Losses of PGD for some of a scene's two images, and their gradients by image."""
    scene = make_scene(("cls", "reg"))
    # All boxes of the scene in the first image but one, which covers it: each has its positions.
    scene = _pick(dataclasses.replace(scene, boxes=[scene.boxes[0], scene.boxes[1][:1]]), images)
    leaves = [m.requires_grad_() for maps in scene.student.values() for m in maps]
    losses = PGD(top_k=3)(scene.step())
    gradients = torch.autograd.grad(sum(losses.values()), leaves)
    named = {
        f"gradient {i} of image {k}": g[j]
        for i, g in enumerate(gradients)
        for j, k in enumerate(images)
    }
    return {**{key: value.detach() for key, value in losses.items()}, **named}


def _pick(scene: Scene, images: list[int]) -> Scene:
    def rows(maps: list[Tensor]) -> list[Tensor]:
        return [x[images].clone() for x in maps]

    return dataclasses.replace(
        scene,
        student={name: rows(maps) for name, maps in scene.student.items()},
        teacher={name: rows(maps) for name, maps in scene.teacher.items()},
        logits=rows(scene.logits),
        offsets=rows(scene.offsets),
        **{key: [getattr(scene, key)[i] for i in images] for key in ("boxes", "classes")},
        image_sizes=[scene.image_sizes[i] for i in images],
    )


def dense(name: str, images: list[int]) -> Result:
    """Losses of a detector, the gradients of its parameters, and what it counts."""
    batch = [make_image([[4, 4, 40, 36], [50, 20, 90, 60]], [0, 2]), no_objects()]
    model: Any = build_tiny(name)
    model.head.cls_score.bias.data.zero_()  # GFL's divisor, a sum of scores, is at least 1
    model.loss_normalizer = 10.0 * len(images)  # counts positives of the images seen
    with EventStorage():
        losses = model([batch[i] for i in images])
    sum(losses.values()).backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    counts = {key: model.get_buffer(key) for key in getattr(model, "running_buffers", ())}
    return {**{key: value.detach() for key, value in losses.items()}, **gradients, **counts}


def all_results(images: list[int]) -> dict[str, Result]:
    """Return what `pgd` and `dense` return for these images."""
    torch.set_num_threads(1)
    return {"pgd": pgd(images), **{name: dense(name, images) for name in DETECTORS}}


def work(rank: int, folder: str) -> None:
    """Be one of two processes, of which each sees one image; write what came out."""
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.save(all_results([rank]), Path(folder) / f"{rank}.pth")
    distributed.destroy_process_group()
