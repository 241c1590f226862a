"""Capturing module outputs: by path and call, by reference, and leaving nothing behind."""

import copy
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

from kd_det.distillation.capture import (
    CapturePath,
    FeatureCapture,
    StopForward,
    tensors_of,
)


class Head(nn.Module):
    """Two convolution blocks, called once per level."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.cls_subnet = nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.ReLU(inplace), nn.Conv2d(4, 4, 1), nn.ReLU(inplace)
        )
        self.score = nn.Conv2d(4, 1, 1)
        self.spare = nn.Linear(1, 1)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [self.score(self.cls_subnet(x)) for x in maps]


class Detector(nn.Module):
    """A backbone with three levels and a head; the forward can be made to fail at its end."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 1)
        self.head = Head(inplace)
        self.fails = False
        self.ran_to_the_end = 0

    def forward(self, image: Tensor) -> list[Tensor]:
        x = self.backbone(image)
        out: list[Tensor] = self.head([x, x[..., ::2, ::2], x[..., ::4, ::4]])
        if self.fails:
            raise ZeroDivisionError
        self.ran_to_the_end += 1
        return out


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def capture_of(model: nn.Module, *paths: str) -> tuple[FeatureCapture, list[CapturePath]]:
    parsed = [CapturePath.parse(path, model) for path in paths]
    return FeatureCapture(model, parsed), parsed


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_one_entry_per_call() -> None:
    model = Detector()
    capture, (backbone, subnet, second, score) = capture_of(
        model, "backbone", "head.cls_subnet", "head.cls_subnet@1", "head.score"
    )
    with capture.record() as captures:
        out = model(IMAGE)
    assert [len(captures.get(p)) for p in (backbone, subnet, second, score)] == [1, 3, 1, 3]
    assert [x.shape[-1] for x in captures.get(subnet)] == [8, 4, 2]
    assert captures.get(second)[0] is captures.get(subnet)[1]
    assert all(a is b for a, b in zip(captures.get(score), out, strict=True))
    assert captures.order == ["backbone", *["head.cls_subnet", "head.score"] * 3]


def test_not_cloned_and_on_the_graph() -> None:
    model = Detector()
    outputs: list[Tensor] = []
    model.backbone.register_forward_hook(lambda module, args, output: outputs.append(output))
    capture, (path,) = capture_of(model, "backbone")
    with capture.record() as captures:
        model(IMAGE)
    (kept,) = captures.get(path)
    assert kept is outputs[0]
    assert kept.untyped_storage().data_ptr() == outputs[0].untyped_storage().data_ptr()
    kept.sum().backward()
    assert model.backbone.weight.grad is not None


def test_the_empty_path_is_the_model_itself() -> None:
    model = Detector()
    capture, (path,) = capture_of(model, "")
    with capture.record() as captures:
        out = model(IMAGE)
    assert captures.get(path)[0] is out


@pytest.mark.parametrize(
    ("text", "module", "call"),
    [
        ("head.cls_subnet#0", "head.cls_subnet.1", None),
        ("head.cls_subnet#1", "head.cls_subnet.3", None),
        ("head.cls_subnet#1@2", "head.cls_subnet.3", 2),
        ("#0", "head.cls_subnet.1", None),
        ("head.cls_subnet.1#0", "head.cls_subnet.1", None),
        ("backbone@0", "backbone", 0),
        ("backbone", "backbone", None),
    ],
)
def test_parse(text: str, module: str, call: int | None) -> None:
    assert CapturePath.parse(text, Detector()) == CapturePath(module, call)


