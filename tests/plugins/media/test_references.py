"""Pictures that a record holds itself are found again by where the record stands, or it is said what is gone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pegboard_plugins.media.places import MediaError
from pegboard_plugins.media.references import TileLoader

REFERENCE = {"start": 0, "end": 40, "part": 0}


def media(file: Path) -> dict[str, Any]:
    return {
        "root": None,
        "outside": False,
        "max_pixels": 10_000,
        "tile_size": 28,
        "thumbnail": False,
        "items": [{"ref": {**REFERENCE, "file": str(file)}, "wh": [8, 8], "grid": [1, 1]}],
    }


def test_a_file_of_records_that_is_gone_is_named_with_the_way_to_make_it_again(
    tmp_path: Path,
) -> None:
    file = tmp_path / "unpacked.jsonl"
    with pytest.raises(MediaError, match=r"unpacked\.jsonl: the file .* is gone.*prepare --fresh"):
        list(TileLoader()._pictures(media(file)))


def test_a_record_without_its_picture_has_changed(tmp_path: Path) -> None:
    file = tmp_path / "unpacked.jsonl"
    file.write_text(json.dumps({"messages": []}).ljust(40))
    with pytest.raises(MediaError, match=r"unpacked\.jsonl: the record .* has changed"):
        list(TileLoader()._pictures(media(file)))
