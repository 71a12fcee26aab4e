"""The claim: grids and tiles are those of the published preprocessing, to the last pixel value."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pegboard_plugins.media.images import ImageLimits, decode_image
from pegboard_plugins.media.tiling import choose_grid, count_tiles, cut_tiles, degrade_tiles

ASSETS = Path(__file__).resolve().parents[4] / "shared" / "assets" / "images"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _sizes() -> list[tuple[int, int]]:
    """2,500 (width, height): whole ratios, where grids tie, and random ones."""
    rng = random.Random(5)
    ratios = [(a * k, b * k) for a in range(1, 11) for b in range(1, 11) for k in (1, 90, 224, 448)]
    return ratios + [(rng.randint(1, 4000), rng.randint(1, 4000)) for _ in range(2100)]


@pytest.mark.parametrize("max_tiles", [12, 6, 4, 1])
def test_the_grid_of_every_size_is_the_published_one(max_tiles: int) -> None:
    published = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    sizes = _sizes()
    assert len(sizes) == 2500
    different = [
        (width, height)
        for width, height in sizes
        if choose_grid(width, height, tile_size=448, max_tiles=max_tiles)
        != published.get_optimal_tiled_canvas((height, width), (448, 448), 1, max_tiles)
    ]
    assert different == []


def test_known_sizes_have_the_published_number_of_tiles() -> None:
    known = {(375, 500): 13, (640, 480): 13, (600, 400): 7, (384, 191): 3, (200, 200): 1}
    for (width, height), tiles in known.items():
        assert count_tiles(choose_grid(width, height, tile_size=448)) == tiles


def test_fewest_tiles_is_honoured() -> None:
    for width, height in _sizes()[::50]:
        columns, rows = choose_grid(width, height, tile_size=448, min_tiles=4, max_tiles=9)
        assert 4 <= columns * rows <= 9


def test_tiles_are_cut_row_by_row_with_the_thumbnail_last() -> None:
    picture = Image.new("RGB", (8, 4))
    for x in range(8):
        for y in range(4):
            picture.putpixel((x, y), (x, y, 0))
    tiles = cut_tiles(picture, (2, 1), tile_size=4)
    assert tiles.shape == (3, 3, 4, 4) and tiles.dtype == np.uint8
    assert tiles[0, 0, 0].tolist() == [0, 1, 2, 3] and tiles[1, 0, 0].tolist() == [4, 5, 6, 7]
    assert tiles[0, 1, :, 0].tolist() == [0, 1, 2, 3]
    whole = np.asarray(picture.resize((4, 4), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(tiles[2], whole)
    assert len(cut_tiles(picture, (2, 1), tile_size=4, use_thumbnail=False)) == 2
    assert len(cut_tiles(picture, (1, 1), tile_size=4)) == 1


@pytest.mark.skipif(not ASSETS.is_dir(), reason="needs the shared photographs")
@pytest.mark.parametrize("max_tiles", [12, 6, 1])
def test_pixels_of_real_photographs_equal_transformers_to_zero_of_255(max_tiles: int) -> None:
    published = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    processor = published.GotOcr2ImageProcessorPil(
        size={"height": 448, "width": 448},
        image_mean=MEAN,
        image_std=STD,
        crop_to_patches=True,
        min_patches=1,
        max_patches=max_tiles,
    )
    photographs = sorted(ASSETS.iterdir())[:: 1 if max_tiles == 12 else 6]
    for path in photographs:
        with path.open("rb") as file:
            picture = decode_image(file, ImageLimits(), path.name)
        grid = choose_grid(*picture.size, tile_size=448, max_tiles=max_tiles)
        ours = cut_tiles(picture, grid, tile_size=448)
        theirs = np.asarray(processor(images=picture, return_tensors="np")["pixel_values"])
        mean, std = (np.array(c, np.float32)[:, None, None] for c in (MEAN, STD))
        assert theirs.shape == ours.shape, path.name
        assert np.array_equal(np.rint((theirs * std + mean) * 255), ours), path.name


def test_a_degraded_tile_is_what_a_jpeg_of_that_quality_shows() -> None:
    rng = np.random.default_rng(0)
    smooth = np.linspace(0, 200, 3 * 3 * 28 * 28).reshape(3, 3, 28, 28)
    tiles = (smooth + rng.integers(0, 40, smooth.shape)).astype(np.uint8)
    degraded = degrade_tiles(tiles, [75, 100, 75])
    assert degraded.shape == tiles.shape and degraded.dtype == np.uint8
    change = np.abs(degraded.astype(int) - tiles).mean(axis=(1, 2, 3))
    assert change[1] < change[0] < 20 and change.min() > 0
    file = io.BytesIO()
    Image.fromarray(tiles[2].transpose(1, 2, 0)).save(file, "JPEG", quality=75)
    assert np.array_equal(np.asarray(Image.open(file)).transpose(2, 0, 1), degraded[2])
    assert degrade_tiles(tiles[:0], []).shape == (0, 3, 28, 28)
