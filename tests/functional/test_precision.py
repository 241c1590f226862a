"""Which type is computed in, and that float32 products keep their digits."""

import pytest
import torch

from kd_det.functional.precision import at_least_float32, full_float32_matmul, working_dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_working_dtype(dtype: torch.dtype) -> None:
    x, half = torch.ones(2, dtype=dtype), torch.ones(2, dtype=torch.float16)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert working_dtype(x) == working_dtype(half, x) == working_dtype(x, half) == expected
    assert at_least_float32(x).dtype == expected


def test_wide_tensors_are_not_copied() -> None:
    for x in (torch.ones(2), torch.ones(2).double()):
        assert at_least_float32(x) is x


def test_the_setting_is_restored_after_an_error() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(KeyError), full_float32_matmul():
            raise KeyError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
