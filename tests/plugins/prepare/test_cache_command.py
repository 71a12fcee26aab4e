"""`pegboard cache` says what a cache folder holds, whether it is whole, and deletes only what can go."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from pegboard.cli import main
from pegboard.file_claims import open_claims
from pegboard.token_store import build_store, draft_folder
from pegboard_plugins.chat.component import TextTokenizeFn
from pegboard_plugins.jsonl.component import JsonlDataset
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
    (folder / "file_hashes").mkdir()
    (folder / "plans" / "p" / "epoch_00000").mkdir(parents=True)
    return folder


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
    shown = [line.split()[:2] for line in lines[1:4]]
    assert shown == [["a", "ready"], ["b", "ready"], ["plans/p", "plan"]]
    assert "3 days" in lines[2] and lines[2].endswith(f"{tmp_path}/b.jsonl")
    assert lines[4].startswith("3 in ")


def test_a_run_config_stands_for_its_cache(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"cache_dir": str(cache)}))
    assert run("list", str(tmp_path / "c.json")) == 0
    assert "3 in " in capsys.readouterr().out
    (tmp_path / "d.json").write_text(json.dumps({"work_dir": str(tmp_path / "w")}))
    assert run("list", str(tmp_path / "d.json")) == 2
    assert f"{tmp_path}/w/.token_store: no cache folder there" in capsys.readouterr().err


def test_verify_finds_a_changed_byte_and_a_missing_file(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", str(cache)) == 0
    assert capsys.readouterr().out.count(": whole") == 2
    mask = cache / "a" / "mask.bin"
    mask.write_bytes(b"\x01" + mask.read_bytes()[1:])
    (cache / "b" / "keys.bin").unlink()
    assert run("verify", str(cache)) == 2
    one, two = capsys.readouterr().out.splitlines()
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
