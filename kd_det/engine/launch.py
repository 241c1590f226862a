"""
Starting one or many processes: Detectron2's launcher on GPUs, or torchrun on GPUs or CPUs.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import launch as detectron2_launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch import nn
from torch.multiprocessing import ProcessRaisedException
from torch.nn.parallel import DistributedDataParallel

from kd_det.engine.job import Job


def launch(main: Callable[[Job], Any], job: Job) -> Any:
    """
    Run `main(job)` in every process of the job.

    Under torchrun the processes exist already and the command-line numbers are not used. Otherwise
    Detectron2's launcher starts one process per GPU.

    Args:
        main: what each process runs.
        job: its arguments --num-gpus, --num-machines, --machine-rank and --dist-url are those of
            Detectron2; under torchrun, MODEL.DEVICE "cpu" keeps the processes off the GPUs.

    Raises:
        RuntimeError: more GPUs are asked for than there are.
        ProcessFailed: one of the processes that were started here ended with an error.
    """
    args, device = job.args, job.cfg.MODEL.DEVICE  # a wrong config stops here, in one process
    if "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return _join_torchrun(main, job, device)
    if args.num_gpus * args.num_machines == 1:
        return main(job)
    found = torch.cuda.device_count()
    if args.num_gpus > found:
        raise RuntimeError(
            f"--num-gpus {args.num_gpus}, but this machine has {found}. For several CPU processes "
            "use `torchrun --nproc-per-node N train_net.py ...`."
        )
    try:
        return detectron2_launch(
            _started,
            args.num_gpus,
            args.num_machines,
            args.machine_rank,
            dist_url=args.dist_url,
            args=(main, job),
        )
    except ProcessRaisedException as error:
        # Its text is the traceback of that process, which has logged it.
        raise ProcessFailed(error.error_index, str(error).strip().splitlines()[-1]) from None


class ProcessFailed(Exception):
    """
    One of several processes ended with an error, which its log file has.

    Args:
        rank: of the process on this machine.
        error: its class and message.
    """

    def __init__(self, rank: int, error: str) -> None:
        super().__init__(f"process {rank} ended with {error}")


def _started(main: Callable[[Job], Any], job: Job) -> Any:
    """Run in a process of its own, which logs the error that it ends with."""
    try:
        return main(job)
    except Exception:
        log_error()
        raise


def log_error() -> None:
    """Write the error that is being handled to the run's log, if that is open already."""
    logger = logging.getLogger("kd_det")
    if logger.handlers:  # without any, Python would print the traceback on the terminal
        logger.error("The job ended with an error:", exc_info=True)


def _join_torchrun(main: Callable[[Job], Any], job: Job, device: str) -> Any:
    use_gpu = torch.cuda.is_available() and device != "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if use_gpu:
        torch.cuda.set_device(local_rank)
    # While the first process computes metrics, the others wait for it.
    dist.init_process_group("nccl" if use_gpu else "gloo", timeout=DEFAULT_TIMEOUT)
    _create_local_group(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    comm.synchronize()
    out = main(job)
    # Not after an error: on GPUs it waits for the others, which wait for this one.
    dist.destroy_process_group()
    return out


def _create_local_group(local_size: int) -> None:
    """Tell Detectron2's `comm` which processes share this machine."""
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(local_size)
        return
    for machine in range(dist.get_world_size() // local_size):
        ranks = list(range(machine * local_size, (machine + 1) * local_size))
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group


def distribute(model: nn.Module) -> nn.Module:
    """
    Wrap a model in DDP if there is more than one process; on a GPU, on this process's own.

    SyncBN works on GPUs alone: several CPU processes need another norm.

    Raises:
        ValueError: several CPU processes and a SyncBN.
    """
    if comm.get_world_size() == 1:
        return model
    on_gpu = next(model.parameters()).device.type == "cuda"
    if not on_gpu and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise ValueError(
            "SyncBN synchronises GPUs, and this job runs on several CPU processes; set the NORM "
            "keys that "
            'say "SyncBN" to "BN".'
        )
    devices = [comm.get_local_rank()] if on_gpu else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
