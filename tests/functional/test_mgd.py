"""MGD's block, loss and masks: the specification's vectors, a slow loop, and the edge cases."""

import pytest
import torch
from torch import Tensor
from waves import assert_float32_whatever_autocast_says, centres_on, random, wave

from kd_det.functional.mgd import GenerationBlock, draw_masks, generation_loss, mask_seed

S, T = wave((2, 2, 3, 4), 1, 0.4, 0.1), wave((2, 2, 3, 4), 1.5, 0.55, 0.7)
KEEP = torch.tensor(
    [[[[float((i + 2 * j + n) % 3 != 0) for j in range(4)] for i in range(3)]] for n in range(2)]
).double()
ONES = torch.ones_like(KEEP)
VALID = centres_on(((24, 32), (16, 20)), (3, 4), 8)


def block() -> GenerationBlock:
    """Return the block of the vectors, in float64."""
    made = GenerationBlock(2).double()
    made.load_state_dict(
        {
            "hidden.weight": wave((2, 2, 3, 3), 0.3, 0.7, 0.1),
            "hidden.bias": torch.tensor([0.05, -0.05], dtype=torch.float64),
            "output.weight": wave((2, 2, 3, 3), 0.3, 0.9, 0.2),
            "output.bias": torch.tensor([0.02, 0.03], dtype=torch.float64),
        }
    )
    return made


def near(*values: float) -> list[object]:
    return [pytest.approx(value, abs=1.5e-9) for value in values]


def loss_of(student: Tensor, teacher: Tensor, keep: Tensor, valid: Tensor | None = None) -> Tensor:
    return generation_loss(block()(student, keep, valid), teacher, valid)


def loop_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A zero-padded 3x3 convolution of (C, H, W), one output at a time."""
    _, height, width = x.shape
    out = torch.zeros(len(weight), height, width, dtype=x.dtype)
    for o in range(len(weight)):
        for i in range(height):
            for j in range(width):
                total = bias[o]
                for y in range(max(i - 1, 0), min(i + 2, height)):
                    for z in range(max(j - 1, 0), min(j + 2, width)):
                        total = total + (weight[o, :, y - i + 1, z - j + 1] * x[:, y, z]).sum()
                out[o, i, j] = total
    return out


def test_generated_map_and_loss_of_the_vectors() -> None:
    generated = block()(S, KEEP)
    found = [generated[0, 0, 1, 1].item(), generated[1, 1, 1, 2].item()]
    assert found == near(0.508015721, -0.519863351)
    assert generation_loss(generated, T).item() == near(29.438849620)[0]


def test_everything_and_nothing_kept() -> None:
    assert loss_of(S, T, ONES).item() == near(32.276085724)[0]
    assert loss_of(S, T, 0 * ONES).item() == near(27.446233293)[0]


def test_padding_is_as_the_border_of_a_smaller_map() -> None:
    value = loss_of(S, T, KEEP, VALID)
    assert value.item() == near(19.853803119)[0]
    whole = loss_of(S[:1], T[:1], KEEP[:1])
    part = (slice(1, 2), slice(None), slice(0, 2), slice(0, 2))
    cut = loss_of(S[part], T[part], KEEP[part])
    assert ((whole + cut) / 2).item() == near(19.853803119)[0]
    junk = S + 50 * (1 - VALID), T - 50 * (1 - VALID)
    assert loss_of(*junk, KEEP, VALID).item() == near(19.853803119)[0]


def test_gradient_of_the_vectors() -> None:
    student = S.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(student, T, KEEP), student)
    assert [grad[0, 0, 0, 1].item(), grad[1, 0, 1, 1].item()] == near(0.010817014, -1.384677219)
    assert not (grad * (1 - KEEP)).any()


def test_parity_with_the_loop() -> None:
    made, weights = block(), block().state_dict()
    student, teacher = random(2, 2, 3, 5), random(2, 2, 3, 5, seed=1)
    keep = (random(2, 1, 3, 5, seed=2) > 0).double()
    total = 0.0
    for n in range(2):
        x = loop_convolution(student[n] * keep[n], weights["hidden.weight"], weights["hidden.bias"])
        x = loop_convolution(x.relu(), weights["output.weight"], weights["output.bias"])
        total += float((x - teacher[n]).square().sum()) / 2
    value = generation_loss(made(student, keep), teacher)
    assert value.item() == pytest.approx(total, rel=1e-12)


def test_gradcheck() -> None:
    def loss(x: Tensor) -> Tensor:
        return loss_of(x, T, KEEP, VALID)

    assert torch.autograd.gradcheck(loss, S.clone().requires_grad_())


def test_no_valid_cell_gives_zero_on_the_graph() -> None:
    student, made = S.clone().requires_grad_(), block()
    value = generation_loss(made(student, KEEP, 0 * VALID), T, 0 * VALID)
    assert value.item() == 0
    value.backward()
    assert torch.equal(student.grad, torch.zeros_like(S))
    assert all(p.grad is not None and not p.grad.any() for p in made.parameters())


def test_a_batch_is_the_mean_of_its_images() -> None:
    alone = [loss_of(S[n : n + 1], T[n : n + 1], KEEP[n : n + 1]).item() for n in range(2)]
    assert sum(alone) / 2 == near(29.438849620)[0]


def test_parameters_at_256_channels() -> None:
    assert sum(p.numel() for p in GenerationBlock(256).parameters()) == 1180160


@pytest.mark.parametrize("ratio", [0.0, 0.45, 0.65, 1.0])
def test_masked_share(ratio: float) -> None:
    (mask,) = draw_masks([(2, 100, 100)], ratio, seed=0)
    assert mask.shape == (2, 1, 100, 100)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert 1 - mask.mean().item() == pytest.approx(ratio, abs=0.015)


def test_masks_repeat_with_the_seed_and_leave_the_global_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    sizes = [(2, 4, 5), (2, 4, 5)]
    first, second = draw_masks(sizes, 0.5, seed=7), draw_masks(sizes, 0.5, seed=7)
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(*first)
    assert not torch.equal(first[0][0], first[0][1])
    assert not torch.equal(first[0], draw_masks(sizes, 0.5, seed=8)[0])


def test_ranks_and_steps_have_seeds_of_their_own() -> None:
    seeds = {mask_seed(5, rank=rank, step=step) for rank in range(8) for step in range(1000)}
    assert len(seeds) == 8000


def test_the_teacher_gets_no_gradient() -> None:
    teacher = T.clone().requires_grad_()
    generation_loss(block()(S, KEEP), teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_under_autocast(dtype: torch.dtype) -> None:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        made = block() if student.dtype == torch.float64 else block().float()
        return generation_loss(made(student, KEEP.to(made.hidden.weight)), teacher)

    assert_float32_whatever_autocast_says(loss, S, T, dtype=dtype)


def test_a_ratio_beyond_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"masked_ratio is 1\.5, expected a number from 0 to 1"):
        draw_masks([(1, 2, 2)], 1.5, seed=0)
