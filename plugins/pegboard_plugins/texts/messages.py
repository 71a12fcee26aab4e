"""Check the messages of a chat record and bring them into the one form that is rendered.

A record is `{"messages": [...], "tools": [...]}` or a bare list of messages. What is wrong is
named by its place (`messages[2].content`), because a bad record is found among millions of lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pegboard.errors import DataError

__all__ = ["ROLES", "ChatRecord", "read_chat_record"]

ROLES = ("system", "developer", "user", "assistant", "tool")


class ChatRecord(NamedTuple):
    """A checked record."""

    messages: list[dict[str, Any]]
    """As given to the chat template: text parts joined, `None` values and `loss` taken out."""
    tools: list[dict[str, Any]] | None
    loss: list[bool]
    """Per message: it is an assistant message and does not say `"loss": false`."""


def read_chat_record(record: Mapping[str, Any] | Sequence[Any]) -> ChatRecord:
    """Check a record and split it into messages, tools and the per-message loss switch.

    Raises:
        DataError: one line that starts with the place, such as `messages[1].role: ...`.
    """
    messages, tools = _split(record)
    cleaned = [_read_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    loss = [
        message["role"] == "assistant" and bool(original.get("loss") is not False)
        for message, original in zip(cleaned, messages, strict=True)
    ]
    if all(message["role"] != "assistant" for message in cleaned):
        raise DataError("messages: no assistant message, so there is nothing to learn; add one")
    return ChatRecord(cleaned, tools, loss)


def _split(record: Any) -> tuple[list[Any], list[dict[str, Any]] | None]:
    if isinstance(record, Mapping):
        if "messages" not in record:
            keys = ", ".join(repr(key) for key in list(record)[:8])
            raise DataError(f"messages: missing; the record has the keys {keys or '(none)'}")
        messages, tools = record["messages"], record.get("tools")
    else:
        messages, tools = record, None
    if not isinstance(messages, list | tuple):
        raise DataError(f"messages: expected a list of messages, found {_kind(messages)}")
    if not messages:
        raise DataError("messages: the list is empty; expected at least one assistant message")
    if tools is None:
        return list(messages), None
    if not isinstance(tools, list | tuple):
        raise DataError(f"tools: expected a list of objects, found {_kind(tools)}")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise DataError(f"tools[{i}]: expected an object, found {_kind(tool)}")
    return list(messages), [dict(tool) for tool in tools]


def _read_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: expected an object with a role, found {_kind(message)}")
    role = message.get("role")
    if role not in ROLES:
        found = repr(role) if isinstance(role, str) else _kind(role)
        raise DataError(f"{where}.role: expected one of {', '.join(ROLES)}, found {found}")
    cleaned = {key: value for key, value in message.items() if value is not None and key != "loss"}
    loss = message.get("loss")
    if loss is not None and not isinstance(loss, bool):
        raise DataError(f"{where}.loss: expected true or false, found {_kind(loss)}")
    _check_tool_calls(message, where)
    content = message.get("content")
    if content is None:
        if not (role == "assistant" and message.get("tool_calls")):
            raise DataError(
                f"{where}.content: null or missing; only an assistant with tool_calls may lack it"
            )
    else:
        cleaned["content"] = _read_content(content, f"{where}.content")
    for key in ("reasoning_content", "reasoning", "thinking"):
        if key in cleaned and not isinstance(cleaned[key], str):
            raise DataError(f"{where}.{key}: expected a string, found {_kind(cleaned[key])}")
    return cleaned


def _read_content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise DataError(f"{where}: expected a string or text parts, found {_kind(content)}")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            found = f"a part of type {kind!r}" if isinstance(part, Mapping) else _kind(part)
            raise DataError(
                f'{where}[{i}]: expected {{"type": "text", "text": ...}}, found {found}; '
                "images need a vision tokenize fn"
            )
        text = part.get("text")
        if not isinstance(text, str):
            raise DataError(f"{where}[{i}].text: expected a string, found {_kind(text)}")
        texts.append(text)
    return "".join(texts)


def _check_tool_calls(message: Mapping[str, Any], where: str) -> None:
    calls = message.get("tool_calls")
    if calls is None:
        return
    if not isinstance(calls, list | tuple):
        raise DataError(f"{where}.tool_calls: expected a list, found {_kind(calls)}")
    if calls and message.get("role") != "assistant":
        raise DataError(f"{where}.tool_calls: only an assistant message may call tools")
    for i, call in enumerate(calls):
        place = f"{where}.tool_calls[{i}]"
        if not isinstance(call, Mapping):
            raise DataError(f"{place}: expected an object, found {_kind(call)}")
        function = call.get("function", call)
        if not isinstance(function, Mapping):
            raise DataError(f"{place}.function: expected an object, found {_kind(function)}")
        name = function.get("name")
        if not isinstance(name, str):
            raise DataError(f"{place}: expected a function name, found {_kind(name)}")
        arguments = function.get("arguments")
        if arguments is not None and not isinstance(arguments, str | Mapping):
            raise DataError(
                f"{place}: arguments must be an object or a JSON string, found {_kind(arguments)}"
            )


def _kind(value: Any) -> str:
    if value is None:
        return "null or nothing"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
