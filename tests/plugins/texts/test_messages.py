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
        ({"messages": [{**USER, "loss": True}, ANSWER]}, "messages[0].loss: true, but only"),
        ({"messages": [USER, {**ANSWER, "weight": 2}]}, "messages[1].weight: expected 0 or 1"),
        ({"messages": [USER, {**ANSWER, "weight": 0, "loss": True}]}, "messages[1]: loss and"),
        ({"messages": [USER, {**ANSWER, "meta": object()}]}, "messages[1].meta: a value of type"),
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
    assert read_chat_record([USER, {**ANSWER, "weight": 0}, {**ANSWER, "weight": 1}]).loss == [
        False,
        False,
        True,
    ]


def test_reasoning_has_one_name_and_may_stand_without_content() -> None:
    for key in ("reasoning_content", "thinking", "reasoning"):
        message = {"role": "assistant", "content": None, key: "r"}
        (_, read) = read_chat_record([USER, message]).messages
        assert read["reasoning_content"] == "r" and "content" not in read


def test_a_bare_function_is_wrapped_as_a_tool() -> None:
    bare = {"name": "f", "parameters": {"type": "object"}}
    whole = {"type": "function", "function": bare}
    for tools in ([bare], [{"type": "function", **bare}], [whole]):
        assert read_chat_record({"messages": [USER, ANSWER], "tools": tools}).tools == [whole]
    assert read_chat_record({"messages": [USER, ANSWER], "tools": []}).tools is None


def test_what_is_rendered_is_a_copy_of_plain_values() -> None:
    class Text(str):
        pass

    arguments = {"x": [1, {"y": None}]}
    call = {"function": {"name": Text("f"), "arguments": arguments}}
    chat = read_chat_record([USER, {**ANSWER, "tool_calls": (call,)}])
    copied = chat.messages[1]["tool_calls"][0]["function"]
    assert type(copied["name"]) is str
    assert copied["arguments"] == arguments and copied["arguments"] is not arguments


def test_an_assistant_message_may_leave_content_out_when_it_calls_tools() -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    chat = read_chat_record({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]})
    assert chat.loss == [False, True]