@pytest.mark.parametrize("inplace", [False, True])
def test_an_activation_path_captures_what_the_activation_returns(inplace: bool) -> None:
    model = Detector(inplace)
    capture, (path,) = capture_of(model, "head.cls_subnet#0@0")
    with capture.record() as captures:
        model(IMAGE)
    (kept,) = captures.get(path)
    expected = model.head.cls_subnet[0](model.backbone(IMAGE)).relu()
    torch.testing.assert_close(kept, expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("backbone@", "'backbone@': expected a number after '@'"),
        ("backbone@x", "expected a number after '@'"),
        ("backbone@-1", "expected a number after '@'"),
        ("head.cls_subnet#one", "expected a number after '#'"),
        ("head.cls_subnet#2", "'head.cls_subnet#2': the module has 2 ReLU activations"),
        ("backbone#0", "the module has 0 ReLU activations"),
        ("head.cls_subnets#0", "no module 'head.cls_subnets'; .*nearest.* head.cls_subnet,"),
    ],
)
def test_parse_errors(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CapturePath.parse(text, Detector())


@pytest.mark.parametrize(
    ("text", "near"),
    [("backbon", "backbone"), ("head.cls_subnet.9", "head.cls_subnet"), ("score", "head.score")],
)
def test_unknown_paths_name_the_nearest(text: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"^Detector has no module '{text}' to capture") as error:
        FeatureCapture(Detector(), [CapturePath(text)])
    assert near in str(error.value)
    assert str(error.value).endswith("A detector's pyramid is 'backbone'.")


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_are_there_during_the_pass_only(fails: bool) -> None:
    model = Detector()
    model.fails = fails
    capture, _ = capture_of(model, "backbone", "head.score")
    assert hooks_of(model) == 0
    try:
        with capture.record():
            assert hooks_of(model) == 2
            model(IMAGE)
    except ZeroDivisionError:
        assert fails
    assert hooks_of(model) == 0


def test_hooks_of_others_stay() -> None:
    model = Detector()
    model.backbone.register_forward_hook(lambda module, args, output: None)
    capture, _ = capture_of(model, "backbone")
    with capture.record():
        model(IMAGE)
    assert hooks_of(model) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_kept_past_the_step(fails: bool) -> None:
    model = Detector()
    model.fails = fails
    capture, (path,) = capture_of(model, "backbone")

    def step() -> "weakref.ref[Tensor]":
        with capture.record() as captures:
            try:
                model(IMAGE)
            except ZeroDivisionError:
                assert fails
        return weakref.ref(captures.get(path)[0])

    kept = step()
    assert kept() is None


def test_steps_do_not_add_up() -> None:
    model = Detector()
    capture, (path,) = capture_of(model, "head.score")
    for _ in range(2):
        with capture.record() as captures:
            model(IMAGE)
        assert len(captures.get(path)) == 3


def test_under_autocast_keeps_the_tensor_the_model_uses() -> None:
    model = Detector()
    capture, (path,) = capture_of(model, "backbone")
    with capture.record() as captures, torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(IMAGE)
    (kept,) = captures.get(path)
    assert kept.dtype == out[0].dtype == torch.bfloat16
    kept.float().sum().backward()
    assert model.backbone.weight.grad is not None


def test_in_place_changes_are_found() -> None:
    model = Detector(inplace=True)
    capture, (conv, relu) = capture_of(model, "head.cls_subnet.0", "head.cls_subnet.1")
    with capture.record() as captures:
        model(IMAGE)
    with pytest.raises(RuntimeError, match=r"'head.cls_subnet.0' was modified in place"):
        captures.get(conv)
    assert len(captures.get(relu)) == 3


def test_in_place_changes_through_a_view_and_inside_a_container_are_found() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neck = _Neck()

        def forward(self, x: Tensor) -> None:
            self.neck(x)["levels"][1][:, 0].add_(1)

    model = Nested()
    capture, (path,) = capture_of(model, "neck")
    with capture.record() as captures:
        model(torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match=r"modified in place"):
        captures.get(path)


class _Neck(nn.Module):
    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        return {"levels": [x, x + 1]}


def test_only_the_wanted_call_is_checked() -> None:
    model = Detector()
    capture, (first, second) = capture_of(model, "head.score@0", "head.score@1")
    with capture.record() as captures:
        model(IMAGE)
    with torch.no_grad():
        captures.get(second)[0].add_(1)
    assert len(captures.get(first)) == 1
    with pytest.raises(RuntimeError, match=r"modified in place"):
        captures.get(second)


def test_stop_forward_ends_the_pass_silently() -> None:
    model = Detector()
    capture, (backbone, subnet) = capture_of(model, "backbone", "head.cls_subnet")
    with capture.record(stop_after=2) as captures:
        model(IMAGE)
    assert model.ran_to_the_end == 0
    assert captures.order == ["backbone", "head.cls_subnet"]
    assert len(captures.get(backbone)) == len(captures.get(subnet)) == 1
    assert hooks_of(model) == 0
    with capture.record(stop_after=5):
        model(IMAGE)
    assert model.ran_to_the_end == 1


def test_stop_forward_is_raised_inside_the_model() -> None:
    """So that a wrapper of the model can tell an early stop from a failure."""
    model = Detector()
    seen: list[type] = []
    forward = model.head.forward

    def watched(maps: list[Tensor]) -> list[Tensor]:
        try:
            return forward(maps)
        except StopForward as stop:
            seen.append(type(stop))
            raise

    model.head.forward = watched  # type: ignore[method-assign]
    capture, _ = capture_of(model, "head.score")
    with capture.record(stop_after=1):
        model(IMAGE)
    assert seen == [StopForward]


def test_other_errors_are_not_swallowed() -> None:
    model = Detector()
    model.fails = True
    capture, _ = capture_of(model, "backbone")
    with pytest.raises(ZeroDivisionError), capture.record(stop_after=9):
        model(IMAGE)


@pytest.mark.parametrize("during", [False, True])
def test_models_can_be_copied_and_pickled_after_capture(during: bool) -> None:
    model = Detector()
    capture, _ = capture_of(model, "backbone", "head")
    with capture.record():
        model(IMAGE)
        # While hooks are attached a copy still works, since they hold no more than the captures.
        twin = copy.deepcopy(model) if during else None
    twin = twin or pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert all(torch.equal(a, b) for a, b in zip(model(IMAGE), twin(IMAGE), strict=True))
    assert during or hooks_of(twin) == 0


def test_missing_calls_are_named() -> None:
    model = Detector()
    capture, (spare, third) = capture_of(model, "head.spare", "head.score@3")
    with capture.record() as captures:
        model(IMAGE)
    with pytest.raises(RuntimeError, match=r"module 'head.spare', but it was called 0 times"):
        captures.get(spare)
    with pytest.raises(RuntimeError, match=r"call 3 of module 'head.score', but it was called 3"):
        captures.get(third)


@pytest.mark.parametrize(
    ("paths", "needed"),
    [
        (["backbone"], 1),
        (["backbone@0", "head.cls_subnet@1"], 3),
        (["head.cls_subnet@1", "backbone"], 3),
        (["head.cls_subnet"], 3),
        (["head.cls_subnet@0", "head.score"], 6),
        (["head.cls_subnet@0", "head.score@1"], 4),
    ],
)
def test_count_needed_is_where_the_last_wanted_capture_fires(paths: list[str], needed: int) -> None:
    model = Detector()
    capture, parsed = capture_of(model, *paths)
    with capture.record() as captures:
        model(IMAGE)
    assert capture.count_needed(captures.order) == needed
    with capture.record(stop_after=needed) as stopped:
        model(IMAGE)
    for path in parsed:
        assert len(stopped.get(path)) == len(captures.get(path))
    wanted = {p: len(captures.get(p)) if p.call is None else p.call + 1 for p in parsed}
    assert not all(captures.order[: needed - 1].count(p.module) >= n for p, n in wanted.items())


def test_count_needed_names_what_did_not_fire() -> None:
    model = Detector()
    capture, _ = capture_of(model, "head.spare")
    with pytest.raises(RuntimeError, match=r"module 'head.spare' runs 0 times"):
        capture.count_needed(["backbone"])
    capture, _ = capture_of(model, "backbone@1")
    with pytest.raises(RuntimeError, match=r"module 'backbone' runs 1 times .* wanted 1"):
        capture.count_needed(["backbone"])


def test_tensors_of_nested_outputs() -> None:
    a, b, c = (torch.full((), float(i)) for i in range(3))
    found = tensors_of({"x": [a, (b, None)], "y": "text", "z": c})
    assert [x.item() for x in found] == [0, 1, 2]
    assert tensors_of(None) == []
