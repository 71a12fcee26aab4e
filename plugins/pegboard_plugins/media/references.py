"""What is kept of a sample's media between planning and loading, and pixels from it.

The token store keeps plain JSON: where each picture lies, the grid it was planned with, and where
its tokens stand in the ids. Pixels are decoded when a batch is made, in the loader's process, and
must come out as planned: another size than planned is an error, never another number of tokens.
A picture written inside its record stays there: the reference is the record's place in the file.
`jpeg`, if there, is between which qualities tiles are degraded, at random.

    {"tile_size": 448, "thumbnail": true, "root": "/data", "outside": false, "max_pixels": 89478485,
     "jpeg": [75, 100],
     "items": [{"ref": "a.png", "wh": [640, 480], "grid": [4, 3], "at": [[17, 3328]]},
               {"ref": {"file": "x.jsonl", "start": 0, "end": 99, "part": 1}, ...},
               {"ref": {"file": "x.parquet", "row": 7, "listed": ["images", 0]}, ...},
               {"ref": "clip.mp4", "frames": [3, 9], "num_frames": 12,
                "at": [[31, 256], [292, 256]]}]}
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import IO, Any

import numpy as np

from pegboard.errors import DataError
from pegboard_plugins.media.frames import read_frames
from pegboard_plugins.media.images import ImageLimits, decode_image
from pegboard_plugins.media.listed import read_listed_at
from pegboard_plugins.media.parts import MediaPart, iter_media_parts
from pegboard_plugins.media.places import (
    MediaError,
    MediaPlace,
    decode_data_url,
    is_data_url,
    open_regular_file,
    shown,
)
from pegboard_plugins.media.tiling import cut_tiles, degrade_tiles, whole_tile
from pegboard_plugins.records.parquet_rows import ParquetRows

__all__ = ["MediaRecord", "RecordSource", "TileLoader", "media_spans", "open_part", "part_name"]

_MAX_TABLES = 8
"""Parquet files that stay open, each with its last row group."""


@dataclass(frozen=True)
class RecordSource:
    """Where a record and its media come from."""

    place: MediaPlace
    limits: ImageLimits = ImageLimits()
    check: str = "lazy"
    """`lazy`: a picture whose size the record gives is not opened before it is needed; `header`:
    every header is read while planning; `decode`: every picture is decoded while planning."""
    at: Mapping[str, Any] | None = None
    """The record's own place (`file`, and `start`, `end` in bytes), for media written inside it."""


class MediaRecord(dict[str, Any]):
    """A record that knows where its media lie; what a vision dataset gives."""

    def __init__(self, record: Mapping[str, Any], source: RecordSource) -> None:
        super().__init__(record)
        self.source = source


def open_part(part: MediaPart, place: MediaPlace) -> IO[bytes]:
    """Open a picture's bytes, wherever they are; the caller closes it.

    Raises:
        MediaError: see `pegboard_plugins.media.places`.
    """
    if isinstance(part.reference, bytes):
        if not part.reference:
            raise MediaError("image empty", "image of no bytes")
        return BytesIO(part.reference)
    if is_data_url(part.reference):
        return decode_data_url(part.reference)
    return open_regular_file(place.resolve(part.reference), part.reference, place.root)


def part_name(part: MediaPart) -> str:
    """A picture as messages call it."""
    if isinstance(part.reference, bytes):
        return f"{part.kind} of {len(part.reference)} bytes"
    return f"{part.kind} {shown(part.reference)}"


def media_spans(media: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(start, count) in the sample's ids of each picture's or frame's image tokens, in order."""
    return [(span[0], span[1]) for item in media["items"] for span in item["at"]]


class TileLoader:
    """Opens what a token store keeps of media. Pickles; each process opens its own files."""

    def __init__(self) -> None:
        self._tables: dict[str, ParquetRows] = {}

    def __call__(self, media: Mapping[str, Any], draw: int = 0) -> Iterator[np.ndarray]:
        """(tiles, 3, tile_size, tile_size) uint8 of each picture and frame, in the order of the ids.

        Args:
            draw: what is random follows from it (`Example.draw`).

        Raises:
            MediaError: a picture is gone, broken, or not of the size it was planned with.
        """
        pictures = self._pictures(media)
        if "jpeg" not in media:
            return pictures
        lowest, highest = media["jpeg"]
        return (
            degrade_tiles(
                tiles, [_drawn(draw, number, m, lowest, highest) for m in range(len(tiles))]
            )
            for number, tiles in enumerate(pictures)
        )

    def _pictures(self, media: Mapping[str, Any]) -> Iterator[np.ndarray]:
        place = MediaPlace(media["root"], media["outside"])
        limits = ImageLimits(max_pixels=media["max_pixels"])
        tile_size = media["tile_size"]
        for item in media["items"]:
            if "frames" in item:
                frames = read_frames(
                    item["ref"], item["frames"], place, limits, num_frames=item["num_frames"]
                )
                for frame in frames:
                    yield whole_tile(frame, tile_size=tile_size)
                continue
            part = self._part_of(item["ref"])
            with open_part(part, place) as file:
                image = decode_image(file, limits, part_name(part))
            if list(image.size) != item["wh"]:
                width, height = item["wh"]
                raise MediaError(
                    "image_wh differs",
                    f"{part_name(part)} is {image.width}x{image.height}, but {width}x{height} was "
                    "planned with: it has changed since it was prepared (run pegboard prepare "
                    "--fresh), or the record's image_wh is wrong (put it right, or leave it out)",
                )
            grid: Sequence[int] = item["grid"]
            yield cut_tiles(
                image, (grid[0], grid[1]), tile_size=tile_size, use_thumbnail=media["thumbnail"]
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"_tables": {}}

    def _part_of(self, reference: str | Mapping[str, Any]) -> MediaPart:
        if isinstance(reference, str):
            return MediaPart("image", reference, None)
        try:
            record = self._read_record(reference)
            if "listed" in reference:
                return read_listed_at(record, reference["listed"], "image")
        except FileNotFoundError:
            # Of a packed file that is its unpacked copy, which may have been pruned.
            raise MediaError(
                "record gone",
                f"{reference['file']}: the file that holds the picture's record is gone: put it back, or run "
                "pegboard prepare --fresh",
            ) from None
        except (OSError, ValueError, LookupError, TypeError, DataError):
            raise _changed(reference) from None
        for number, (_, part) in enumerate(iter_media_parts(record)):
            if number == reference["part"]:
                return part
        raise _changed(reference)

    def _read_record(self, reference: Mapping[str, Any]) -> Any:
        path = reference["file"]
        if "row" in reference:
            if path not in self._tables:
                if len(self._tables) >= _MAX_TABLES:
                    self._tables.pop(next(iter(self._tables))).close()
                self._tables[path] = ParquetRows(path)
            return self._tables[path].read_record(reference["row"])
        start, end = reference["start"], reference["end"]
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return json.loads(os.pread(descriptor, end - start, start))
        finally:
            os.close(descriptor)


def _drawn(draw: int, picture: int, tile: int, lowest: int, highest: int) -> int:
    """A number from `lowest` to `highest`, the same for the same draw, picture and tile."""
    digest = hashlib.blake2b(f"{draw} {picture} {tile}".encode(), digest_size=8).digest()
    return lowest + int.from_bytes(digest, "little") % (highest - lowest + 1)


def _changed(reference: Mapping[str, Any]) -> MediaError:
    return MediaError(
        "record changed", f"{reference['file']}: the record that held the picture has changed"
    )
