"""The claim: VLMJsonlDataset gives records that know where their media lie, and opens none of them."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest

from pegboard_plugins.jsonl.component import VLMJsonlDataset
from pegboard_plugins.jsonl.media_records import MediaJsonlRecords
from pegboard_plugins.media.references import MediaRecord


def _write(folder: Path) -> str:
    path = folder / "a.jsonl"
    path.write_text('{"messages": [1]}\n{"messages": ["\u00e9"]}\n')
    return str(path)


def test_a_record_knows_its_root_and_its_own_bytes(tmp_path: Path) -> None:
    path = _write(tmp_path)
    dataset = VLMJsonlDataset(
        VLMJsonlDataset.Config(anno_path=path, media_root=str(tmp_path / "pictures"))
    ).build("d")
    record = dataset[1]
    assert isinstance(record, MediaRecord) and record == {"messages": ["\u00e9"]}
    source = record.source
    assert source.place.root == str(tmp_path / "pictures") and not source.place.allow_outside
    at = source.at
    assert at is not None
    with open(at["file"], "rb") as file:
        assert json.loads(os.pread(file.fileno(), at["end"] - at["start"], at["start"])) == record


def test_without_media_root_paths_start_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = MediaJsonlRecords("d", [_write(tmp_path)])
    assert dataset[0].source.place.root == str(tmp_path)


def test_the_fingerprint_follows_everything_that_changes_what_may_be_read(tmp_path: Path) -> None:
    path = _write(tmp_path)
    made = [
        MediaJsonlRecords("d", [path], media_root="a"),
        MediaJsonlRecords("d", [path], media_root="b"),
        MediaJsonlRecords("d", [path], media_root="a", check_media="decode"),
        MediaJsonlRecords("d", [path], media_root="a", max_image_pixels=7),
        MediaJsonlRecords("d", [path], media_root="a", allow_outside=True),
    ]
    assert len({dataset.fingerprint() for dataset in made}) == len(made)
    assert made[0].fingerprint() == MediaJsonlRecords("d", [path], media_root="a").fingerprint()
    assert made[-1][0].source.place.allow_outside


def test_it_goes_to_worker_processes(tmp_path: Path) -> None:
    dataset = pickle.loads(pickle.dumps(MediaJsonlRecords("d", [_write(tmp_path)])))
    assert len(dataset) == 2 and dataset[0].source.at is not None
