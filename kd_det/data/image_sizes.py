"""Whether images have the size that is annotated, by their headers."""

import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from detectron2.data.detection_utils import read_image
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image

# Reading headers is waiting, above all for the files of a network.
_THREADS = 16
# What Pillow raises for broken files; a broken PNG gives a SyntaxError, one that is made to fill
# the memory a DecompressionBombError.
UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)


def check_image_sizes(name: str, images: Sequence[tuple[str, int, int]]) -> None:
    """
    Compare annotated sizes with those of the files, each turned upright as Detectron2 turns it.

    Headers are read, of some thousand files in a second; a file whose header says another size is
    read as Detectron2 reads it before it is refused. Headers do not tell that pixels are
    broken, nor of an orientation that a PNG has behind them.

    Args:
        name: of the data set, for messages.
        images: path, width and height in pixels of each.

    Raises:
        RuntimeError: an image cannot be opened.
        ValueError: an image has another size.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = pool.map(_header_size, [path for path, _, _ in images])
        for (path, width, height), size in zip(images, sizes, strict=True):
            if size == (width, height):
                continue
            true = _true_size(name, path)
            if true != (width, height):
                raise ValueError(
                    f"data set {name!r}: {path} has {true[0]} x {true[1]} pixels (width x height, "
                    f"upright by its EXIF orientation), but is annotated as {width} x {height}. "
                    "Correct width and height in the annotation file (and the boxes, where they "
                    "were drawn on an image of that size), or replace the image."
                )


def _header_size(path: str) -> tuple[int, int] | None:
    """Return (width, height) as far as the header tells; None where it cannot be read."""
    try:
        local = PathManager.get_local_path(path)
        status = os.stat(local)
        return _read_header(local, status.st_size, status.st_mtime_ns)
    except (*UNREADABLE, ValueError):  # a ValueError: a name that no file can have
        return None


@functools.cache
def _read_header(path: str, *stamp: int) -> tuple[int, int]:
    with Image.open(path) as image:
        width, height = image.size
        try:
            # Not the PNG's own, which reads all pixels for what may stand behind them.
            exif = Image.Image.getexif(image)
        except Exception:  # whatever is in there; Detectron2 then takes the image as it is
            return width, height
    turned = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def _true_size(name: str, path: str) -> tuple[int, int]:
    try:
        height, width = read_image(path, format="RGB").shape[:2]
    except UNREADABLE as error:
        raise cannot_read(path, name, error) from error
    return width, height


def cannot_read(path: str, name: str, error: Exception) -> RuntimeError:
    """
    Return the error to raise for an image that cannot be read.

    Args:
        path: of the image.
        name: of the data sets that it is of.
        error: one of `UNREADABLE`.
    """
    return RuntimeError(
        f"cannot read {path} of data set {name}: {error}; replace the file, or take its image out "
        "of the annotation file"
    )
