"""Frames of a video: a folder of pictures, an animated picture, or a file that PyAV reads.

Which frames are taken depends on their number alone (the middle of equal parts), so planning and
loading agree, and a run can be repeated. Frames are counted without decoding. Frames of a container
are turned as its display matrix says.

NOTE: a container is opened as a plain file of the format its name says: playlists and other formats
that name further files or URLs never get a chance.

Source: the matrix of ISO/IEC 14496-12, 8.3.2, as ffmpeg's libavutil/display.h describes it.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from PIL import Image

from pegboard.errors import DataError
from pegboard_plugins.media.images import (
    DECODE_ERRORS,
    ImageLimits,
    decode_image,
    read_image_size,
)
from pegboard_plugins.media.places import MediaError, MediaPlace, open_regular_file, shown

__all__ = ["MAX_FRAMES", "count_frames", "pick_frames", "read_frames"]

MAX_FRAMES = 1_000_000
"""Most frames that may be asked of one video."""

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_ANIMATED = (".gif", ".webp", ".png", ".apng")
_CONTAINERS = {
    ".mp4": "mov",
    ".m4v": "mov",
    ".mov": "mov",
    ".3gp": "mov",
    ".webm": "matroska",
    ".mkv": "matroska",
    ".avi": "avi",
    ".flv": "flv",
    ".wmv": "asf",
    ".ts": "mpegts",
    ".mpg": "mpeg",
    ".mpeg": "mpeg",
}
# (a, b, c, d) of a display matrix: column x and row y of the frame go to a x + c y and b x + d y.
_TURNS: Mapping[tuple[float, ...], Image.Transpose] = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


def pick_frames(num_frames: int, most: int) -> list[int]:
    """At most `most` frame numbers (from 0), evenly spread: the middle of each of equal parts."""
    taken = min(num_frames, most)
    return [(2 * part + 1) * num_frames // (2 * taken) for part in range(taken)]


def count_frames(reference: str, place: MediaPlace, limits: ImageLimits) -> int:
    """How many frames a video has, from file names, headers or packets.

    Raises:
        MediaError: no video there, or none of its frames; PyAV is needed and is not installed.
    """
    path = place.resolve(reference)
    if os.path.isdir(path):
        num_frames = len(_frame_files(path, reference))
    elif _suffix(path) in _ANIMATED:
        with open_regular_file(path, reference, place.root) as file:
            read_image_size(file, limits, _name(reference))
            file.seek(0)
            num_frames = _animated_frames(file, reference)
    else:
        with open_regular_file(path, reference, place.root) as file:
            num_frames = _count_packets(file, path, reference)
    if not 1 <= num_frames <= MAX_FRAMES:
        raise MediaError("video without frames", f"{_name(reference)} has {num_frames} frames")
    return num_frames


def read_frames(
    reference: str,
    picks: Sequence[int],
    place: MediaPlace,
    limits: ImageLimits,
    *,
    num_frames: int | None = None,
) -> Iterator[Image.Image]:
    """The frames `picks` (ascending) as upright RGB pictures.

    Args:
        num_frames: what they were picked of; a folder that holds another number of frames now is refused.

    Raises:
        MediaError: the video can't be decoded, ended before the last of them, or has changed.
    """
    path = place.resolve(reference)
    if os.path.isdir(path):
        files = _frame_files(path, reference)
        if num_frames not in (None, len(files)):
            raise MediaError(
                "frames differ",
                f"{_name(reference)} holds {len(files)} frames, but {num_frames} when it was "
                "planned with: run pegboard prepare --fresh",
            )
        for pick in picks:
            if pick >= len(files):
                raise _too_short(reference, pick, len(files))
            frame = f"{reference.rstrip('/')}/{files[pick]}"
            with open_regular_file(place.resolve(frame), frame, place.root) as file:
                yield decode_image(file, limits, _name(frame))
        return
    with open_regular_file(path, reference, place.root) as file:
        if _suffix(path) in _ANIMATED:
            yield from _read_animated(file, picks, reference, limits)
        else:
            yield from _read_container(file, path, picks, reference, limits)


def _frame_files(folder: str, reference: str) -> list[str]:
    """Names of the pictures in a folder, by the last number in the name, then by name."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise MediaError(
            "video unreadable", f"{_name(reference)} can't be listed: {error.strerror}"
        ) from None
    names = [n for n in names if _suffix(n) in _PICTURES and not n.startswith(".")]

    def order(name: str) -> tuple[int, str]:
        numbers = re.findall(r"[0-9]+", os.path.splitext(name)[0])
        return (int(numbers[-1][:18]) if numbers else -1, name)

    return sorted(names, key=order)


