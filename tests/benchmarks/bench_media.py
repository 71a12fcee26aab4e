"""Pictures to tiles: tiles per CPU second of our loader beside transformers' PIL image processor.

Run `python tests/benchmarks/bench_media.py [folder of pictures]`; not collected by pytest. Both open
the same files and make the same tiles; ours stay uint8, transformers' are float32 and normalised, as
its users get them. Rounds are interleaved; the medians of the CPU times are compared.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

ROUNDS = 5
DEFAULT = Path(__file__).resolve().parents[3] / "shared" / "assets" / "images"


def main(folder: Path) -> None:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    from pegboard_plugins.media.images import ImageLimits, decode_image
    from pegboard_plugins.media.tiling import choose_grid, cut_tiles

    paths = sorted(folder.iterdir())
    processor = GotOcr2ImageProcessorPil(
        size={"height": 448, "width": 448},
        image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
        crop_to_patches=True,
        min_patches=1,
        max_patches=12,
    )

    def ours() -> int:
        tiles = 0
        for path in paths:
            with path.open("rb") as file:
                picture = decode_image(file, ImageLimits(), path.name)
            tiles += len(
                cut_tiles(picture, choose_grid(*picture.size, tile_size=448), tile_size=448)
            )
        return tiles

    def theirs() -> int:
        tiles = 0
        for path in paths:
            picture = Image.open(path).convert("RGB")
            tiles += len(processor(images=picture, return_tensors="np")["pixel_values"])
        return tiles

    cases: dict[str, Callable[[], int]] = {"ours": ours, "transformers": theirs}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, case in cases.items():
            before = time.process_time()
            tiles = case()
            seconds[name].append(time.process_time() - before)
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(
            f"{name:14} {tiles} tiles of {len(paths)} pictures in {middle:.2f} CPU s: {tiles / middle:.0f} a s"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT)
