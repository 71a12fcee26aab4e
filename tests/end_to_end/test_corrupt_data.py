"""However a file of chats is damaged: every good record is kept, every bad one named, nothing hangs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pegboard import DataError
from pegboard.contracts import TokenizeFn
from pegboard.token_store import TokenStore, build_store
from pegboard_plugins.chat.component import ChatTokenizeFn
from pegboard_plugins.jsonl.component import JsonlDataset
from pegboard_plugins.tokenizers.component import ByteTokenizer

CASES = 2000
Corrupt = Callable[[random.Random, list[bytes]], bytes]


def good_lines() -> list[bytes]:
    """Different records, so that a sample tells which it came from."""
    lines = []
    for i, word in enumerate(["one", "zwei", "trois", "\u4e09", "\U0001f600", "six \\ seven", '"']):
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": f"{word} {i}"},
            {"role": "assistant", "content": f"{word} again"},
        ]
        if i % 3 == 1:
            messages.insert(0, {"role": "system", "content": "be brief"})
        record = {"messages": messages, "id": i}
        lines.append(json.dumps(record, ensure_ascii=i % 2 == 0).encode())
    return lines


def _bytes(draw: random.Random, lines: list[bytes]) -> bytes:
    data = bytearray(b"\n".join(lines) + b"\n")
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(data))
        kind = draw.randrange(3)
        if kind == 0:
            data[place] = draw.randrange(256)
        elif kind == 1:
            data[place:place] = draw.randbytes(draw.randint(1, 9))
        else:
            del data[place : place + draw.randint(1, 30)]
    return bytes(data)


def _lines(draw: random.Random, lines: list[bytes]) -> bytes:
    lines = list(lines)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(lines))
        odd = draw.choice(
            [b"", b"   \t", b"\r", b"[]", b"null", b"3", b'"text"', b"{}", b"{", b"}{", b"\x00" * 9,
             b'{"messages": []}', b"[" * 5000, b'{"a":' * 3000 + b"1" + b"}" * 3000,
             b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b"1" * 5000, b"NaN", b"# note"]
        )  # fmt: skip
        kind = draw.randrange(4)
        if kind == 0:
            lines[place] = odd
        elif kind == 1:
            lines.insert(place, odd)
        elif kind == 2:
            lines.insert(place, lines[draw.randrange(len(lines))])
        else:  # two records on one line, or one on two
            other = draw.choice([b" ", b"", b"\r\n", b"\n\n"])
            lines[place : place + 2] = [other.join(lines[place : place + 2])]
    return b"\n".join(lines) + draw.choice([b"", b"\n", b"\n\n\n", b"\r\n \n"])


def _types(draw: random.Random, lines: list[bytes]) -> bytes:
    """Valid JSON in which something is of another type, or another key."""
    lines = list(lines)
    place = draw.randrange(len(lines))
    record = json.loads(lines[place])
    odd: Any = draw.choice(
        [
            None,
            3,
            -1.5,
            True,
            "text",
            [],
            {},
            [[]],
            [None],
            {"a": {}},
            "",
            10**30,
            ["a", 3],
            {"role": "x"},
        ]
    )
    message = draw.choice(record["messages"])
    kind = draw.randrange(6)
    if kind == 0:
        record["messages"] = odd
    elif kind == 1:
        message[
            draw.choice(["role", "content", "tool_calls", "reasoning_content", "loss", "name"])
        ] = odd
    elif kind == 2:
        record["messages"].insert(draw.randrange(3), odd)
    elif kind == 3:
        record["tools"] = odd
    elif kind == 4:
        del message[draw.choice(["role", "content"])]
    else:
        message["content"] = [{"type": draw.choice(["text", "image_url", "x"]), "text": odd}, odd]
    lines[place] = json.dumps(record).encode()
    return b"\n".join(lines)


def _encodings(draw: random.Random, lines: list[bytes]) -> bytes:
    lines = list(lines)
    encoding = draw.choice(
        ["utf-16", "utf-16-le", "utf-32", "latin-1", "cp037", "utf-8-sig", "utf-7"]
    )
    if draw.random() < 0.3:
        return b"\n".join(lines).decode().encode(encoding, "replace")
    place = draw.randrange(len(lines))
    lines[place] = lines[place].decode().encode(encoding, "replace")
    return b"\n".join(lines)


def _truncation(draw: random.Random, lines: list[bytes]) -> bytes:
    data = b"\n".join(lines) + b"\n"
    start = draw.choice([0, 0, draw.randrange(len(data))])
    return data[start : draw.randint(start, len(data))]


CORRUPTIONS: tuple[Corrupt, ...] = (_bytes, _lines, _types, _encodings, _truncation)


@pytest.fixture(scope="module")
def tokenize() -> TokenizeFn:
    component = ChatTokenizeFn(ChatTokenizeFn.Config(max_length=512))
    tokenizer = ByteTokenizer(ByteTokenizer.Config()).build()
    return component.build(tokenizer, None)  # type: ignore[arg-type]


def _build(path: Path, store: Path, tokenize: TokenizeFn) -> TokenStore:
    records = JsonlDataset(JsonlDataset.Config(anno_path=str(path))).build("d")
    return build_store(store, records, tokenize, on_bad_record="skip", name="d")


def _check(case: int, tmp_path: Path, tokenize: TokenizeFn, clean: dict[bytes, list[int]]) -> None:
    draw = random.Random(case)
    lines = list(clean)
    draw.shuffle(lines)
    content = CORRUPTIONS[case % len(CORRUPTIONS)](draw, lines)
    path = tmp_path / f"{case}.jsonl"
    path.write_bytes(content)
    found = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    while found and not found[-1].strip():
        found.pop()
    try:
        store = _build(path, tmp_path / str(case), tokenize)
    except DataError as error:  # nothing at all is left: that is one message, with the place
        assert "\n" not in str(error)
        assert str(path) in str(error)
        assert not any(line.strip() in clean for line in found)
        return
    bad = {record.line: record.reason for record in store.bad_records()}
    assert len(bad) == store.meta["num_bad"] and all(bad.values())
    samples = {store.key(i).line: store[i].input_ids.tolist() for i in range(len(store))}
    assert len(samples) == len(store) and not samples.keys() & bad.keys()
    assert len(samples) + len(bad) + sum(store.meta["dropped"].values()) == len(found)
    for number, line in enumerate(found, start=1):
        if line.strip() in clean:
            assert samples.get(number) == clean[line.strip()], (number, bad.get(number))
        elif not _is_object(line):
            assert number in bad, line


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode()), dict)
    except (ValueError, RecursionError):
        return False


@pytest.fixture(scope="module")
def clean(tokenize: TokenizeFn, tmp_path_factory: pytest.TempPathFactory) -> dict[bytes, list[int]]:
    folder = tmp_path_factory.mktemp("clean")
    lines = good_lines()
    (folder / "data.jsonl").write_bytes(b"\n".join(lines))
    store = _build(folder / "data.jsonl", folder / "store", tokenize)
    assert len(store) == len(lines)
    return {line: store[i].input_ids.tolist() for i, line in enumerate(lines)}


@pytest.mark.parametrize(
    "corrupt", range(len(CORRUPTIONS)), ids=[c.__name__[1:] for c in CORRUPTIONS]
)
def test_a_damaged_file_keeps_its_good_records_and_names_its_bad_ones(
    corrupt: int, tmp_path: Path, tokenize: TokenizeFn, clean: dict[bytes, list[int]]
) -> None:
    for case in range(corrupt, 100, len(CORRUPTIONS)):
        _check(case, tmp_path, tokenize, clean)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, CASES, 100))
def test_two_thousand_damaged_files_keep_their_good_records_and_name_their_bad_ones(
    first: int, tmp_path: Path, tokenize: TokenizeFn, clean: dict[bytes, list[int]]
) -> None:
    for case in range(first, first + 100):
        _check(case, tmp_path, tokenize, clean)
