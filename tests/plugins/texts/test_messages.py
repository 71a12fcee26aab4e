"""A broken chat record is refused in one line that names the place."""

from __future__ import annotations

from typing import Any

import pytest

from pegboard.errors import DataError
from pegboard_plugins.texts.messages import read_chat_record

USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("record", "place"),
    [
        ({"text": "x"}, "messages: missing"),
        ({"messages": "x"}, "messages: expected a list"),
        ({"messages": []}, "messages: the list is empty"),
        ({"messages": [USER]}, "messages: no assistant"),
        ({"messages": [USER, "b"]}, "messages[1]: expected an object"),
        (
            {"messages": [USER, {"role": "gpt", "content": "b"}]},
            "messages[1].role: expected one of",
        ),
        ({"messages": [USER, {"content": "b"}]}, "messages[1].role: expected one of"),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            "messages[1].content: null or missing",
        ),
        ({"messages": [{"role": "user", "content": None}, ANSWER]}, "messages[0].content: null"),
        (
            {"messages": [{"role": "user", "content": 3}, ANSWER]},
            "messages[0].content: expected a string",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
            "messages[0].content[0]: expected",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}, ANSWER]},
            "messages[0].content[0].text: expected",
        ),
        ({"messages": [USER, {**ANSWER, "loss": "no"}]}, "messages[1].loss: expected"),
        (
            {"messages": [USER, {**ANSWER, "reasoning_content": 1}]},
            "messages[1].reasoning_content:",
        ),
        ({"messages": [USER, {**ANSWER, "tool_calls": {}}]}, "messages[1].tool_calls: expected"),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{}]}]},
            "messages[1].tool_calls[0]: expected",
        ),
        (
            {"messages": [{**USER, "tool_calls": [{"name": "f"}]}, ANSWER]},
            "messages[0].tool_calls: only",
        ),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": 1}]}]},
            "messages[1].tool_calls[0]: arguments",
        ),
        ({"messages": [USER, ANSWER], "tools": "f"}, "tools: expected a list"),
        ({"messages": [USER, ANSWER], "tools": ["f"]}, "tools[0]: expected an object"),
        (3, "messages: expected a list"),
    ],
)
def test_a_broken_record_is_named_by_place(record: Any, place: Any) -> None:
    with pytest.raises(DataError) as error:
        read_chat_record(record)
    assert str(error.value).startswith(place)
    assert "\n" not in str(error.value)


def test_text_parts_join_and_the_loss_switch_leaves_the_message() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat = read_chat_record(
        [{"role": "user", "content": parts, "name": None}, {**ANSWER, "loss": False}]
    )
    assert chat.messages == [{"role": "user", "content": "ab"}, ANSWER]
    assert chat.loss == [False, False]
    assert chat.tools is None


def test_an_assistant_message_may_leave_content_out_when_it_calls_tools() -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    chat = read_chat_record({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]})
    assert chat.loss == [False, True]
