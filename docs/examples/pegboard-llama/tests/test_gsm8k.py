"""Claim: GSM8K as published and as chats gives the same chats, what is neither is named by line, and an
answer counts as formed only if it ends with its number."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "smollm2" / "gsm8k.py"


def loaded() -> Any:
    spec = importlib.util.spec_from_file_location("gsm8k", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gsm8k"] = module
    spec.loader.exec_module(module)
    return module


gsm8k = loaded()
CHAT = {
    "messages": [
        {"role": "user", "content": "Six times seven?"},
        {"role": "assistant", "content": "6*7=42.\n#### 42"},
    ]
}
PUBLISHED = {"question": "Six times seven?", "answer": "6*7=<<6*7=42>>42.\n#### 42"}


def test_both_forms_give_the_same_chats(tmp_path: Path) -> None:
    source, target = tmp_path / "source.jsonl", tmp_path / "new" / "chats.jsonl"
    lines = [json.dumps(record) for record in (PUBLISHED, {"id": 7, **CHAT}, CHAT)]
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert gsm8k.main([str(source), str(target), "--limit", "2"]) == 0
    written = target.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in written] == [CHAT, CHAT]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        json.dumps({"text": "nothing of the kind"}),
        json.dumps({"question": "Six?", "answer": "Six."}),
        json.dumps({"messages": CHAT["messages"][:1]}),
    ],
)
def test_a_line_that_is_something_else_is_named(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source.jsonl"
    source.write_text(json.dumps(CHAT) + "\n" + line + "\n", encoding="utf-8")
    assert gsm8k.main([str(source), str(tmp_path / "chats.jsonl")]) == 2
    said = capsys.readouterr().err
    assert f"{source}:2: no question and answer of GSM8K" in said and said.count("\n") == 1
    assert not (tmp_path / "chats.jsonl").exists()


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("So it is 3.\n#### 3", "3"),
        ("So it is -1,250.5.\n#### -1,250.5", "-1,250.5"),
        ("So it is 3.\n#### 3 apples", None),
        ("#### 3", None),
        ("So it is 3.\n#### 3\nAnd more.", None),
        ("The answer is 3.", None),
    ],
)
def test_an_answer_is_formed_only_if_it_ends_with_its_number(
    answer: str, number: str | None
) -> None:
    found = gsm8k.FINAL_LINE.search(answer)
    assert (found and found[1]) == number
