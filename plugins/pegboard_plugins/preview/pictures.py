"""Small pictures of the tiles that a batch holds, and the rows that each of them fills."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

from .contents import Tile

if TYPE_CHECKING:
    from pegboard.contracts import Batch

__all__ = ["png", "read_tiles"]

_SIDE = 96
"""Pixels of a thumbnail's side, at most."""
_MOST_PICTURES = 64
"""Tiles of a pack that get a thumbnail."""


def read_tiles(batch: Batch) -> tuple[Tile, ...]:
    """The batch's vision tiles in order; () without any, or if they are in a form unknown here."""
    pixels = batch.media.get("pixel_values")
    positions = batch.media.get("image_positions")
    if pixels is None or positions is None or pixels.ndim != 4 or not len(pixels):
        return ()
    rows = positions.numpy()
    count = len(pixels)
    if len(rows) % count or str(pixels.dtype) != "torch.uint8":
        return ()
    tiles = []
    for k, own in enumerate(rows.reshape(count, -1)):
        picture = png(pixels[k].numpy()) if k < _MOST_PICTURES else b""
        tiles.append(Tile(int(own[0]), int(own[-1]) + 1, picture))
    return tuple(tiles)


def png(pixels: np.ndarray) -> bytes:
    """(3, H, W) uint8 -> a PNG of it, made small by leaving rows and columns out."""
    every = max(1, -(-max(pixels.shape[1:]) // _SIDE))
    small = np.ascontiguousarray(pixels[:, ::every, ::every].transpose(1, 2, 0))
    height, width, _ = small.shape
    lines = np.zeros((height, 1 + 3 * width), dtype=np.uint8)  # each line starts with filter 0
    lines[:, 1:] = small.reshape(height, -1)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
