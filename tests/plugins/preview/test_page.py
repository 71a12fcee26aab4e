"""The page is one file, allows its own two blocks alone, and shows data as text, never as markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pegboard.plugin_manager import load_plugins
from pegboard.run_config import load_run_config
from pegboard_plugins.preview.contents import Preview
from pegboard_plugins.preview.gathering import gather_preview
from pegboard_plugins.preview.page import render_page

ATTACK = """</script></style><script>alert(1)</script><img src=x onerror=alert(2)>'"><svg/onload=a>&lt;"""
ALLOWED_ATTRIBUTES = re.compile(
    r"(id|class|title|href|src|alt|role|tabindex|hidden|lang|name|content|charset|type|checked|open|scope|"
    r"http-equiv|aria-[a-z]+|data-[a-z]+|viewbox|preserveaspectratio|width|height|x|y|x1|x2|y1|y2|"
    r"text-anchor)$"
)


class Reader(HTMLParser):
    """Elements with their attributes, and the text of each kind of element."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input", "br", "rect", "line"):
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open[-3:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open[-1]][-1] += data


@pytest.fixture
def page(write_run: Callable[..., Path]) -> str:
    messages = [
        {"role": "user", "content": ATTACK},
        {"role": "assistant", "content": f"{ATTACK} \u202e \u4f60\n"},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": ATTACK},
    ]
    name = "a</h1><script>alert(3)</script>"
    path = write_run({"plain": [{"messages": messages}] * 3, "t": [{"text": ATTACK}]})
    config = json.loads(path.read_text())
    config["datasets"][0]["dataset"]["name"] = name
    path.write_text(json.dumps(config))
    return render_page(
        gather(path), conditions=["supervised<1%"], broken=[f"supervised<1%: {ATTACK}"]
    )


def gather(path: Path) -> Preview:
    run = load_run_config(path, (), load_plugins(third_party=False).registry).run
    return gather_preview(run, config_path=f"{ATTACK}/{ATTACK}.json", step=1, num_shown=9)


def test_data_never_becomes_markup(page: str) -> None:
    reader = Reader(page)
    kinds = {tag for tag, _ in reader.elements}
    assert kinds <= {
        *("html", "head", "meta", "title", "style", "body", "script", "header", "main", "section"),
        *(
            "a",
            "p",
            "h1",
            "h2",
            "h3",
            "h4",
            "ul",
            "li",
            "b",
            "i",
            "u",
            "em",
            "del",
            "ins",
            "span",
            "div",
        ),
        *(
            "dl",
            "dt",
            "dd",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
            "br",
            "details",
            "summary",
        ),
        *("article", "label", "input", "kbd", "svg", "g", "rect", "line", "text"),
    }
    assert sum(tag == "script" for tag, _ in reader.elements) == 2
    wrong = [
        name for _, attrs in reader.elements for name in attrs if not ALLOWED_ATTRIBUTES.match(name)
    ]
    assert wrong == []
    assert "alert(1)" in "".join(reader.texts["i"])  # still there, as text


def test_nothing_is_loaded_from_anywhere(page: str) -> None:
    for tag, attributes in Reader(page).elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert (attributes.get("href") or "#").startswith("#")
        assert (attributes.get("src") or "data:image/png;").startswith("data:image/png;")
    assert not re.search(r"url\(|@import", page.split("<body>")[0])


def test_the_policy_allows_exactly_the_two_blocks_of_the_file(page: str) -> None:
    reader = Reader(page)
    [policy] = [a["content"] for _, a in reader.elements if "http-equiv" in a]
    assert policy is not None

    def hashed(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert f"style-src {hashed(reader.texts['style'][0])};" in policy
    assert f"script-src {hashed(reader.texts['script'][1])};" in policy
    assert "unsafe" not in policy
    assert not any("style" in attributes for _, attributes in reader.elements)


def test_the_numbers_beside_the_tokens_are_those_of_the_pack(
    write_run: Callable[..., Path],
) -> None:
    records = [{"text": f"\u4f60 {k}\n\tend  "} for k in range(5)]
    collator = {"class_name": "SFTLLMCollator", "pad_to_multiple_of": 64}
    preview = gather(
        write_run({"a": records}, dataloader={"pack_max_length": 512, "collator": collator})
    )
    reader = Reader(render_page(preview))
    data = json.loads(reader.texts["script"][0])
    pack = preview.packs[0]
    assert data[0]["ids"] == list(pack.ids)
    assert data[0]["positions"] == list(pack.positions)
    assert [k >= 0 for k in data[0]["loss"]] == [weight != 0 for weight in pack.weights]
    assert sum(tokens_of(reader)) == len(pack.ids)


def tokens_of(reader: Reader) -> Iterator[int]:
    """Tokens that each token element stands for."""
    inside = False
    for tag, attributes in reader.elements:
        if tag == "p":
            inside = attributes.get("class") == "tokens"
        elif tag == "i" and inside:
            yield int(attributes.get("data-n") or 1)


def test_the_same_preview_gives_the_same_bytes(write_run: Callable[..., Path]) -> None:
    path = write_run({"a": [{"text": "one two"}]})
    assert render_page(gather(path)) == render_page(gather(path))


def test_pictures_stand_at_the_rows_of_their_tiles() -> None:
    import numpy as np
    import torch

    from pegboard.contracts import Batch, Targets
    from pegboard_plugins.preview.contents import Pack, Sample, Segment
    from pegboard_plugins.preview.page_packs import render_tokens
    from pegboard_plugins.preview.pictures import png, read_tiles
    from pegboard_plugins.preview.pieces import Piece

    pixels = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    empty = torch.empty(0, dtype=torch.int64)
    batch = Batch(
        input_ids_T=torch.tensor([5, *[9] * 16, 6]),
        position_ids_T=torch.arange(18),
        cu_seqlens=torch.tensor([0, 18], dtype=torch.int32),
        max_seqlen=18,
        targets=Targets(empty, empty, empty.float(), empty, 1.0),
        num_tokens=18,
        media={"pixel_values": pixels, "image_positions": torch.arange(1, 17)},
    )
    tiles = read_tiles(batch)
    assert [(tile.start, tile.end) for tile in tiles] == [(1, 9), (9, 17)]
    assert tiles[0].picture == png(np.asarray(pixels[0]))
    pieces = [
        Piece("a", "text", "a"),
        *[Piece("<img>", "special", "<img>")] * 16,
        Piece("b", "text", "b"),
    ]
    pack = Pack(
        number=1,
        ids=batch.input_ids_T.tolist(),
        positions=list(range(18)),
        weights=[0.0] * 18,
        pieces=pieces,
        samples=(Sample(-1, "", 0, 18, (Segment("user", 0, 18),)),),
        tiles=tiles,
    )
    shown = list(render_tokens(pack, 0, 18, 1.0))
    assert len(shown) == 3
    assert 'data-n="16"' in shown[1] and shown[1].count("<img src") == 2


def test_any_text_is_shown_whole(write_run: Callable[..., Path]) -> None:
    text = "a & b < c > d \" ' \u4f60 caf\u00e9"
    reader = Reader(render_page(gather(write_run({"a": [{"text": text}]}))))
    shown: Any = "".join(reader.texts["i"])
    for word in text.split():
        if word.isascii():
            assert word in shown
