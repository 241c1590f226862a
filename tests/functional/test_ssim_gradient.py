"""The gradient of SSIM: finite differences, autograd through the parts, what is kept for it."""

import itertools

import pytest
import torch
from ssim_scenes import dissimilarity, gradient, random_maps, similarity
from torch import Tensor

from kd_det.functional.ssim import min_max_normalize

ALL_TERMS = list(itertools.product((0, 1), repeat=3))[1:]


@pytest.mark.parametrize("normalize", ["channel", "none"])
@pytest.mark.parametrize("border", ["reflect", "renorm"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (4, 11), (5, 7), (6, 6)])
def test_gradcheck_sizes(size, border, normalize):
    s, t = random_maps((1, 2, *size))
    s.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: dissimilarity(x, t, border=border, normalize=normalize), (s,)
    )


@pytest.mark.parametrize("border", ["reflect", "renorm", "valid"])
@pytest.mark.parametrize("window", ["gaussian", "box"])
def test_gradcheck_blocks(border, window):
    s, t = random_maps((2, 2, 25, 42))
    s.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: dissimilarity(x, t, border=border, window=window, chunk_elements=1),
        (s,),
        fast_mode=True,
    )


@pytest.mark.parametrize("exponents", ALL_TERMS)
@pytest.mark.parametrize("normalize", ["channel", "image", "level", "none"])
def test_gradcheck_terms_and_normalisations(normalize, exponents):
    s, t = random_maps((2, 2, 4, 5))
    s.requires_grad_()
    options = {"normalize": normalize, "exponents": exponents, "window_size": 5}
    assert torch.autograd.gradcheck(lambda x: dissimilarity(x, t, **options), (s,))


@pytest.mark.parametrize("border", ["reflect", "renorm"])
@pytest.mark.parametrize("normalize", ["channel", "image", "level", "none"])
def test_gradcheck_mask(normalize, border):
    s, t = random_maps((2, 2, 4, 5))
    mask = torch.zeros(2, 1, 4, 5)
    mask[0, 0, :3, :4] = 1
    mask[1, 0, :4, :2] = 1
    mask[1, 0, 1, 1] = 0
    s.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: dissimilarity(x, t, normalize=normalize, border=border, mask=mask), (s,)
    )


@pytest.mark.parametrize("per", ["channel", "image", "level"])
def test_gradcheck_min_max(per):
    s, _ = random_maps((2, 2, 3, 4))
    s.requires_grad_()
    mask = torch.ones(2, 1, 3, 4)
    mask[0, 0, 2] = 0
    assert torch.autograd.gradcheck(lambda x: min_max_normalize(x, per=per), (s,))
    assert torch.autograd.gradcheck(lambda x: min_max_normalize(x, per=per, mask=mask), (s,))


def test_fused_min_max_equals_autograd_through_min_max():
    s, t = random_maps((2, 3, 13, 21))
    s[0, 0] = (s[0, 0] * 4).round() / 4  # many positions share the extremes
    for per in ("channel", "image", "level"):
        leaf = s.clone().requires_grad_()
        scaled = min_max_normalize(leaf, per=per)
        dissimilarity(scaled, min_max_normalize(t, per=per), normalize="none").backward()
        fused = gradient(s, t, normalize=per)
        torch.testing.assert_close(fused, leaf.grad, rtol=0, atol=1e-14)


def test_gradient_scales_with_upstream_and_survives_a_second_backward():
    s, t = random_maps((1, 2, 7, 11))
    expected = gradient(s, t)
    leaf = s.clone().requires_grad_()
    loss = dissimilarity(leaf, t) * 3
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(leaf.grad, 6 * expected)


def test_teacher_gets_no_gradient():
    s, t = random_maps((1, 2, 7, 11))
    s.requires_grad_(), t.requires_grad_()
    dissimilarity(s, t).backward()
    assert s.grad is not None and t.grad is None
    assert not similarity(s, t).requires_grad
    with torch.no_grad():
        assert not dissimilarity(s, t).requires_grad


def test_one_map_is_kept_for_backward():
    s, t = (x.float() for x in random_maps((2, 8, 25, 42)))
    s.requires_grad_()
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = dissimilarity(s, t)
    own = {x.untyped_storage().data_ptr() for x in (s, t)}
    beyond = sum(size for pointer, size in kept.items() if pointer not in own)
    assert 0 < beyond <= s.numel() * s.element_size()
    loss.backward()
