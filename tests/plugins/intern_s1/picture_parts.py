"""Pictures made of their sample's number, and packs of one sample in the order given: parts for tests of ranks.

Loaded as a plugin file; no tests in here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch.distributed.tensor import DTensor

import pegboard
from pegboard import Batch, Example, PackPlan, SampleKey, Targets
from pegboard.savers import SaveRequest
from pegboard.train_state import named_tensors

IMAGE_ID, TILE, PER_TILE = 300, 28, 4


class Samples:
    """Built TileSamples."""

    def __init__(self, name: str, tiles: Sequence[int]) -> None:
        self.name, self.tiles = name, tiles

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {"number": index, "tiles": self.tiles[index]}

    def key(self, index: int) -> SampleKey:
        return SampleKey(self.name, "samples", index + 1)

    def fingerprint(self) -> str | None:
        return repr(self.tiles)


class TileSamples(pegboard.DatasetComponent):
    """Samples with so many tiles each."""

    class Config(pegboard.ComponentConfig):
        """Fields of TileSamples."""

        tiles: tuple[int, ...] = Field(description="Tiles of each sample.")

    config: Config

    def build(self, name: str) -> Samples:
        return Samples(name, self.config.tiles)


class Tokenize:
    """Built TileTokenize."""

    max_length = 512

    def __call__(self, record: Mapping[str, Any]) -> Sequence[Example]:
        words = np.random.default_rng(record["number"]).integers(0, 200, 9)
        image = np.full(record["tiles"] * PER_TILE, IMAGE_ID)
        ids = np.concatenate([words[:3], image, words[3:]]).astype(np.int32)
        mask = np.arange(len(ids)) >= len(ids) - 5
        return [Example(input_ids=ids, loss_mask=mask)]

    def take_counts(self) -> Mapping[str, int]:
        return {}

    def fingerprint(self) -> str:
        return "tiles"


class TileTokenize(pegboard.TokenizeFnComponent):
    """Random words around image tokens."""

    class Config(pegboard.ComponentConfig):
        """Fields of TileTokenize."""

        max_length: int = Field(default=512, description="Longest example.")

    config: Config

    def build(self, tokenizer: Any, model: Any) -> Tokenize:
        tokens = model.image_tokens()
        assert tokens == (TILE, PER_TILE, IMAGE_ID)
        return Tokenize()


class Collate:
    """Built TileCollator: pixels drawn from the first word."""

    def __call__(self, examples: Sequence[Example]) -> Batch:
        ids = torch.from_numpy(
            np.concatenate([e.input_ids for e in examples] or [np.zeros(1)]).astype(np.int64)
        )
        lengths = [len(e.input_ids) for e in examples] or [1]
        mask = torch.from_numpy(
            np.concatenate([e.loss_mask for e in examples] or [np.zeros(1, dtype=bool)])
        )
        labelled = mask.nonzero().flatten()
        tiles = [int((e.input_ids == IMAGE_ID).sum()) // PER_TILE for e in examples]
        media = {}
        if sum(tiles):
            generator = torch.Generator().manual_seed(int(ids[0]))
            shape = (sum(tiles), 3, TILE, TILE)
            media = {
                "pixel_values": torch.randint(256, shape, generator=generator, dtype=torch.uint8),
                "image_positions": (ids == IMAGE_ID).nonzero().flatten(),
                "tile_counts": torch.tensor(tiles, dtype=torch.int32),
            }
        return Batch(
            input_ids_T=ids,
            position_ids_T=torch.cat([torch.arange(n) for n in lengths]),
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
            max_seqlen=max(lengths),
            targets=Targets(
                labelled - 1,
                ids[labelled],
                torch.ones(len(labelled)),
                torch.zeros_like(labelled),
                1.0,
            ),
            num_tokens=len(ids) if examples else 0,
            keys=tuple(e.key for e in examples if e.key is not None),
            media=media,
            extras={"num_tiles": sum(tiles), "tiles_of_samples": tuple(tiles)},
        )


class TileCollator(pegboard.CollatorComponent):
    """Batches with made-up pixels."""

    provides = frozenset({"pixel_values"})

    def build(self, *, pad_token_id: int) -> Collate:
        return Collate()


class InOrder:
    """Built OneByOne."""

    def plan(self, lengths: np.ndarray, *others: Any, **options: Any) -> PackPlan:
        return PackPlan(np.arange(len(lengths) + 1), np.arange(len(lengths)))


class OneByOne(pegboard.PackerComponent):
    """A pack for each sample, in order."""

    def build(self) -> InOrder:
        return InOrder()


class Watch:
    """Built WatchParts."""

    def due(self, step: int, *, is_last: bool) -> bool:
        return True

    def save(self, request: SaveRequest) -> None:
        digests: dict[str, Any] = {}
        for name, parameter in named_tensors(request.module).items():
            whole = parameter.detach()
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            digest = digests.setdefault(name.split(".")[0], hashlib.sha256())
            # A copy: numpy pins the storage, which FSDP wants to free later.
            digest.update(whole.clone().numpy().tobytes())
        line = {"step": request.step, **{part: d.hexdigest() for part, d in digests.items()}}
        with (request.run_dir / f"parts_{torch.distributed.get_rank()}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


class WatchParts(pegboard.SaverComponent):
    """Writes a digest of each part's weights after every step."""

    def build(self) -> Any:
        return Watch()


@pegboard.hookimpl
def register_datasets(register: Callable[[type[Any]], None]) -> None:
    register(TileSamples)


@pegboard.hookimpl
def register_tokenize_fns(register: Callable[[type[Any]], None]) -> None:
    register(TileTokenize)


@pegboard.hookimpl
def register_collators(register: Callable[[type[Any]], None]) -> None:
    register(TileCollator)


@pegboard.hookimpl
def register_packers(register: Callable[[type[Any]], None]) -> None:
    register(OneByOne)


@pegboard.hookimpl
def register_savers(register: Callable[[type[Any]], None]) -> None:
    register(WatchParts)
