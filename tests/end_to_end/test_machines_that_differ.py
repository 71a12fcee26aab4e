"""The claim: machines that hold other data, or see another checkpoint, end on every rank with one message that
says so; before, they trained together until one had fewer steps, and then waited for half an hour."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from launching import tiny_config, torchrun, write_chats, write_config

from pegboard import rank_agreement
from pegboard.errors import DataError
from pegboard.rank_agreement import check_same_data

MACHINES = '''
"""Each rank on a machine of its own: another current folder, local rank 0."""
import os, sys
from pegboard.cli import main
os.chdir(sys.argv[1 + int(os.environ["RANK"])])
os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
sys.exit(main(["train", *sys.argv[3:]]))
'''


def source(name: str, samples: int, identity: str) -> Any:
    class Store:
        def __len__(self) -> int:
            return samples

        def content_identity(self) -> str:
            return identity

    return SimpleNamespace(name=name, store=Store())


def other_ranks_say(monkeypatch: pytest.MonkeyPatch, *others: Any) -> None:
    monkeypatch.setattr(rank_agreement, "gather_from_ranks", lambda value: [value, *others])


def test_a_rank_with_other_samples_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [source("a", 3, "x"), source("b", 40, "y")]
    same = [(3, "x"), (40, "y")]
    other_ranks_say(monkeypatch, same, same)
    check_same_data(ours)
    other_ranks_say(monkeypatch, same, [(3, "x"), (1080, "z")])
    with pytest.raises(
        DataError, match=r"'b': rank 2 has other samples \(1,080\) than rank 0 \(40\)"
    ):
        check_same_data(ours)
    other_ranks_say(monkeypatch, [(3, "w"), (40, "y")])  # as many, but others
    with pytest.raises(DataError, match=r"'a': rank 1 has other samples \(3\) than rank 0 \(3\)"):
        check_same_data(ours)


@pytest.mark.slow
@pytest.mark.parametrize("differs", ["data", "checkpoint"])
def test_two_machines_that_differ_end_with_one_message(tmp_path: Path, differs: str) -> None:
    script = tmp_path / "machines.py"
    script.write_text(MACHINES, encoding="utf-8")
    folders = [tmp_path / "one", tmp_path / "two"]
    for index, folder in enumerate(folders):
        folder.mkdir()
        write_chats(folder / "chats.jsonl", 20 + 20 * index if differs == "data" else 20)
    config = tiny_config(
        Path("runs"), Path("chats.jsonl"), global_batch_size=2, epoch_num=1, cache_dir="cache"
    )
    config["savers"] = [{"class_name": "CheckpointSaver"}]
    path = write_config(tmp_path / "config.json", config)
    arguments = [str(script), *map(str, folders), str(path)]
    if differs == "checkpoint":
        state = folders[0] / "runs" / "run" / "checkpoints" / "step_00000001" / "state.json"
        state.parent.mkdir(parents=True)
        state.write_text('{"format_version": 2, "files": {}, "train_state": {}}', encoding="utf-8")
        arguments.append("--resume")
    result = torchrun(2, *arguments, timeout_s=100)
    assert result.returncode != 0
    expected = {
        "data": "dataset 'chats': rank 1 has other samples (40) than rank 0 (20)",
        "checkpoint": "step_00000001: can't be resumed: rank 1: ",
    }
    assert result.stderr.count(expected[differs]) >= 2, result.stderr[-3000:]
