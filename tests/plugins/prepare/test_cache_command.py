"""`pegboard cache` says what a cache folder holds, whether it is whole, and deletes only what can go."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from pegboard.cli import main
from pegboard.data_loading import DataSource
from pegboard.epoch_planner import EpochPlanner
from pegboard.file_claims import open_claims
from pegboard.file_identity import content_hashes
from pegboard.token_store import build_store, draft_folder, open_store
from pegboard_plugins.chat.component import TextTokenizeFn
from pegboard_plugins.jsonl.component import JsonlDataset
from pegboard_plugins.packers.component import ExpandSoftPacker
from pegboard_plugins.records.compressed_lines import CompressedLines
from pegboard_plugins.tokenizers.component import ByteTokenizer


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Two stores, `a` and `b`."""
    folder = tmp_path / "cache"
    tokenizer = ByteTokenizer(ByteTokenizer.Config()).build()
    tokenize: Any = TextTokenizeFn(TextTokenizeFn.Config(max_length=64)).build(tokenizer, None)  # type: ignore[arg-type]
    for name in ("a", "b"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps({"text": f"text of {name}"}) + "\n")
        records = JsonlDataset(JsonlDataset.Config(anno_path=str(path))).build(name)
        build_store(folder / name, records, tokenize, name=name)
    plans = EpochPlanner(
        [DataSource(open_store(folder / "a"), 0, "a")],
        packer=ExpandSoftPacker(ExpandSoftPacker.Config()).build(),
        pack_max_length=64,
        folder=folder / "plans",
        cached_from=0,
    )
    plans.plan(0)
    (plan,) = (folder / "plans").iterdir()
    plan.rename(plan.with_name("p"))
    content_hashes([str(tmp_path / "a.jsonl")], folder / "file_hashes")
    (ledger,) = (folder / "file_hashes").glob("*.json")
    ledger.rename(ledger.with_name("h.json"))
    return folder


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    """A folder with the unpacked copy of one file."""
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "c"}\n'))
    CompressedLines(str(path), str(tmp_path / "unpacked")).close()
    return tmp_path / "unpacked"


def run(*words: str) -> int:
    return main(["cache", *words, "--no-third-party"])


def age(folder: Path, days: float) -> None:
    when = time.time() - days * 86_400
    os.utime(folder / "last_used", (when, when))


def test_list_names_each_store_with_its_size_and_origin(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    age(cache / "b", 3)
    assert run("list", str(cache)) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split()[:2] for line in lines[1:5]]
    assert shown == [
        ["a", "ready"], ["b", "ready"], ["file_hashes/h.json", "hashes"], ["plans/p", "plan"],
    ]  # fmt: skip
    assert "3 days" in lines[2] and lines[2].endswith(f"{tmp_path}/b.jsonl")
    assert lines[5].startswith("4 in ")


def test_a_run_config_stands_for_its_cache(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"cache_dir": str(cache)}))
    assert run("list", str(tmp_path / "c.json")) == 0
    assert "4 in " in capsys.readouterr().out
    (tmp_path / "d.json").write_text(json.dumps({"work_dir": str(tmp_path / "w")}))
    assert run("list", str(tmp_path / "d.json")) == 2
    assert f"{tmp_path}/w/.token_store: no cache folder there" in capsys.readouterr().err


