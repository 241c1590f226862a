"""Pairing levels by their strides in the loaded image, adapters, and cutting maps to one grid."""

import math
import re
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kd_det.distillation.capture import CapturePath
from kd_det.distillation.pairing import (
    Level,
    LevelPair,
    build_adapters,
    levels_of,
    measure_levels,
    on_one_grid,
    pair_levels,
)

quick = settings(max_examples=30, deadline=None)


def pyramid(first: int, last: int, *, factor: float = 1.0, channels: int = 8) -> list[Level]:
    """Levels p<first> .. p<last> of a model that sees the image reduced by `factor`."""
    return [Level(f"p{i}", channels, factor * 2**i) for i in range(first, last + 1)]


def names(pairs: Sequence[LevelPair]) -> list[str]:
    return [pair.name for pair in pairs]


class TestPairing:
    def test_full_view_pairs_equal_levels(self) -> None:
        pairs = pair_levels(pyramid(3, 7), pyramid(3, 7))
        assert names(pairs) == ["p3~p3", "p4~p4", "p5~p5", "p6~p6", "p7~p7"]
        assert [(p.student, p.teacher, p.stride, p.scale) for p in pairs] == [
            (i, i, 2.0 ** (i + 3), 1.0) for i in range(5)
        ]
        assert not any(pair.resample for pair in pairs)

    def test_half_view_pairs_one_level_lower(self) -> None:
        pairs = pair_levels(pyramid(2, 6, factor=2), pyramid(3, 7))
        assert names(pairs) == ["p2~p3", "p3~p4", "p4~p5", "p5~p6", "p6~p7"]
        assert [p.stride for p in pairs] == [8, 16, 32, 64, 128]
        assert not any(pair.resample for pair in pairs)

    def test_quarter_view_pairs_two_levels_lower(self) -> None:
        pairs = pair_levels(pyramid(2, 5, factor=4), pyramid(3, 7))
        assert names(pairs) == ["p2~p4", "p3~p5", "p4~p6", "p5~p7"]

    def test_levels_without_partner_stay_out(self) -> None:
        pairs = pair_levels(pyramid(2, 6), pyramid(3, 7))
        assert names(pairs) == ["p3~p3", "p4~p4", "p5~p5", "p6~p6"]
        assert [(p.student, p.teacher) for p in pairs] == [(1, 0), (2, 1), (3, 2), (4, 3)]

    @given(
        student=st.tuples(st.integers(1, 5), st.integers(0, 5)),
        teacher=st.tuples(st.integers(1, 5), st.integers(0, 5)),
        log_factor=st.integers(0, 3),
        resample=st.booleans(),
    )
    @quick
    def test_powers_of_two_pair_exactly_the_common_strides(
        self,
        student: tuple[int, int],
        teacher: tuple[int, int],
        log_factor: int,
        resample: bool,
    ) -> None:
        own = pyramid(student[0], sum(student), factor=2**log_factor)
        other = pyramid(teacher[0], sum(teacher))
        common = sorted({x.stride for x in own} & {x.stride for x in other})
        if not common:
            with pytest.raises(ValueError, match=r"No level of the student"):
                pair_levels(own, other, resample=resample)
            return
        # Whatever order a backbone lists its levels in.
        pairs = pair_levels(own[::-1], other, resample=resample)
        assert [pair.stride for pair in pairs] == common
        for pair in pairs:
            assert own[::-1][pair.student].stride == other[pair.teacher].stride == pair.stride
            assert pair.scale == 1

    @given(st.floats(1, 16).filter(lambda f: 0.03 < math.log2(f) % 1 < 0.97))
    @quick
    def test_other_factors_pair_nothing_unless_resampled(self, factor: float) -> None:
        own, other = pyramid(2, 6, factor=factor), pyramid(2, 12)
        with pytest.raises(ValueError, match=r"power of two, or set KD.RESAMPLE_LEVELS True"):
            pair_levels(own, other)
        pairs = pair_levels(own, other, resample=True)
        assert len(pairs) == 5
        for pair in pairs:
            assert pair.resample
            assert pair.scale == other[pair.teacher].stride / own[pair.student].stride
            assert 2**-0.5 - 1e-9 <= pair.scale <= 2**0.5 + 1e-9

    def test_resampling_goes_no_further_than_half_an_octave(self) -> None:
        with pytest.raises(ValueError, match=r"No level"):
            pair_levels(pyramid(3, 3), [Level("p5", 8, 12.0)], resample=True)
        (pair,) = pair_levels(pyramid(3, 3), [Level("x", 8, 11.0)], resample=True)
        assert pair.scale == 11 / 8

    def test_sizes_rounded_up_are_the_same_grid(self) -> None:
        """A map of 101 cells on 800 px has stride 7.92."""
        (pair,) = pair_levels([Level("p3", 8, 800 / 101)], [Level("p3", 8, 8.0)])
        assert pair.scale == 1

    def test_error_lists_both_pyramids(self) -> None:
        with pytest.raises(ValueError) as error:
            pair_levels(pyramid(2, 3, factor=1.5), pyramid(3, 4, channels=64))
        text = str(error.value)
        assert "student: p2 (stride 6, 8 channels), p3 (stride 12, 8 channels)\n" in text
        assert "teacher: p3 (stride 8, 64 channels), p4 (stride 16, 64 channels)\n" in text
        assert "KD.STUDENT.VIEW_FACTOR" in text

    @pytest.mark.parametrize("resample", [False, True])
    def test_empty_pyramids(self, resample: bool) -> None:
        for own, other in (([], pyramid(3, 3)), (pyramid(3, 3), [])):
            with pytest.raises(ValueError, match=r"no levels"):
                pair_levels(own, other, resample=resample)


