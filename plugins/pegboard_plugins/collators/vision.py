"""Text and image examples of one pack -> a flat Batch with uint8 tiles.

Pictures are decoded here, when the batch is made, so in the loader's process. Tiles stay uint8
until the device. A sample whose pictures can't be read stops the run with its place, or, where the
dataset says `on_bad_record: skip`, is left out of its pack whole and counted: no picture is ever
replaced, and the step's global counts are taken from what is left.

Shape legend: M tiles, P image tokens, T tokens of the row, S side of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from pegboard import Batch, DataError, Example
from pegboard_plugins.collators.text import TextCollator
from pegboard_plugins.media.references import TileLoader, media_spans

__all__ = ["VisionCollator"]


class VisionCollator(TextCollator):
    """The built collator; see TextCollator for the arguments that are not here.

    Args:
        max_tiles_per_pack: read by whoever plans packs.
    """

    def __init__(
        self,
        *,
        pad_token_id: int,
        pad_to_multiple_of: int = 1,
        loss_reduction: str = "token",
        max_tiles_per_pack: int | None = None,
    ) -> None:
        super().__init__(
            pad_token_id=pad_token_id,
            pad_to_multiple_of=pad_to_multiple_of,
            loss_reduction=loss_reduction,
        )
        self.max_tiles_per_pack = max_tiles_per_pack
        self._load_tiles = TileLoader()

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """One micro-batch; `media` is empty and `extras["num_tiles"]` 0 if no sample has pictures.

        Raises:
            DataError: a picture is missing, broken or not of the size planned, and its sample may
                not be skipped; an example is empty or its mask has another length than its ids.
        """
        kept: list[Example] = []
        pictures: list[list[np.ndarray]] = []
        for example in examples:
            try:
                tiles = self._load(example)
            except DataError as error:
                message = f"{example.key}: {error}" if example.key is not None else str(error)
                if not example.may_skip:
                    raise DataError(message) from error
                _warn(f"left out of its pack: {message}")
                continue
            kept.append(example)
            pictures.append(tiles)
        batch = super().__call__([_text_only(example) for example in kept])
        batch.num_skipped = len(examples) - len(kept)
        flat = [tiles for sample in pictures for tiles in sample]
        batch.extras = {
            **batch.extras,
            "num_tiles": sum(map(len, flat)),
            "tiles_of_samples": tuple(sum(map(len, sample)) for sample in pictures),
        }
        if flat:
            batch.media = {
                "pixel_values": _joined(flat),
                "image_positions": _positions(kept),
                "tile_counts": torch.tensor([len(tiles) for tiles in flat], dtype=torch.int32),
            }
        return batch

    def _load(self, example: Example) -> list[np.ndarray]:
        """Tiles of each picture of the sample; as many as its ids have room for."""
        if not example.media:
            return []
        tiles = list(self._load_tiles(example.media, example.draw))
        found = sum(map(len, tiles))
        if found != example.num_tiles:
            raise DataError(f"{found} image tiles, but {example.num_tiles} were planned")
        return tiles


def _text_only(example: Example) -> Example:
    return replace(example, media={}) if example.media else example


def _joined(tiles: Sequence[np.ndarray]) -> torch.Tensor:
    """(M, 3, S, S) uint8 of all pictures, in order."""
    sizes = {part.shape[-1] for part in tiles}
    if len(sizes) > 1:
        raise DataError(
            f"tiles of {' and '.join(map(str, sorted(sizes)))} pixels in one pack; give every "
            "tokenize_fn the same tile size"
        )
    return torch.from_numpy(np.concatenate(tiles))


def _positions(examples: Sequence[Example]) -> torch.Tensor:
    """(P,) int64 rows of the pack that hold image features, in order."""
    rows = []
    start = 0
    for example in examples:
        if example.media:
            rows += [
                np.arange(start + first, start + first + count, dtype=np.int64)
                for first, count in media_spans(example.media)
            ]
        start += len(example.input_ids)
    return torch.from_numpy(np.concatenate(rows))


def _warn(message: str) -> None:
    from loguru import logger

    logger.warning(message)