def _animated_frames(file: IO[bytes], reference: str) -> int:
    try:
        image = Image.open(file, formats=("GIF", "WEBP", "PNG"))
        return int(getattr(image, "n_frames", 1))
    except DECODE_ERRORS as error:
        raise _broken(reference, error) from None


def _read_animated(
    file: IO[bytes], picks: Sequence[int], reference: str, limits: ImageLimits
) -> Iterator[Image.Image]:
    read_image_size(file, limits, _name(reference))
    file.seek(0)
    try:
        image = Image.open(file, formats=("GIF", "WEBP", "PNG"))
        for pick in picks:
            image.seek(pick)
            # A later frame of a GIF may reach beyond the size that its header says.
            _check_pixels(image.width * image.height, reference, limits)
            yield image.convert("RGB")
    except DECODE_ERRORS as error:
        raise _broken(reference, error) from None


def _count_packets(file: IO[bytes], path: str, reference: str) -> int:
    av = _pyav(reference)
    try:
        with _container(av, file, path, reference) as container:
            stream = container.streams.video[0]
            # A video cut without being encoded anew keeps packets before its start, from which
            # decoding begins; their frames are not shown.
            shown_packets = (p for p in container.demux(stream) if p.size and not p.is_discard)
            return sum(1 for _ in shown_packets)
    except (av.error.FFmpegError, OSError, ValueError, LookupError) as error:
        raise _broken(reference, error) from None


def _read_container(
    file: IO[bytes], path: str, picks: Sequence[int], reference: str, limits: ImageLimits
) -> Iterator[Image.Image]:
    av = _pyav(reference)
    wanted = list(picks)
    number = -1
    try:
        with _container(av, file, path, reference) as container:
            stream = container.streams.video[0]
            pixels = stream.codec_context.width * stream.codec_context.height
            _check_pixels(pixels, reference, limits)
            for number, frame in enumerate(container.decode(stream)):
                if wanted and number == wanted[0]:
                    wanted.pop(0)
                    yield _upright(frame)
                if not wanted:
                    return
    except (av.error.FFmpegError, OSError, ValueError, LookupError) as error:
        raise _broken(reference, error) from None
    raise _too_short(reference, wanted[0], number + 1)


def _upright(frame: Any) -> Image.Image:
    """The frame as players show it: phones write portrait video as landscape and a matrix.

    A matrix that is no quarter turn or flip is not applied.
    """
    image: Image.Image = frame.to_image()
    for side in frame.side_data:
        if side.type.name == "DISPLAYMATRIX":
            matrix = struct.unpack("=9i", bytes(side)[:36])
            turn = _TURNS.get(tuple(round(matrix[place] / 65536, 3) for place in (0, 1, 3, 4)))
            return image if turn is None else image.transpose(turn)
    return image


def _container(av: Any, file: IO[bytes], path: str, reference: str) -> Any:
    form = _CONTAINERS.get(_suffix(path))
    if form is None:
        raise MediaError(
            "video format unknown",
            f"{_name(reference)} is no folder and ends in none of "
            f"{', '.join(sorted({*_CONTAINERS, *_ANIMATED}))}",
        )
    return av.open(file, mode="r", format=form, metadata_errors="ignore")


def _pyav(reference: str) -> Any:
    try:
        import av
    except ImportError:
        raise MediaError(
            "video needs PyAV",
            f"{_name(reference)} needs PyAV; pip install 'pegboard[video]', or give a folder of "
            "frames or a GIF",
        ) from None
    return av


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _name(reference: str) -> str:
    return f"video {shown(reference)}"


def _check_pixels(pixels: int, reference: str, limits: ImageLimits) -> None:
    if pixels > limits.max_pixels:
        raise MediaError("image too many pixels", f"{_name(reference)}: frames of {pixels} pixels")


def _broken(reference: str, error: Exception) -> DataError:
    if isinstance(error, DataError):
        return error
    text = " ".join(str(error).split()) or type(error).__name__
    return MediaError("video broken", f"{_name(reference)} can't be decoded: {text}")


def _too_short(reference: str, pick: int, found: int) -> MediaError:
    return MediaError(
        "video shorter than planned",
        f"{_name(reference)}: frame {pick} was planned, but only {found} can be decoded; if it has "
        "changed since it was prepared, run pegboard prepare --fresh",
    )
