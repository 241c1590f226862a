"""SSIM in other precisions and layouts, and its errors."""

import pytest
import torch
from ssim_scenes import dissimilarity, gradient, random_maps, similarity

from kd_det.functional.ssim import DEFAULT_SSIM, SSIMOptions, min_max_normalize


def test_autocast_changes_nothing():
    s, t = (x.float() for x in random_maps((2, 3, 25, 42)))
    plain, plain_grad = dissimilarity(s, t), gradient(s, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, cast_grad = dissimilarity(s, t), gradient(s, t)
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(cast_grad, plain_grad)


def test_low_precision_matrix_products_are_not_used_and_the_setting_is_kept():
    s, t = (x.float() for x in random_maps((2, 3, 25, 42)))
    plain = dissimilarity(s, t)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(dissimilarity(s, t), plain)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(dtype):
    s, t = (x.to(dtype) for x in random_maps((1, 2, 13, 21)))
    loss = dissimilarity(s, t)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(dissimilarity(s.double(), t.double()).item(), abs=1e-6)
    assert gradient(s, t).dtype == dtype
    # Below the smallest float16 until the loss scale is on it.
    leaf = (s + 0).requires_grad_()
    (dissimilarity(leaf, t) * 2**16).backward()
    wide = gradient(s.double(), t.double())
    torch.testing.assert_close(leaf.grad.double() / 2**16, wide, rtol=1e-2, atol=1e-6)


def test_float32_keeps_its_digits_on_large_offsets():
    # E[x^2] - mu^2 without centring would lose the variance of 1e-4 beside a mean of 1.
    s, t = random_maps((1, 2, 32, 32))
    s, t = 0.99 + 0.01 * s, 0.99 + 0.01 * t
    wide = gradient(s, t, normalize="none")
    single = gradient(s.float(), t.float(), normalize="none").double()
    exact = gradient(s.float().double(), t.float().double(), normalize="none")
    assert (single - exact).norm() < 1e-4 * wide.norm()


def test_channels_last_equals_contiguous():
    s, t = random_maps((2, 6, 7, 11))
    for elements in (77 * 2, None):
        options = {"chunk_elements": elements}
        last = [x.contiguous(memory_format=torch.channels_last) for x in (s, t)]
        torch.testing.assert_close(dissimilarity(*last, **options), dissimilarity(s, t, **options))
        torch.testing.assert_close(gradient(*last, **options), gradient(s, t, **options))
        torch.testing.assert_close(similarity(*last, **options), similarity(s, t, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"border": "valid"}, r"11x11.*found 7x12"),
        ({"border": "zero"}, r"border='zero'.*reflect"),
        ({"window": "disc"}, r"window='disc'"),
        ({"normalize": "batch"}, r"normalize='batch'.*level"),
        ({"window_size": 4}, r"odd.*found 4"),
        ({"sigma": 0.0}, r"sigma positive"),
        ({"exponents": (0, 0, 0)}, r"nothing to compare"),
        ({"exponents": (1, 2, 1)}, r"\(1, 2, 1\)"),
        ({"chunk_elements": 0}, r"chunk_elements.*found 0"),
        ({"mask": torch.ones(1, 7, 12)}, r"\(1, 1, 7, 12\), found \(1, 7, 12\)"),
        (
            {"mask": torch.ones(1, 1, 7, 12), "border": "valid", "window_size": 3},
            r"mask needs border",
        ),
    ],
)
def test_bad_options_are_named(options, message):
    x = torch.rand(1, 2, 7, 12)
    with pytest.raises(ValueError, match=message):
        dissimilarity(x, x, **options)


def test_options_are_one_hashable_value():
    assert SSIMOptions() == DEFAULT_SSIM
    # As yaml has them; windows are cached by their options.
    listed = SSIMOptions(exponents=[1, 0, 1])  # type: ignore[arg-type]
    assert hash(listed) == hash(SSIMOptions(exponents=(1, 0, 1)))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(1, 2, 7, 12\) and \(1, 3, 7, 12\)"):
        dissimilarity(torch.rand(1, 2, 7, 12), torch.rand(1, 3, 7, 12))
    with pytest.raises(ValueError, match="min-max per 'none'"):
        min_max_normalize(torch.rand(1, 2, 7, 12), per="none")
