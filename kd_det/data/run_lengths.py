"""
Masks as run lengths, as COCO writes them: checked before pycocotools unpacks them.

A mask of height H and width W is read column by column. `counts` says how many zeros, then ones,
then zeros, ... there are: as a list of numbers, or packed into a text. There each number is split
into groups of five bits, lowest first, written as characters from "0" on, with 32 added where a
group follows. From the fourth number on it is the difference to the last but one; the highest bit
of its last group is the sign.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from kd_det.data.annotation_file import is_whole, shown

_FIRST = ord("0")
_GROUP_BITS = 5
_MORE = 32
# Of one number: 2^30 pixels and a sign.
_MAX_GROUPS = 7


def find_run_length_problem(mask: Mapping[str, Any], width: int, height: int) -> str:
    """
    Return what is wrong with a mask of an image of this size, empty where nothing is.

    Args:
        mask: with "size", [height, width], and "counts", a list or a packed text.
        width, height: of the image, in pixels.
    """
    size, counts = mask.get("size"), mask.get("counts")
    if size != [height, width] or not all(map(is_whole, size)):
        return f"of size {shown(size)}; expected [height, width] of its image, [{height}, {width}]"
    if isinstance(counts, str):
        runs = unpack(counts)
        if runs is None:
            return f"with the counts {shown(counts)}; expected a text as pycocotools packs them"
        total, lowest = int(runs.sum()), int(runs.min(initial=0))
    elif isinstance(counts, list) and all(map(is_whole, counts)):
        total, lowest = sum(counts), min(counts, default=0)
    else:
        return f"with the counts {shown(counts)}; expected a list of whole numbers or a text"
    if lowest < 0 or total != width * height:
        return (
            f"whose counts add up to {total} pixels, the smallest being {lowest}; expected numbers "
            f"from 0 on that add up to {width} x {height} = {width * height}"
        )
    return ""


def unpack(text: str) -> "np.ndarray[Any, np.dtype[np.int64]] | None":
    """Return the run lengths in a packed text, (R,); None where it is no such text."""
    try:
        codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - _FIRST
    except UnicodeEncodeError:
        return None
    if len(codes) == 0 or codes.min() < 0 or codes.max() >= 2 * _MORE or codes[-1] >= _MORE:
        return None
    last = np.flatnonzero(codes < _MORE)
    first = np.concatenate(([0], last[:-1] + 1))
    groups = last - first + 1
    if groups.max() > _MAX_GROUPS:
        return None
    place = np.arange(len(codes)) - np.repeat(first, groups)
    numbers = np.add.reduceat((codes % _MORE) << (_GROUP_BITS * place), first)
    negative = codes[last] >= _MORE // 2
    numbers -= np.where(negative, np.int64(1) << (_GROUP_BITS * groups), 0)
    # The first three are given as they are.
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers
