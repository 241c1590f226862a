"""Broken and odd image files: an error that names file and data set, or no harm."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from kd_det.data import CheckedDatasetMapper, register_coco_style

WIDTH, HEIGHT = 24, 16


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (WIDTH, HEIGHT)) -> bytes:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    out = io.BytesIO()
    image.convert(mode).save(out, kind)
    return out.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it is as large as that, and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 99)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


BROKEN: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "one byte": lambda: b"\xff",
    "text": lambda: b"not an image",
    "html": lambda: b"<html>404 Not Found</html>",
    "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "zeros": lambda: bytes(4096),
    "pickle": lambda: b"\x80\x04cos\nsystem\n(V exit\ntR.",
    "JPEG, its start": lambda: encoded("JPEG")[:2],
    "JPEG, its header": lambda: encoded("JPEG")[:100],
    "JPEG, half of it": lambda: encoded("JPEG")[: len(encoded("JPEG")) // 2],
    "JPEG, its end": lambda: encoded("JPEG")[50:],
    "PNG, its start": lambda: encoded("PNG")[:8],
    "PNG, its header": lambda: encoded("PNG")[:33],
    "PNG, half of it": lambda: encoded("PNG")[: len(encoded("PNG")) // 2],
    "PNG, header overwritten": lambda: encoded("PNG")[:16] + bytes(8) + encoded("PNG")[24:],
    "PNG, a bomb": lambda: png_of(60_000, 60_000),
    "PNG, without pixels": lambda: png_of(WIDTH, HEIGHT),
    "PNG, of no width": lambda: png_of(0, HEIGHT),
    "GIF, half of it": lambda: encoded("GIF")[: len(encoded("GIF")) // 2],
    "BMP, half of it": lambda: encoded("BMP")[: len(encoded("BMP")) // 2],
    "TIFF, half of it": lambda: encoded("TIFF")[: len(encoded("TIFF")) // 2],
    "WebP, half of it": lambda: encoded("WEBP")[: len(encoded("WEBP")) // 2],
    "another size": lambda: encoded("PNG", size=(WIDTH + 1, HEIGHT)),
    "turned": lambda: encoded("PNG", size=(HEIGHT, WIDTH)),
}
HARMLESS: dict[str, Callable[[], bytes]] = {
    **{f"PNG {mode}": lambda mode=mode: encoded("PNG", mode) for mode in ("1", "L", "P", "RGBA")},
    "JPEG CMYK": lambda: encoded("JPEG", "CMYK"),
    "JPEG L": lambda: encoded("JPEG", "L"),
    "PNG I;16": lambda: _sixteen_bits(),
    "GIF": lambda: encoded("GIF"),
    "BMP": lambda: encoded("BMP"),
    "TIFF": lambda: encoded("TIFF"),
    "WebP": lambda: encoded("WEBP"),
    "JPEG with a tail": lambda: encoded("JPEG") + bytes(100),
    "PNG, pixels overwritten": lambda: encoded("PNG")[:60] + bytes(200) + encoded("PNG")[260:],
    "PNG with a tail": lambda: encoded("PNG") + b"text",
}


def _sixteen_bits() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((HEIGHT, WIDTH), 4000, np.uint16)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def name(tmp_path: Path) -> Any:
    (tmp_path / "images").mkdir()
    register_coco_style("odd_images", tmp_path / "truth.json", tmp_path / "images")
    yield "odd_images"
    DatasetCatalog.remove("odd_images")
    MetadataCatalog.remove("odd_images")


def config(shortest: int = 0, longest: int = 1333) -> CfgNode:
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (shortest,), longest
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = shortest, longest
    return cfg


def mapped(folder: Path, content: bytes, cfg: CfgNode, is_train: bool, **size: int) -> Any:
    path = folder / "images" / "0.jpg"
    path.write_bytes(content)
    mapper = CheckedDatasetMapper(cfg, is_train)
    size = size or {"width": WIDTH, "height": HEIGHT}
    return mapper({"file_name": str(path), "image_id": 0, "annotations": [], **size})


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", list(BROKEN))
@pytest.mark.parametrize("is_train", [True, False])
def test_broken(tmp_path: Path, name: str, kind: str, is_train: bool) -> None:
    with pytest.raises((RuntimeError, ValueError)) as error:
        mapped(tmp_path, BROKEN[kind](), config(), is_train)
    assert str(tmp_path / "images" / "0.jpg") in str(error.value)
    if kind not in ("another size", "turned"):
        assert "of data set odd_images" in str(error.value)


@pytest.mark.parametrize("kind", list(HARMLESS))
def test_harmless(tmp_path: Path, name: str, kind: str) -> None:
    assert mapped(tmp_path, HARMLESS[kind](), config(), True)["image"].shape == (3, HEIGHT, WIDTH)


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("size", [(1, 4000), (4000, 1)])
def test_an_image_that_resizes_to_nothing(
    tmp_path: Path, name: str, is_train: bool, size: tuple[int, int]
) -> None:
    message = r"cannot resize .*0.jpg of data set odd_images, (1 x 4000|4000 x 1) pixels: .*take it"
    with pytest.raises(RuntimeError, match=message):
        mapped(
            tmp_path,
            encoded("PNG", size=size),
            config(800, 1333),
            is_train,
            width=size[0],
            height=size[1],
        )


def test_the_smallest_image(tmp_path: Path, name: str) -> None:
    content = encoded("PNG", size=(1, 1))
    assert mapped(tmp_path, content, config(8), True, width=1, height=1)["image"].shape == (3, 8, 8)
