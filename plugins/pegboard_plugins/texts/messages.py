"""Check the messages of a chat record and bring them into the one form that is rendered.

A record is `{"messages": [...], "tools": [...]}` or a bare list of messages; other forms are read
by a record format first. What is wrong is named by its place (`messages[2].content`), because a bad
record is found among millions of lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pegboard.errors import DataError
from pegboard_plugins.records.chat_forms import is_object, kind_of, read_tools

__all__ = ["REASONING_KEYS", "ROLES", "ChatRecord", "read_chat", "read_chat_record"]

ROLES = ("system", "developer", "user", "assistant", "tool")
"""What a message's `role` may be."""
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys of an assistant message that hold its reasoning; the first that is there counts."""


class ChatRecord(NamedTuple):
    """A checked record."""

    messages: list[dict[str, Any]]
    """As given to the chat template: text parts joined, reasoning under `reasoning_content`, `None`
    values, `loss` and `weight` taken out. Plain JSON values only, all new."""
    tools: list[dict[str, Any]] | None
    """Each as `{"type": "function", "function": {...}}`, or as it was if it is of another type."""
    loss: list[bool]
    """Per message: it is an assistant message and does not say `"loss": false` or `"weight": 0`."""


def read_chat_record(record: Mapping[str, Any] | Sequence[Any]) -> ChatRecord:
    """Check a record in OpenAI's form; see `read_chat`."""
    if isinstance(record, Mapping):
        if "messages" not in record:
            keys = ", ".join(repr(key) for key in list(record)[:8])
            raise DataError(f"messages: missing; the record has the keys {keys or '(none)'}")
        return read_chat(record["messages"], record.get("tools"))
    return read_chat(record, None)


def read_chat(messages: Any, tools: Any = None) -> ChatRecord:
    """Check messages and tools, and split off the per-message loss switch.

    Raises:
        DataError: one line that starts with the place, such as `messages[1].role: ...`.
    """
    if not isinstance(messages, list | tuple):
        raise DataError(f"messages: expected a list of messages, found {kind_of(messages)}")
    if not messages:
        raise DataError("messages: the list is empty; expected at least one assistant message")
    definitions = read_tools(tools, "tools")
    if definitions is not None:
        definitions = [_read_tool(tool, f"tools[{i}]") for i, tool in enumerate(definitions)]
    cleaned = []
    loss = []
    for i, message in enumerate(messages):
        one = _read_message(message, f"messages[{i}]")
        cleaned.append(one)
        loss.append(_read_loss(message, one["role"], f"messages[{i}]"))
    if all(message["role"] != "assistant" for message in cleaned):
        raise DataError("messages: no assistant message, so there is nothing to learn; add one")
    return ChatRecord(cleaned, definitions, loss)


def _read_tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise DataError(f"{where}: expected an object, found {kind_of(tool)}")
    plain = {key: _plain(value, f"{where}.{key}") for key, value in tool.items()}
    if "name" in plain and "function" not in plain and plain.get("type", "function") == "function":
        plain.pop("type", None)
        return {"type": "function", "function": plain}
    return plain


def _read_message(message: Any, where: str) -> dict[str, Any]:
    if not is_object(message):
        raise DataError(f"{where}: expected an object with a role, found {kind_of(message)}")
    role = message.get("role")
    if role not in ROLES:
        found = repr(role) if isinstance(role, str) else kind_of(role)
        raise DataError(f"{where}.role: expected one of {', '.join(ROLES)}, found {found}")
    cleaned: dict[str, Any] = {}
    for key, value in message.items():
        if value is None or key in ("loss", "weight", "content"):
            continue
        cleaned[key] = value if type(value) is str else _plain(value, f"{where}.{key}")
    reasoning = None
    for key in REASONING_KEYS:
        if key in cleaned:
            if not isinstance(cleaned[key], str):
                raise DataError(f"{where}.{key}: expected a string, found {kind_of(cleaned[key])}")
            reasoning = cleaned[key] if reasoning is None else reasoning
    if reasoning is not None:
        cleaned["reasoning_content"] = reasoning
    if "tool_calls" in cleaned:
        _check_tool_calls(cleaned["tool_calls"], role, where)
    content = message.get("content")
    if content is not None:
        cleaned["content"] = _read_content(content, f"{where}.content")
    elif role != "assistant" or not (cleaned.get("tool_calls") or reasoning):
        raise DataError(
            f"{where}.content: null or missing; only an assistant with tool_calls or reasoning "
            "may lack it"
        )
    return cleaned


def _read_loss(message: Mapping[str, Any], role: str, where: str) -> bool:
    """Whether the message may get loss; OpenAI's `weight` says the same as `loss`."""
    loss = message.get("loss")
    if loss is not None and not isinstance(loss, bool):
        raise DataError(f"{where}.loss: expected true or false, found {kind_of(loss)}")
    weight = message.get("weight")
    if weight is not None:
        if weight not in (0, 1):
            raise DataError(f"{where}.weight: expected 0 or 1, found {weight!r}")
        if loss is not None and loss != bool(weight):
            raise DataError(f"{where}: loss and weight contradict each other; keep one")
        loss = bool(weight)
    if role != "assistant":
        if loss:
            raise DataError(
                f"{where}.loss: true, but only what an assistant says can be learnt; remove it"
            )
        return False
    return loss is not False


def _read_content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise DataError(f"{where}: expected a string or text parts, found {kind_of(content)}")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            found = f"a part of type {kind!r}" if isinstance(part, Mapping) else kind_of(part)
            raise DataError(
                f'{where}[{i}]: expected {{"type": "text", "text": ...}}, found {found}; '
                "images need a vision tokenize fn"
            )
        text = part.get("text")
        if not isinstance(text, str):
            raise DataError(f"{where}[{i}].text: expected a string, found {kind_of(text)}")
        texts.append(text)
    return "".join(texts)


def _check_tool_calls(calls: Any, role: str, where: str) -> None:
    if not isinstance(calls, list | tuple):
        raise DataError(f"{where}.tool_calls: expected a list, found {kind_of(calls)}")
    if calls and role != "assistant":
        raise DataError(f"{where}.tool_calls: only an assistant message may call tools")
    for i, call in enumerate(calls):
        place = f"{where}.tool_calls[{i}]"
        if not isinstance(call, Mapping):
            raise DataError(f"{place}: expected an object, found {kind_of(call)}")
        function = call.get("function", call)
        if not isinstance(function, Mapping):
            raise DataError(f"{place}.function: expected an object, found {kind_of(function)}")
        name = function.get("name")
        if not isinstance(name, str):
            raise DataError(f"{place}: expected a function name, found {kind_of(name)}")
        arguments = function.get("arguments")
        if arguments is not None and not isinstance(arguments, str | Mapping):
            raise DataError(
                f"{place}: arguments must be an object or a JSON string, found {kind_of(arguments)}"
            )


def _plain(value: Any, where: str) -> Any:
    """A copy in JSON's own types: a template must never see an object with methods of its own."""
    kind = type(value)
    if value is None or kind in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    for base in (str, bool, int, float):
        if isinstance(value, base):
            return base(value)
    raise DataError(f"{where}: {kind_of(value)} is no JSON value")