class TestReading:
    def test_maps_of_one_call_or_of_several(self) -> None:
        a, b = torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 4, 4)
        path = CapturePath("neck")
        assert levels_of([{"p3": a, "p4": b}], path) == [("p3", a), ("p4", b)]
        assert [name for name, _ in levels_of([[a, b]], path)] == ["[0]", "[1]"]
        assert [name for name, _ in levels_of([a, b], path)] == ["call 0", "call 1"]
        assert all(x is y for (_, x), y in zip(levels_of([(a, b)], path), (a, b), strict=True))

    @pytest.mark.parametrize(
        ("output", "found"),
        [(torch.zeros(4, 10), r"\(4, 10\)"), ("text", "str"), ({"p3": None}, "NoneType")],
    )
    def test_what_is_no_map_is_refused(self, output: object, found: str) -> None:
        message = f"Capture 'roi_heads.box_head', output .*: expected a pyramid .* found {found}"
        with pytest.raises(ValueError, match=message):
            levels_of([output], CapturePath("roi_heads.box_head"))

    def test_strides_are_those_of_the_loaded_image(self) -> None:
        maps = [("p2", torch.zeros(1, 3, 64, 64)), ("p6", torch.zeros(1, 5, 4, 4))]
        assert measure_levels(maps, 256, 1.0) == [Level("p2", 3, 4.0), Level("p6", 5, 64.0)]
        assert [level.stride for level in measure_levels(maps, 256, 2.0)] == [8, 128]


class TestAdapters:
    def build(self, own: int, other: int, mode: str) -> nn.ModuleList:
        levels = pyramid(3, 5, channels=own), pyramid(3, 5, channels=other)
        return build_adapters(pair_levels(*levels), *levels, mode=mode)

    @pytest.mark.parametrize(
        ("own", "other", "mode", "present"),
        [
            (4, 4, "auto", False),
            (4, 6, "auto", True),
            (4, 4, "always", True),
            (4, 4, "never", False),
        ],
    )
    def test_modes(self, own: int, other: int, mode: str, present: bool) -> None:
        adapters = self.build(own, other, mode)
        assert len(adapters) == 3
        for adapter in adapters:
            assert isinstance(adapter, nn.Conv2d if present else nn.Identity)
        if present:
            shapes = {tuple(p.shape) for p in adapters.parameters()}
            assert shapes == {(other, own, 1, 1)}  # no bias
            assert len(list(adapters.parameters())) == 3  # one per pair, not shared

    def test_each_level_has_its_own_channels(self) -> None:
        own = [Level("c3", 4, 8.0), Level("c4", 8, 16.0), Level("c5", 16, 32.0)]
        other = [Level("c4", 8, 16.0), Level("c5", 24, 32.0)]
        adapters = build_adapters(pair_levels(own, other), own, other, mode="auto")
        assert isinstance(adapters[0], nn.Identity)
        assert adapters[1].weight.shape == (24, 16, 1, 1)

    def test_never_refuses_other_channels(self) -> None:
        with pytest.raises(ValueError, match=r"p3~p3 have 4 and 6 channels and adapters are off"):
            self.build(4, 6, "never")

    def test_unknown_mode(self) -> None:
        with pytest.raises(ValueError, match=r"ADAPTER is 'maybe', expected 'auto', 'always' or"):
            self.build(4, 4, "maybe")


def ramp(height: int, width: int, stride: float) -> Tensor:
    """A map whose channels hold y and x of each cell's centre, in pixels of the loaded image."""
    y = (torch.arange(height) + 0.5) * stride
    x = (torch.arange(width) + 0.5) * stride
    return torch.stack(torch.meshgrid(y, x, indexing="ij"))[None]


