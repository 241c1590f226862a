"""In which precision the maths of this package is done: float32 at least, and all of its digits."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if any of the tensors is, else float32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or unchanged if it is float64 already."""
    return x.to(working_dtype(x))


@contextmanager
def full_float32_matmul() -> Iterator[None]:
    """Keep TF32 and bfloat16 out of float32 matrix products, whatever the process allows."""
    # Since torch 2.9; the older functions below raise once a program has used these.
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        matmuls = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
        saved = [matmul.fp32_precision for matmul in matmuls]
        try:
            for matmul in matmuls:
                matmul.fp32_precision = "ieee"
            yield
        finally:
            for matmul, precision in zip(matmuls, saved, strict=True):
                matmul.fp32_precision = precision
    else:
        precision = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
