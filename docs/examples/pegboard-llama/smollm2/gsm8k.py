"""GSM8K as chats: what the fine-tuning trains on and what it is scored on.

    python gsm8k.py train.jsonl chats.jsonl --limit 400

Reads the published form, `{"question", "answer"}`, whose calculator marks (`<<6*7=42>>`) it takes
out, or chats that are made already, `{"messages"}`. Either way an answer ends with `#### number`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

__all__ = ["FINAL_LINE", "main", "read_chats", "write_chats"]

FINAL_LINE = re.compile(r"\n#### (-?[0-9][0-9,]*(?:\.[0-9]+)?)\Z")
"""The end of an answer that is right in form; its group is the number."""
_MARKS = re.compile(r"<<[^<>]*>>")


def main(argv: list[str] | None = None) -> int:
    """Convert; exit code 2 with one line if a file can't be read or is something else."""
    parser = argparse.ArgumentParser(description="GSM8K as chats.")
    parser.add_argument("source", type=Path, help="JSON lines of GSM8K")
    parser.add_argument("target", type=Path, help="JSON lines of chats")
    parser.add_argument("--limit", type=int, help="first so many (default: all)")
    arguments = parser.parse_args(argv)
    try:
        write_chats(arguments.target, read_chats(arguments.source, arguments.limit))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def read_chats(source: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The first `limit` records as `{"messages"}`.

    Raises:
        OSError: the file can't be read.
        ValueError: a line is no record of GSM8K; says which.
    """
    chats = []
    with source.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if limit is not None and number > limit:
                break
            try:
                chats.append(_chat(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{source}:{number}: no question and answer of GSM8K; expected the keys "
                    "question and answer, or messages, and an answer that ends with '#### number'"
                ) from error
    return chats


def write_chats(target: Path, chats: list[dict[str, Any]]) -> None:
    """One JSON line for each chat."""
    target.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats)
    target.write_text(text, encoding="utf-8")


def _chat(record: Any) -> dict[str, Any]:
    if "messages" in record:
        (question, answer) = (message["content"] for message in record["messages"])
    else:
        question, answer = record["question"], _MARKS.sub("", record["answer"])
    if FINAL_LINE.search(answer) is None:
        raise ValueError("no final line")
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


if __name__ == "__main__":
    sys.exit(main())
