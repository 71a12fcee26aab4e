"""The claim: a batch holds the tiles of its samples in order, at the rows that stand for them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pegboard import DataError, Example, SampleKey
from pegboard_plugins.collators.vision import VisionCollator

IMAGE_ID = 9


def _example(root: Path, *names: str, length: int = 12, line: int = 1, **more: Any) -> Example:
    """One tile of 4 tokens for each picture, from row 2 on, 5 rows apart."""
    length = max(length, 5 * len(names) + 3)
    ids = np.ones(length, dtype=np.int32)
    items = []
    for number, name in enumerate(names):
        start = 2 + 5 * number
        ids[start : start + 4] = IMAGE_ID
        items.append({"ref": name, "wh": [8, 8], "grid": [1, 1], "at": [[start, 4]]})
    media = {
        "tile_size": 8,
        "thumbnail": True,
        "root": str(root),
        "outside": False,
        "max_pixels": 10**6,
        "items": items,
    }
    mask = np.ones(length, dtype=np.bool_)
    mask[ids == IMAGE_ID] = False
    return Example(
        input_ids=ids,
        loss_mask=mask,
        media=media if items else {},
        num_tiles=len(items),
        key=SampleKey("d", "d.jsonl", line),
        **more,
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(4):
        Image.new("RGB", (8, 8), (number, 100, 200)).save(tmp_path / f"{number}.png")
    return tmp_path


def test_tiles_and_rows_are_in_the_order_of_the_pack(root: Path) -> None:
    examples = [_example(root, "2.png", "0.png"), _example(root), _example(root, "3.png")]
    batch = VisionCollator(pad_token_id=0, pad_to_multiple_of=16)(examples)
    pixels = batch.media["pixel_values"]
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 3, 8, 8)
    assert pixels[:, 0, 0, 0].tolist() == [2, 0, 3]
    rows = batch.media["image_positions"]
    assert rows.dtype == torch.int64
    assert rows.tolist() == torch.nonzero(batch.input_ids_T == IMAGE_ID).flatten().tolist()
    assert batch.media["tile_counts"].tolist() == [1, 1, 1]
    assert batch.media["tile_counts"].dtype == torch.int32
    assert batch.extras["num_tiles"] == 3 and type(batch.extras["num_tiles"]) is int


def test_text_alone_and_a_filler_carry_no_media(root: Path) -> None:
    collator = VisionCollator(pad_token_id=0)
    for examples in ([_example(root)], []):
        batch = collator(examples)
        assert batch.media == {} and batch.extras["num_tiles"] == 0


def test_an_unreadable_picture_is_an_error_that_names_the_sample(root: Path) -> None:
    (root / "1.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"^d\.jsonl:7: image '1\.png' is no picture"):
        VisionCollator(pad_token_id=0)([_example(root, "1.png", line=7)])


def test_a_sample_that_may_be_skipped_leaves_its_pack_whole_and_is_counted(root: Path) -> None:
    examples = [
        _example(root, "0.png", line=1),
        _example(root, "2.png", "gone.png", line=2, may_skip=True),
        _example(root, "3.png", line=3, may_skip=True),
    ]
    batch = VisionCollator(pad_token_id=0)(examples)
    assert batch.num_skipped == 1
    assert [key.line for key in batch.keys] == [1, 3]
    assert batch.media["pixel_values"][:, 0, 0, 0].tolist() == [0, 3]
    rows = torch.nonzero(batch.input_ids_T == IMAGE_ID).flatten().tolist()
    assert batch.media["image_positions"].tolist() == rows
    only_bad = VisionCollator(pad_token_id=0)([examples[1]])
    assert only_bad.num_skipped == 1 and only_bad.num_tokens == 0 and only_bad.media == {}


def test_a_picture_that_changed_its_size_is_refused(root: Path) -> None:
    Image.new("RGB", (9, 8)).save(root / "0.png")
    with pytest.raises(DataError, match="is 9x8, but 8x8 was planned"):
        VisionCollator(pad_token_id=0)([_example(root, "0.png")])


def test_the_collator_goes_to_worker_processes(root: Path) -> None:
    collator = pickle.loads(pickle.dumps(VisionCollator(pad_token_id=0, max_tiles_per_pack=7)))
    assert collator.max_tiles_per_pack == 7
    assert len(collator([_example(root, "0.png")]).media["pixel_values"]) == 1
