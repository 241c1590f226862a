"""What a step says when its numbers are no longer any."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_ADVICE = (
    "Lower SOLVER.BASE_LR, clip gradients (SOLVER.CLIP_GRADIENTS.ENABLED True), or look at these "
    "images' annotations."
)


def describe_non_finite(
    iteration: int, losses: Mapping[str, float], batch: Sequence[Mapping[str, Any]]
) -> str:
    """
    Return what to say of losses that are not finite; empty where all are.

    Args:
        iteration: of this step.
        losses: of this step, by name.
        batch: its items.
    """
    broken = {k: v for k, v in losses.items() if not abs(v) < float("inf")}
    if not broken:
        return ""
    return (
        f"Not finite at iteration {iteration}: {broken}. Images of the batch: "
        f"{image_names(batch)}. All losses: {dict(losses)}. {_ADVICE}"
    )


@contextlib.contextmanager
def explained(
    iteration: int, last_losses: Mapping[str, float], batch: Sequence[Mapping[str, Any]]
) -> Iterator[None]:
    """
    Raise what a model found wrong with its numbers again, with what is known of the step.

    Detectors assert that boxes are boxes, and RPN that its scores are finite: predictions of a
    model that diverges are neither.

    Args:
        iteration: of this step.
        last_losses: of the step before, by name.
        batch: this step's items.

    Raises:
        FloatingPointError: in place of an AssertionError, or of one that names no iteration.
        RuntimeError, ValueError: as the model raised them, such as a batch norm of one single
            value, with iteration and images.
    """
    try:
        yield
    except (AssertionError, FloatingPointError) as error:
        losses = f"Losses of the step before: {dict(last_losses)}" if last_losses else "First step"
        raise FloatingPointError(
            f"The model stopped at iteration {iteration} ({type(error).__name__}: "
            f"{error}). Images of the batch: {image_names(batch)}. "
            f"{losses}. If losses grow, training diverges. {_ADVICE}"
        ) from error
    except (RuntimeError, ValueError) as error:
        if type(error) not in (RuntimeError, ValueError):
            raise  # others may be caught by their kind, and are made of more than a message
        where = f"iteration {iteration}, images of the batch: {image_names(batch)}"
        raise type(error)(f"{error} ({where})") from error


def image_names(batch: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the ids of a batch's images, or their files where they have none."""
    return [item.get("image_id", item.get("file_name", "?")) for item in batch]
