"""The terminal view fits the width, obeys NO_COLOR, and passes nothing on that a terminal obeys."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pegboard.plugin_manager import load_plugins
from pegboard.run_config import load_run_config
from pegboard_plugins.preview.contents import Preview
from pegboard_plugins.preview.gathering import gather_preview
from pegboard_plugins.preview.terminal import Style, _columns, choose_style, render_terminal

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\u202enot\u200b \u4f60\u597d \U0001f600\ttab"


@pytest.fixture
def preview(write_run: Callable[..., Path]) -> Preview:
    records = [
        {
            "messages": [
                {"role": "user", "content": f"{HOSTILE} {k} " + "long " * (3 * k)},
                {"role": "assistant", "content": f"answer {k}\n\nwith lines"},
            ]
        }
        for k in range(12)
    ]
    sources = {"hostile": records, "plain": [{"text": "some text\n" * 9}]}
    path = write_run(sources, dataloader={"pack_max_length": 2048})
    run = load_run_config(path, (), load_plugins(third_party=False).registry).run
    return gather_preview(run, config_path=str(path), step=1, num_shown=2)


def render(preview: Preview, **fields: Any) -> str:
    style = Style(fields.pop("color", False), fields.pop("width", 80))
    return render_terminal(preview, style, num_packs=2, full=True, **fields)


@pytest.mark.parametrize("width", [40, 60, 80, 132])
@pytest.mark.parametrize("color", [False, True])
def test_no_line_is_wider_than_the_terminal(preview: Preview, width: int, color: bool) -> None:
    lines = ESCAPE.sub("", render(preview, width=width, color=color)).split("\n")
    body = lines[next(k for k, line in enumerate(lines) if line.startswith("\u2500")) :]
    too_wide = [line for line in body if _columns(line) > width]
    assert too_wide == []


def test_control_characters_of_the_data_never_reach_the_terminal(preview: Preview) -> None:
    text = ESCAPE.sub("", render(preview, color=True))
    assert set(re.findall(r"[\x00-\x1f\x7f-\x9f\u200b\u202e]", text)) == {"\n"}
    assert "U+001B" in text and "U+202E" in text


def test_without_colour_loss_is_marked_by_characters(preview: Preview) -> None:
    text = render(preview)
    assert not ESCAPE.search(text)
    marked = re.findall("\u2039(.*?)\u203a", text.split("legend")[1], re.S)
    assert any("answer" in part for part in marked)
    assert not any("long" in part for part in marked)


def test_no_color_and_dumb_terminals_and_pipes_get_no_colour(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert choose_style("auto", Terminal()).color
    assert not choose_style("auto", io.StringIO()).color
    assert not choose_style("never", Terminal()).color
    monkeypatch.setenv("NO_COLOR", "1")
    assert not choose_style("auto", Terminal()).color
    assert choose_style("always", io.StringIO()).color
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not choose_style("auto", Terminal()).color


def test_a_long_pack_is_cut_off_with_a_note_unless_all_is_asked_for(preview: Preview) -> None:
    short = render_terminal(preview, Style(False, 40), num_packs=2, full=False)
    whole = render_terminal(preview, Style(False, 40), num_packs=2, full=True)
    assert "more lines of this pack" in short
    assert len(short) < len(whole)
