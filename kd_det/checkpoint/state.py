"""What a run needs to go on, beside the student's tensors and the trainer's state."""

import logging
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from kd_det.distillation.detector import DistillationDetector

_NORMALIZER = "loss_normalizer"
_BUFFERS = "running_buffers"
_logger = logging.getLogger(__name__)


def student_of(model: nn.Module) -> nn.Module:
    """Return the model that ships: the student of a wrapper, or the plain model itself."""
    return model.student if isinstance(model, DistillationDetector) else model


class KDState:
    """
    What a run needs to go on, beside the student's tensors and the trainer's state.

    Args:
        model: a `DistillationDetector` or any plain model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def state_dict(self) -> dict[str, Any]:
        """Return adapters, distillers' tensors, the teacher's identity, what detectors count."""
        out: dict[str, Any] = {_NORMALIZER: loss_normalizers(self._model)}
        buffers = _running_buffers(self._model)
        if buffers:
            out[_BUFFERS] = buffers
        if isinstance(self._model, DistillationDetector):
            out["names"] = list(self._model.active)
            out["adapters"] = _tensors(_adapters(self._model))
            out["distillers"] = _tensors(_distillers(self._model))
            out["auto_weights"] = {
                name: active.auto.state_dict()
                for name, active in self._model.active.items()
                if active.auto is not None
            }
            teacher = self._model.teacher
            if teacher is not None and teacher.identity is not None:
                out["teacher"] = asdict(teacher.identity)
        return out

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Restore what `state_dict` returned.

        Raises:
            ValueError: the checkpoint was made with another teacher or other distillers.
        """
        self._check(state)
        set_loss_normalizers(self._model, state[_NORMALIZER])
        for name, buffer in _running_buffers(self._model).items():
            if name in state.get(_BUFFERS, {}):
                buffer.copy_(state[_BUFFERS][name])
        if not isinstance(self._model, DistillationDetector):
            return
        _load(_adapters(self._model), state["adapters"])
        _load(_distillers(self._model), state["distillers"])
        measured = state.get("auto_weights", {})
        for name, active in self._model.active.items():
            if active.auto is not None and name in measured:
                active.auto.load_state_dict(measured[name])
            elif active.auto is not None:
                _logger.info("%s: its weight was given before, and is measured from here on.", name)
            elif name in measured:
                _logger.info("%s: its weight was set by a SHARE before, and is given now.", name)

    def _check(self, state: dict[str, Any]) -> None:
        """Compare what a checkpoint was made with to this run, before anything is changed."""
        now = self.state_dict()
        advice = "or start afresh with MODEL.WEIGHTS set to the checkpoint."
        names = [sorted(x.get("names", [])) for x in (state, now)]
        if "names" in state and names[0] != names[1]:
            raise ValueError(
                f"The run to resume had the distillers {', '.join(names[0]) or 'none'}, this "
                f"config has {', '.join(names[1]) or 'none'}. Resume with the same "
                f"KD.DISTILLERS, {advice}"
            )
        for key in ("adapters", "distillers"):
            shapes = [{k: v.shape for k, v in x.get(key, {}).items()} for x in (state, now)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"The run to resume had other {key} ({', '.join(shapes[0]) or 'none'}) than "
                    f"this config ({', '.join(shapes[1]) or 'none'}). Resume with the same "
                    f"KD.DISTILLERS and models, {advice}"
                )
        was, own = state.get("teacher"), now.get("teacher")
        if was and own and was["sha256"] != own["sha256"]:
            raise ValueError(
                f"The run to resume was taught by {was['weights']} (sha256 {was['sha256'][:12]}), "
                f"this config names {own['weights']} ({own['sha256'][:12]}). Resume with the same "
                f"teacher, {advice}"
            )


def loss_normalizers(model: nn.Module) -> dict[str, float]:
    """
    Return what a student's modules divide their own losses by, by module.

    A plain attribute of Detectron2's dense detectors, absent from their state dict.
    """
    return {
        name: float(getattr(module, _NORMALIZER))
        for name, module in student_of(model).named_modules()
        # The keypoint head has a word under the same name.
        if isinstance(getattr(module, _NORMALIZER, None), (int, float))
    }


def set_loss_normalizers(model: nn.Module, values: dict[str, float]) -> None:
    """Restore what `loss_normalizers` returned."""
    modules = dict(student_of(model).named_modules())
    for name, value in values.items():
        setattr(modules[name], _NORMALIZER, value)


def _running_buffers(model: nn.Module) -> dict[str, Tensor]:
    """
    Return what a student's modules count while they train, beside what ships.

    A module names such buffers in its attribute `running_buffers`; they are not persistent, so that
    the state dict is that of the model which ships.
    """
    return {
        f"{name}.{key}".strip("."): module.get_buffer(key)
        for name, module in student_of(model).named_modules()
        for key in getattr(module, _BUFFERS, ())
    }


def _adapters(model: DistillationDetector) -> dict[str, nn.Module]:
    return {
        f"{name}-{capture}": modules
        for name, active in model.active.items()
        for capture, modules in active.adapters.items()
    }


def _distillers(model: DistillationDetector) -> dict[str, nn.Module]:
    return {name: active.distiller for name, active in model.active.items()}


def _tensors(modules: dict[str, nn.Module]) -> dict[str, Any]:
    """Return the state of several modules in one flat dict, as a ModuleDict of them would."""
    return {
        f"{name}.{key}": value
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }


def _load(modules: dict[str, nn.Module], state: dict[str, Any]) -> None:
    for name, module in modules.items():
        prefix = f"{name}."
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        module.load_state_dict(own)
