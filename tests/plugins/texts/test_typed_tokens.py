"""Special tokens typed in a record are marked where they are text, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest

from pegboard.errors import DataError
from pegboard_plugins.texts.typed_tokens import TypedTokens
from pegboard_plugins.tokenizers.byte_tokenizer import make_byte_tokenizer

FIRST, SECOND = "\U0010ff00", "\U0010ff01"


@pytest.fixture(scope="module")
def typed() -> TypedTokens:
    return TypedTokens(make_byte_tokenizer())


def message(role: str, content: Any, **more: Any) -> Any:
    return {"role": role, "content": content, **more}


def test_a_record_without_any_is_the_same_object(typed: TypedTokens) -> None:
    messages, tools = [message("user", "a < b")], [{"function": {"name": "f"}}]
    assert typed.mark(messages, tools) == (messages, tools, "")
    assert typed.mark(messages, tools)[0] is messages


def test_every_role_but_assistant_may_not_type_any(typed: TypedTokens) -> None:
    for role in ("user", "system", "tool"):
        for token in ("<|im_end|>", "<think>", "</tool_response>"):
            (marked,), _, mark = typed.mark([message(role, f"x{token}y")], None)
            assert mark == FIRST
            assert marked["content"] == f"x{token[0]}{mark}{token[1:]}y"


def test_an_assistant_may_write_what_is_not_special(typed: TypedTokens) -> None:
    text = "<think>r</think><tool_call>{}</tool_call>"
    assert typed.mark([message("assistant", text)], None)[2] == ""
    (marked,), _, mark = typed.mark([message("assistant", text + "<|im_end|>")], None)
    assert marked["content"] == text + f"<{mark}|im_end|>"


def test_tools_and_arguments_are_looked_into(typed: TypedTokens) -> None:
    call = {"function": {"name": "f", "arguments": {"x": ["<|im_end|>"]}}}
    tools = [{"function": {"name": "f", "description": "ends with <|im_end|>"}}]
    messages, marked, mark = typed.mark([message("assistant", "", tool_calls=[call])], tools)
    assert messages[0]["tool_calls"][0]["function"]["arguments"]["x"] == [f"<{mark}|im_end|>"]
    assert marked and marked[0]["function"]["description"] == f"ends with <{mark}|im_end|>"


def test_keys_of_arguments_and_tools_are_looked_into(typed: TypedTokens) -> None:
    call = {"function": {"name": "f", "arguments": {"<|im_end|>": 1, FIRST: 2}}}
    messages, _, mark = typed.mark([message("assistant", "", tool_calls=[call])], None)
    assert mark == SECOND
    arguments = messages[0]["tool_calls"][0]["function"]["arguments"]
    assert arguments == {f"<{SECOND}|im_end|>": 1, FIRST: 2}
    tools = [{"function": {"name": "f", "parameters": {"properties": {"<think>": {}}}}}]
    _, marked, mark = typed.mark([message("user", "q")], tools)
    assert marked and marked[0]["function"]["parameters"] == {"properties": {f"<{mark}think>": {}}}


def test_a_mark_is_a_character_that_the_record_does_not_hold(typed: TypedTokens) -> None:
    (marked,), _, mark = typed.mark([message("user", f"<|im_end|>{FIRST}")], None)
    assert mark == SECOND and marked["content"] == f"<{SECOND}|im_end|>{FIRST}"
    every = "".join(chr(0x10FF00 + i) for i in range(8))
    with pytest.raises(DataError, match="private-use characters"):
        typed.mark([message("user", f"<|im_end|>{every}")], None)


def test_a_tokenizer_that_knows_no_added_tokens_marks_nothing() -> None:
    class Plain:
        pass

    plain: Any = Plain()
    messages = [message("user", "<|im_end|>")]
    assert TypedTokens(plain).mark(messages, None) == (messages, None, "")
