"""Learning rates that differ between the parts of a model."""

from typing import Any

from torch import nn


def slow_bottom_up(
    groups: list[dict[str, Any]], model: nn.Module, factor: float
) -> list[dict[str, Any]]:
    """
    Split optimizer groups in two: the parameters of the net below the pyramid learn at lr * factor.

    Args:
        groups: of all parameters that train, each with "params" and "lr".
        model: whose modules called "bottom_up" are meant.
        factor: multiplies their "lr".

    Raises:
        ValueError: the model has no such module.
    """
    slow = {id(p) for name, p in model.named_parameters() if "bottom_up" in name.split(".")}
    if not slow:
        raise ValueError(
            f"SOLVER.BOTTOM_UP_LR_FACTOR is {factor}, but {type(model).__name__} has no module "
            "called bottom_up; set it to 1."
        )
    out = []
    for group in groups:
        parts = [
            [p for p in group["params"] if (id(p) in slow) is inside] for inside in (False, True)
        ]
        rates = (group["lr"], group["lr"] * factor)
        out += [
            {**group, "params": part, "lr": rate}
            for part, rate in zip(parts, rates, strict=True)
            if part
        ]
    return out
