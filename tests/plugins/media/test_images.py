"""The claim: each odd picture has one clear fate, and a header tells the size that decoding gives."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from pegboard_plugins.media.images import FORMATS, ImageLimits, decode_image, read_image_size
from pegboard_plugins.media.places import MediaError

LIMITS = ImageLimits()
WRITERS = {"JPEG2000": "jpg_2000", "AVIF": "avif", "WEBP": "webp"}


def _gradient(width: int = 32, height: int = 20) -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([x * 7, y * 11, (x + y) * 3], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels)


def _saved(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def _decode(content: bytes, limits: ImageLimits = LIMITS) -> Image.Image:
    return decode_image(io.BytesIO(content), limits, "picture 'x'")


def _size(content: bytes, limits: ImageLimits = LIMITS) -> tuple[int, int]:
    return read_image_size(io.BytesIO(content), limits, "picture 'x'")


def _reason(content: bytes, limits: ImageLimits = LIMITS) -> str:
    with pytest.raises(MediaError, match="picture 'x'") as caught:
        _decode(content, limits)
    return caught.value.reason


def _skip_without(form: str) -> None:
    Image.init()
    if form not in Image.SAVE or not features.check(WRITERS.get(form, "pil")):
        pytest.skip(f"this Pillow writes no {form}")


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_opened(form: str) -> None:
    _skip_without(form)
    content = _saved(_gradient(), form)
    assert _size(content) == (32, 20) == _decode(content).size


def test_an_mpo_file_gives_its_first_picture() -> None:
    content = _saved(_gradient(), "MPO", save_all=True, append_images=[_gradient(8, 8)])
    assert _size(content) == (32, 20) == _decode(content).size


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_turns_a_picture_upright_in_header_and_pixels(form: str, turn: int) -> None:
    _skip_without(form)
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste((200, 0, 0), (0, 0, 16, 8))  # a red corner, top left
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(back[turn]) if turn in back else upright
    exif = Image.Exif()
    exif[0x0112] = turn
    content = _saved(stored, form, exif=exif)
    assert _size(content) == (48, 32)
    picture = _decode(content)
    assert picture.size == (48, 32)
    red, green, _ = np.asarray(picture)[3, 4].tolist()
    assert red > 150 and green < 100


def test_a_broken_exif_block_leaves_the_picture_as_stored() -> None:
    content = _saved(_gradient(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff")
    assert _size(content) == (32, 20) == _decode(content).size


def test_sixteen_bit_grey_keeps_its_high_byte() -> None:
    values = np.array([[0, 256, 65535], [255, 32768, 511]], dtype=np.uint16)
    picture = _decode(_saved(Image.fromarray(values)))
    assert np.asarray(picture)[..., 0].tolist() == [[0, 1, 255], [0, 128, 1]]


def test_float_and_32_bit_pixels_are_refused() -> None:
    pixels = np.full((4, 4), 0.5, dtype=np.float32)
    assert _reason(_saved(Image.fromarray(pixels), "TIFF")) == "image bit depth"
    wide = np.full((4, 4), 1 << 20, dtype=np.int32)
    assert _reason(_saved(Image.fromarray(wide), "TIFF")) == "image bit depth"


@pytest.mark.parametrize("mode", ["P", "L", "LA", "RGBA", "1", "CMYK"])
def test_other_colour_modes_become_rgb(mode: str) -> None:
    image = _gradient().convert(mode)
    form = "TIFF" if mode == "CMYK" else "PNG"
    picture = _decode(_saved(image, form))
    assert picture.mode == "RGB" and picture.size == (32, 20)
    assert np.array_equal(np.asarray(picture), np.asarray(image.convert("RGB")))


def test_cmyk_jpeg_becomes_rgb() -> None:
    content = _saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")
    red, green, blue = np.asarray(_decode(content))[8, 8].tolist()
    assert red > 200 and green < 60 and blue < 60


def test_an_animated_picture_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = _saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert _decode(content).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("form", FORMATS)
def test_a_truncated_picture_is_refused(form: str) -> None:
    _skip_without(form)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = _saved(Image.fromarray(noise), form)
    with pytest.raises(MediaError):
        _decode(content[: len(content) // 2])


def test_truncation_is_named() -> None:
    content = _saved(_gradient(200, 200), "JPEG")
    assert _reason(content[: len(content) * 2 // 3]) == "image truncated"


def test_text_and_forbidden_formats_are_no_pictures() -> None:
    with pytest.raises(MediaError, match=f"none of {', '.join(FORMATS)}"):
        _decode(b"hello")
    icon = Image.new("RGBA", (16, 16))
    assert _reason(_saved(icon, "ICO")) == "image not readable"  # Pillow decodes it to open it
    assert _reason(b"hello") == "image not readable"
    assert _reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "image not readable"


def _png_header(width: int, height: int) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", len(head))
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + struct.pack(">I", 0)
        + b"IDAT"
        + struct.pack(">I", zlib.crc32(b"IDAT"))
    )


@pytest.mark.parametrize("side", [10_000, 30_000, 2_000_000_000])
def test_a_decompression_bomb_is_refused_from_its_header(side: int) -> None:
    assert _reason(_png_header(side, side)) == "image too many pixels"
    with pytest.raises(MediaError):
        _size(_png_header(side, side))


def test_the_limit_on_pixels_is_exact() -> None:
    content = _saved(_gradient(32, 20))
    assert _decode(content, ImageLimits(max_pixels=640)).size == (32, 20)
    assert _reason(content, ImageLimits(max_pixels=639)) == "image too many pixels"


def test_a_picture_without_pixels_is_refused() -> None:
    with pytest.raises(MediaError):
        _decode(_png_header(0, 5))


def test_an_extreme_aspect_is_refused() -> None:
    assert _reason(_saved(Image.new("RGB", (1, 201)))) == "image aspect extreme"
    assert _decode(_saved(Image.new("RGB", (1, 200)))).size == (1, 200)
