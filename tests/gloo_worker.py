"""One of two processes that average numbers. It starts anew, so it imports torch and no package."""

import runpy
from pathlib import Path

import torch
from torch import distributed

REDUCE = Path(__file__).parents[1] / "kd_det" / "functional" / "reduce.py"


def work(rank: int, folder: str) -> None:
    """Average over both processes; write what came out."""
    names = runpy.run_path(str(REDUCE))
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    given = torch.tensor([rank, 3])
    number = names["mean_number_over_processes"](rank, torch.device("cpu"))
    mean = names["mean_over_processes"](given)
    torch.save([mean, given, number], Path(folder) / f"{rank}.pth")
    distributed.destroy_process_group()