class TestOneGrid:
    same = LevelPair(0, 0, "p3~p3", 8.0, 1.0)

    def test_equal_maps_stay_as_they_are(self) -> None:
        student, teacher = torch.zeros(1, 2, 4, 6), torch.zeros(1, 3, 4, 6)
        out = on_one_grid(student, teacher, self.same, [(32, 48)])
        assert out[0] is student
        assert out[1] is teacher

    @pytest.mark.parametrize("swap", [False, True])
    def test_padding_is_cut_from_the_larger(self, swap: bool) -> None:
        """Images of up to 40 x 40 padded to 64 x 64 by the one model, to 48 x 96 by the other."""
        maps = [ramp(8, 8, 8), ramp(6, 12, 8)][:: -1 if swap else 1]
        out = on_one_grid(maps[0], maps[1], self.same, [(40, 40), (33, 17)])
        for cut in out:
            torch.testing.assert_close(cut, ramp(6, 8, 8))

    @given(
        content=st.tuples(st.integers(8, 100), st.integers(8, 100)),
        own=st.tuples(st.integers(0, 5), st.integers(0, 5)),
        other=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    )
    @quick
    def test_extra_padding_changes_nothing_on_the_image(
        self, content: tuple[int, int], own: tuple[int, int], other: tuple[int, int]
    ) -> None:
        cells = [-(-side // 8) for side in content]
        maps = [ramp(cells[0] + more[0], cells[1] + more[1], 8) for more in (own, other)]
        out = on_one_grid(maps[0], maps[1], self.same, [content])
        for cut in out:
            assert torch.equal(cut[..., : cells[0], : cells[1]], ramp(*cells, 8))
        assert out[0].shape == out[1].shape

    def test_a_map_without_the_content_is_refused(self) -> None:
        """7 cells of 8 px end at 56; an image of 80 px needs 10."""
        with pytest.raises(RuntimeError) as error:
            on_one_grid(ramp(10, 10, 8), ramp(10, 7, 8), self.same, [(80, 40), (80, 80)])
        text = str(error.value)
        assert re.search(r"p3~p3: the student's map is \(10, 10\), the teacher's \(10, 7\)", text)
        assert "10.0 x 10.0 cells of stride 8; the two models do not see the same image" in text
        with pytest.raises(RuntimeError):
            on_one_grid(ramp(7, 10, 8), ramp(10, 10, 8), self.same, [(80, 80)])
        # The same maps are fine for smaller images, and a cell may hang over the edge.
        on_one_grid(ramp(10, 10, 8), ramp(10, 7, 8), self.same, [(80, 56)])
        on_one_grid(ramp(10, 10, 8), ramp(10, 7, 8), self.same, [(80, 63)])

    @pytest.mark.parametrize(
        ("own", "own_cells", "other", "other_cells"),
        [
            (32 / 3, 12, 8.0, 12),  # 96 px, its 3/4 view padded from 72 to 96
            (12.0, 8, 16.0, 6),
            (6.0, 30, 8.0, 12),
        ],
    )
    def test_resampling_keeps_places_whatever_the_padding(
        self, own: float, own_cells: int, other: float, other_cells: int
    ) -> None:
        """A ramp of positions read at the student's cells is the student's own ramp."""
        pair = LevelPair(0, 0, "x~y", own, other / own)
        student, teacher = on_one_grid(
            ramp(own_cells, own_cells, own), ramp(other_cells, other_cells, other), pair, [(90, 90)]
        )
        assert student.shape == teacher.shape
        assert student.shape[-1] * own > 90 - own
        # Beyond the centres of the outermost cells nothing is extrapolated.
        expected = student.clamp(other / 2, (other_cells - 0.5) * other)
        torch.testing.assert_close(teacher, expected, rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize("scale", [0.75, 1.4])
    def test_resampling_a_map_of_one_cell(self, scale: float) -> None:
        """As the coarsest level of a small image is."""
        pair = LevelPair(0, 0, "p7~p7", 128 / scale, scale)
        teacher = torch.full((1, 2, 1, 1), 3.0)
        student, resampled = on_one_grid(torch.zeros(1, 2, 1, 1), teacher, pair, [(96, 96)])
        assert student.shape == resampled.shape == (1, 2, 1, 1)
        assert torch.equal(resampled, teacher)

    def test_resampling_computes_in_float32_at_least(self) -> None:
        pair = LevelPair(0, 0, "x~y", 6.0, 8 / 6)
        for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
            _, teacher = on_one_grid(ramp(16, 16, 6), ramp(12, 12, 8).to(dtype), pair, [(96, 96)])
            assert teacher.dtype == expected


def test_adapters_may_see_neighbours_and_have_a_bias() -> None:
    own, other = [Level("p3", 8, 8.0)], [Level("p3", 16, 8.0)]
    (adapter,) = build_adapters(
        pair_levels(own, other), own, other, mode="always", kernel=3, bias=True
    )
    assert adapter.weight.shape == (16, 8, 3, 3)
    assert adapter.bias is not None
    assert adapter(torch.zeros(1, 8, 5, 7)).shape == (1, 16, 5, 7)
