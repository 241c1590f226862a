"""Several CPU processes through torchrun: one run, the same gradients, one set of files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from tiny_runs import TinyTeacher
from torch import nn

from kd_det.engine import launch as launch_module
from kd_det.engine.main import main

MakeTeacher = Callable[[str], TinyTeacher]


def test_two_processes_equal_one_with_the_double_batch(
    tiny_teacher: MakeTeacher, tmp_path: Path
) -> None:
    """
    Compare parameters and optimizer state after 3 steps, the first of them with an idle distiller.

    A process sees half the batch, so the two agree only where a loss is a plain mean over images.
    RPN's is, once its sampling takes all anchors; the dense detectors divide by the positives of
    their own process. For the same reason: images of one size, frozen BatchNorm, no random flips.
    """
    data = tiny_runs.make_data(tmp_path / "data", name="one_size", sizes=[(96, 64)])
    keys = {
        **tiny_runs.distil_keys("faster_rcnn", tiny_teacher("fcos")),
        "KD.STUDENT.META_ARCHITECTURE": "ProposalNetwork",
        "KD.FEATURE_LP.SCHEDULE.WARMUP_ITERS": 1,
        "KD.GRAD_SHARE_PERIOD": 1,
        "KD.DATASETS": [data],
        "DATASETS.TRAIN": [data["name"]],
        "INPUT.RANDOM_FLIP": "none",
        "MODEL.RESNETS.NORM": "FrozenBN",
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 20000,
        "SOLVER.BASE_LR": 0.1,
        "SOLVER.CHECKPOINT_PERIOD": 2,
    }
    config = tiny_runs.write_config(tmp_path / "run.yaml", "faster_rcnn", keys)
    one, two = tmp_path / "one", tmp_path / "two"
    main(["--config-file", str(config), "OUTPUT_DIR", str(one)])
    tiny_runs.torchrun(config, "OUTPUT_DIR", str(two))

    names = ["model_0000001.pth", "model_final.pth"]
    assert sorted(path.name for path in two.glob("*.pth*")) == names
    a, b = (torch.load(folder / "model_final.pth") for folder in (one, two))
    for part in ("model", "adapters"):
        left, right = (c["model"] if part == "model" else c["kd"]["adapters"] for c in (a, b))
        assert left.keys() == right.keys()
        for key in left:
            torch.testing.assert_close(left[key], right[key], rtol=1e-5, atol=1e-5)
    # SGD's momentum is the sum of the gradients so far.
    momenta = [c["trainer"]["_trainer"]["optimizer"]["state"] for c in (a, b)]
    largest = max(x["momentum_buffer"].abs().max().item() for x in momenta[0].values())
    assert largest > 1e-2
    for key, state in momenta[0].items():
        other = momenta[1][key]["momentum_buffer"]
        torch.testing.assert_close(state["momentum_buffer"], other, rtol=1e-3, atol=1e-5)
    initial = tiny_runs.load_config(str(config))
    tiny_runs.seed_all_rng(initial.SEED)
    start = tiny_runs.build_model(initial).student.state_dict()
    moved = max((start[key] - a["model"][key]).abs().max().item() for key in start)
    assert moved > 1e-3  # far more than the tolerance


@pytest.mark.slow
def test_whole_run_with_evaluation_and_resume(
    tiny_teacher: MakeTeacher, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    keys = {
        **tiny_runs.distil_keys("fcos", tiny_teacher("retinanet")),
        "KD.DATASETS": [tiny_data],
        "DATASETS.TEST": [tiny_data["name"]],
        "TEST.EVAL_PERIOD": 2,
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "KD.FEATURE_LP.WEIGHT": None,
    }
    config = tiny_runs.write_config(tmp_path / "run.yaml", "fcos", keys)
    tiny_runs.torchrun(config)
    folder = tmp_path / "run"
    assert (folder / "result.json").is_file()
    assert torch.load(folder / "model_final.pth")["iteration"] == 2

    printed = tiny_runs.torchrun(config, "--resume", "SOLVER.MAX_ITER", "5")
    assert "Resumed from" in printed
    content = torch.load(folder / "model_final.pth")
    assert content["iteration"] == 4
    assert sorted(path.name for path in folder.glob("model_*.pth")) == [
        "model_0000001.pth",
        "model_0000003.pth",
        "model_final.pth",
    ]
    tiny_runs.torchrun(config, "--eval-only")

    # The weight, which two processes measured together, goes on in one.
    before = content["kd"]["auto_weights"]["FeatureLp"]["logs"]
    main(["--config-file", str(config), "--resume", "SOLVER.MAX_ITER", "6"])
    after = torch.load(folder / "model_final.pth")["kd"]["auto_weights"]["FeatureLp"]["logs"]
    assert len(before) == 5 and after[:5] == before and len(after) == 6


class TestDistribute:
    def test_one_process_needs_no_wrapper(self) -> None:
        model = nn.Linear(1, 1)
        assert launch_module.distribute(model) is model

    def test_no_search_for_unused_parameters(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given: dict[str, Any] = {}

        def record(model: nn.Module, **options: Any) -> nn.Module:
            given.update(options)
            return model

        monkeypatch.setattr(launch_module, "DistributedDataParallel", record)
        monkeypatch.setattr(launch_module.comm, "get_world_size", lambda: 2)
        launch_module.distribute(nn.Linear(1, 1))
        assert not given.get("find_unused_parameters", False)
        assert given["device_ids"] is None


@pytest.mark.parametrize("detector", list(tiny_runs.META))
@pytest.mark.parametrize("iteration", [0, 3])
@pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy:UserWarning")
def test_every_parameter_has_a_gradient_in_every_step(
    tiny_student: Callable[..., Any],
    tiny_teacher: MakeTeacher,
    tiny_records: list[dict[str, Any]],
    detector: str,
    iteration: int,
) -> None:
    """What makes the search needless, whether the distiller is idle (0) or not (3)."""
    keys = {"KD.FEATURE_LP.SCHEDULE.WARMUP_ITERS": 2}
    cfg = tiny_student(detector, tiny_teacher("retinanet"), keys)
    model = tiny_runs.build_model(cfg)
    losses, _ = tiny_runs.losses_at(model, tiny_runs.batch_of(cfg, tiny_records), iteration)
    assert ("loss_kd_feature_lp_idle" in losses) is (iteration == 0)
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
