"""SSIM under dead channels, masks, affine maps, flips, chunks."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ssim_scenes import dissimilarity, gradient, random_maps, similarity
from torch import Tensor

from kd_det.functional.ssim import min_max_normalize


def test_dead_channels_are_zero_without_gradient():
    s, t = random_maps((1, 3, 7, 11))
    s[0, 0] = 5.0
    s[0, 1] = 5.0 + 1e-4 * s[0, 1]
    g = gradient(s, t)
    assert torch.equal(g[0, :2], torch.zeros(2, 7, 11).double()) and g[0, 2].abs().max() > 0
    assert torch.equal(min_max_normalize(s)[0, :2], torch.zeros(2, 7, 11).double())
    s[0, 1] = 5.0 + 1.1e-3 * (s[0, 2] - s[0, 2].min()) / (s[0, 2].max() - s[0, 2].min())
    assert gradient(s, t)[0, 1].abs().max() > 0
    # A dead teacher channel is compared as zero, and pulls no gradient to infinity.
    assert torch.isfinite(gradient(t, s)).all()


def padded(x: Tensor, bottom: int, right: int, value: float) -> Tensor:
    return torch.nn.functional.pad(x, (0, right, 0, bottom), value=value)


@settings(deadline=None, max_examples=15)
@given(
    st.integers(1, 14),
    st.integers(1, 14),
    st.integers(0, 9),
    st.integers(0, 9),
    st.sampled_from(["reflect", "renorm"]),
    st.sampled_from(["channel", "image", "level", "none"]),
)
def test_masked_padding_changes_nothing(h, w, bottom, right, border, normalize):
    s, t = random_maps((2, 2, h, w))
    options = {"border": border, "normalize": normalize}
    mask = padded(torch.ones(2, 1, h, w), bottom, right, 0.0)
    s_pad, t_pad = padded(s, bottom, right, 7.0), padded(t, bottom, right, -3.0)
    expected = dissimilarity(s, t, **options)
    torch.testing.assert_close(dissimilarity(s_pad, t_pad, mask=mask, **options), expected)
    g = gradient(s_pad, t_pad, mask=mask, **options)
    torch.testing.assert_close(g, padded(gradient(s, t, **options), bottom, right, 0.0))


def test_mask_leaves_positions_out_of_the_mean():
    s, t = random_maps((2, 3, 8, 9))
    mask = torch.ones(2, 1, 8, 9, dtype=torch.bool)
    mask[:, :, 2:4, 3:5] = False
    ssim = similarity(s, t, normalize="none")
    expected = (1 - ssim[mask.expand_as(ssim)].mean()) / 2
    torch.testing.assert_close(dissimilarity(s, t, normalize="none", mask=mask), expected)


def test_images_of_different_extent_in_one_batch():
    s, t = random_maps((2, 2, 9, 12))
    mask = torch.zeros(2, 1, 9, 12)
    mask[0, 0, :6, :12] = 1
    mask[1, 0, :9, :8] = 1
    alone = [
        dissimilarity(s[n : n + 1, :, :h, :w], t[n : n + 1, :, :h, :w])
        for n, (h, w) in enumerate(((6, 12), (9, 8)))
    ]
    torch.testing.assert_close(dissimilarity(s, t, mask=mask), sum(alone) / 2)  # 72 positions each


def test_nothing_to_compare_is_an_attached_zero():
    s, t = random_maps((2, 3, 4, 5))
    s.requires_grad_()
    loss = dissimilarity(s, t, mask=torch.zeros(2, 1, 4, 5))
    loss.backward()
    assert loss.item() == 0 and torch.equal(s.grad, torch.zeros_like(s))
    empty = torch.zeros(0, 3, 4, 5, requires_grad=True)
    loss = dissimilarity(empty, empty.detach())
    loss.backward()
    assert loss.item() == 0 and empty.grad.shape == empty.shape


@settings(deadline=None, max_examples=15)
@given(
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(2, 20),
    st.integers(2, 20),
    st.floats(0.1, 20),
    st.floats(-10, 10),
    st.integers(0, 1000),
)
def test_invariants(n, c, h, w, scale, shift, seed):
    s, t = random_maps((n, c, h, w), seed)
    loss = dissimilarity(s, t)
    assert -1e-12 <= loss.item() <= 1
    # Not exactly: 1e-6 is added to a range of 0.1 or more.
    assert dissimilarity(scale * t + shift, t).item() < 1e-9
    torch.testing.assert_close(dissimilarity(scale * s + shift, t), loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dissimilarity(s.flip(2, 3), t.flip(2, 3)), loss)
    torch.testing.assert_close(dissimilarity(s.mT, t.mT), loss)
    torch.testing.assert_close(dissimilarity(t, s), loss)
    torch.testing.assert_close(
        sum(dissimilarity(s[:, k : k + 1], t[:, k : k + 1]) for k in range(c)) / c, loss
    )
    g = gradient(s, t)
    assert g.sum((2, 3)).abs().max() < 1e-12 and (g * s).sum((2, 3)).abs().max() < 1e-4


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 4000), st.booleans())
def test_chunks_change_nothing(elements, masked):
    s, t = random_maps((3, 5, 7, 11))
    mask = (torch.arange(11) < 8).expand(3, 1, 7, 11) if masked else None
    for normalize in ("channel", "level"):
        whole, parts = (
            {"normalize": normalize, "mask": mask, "chunk_elements": k} for k in (None, elements)
        )
        torch.testing.assert_close(
            dissimilarity(s, t, **parts), dissimilarity(s, t, **whole), rtol=0, atol=1e-12
        )
        torch.testing.assert_close(
            gradient(s, t, **parts), gradient(s, t, **whole), rtol=0, atol=1e-14
        )
    torch.testing.assert_close(similarity(s, t, chunk_elements=elements), similarity(s, t))
