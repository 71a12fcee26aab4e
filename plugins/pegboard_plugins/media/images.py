"""One picture, from a file or bytes: its size from the header, or its pixels as upright RGB.

What each odd picture becomes:
    EXIF orientation      turned upright (a broken EXIF block: as stored)
    palette, grey, CMYK   RGB by Pillow; alpha is dropped, as published processors do
    16 bit                the high byte
    32 bit, float         refused, unless its values are 16-bit ones
    animated              its first frame
    truncated, broken     refused
    too many pixels       refused from the header, before anything is decoded
    extreme aspect        refused over 200:1

Source: orientation values of the EXIF 2.32 standard, tag 0x0112.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from dataclasses import dataclass
from functools import cache
from typing import IO

import numpy as np
from PIL import Image

from pegboard_plugins.media.places import MediaError

__all__ = ["DECODE_ERRORS", "FORMATS", "ImageLimits", "decode_image", "read_image_size"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Formats that are opened, MPO as the JPEG it starts with.

NOTE: Pillow's EPS and others start programs, and its ICO decodes while it opens; they must stay out.
"""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    AssertionError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's parsers raise on broken bytes, seen by fuzzing and in its sources."""


@dataclass(frozen=True)
class ImageLimits:
    """What a header may say before a picture is refused."""

    max_pixels: int = 89_478_485
    """Width times height."""
    max_aspect: float = 200.0
    """Longer side over shorter side."""


def read_image_size(file: IO[bytes], limits: ImageLimits, name: str) -> tuple[int, int]:
    """(width, height) once upright, from the header; no pixel is decoded.

    Args:
        name: of the picture, for messages.

    Raises:
        MediaError: no picture, or one over the limits.
    """
    image, turn = _open(file, limits, name)
    size = image.size
    return (size[1], size[0]) if turn in (5, 6, 7, 8) else size


def decode_image(file: IO[bytes], limits: ImageLimits, name: str) -> Image.Image:
    """The picture as upright RGB.

    Raises:
        MediaError: no picture, a truncated or broken one, or one over the limits.
    """
    image, turn = _open(file, limits, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            image = _to_rgb(image, name)
            method = _TURNS.get(turn)
            return image if method is None else image.transpose(method)
    except MediaError:
        raise
    except DECODE_ERRORS as error:
        text = " ".join(str(error).split()) or type(error).__name__
        short = "truncated" in text or isinstance(error, EOFError)
        raise MediaError(
            "image truncated" if short else "image broken", f"{name} can't be decoded: {text}"
        ) from None


def _open(file: IO[bytes], limits: ImageLimits, name: str) -> tuple[Image.Image, int]:
    try:
        with warnings.catch_warnings():
            # Pillow's own words on sizes and odd tags; what matters is checked here.
            warnings.simplefilter("ignore")
            image = Image.open(file, formats=_openable())
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise MediaError("image too many pixels", f"{name}: {error}") from None
    except DECODE_ERRORS as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if "cannot identify" in text:
            text = f"none of {', '.join(FORMATS)}"
        raise MediaError("image not readable", f"{name} is no picture: {text}") from None
    if width < 1 or height < 1:
        raise MediaError("image without pixels", f"{name} is {width}x{height}")
    if width * height > limits.max_pixels:
        raise MediaError(
            "image too many pixels",
            f"{name} is {width}x{height}, over max_image_pixels {limits.max_pixels}",
        )
    if max(width, height) > limits.max_aspect * min(width, height):
        raise MediaError(
            "image aspect extreme", f"{name} is {width}x{height}, over {limits.max_aspect:g}:1"
        )
    return image, _orientation(image)


@cache
def _openable() -> tuple[str, ...]:
    """What this Pillow opens of FORMATS: a name that it doesn't know ends its search with an error."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, from the header; 1 where there is none or Pillow applies it."""
    if image.format == "TIFF":
        return 1  # Pillow turns it while loading, and reports the size once turned
    # NOTE: PngImageFile.getexif() decodes the whole picture to look for a late EXIF chunk; only a
    # chunk before the pixels counts here, so that header and decoder agree.
    if image.format == "PNG" and not {"exif", "XML:com.adobe.xmp", "xmp"} & image.info.keys():
        return 1
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            turn = image.getexif().get(_ORIENTATION, 1)
    except DECODE_ERRORS:
        return 1
    return turn if isinstance(turn, int) and turn in _TURNS else 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image)
        if image.mode == "F" or int(values.min()) < 0 or int(values.max()) > 0xFFFF:
            raise MediaError(
                "image bit depth", f"{name} has {image.mode} pixels, expected 8 or 16 bit"
            )
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")
