"""The claim: a bad line of data is named wherever it stands, and every kind of mistake that a config can have is told in
one report, each at its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pegboard.cli import main

MakeConfig = Callable[..., Path]


@pytest.mark.parametrize("line", [1, 7, 14], ids=["first", "middle", "last"])
@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('{"messages": [', "JSON"),
        ("", "blank"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null}]}', "content"),
        ('{"messages": [{"role": "wizard", "content": "a"}]}', "wizard"),
    ],
    ids=["no json", "blank", "null", "role"],
)  # fmt: skip
def test_a_bad_line_is_named_wherever_it_stands(
    bad: str,
    says: str,
    line: int,
    make_config: MakeConfig,
    chats: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = chats.read_text().splitlines()
    lines[line - 1] = bad
    chats.write_text("\n".join(lines) + "\n")
    code = main(["train", str(make_config(savers=[], epoch_num=1)), "--no-third-party"])
    said = capsys.readouterr().err.splitlines()
    if line == 14 and not bad:  # a blank line at the end is none
        assert code == 0
        return
    assert code == 2
    assert said[-1].startswith(f"{chats}:{line}: ") and says in said[-1], said[-1]


def test_every_kind_of_mistake_in_a_config_of_real_parts_is_told_at_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """{
  "wrk_dir": "work",
  "tokenizer": {"class_name": "ByteTokenizer"},
  "model": {"class_name": "InternS1", "preset": "intern-s1-mini"},
  "datasets": [
    {"dataset": {"class_name": "JsonlDatset", "anno_path": "a.jsonl"},
     "tokenize_fn": {"class_name": "ChatTokenizeFn", "max_length": 64}},
    {"dataset": {"class_name": "JsonlDataset", "name": "b", "anno_path": "not/here.jsonl"},
     "tokenize_fn": {"class_name": "TextTokenizeFn", "max_length": 9999}}
  ],
  "dataloader": {"pack_max_length": 4096, "collator": {"class_name": "SFTLLMCollator"}},
  "optimizer": {"class_name": "CosineSchedule"},
  "global_batch_size": "8",
  "epoch_num": 1
}"""
    path = tmp_path / "c.json"
    path.write_text(text)
    assert main(["check", str(path), "--no-third-party"]) == 2
    said = capsys.readouterr().err
    for place, words in [
        ("2:3", "wrk_dir: unknown key 'wrk_dir'. Did you mean 'work_dir'?"),
        ("6:32", "no dataset named 'JsonlDatset'. Did you mean 'JsonlDataset'?"),
        ("8:74", "datasets[1].dataset.anno_path: no file"),
        ("9:68", "datasets[1].tokenize_fn.max_length: 9999 is more than dataloader.pack_max_length"),
        ("11:70", "dataloader.collator.class_name: SFTLLMCollator does not provide"),
        ("12:31", "optimizer.class_name: no optimizer named 'CosineSchedule'"),
        ("13:24", "global_batch_size: expected an integer"),
    ]:  # fmt: skip
        assert any(
            line.startswith(f"{path}:{place}: ") and words in line for line in said.splitlines()
        ), f"{place} {words}\n---\n{said}"
    assert len(said.splitlines()) == 7