def test_verify_finds_a_changed_byte_and_a_missing_file(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", str(cache)) == 0
    assert capsys.readouterr().out.count(": whole") == 3
    mask = cache / "a" / "mask.bin"
    mask.write_bytes(b"\x01" + mask.read_bytes()[1:])
    (cache / "b" / "keys.bin").unlink()
    assert run("verify", str(cache)) == 2
    one, two, three = capsys.readouterr().out.splitlines()
    assert three == f"{cache}/plans/p: whole"
    assert one == f"{cache}/a: damaged: mask.bin; delete the folder"
    assert "keys.bin: None bytes" in two


def test_prune_deletes_what_is_old_damaged_or_abandoned_and_keeps_the_rest(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    age(cache / "b", 40)
    shutil.copytree(cache / "a", cache / "c")
    (cache / "c" / "ids.bin").unlink()
    dead = draft_folder(cache / "d", "x")
    dead.mkdir()
    (dead / "0.claim").write_text(json.dumps({"pid": 2**22 + 1, "machine": "elsewhere"}))
    os.utime(dead, (0, 0))
    os.utime(dead / "0.claim", (0, 0))
    (cache / ".e.gone").mkdir()
    alive = draft_folder(cache / "f", "x")
    alive.mkdir()
    with open_claims(alive) as claims:
        assert claims.take("0")
        assert run("prune", str(cache), "--dry-run") == 0
        told = capsys.readouterr().out
        assert told.count("would delete") == 4
        assert len(list(cache.iterdir())) == 8
        assert run("prune", str(cache)) == 0
        assert capsys.readouterr().out == told.replace("would delete", "deleted").replace(
            "would be freed", "freed"
        )
    assert sorted(path.name for path in cache.iterdir()) == [
        alive.name, "a", "file_hashes", "plans",
    ]  # fmt: skip
    assert len(list((cache / "plans").iterdir())) == 1
    assert run("prune", str(cache), "--days", "0") == 0
    assert sorted(path.name for path in cache.iterdir()) == ["file_hashes", "plans"]
    assert list((cache / "plans").iterdir()) == []
    assert [path.name for path in (cache / "file_hashes").glob("*.json")] == ["h.json"]


def test_hashes_stay_while_one_of_their_files_is_there(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To read terabytes again costs more than a small file."""
    dead = cache / "file_hashes" / "x.claim"
    dead.touch()
    assert run("prune", str(cache)) == 0
    assert (cache / "file_hashes" / "h.json").exists() and dead.exists()
    os.utime(dead, (0, 0))
    (tmp_path / "a.jsonl").unlink()
    assert run("prune", str(cache)) == 0
    out = capsys.readouterr().out
    assert f"deleted {cache}/file_hashes/h.json (its data files are gone)" in out
    assert f"deleted {dead} (leftover)" in out
    assert list((cache / "file_hashes").iterdir()) == []


@pytest.mark.parametrize("harm", ["flip", "cut", "no meta"])
def test_a_plan_is_read_against_its_checksums(
    cache: Path, capsys: pytest.CaptureFixture[str], harm: str
) -> None:
    epoch = cache / "plans" / "p" / "epoch_00000"
    samples = epoch / "samples.npy"
    name = "samples.npy"
    if harm == "flip":
        content = samples.read_bytes()
        samples.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif harm == "cut":
        samples.write_bytes(samples.read_bytes()[:-1])
    else:
        name = "plan.json"
        (epoch / name).write_text("{}")
    assert run("verify", str(cache)) == 2
    expected = f"{cache}/plans/p: damaged: epoch_00000/{name}; delete the folder"
    assert capsys.readouterr().out.splitlines()[-1] == expected


def test_a_plan_that_is_mapped_counts_as_opened(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = EpochPlanner(
        [DataSource(open_store(cache / "a"), 0, "a")],
        packer=ExpandSoftPacker(ExpandSoftPacker.Config()).build(),
        pack_max_length=64,
        folder=cache / "plans",
        cached_from=0,
    )
    assert plans._folder is not None
    (cache / "plans" / "p").rename(plans._folder)
    for path in (plans._folder, *plans._folder.rglob("*")):
        os.utime(path, (0, 0))
    assert run("prune", str(cache), "--dry-run") == 0
    assert f"would delete {plans._folder} (not opened for" in capsys.readouterr().out
    plans.plan(0)
    assert run("prune", str(cache)) == 0
    assert plans._folder.exists()


def test_unpacked_files_are_listed_verified_and_pruned(
    cache: Path, unpacked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.json"
    dataset = {"unpack_dir": str(unpacked)}
    config.write_text(
        json.dumps({"cache_dir": str(cache), "eval": {"datasets": [{"dataset": dataset}]}})
    )
    (file,) = unpacked.glob("*.jsonl")
    assert run("list", str(config)) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if file.name in line)
    assert row.split()[:2] == [file.name, "unpacked"] and row.endswith(f"{tmp_path}/c.jsonl.gz")
    assert run("verify", str(config)) == 0
    assert f"{file}: whole" in capsys.readouterr().out
    file.write_bytes(b'{"text": "d"}\n')
    assert run("verify", str(unpacked)) == 2
    assert f"{file}: damaged: not what {tmp_path}/c.jsonl.gz was unpacked to; delete the file" in (
        capsys.readouterr().out
    )
    os.utime(file, (0, 0))
    draft = unpacked / "tmpx.part"
    draft.touch()
    assert run("prune", str(config)) == 0
    assert f"deleted {file} (not opened for" in capsys.readouterr().out
    assert [path.name for path in unpacked.iterdir()] == ["tmpx.part"], "written at this moment"
    os.utime(draft, (0, 0))
    assert run("prune", str(unpacked)) == 0
    assert list(unpacked.iterdir()) == []


def test_an_unpacked_file_of_another_length_is_damaged_and_pruned(
    unpacked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = unpacked.glob("*.jsonl")
    file.write_bytes(b"{")
    assert run("list", str(unpacked)) == 0
    assert "damaged: 1 bytes, expected 14" in capsys.readouterr().out
    assert run("verify", str(unpacked)) == 2
    assert run("prune", str(unpacked)) == 0
    assert list(unpacked.iterdir()) == []
