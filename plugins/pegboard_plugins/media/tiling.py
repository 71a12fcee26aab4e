"""Dynamic tiling: the grid whose aspect ratio is nearest to the picture's, and its tiles.

A picture is resized to the grid's size (bicubic), cut row by row, and a grid of several tiles gets
the whole picture, resized to one tile, as its last.

Source: InternVL's dynamic preprocessing (Chen et al., How Far Are We to GPT-4V?, 2024, section
3.3), as published with Intern-S1 and in transformers' GotOcr2ImageProcessor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from io import BytesIO

import numpy as np
from PIL import Image

__all__ = ["choose_grid", "count_tiles", "cut_tiles", "degrade_tiles", "whole_tile"]


def choose_grid(
    width: int, height: int, *, tile_size: int, min_tiles: int = 1, max_tiles: int = 12
) -> tuple[int, int]:
    """(columns, rows) for a picture of this size, with min_tiles <= columns * rows <= max_tiles.

    Of equally near grids the larger is taken while the picture has more than half its pixels.
    """
    aspect = width / height
    half_area = 0.5 * tile_size * tile_size
    best, best_distance = (1, 1), float("inf")
    for columns, rows in _grids(min_tiles, max_tiles):
        distance = abs(aspect - columns / rows)
        if distance < best_distance:
            best, best_distance = (columns, rows), distance
        elif distance == best_distance and width * height > half_area * columns * rows:
            best = (columns, rows)
    return best


def count_tiles(grid: tuple[int, int], *, use_thumbnail: bool = True) -> int:
    """Tiles of a grid, the thumbnail included."""
    tiles = grid[0] * grid[1]
    return tiles + 1 if use_thumbnail and tiles > 1 else tiles


def cut_tiles(
    image: Image.Image, grid: tuple[int, int], *, tile_size: int, use_thumbnail: bool = True
) -> np.ndarray:
    """(tiles, 3, tile_size, tile_size) uint8 of an RGB picture, row by row, the thumbnail last."""
    columns, rows = grid
    tiles = np.empty(
        (count_tiles(grid, use_thumbnail=use_thumbnail), 3, tile_size, tile_size), dtype=np.uint8
    )
    resized = image.resize((tile_size * columns, tile_size * rows), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized).reshape(rows, tile_size, columns, tile_size, 3)
    tiles[: columns * rows] = pixels.transpose(0, 2, 4, 1, 3).reshape(-1, 3, tile_size, tile_size)
    if len(tiles) > columns * rows:
        tiles[-1:] = whole_tile(image, tile_size=tile_size)
    return tiles


def whole_tile(image: Image.Image, *, tile_size: int) -> np.ndarray:
    """(1, 3, tile_size, tile_size) uint8: the whole RGB picture as one tile."""
    resized = image.resize((tile_size, tile_size), Image.Resampling.BICUBIC)
    return np.asarray(resized).transpose(2, 0, 1)[None]


def degrade_tiles(tiles_MCSS: np.ndarray, qualities: Sequence[int]) -> np.ndarray:
    """(M, 3, S, S) uint8 tiles as JPEG files of these qualities, one for each, would show them.

    Source: the training transform of InternVL 1.5 (Chen et al. 2024).
    """
    degraded = np.empty_like(tiles_MCSS)
    for number, (tile, quality) in enumerate(zip(tiles_MCSS, qualities, strict=True)):
        file = BytesIO()
        Image.fromarray(tile.transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
        with Image.open(file) as image:
            degraded[number] = np.asarray(image).transpose(2, 0, 1)
    return degraded


@cache
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Grids by number of tiles, narrower first; never empty for max_tiles >= 1."""
    grids = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))
