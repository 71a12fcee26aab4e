"""Read chat records of several forms as OpenAI messages.

Only the form is changed here: what a message may hold is checked by whoever renders it, so that
each problem is reported by one piece of code and in one wording.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pegboard.contracts import RecordChat, RecordContent, RecordText
from pegboard.errors import DataError

if TYPE_CHECKING:
    from pegboard_plugins.records.formats import (
        AlpacaFormat,
        OpenAIFormat,
        PromptCompletionFormat,
        ShareGPTFormat,
    )

__all__ = [
    "AlpacaRecords",
    "OpenAIRecords",
    "PromptCompletionRecords",
    "ShareGPTRecords",
    "is_object",
    "kind_of",
    "read_tools",
]

_MESSAGE_KEYS = ("messages", "dialogs", "conversations")

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "call",
    "tool_call": "call",
}


class OpenAIRecords:
    """Built OpenAIFormat."""

    def __init__(self, config: OpenAIFormat.Config) -> None:
        self._keys = _MESSAGE_KEYS if config.messages is None else (config.messages,)
        self._named = config.messages is not None
        self._tools = config.tools

    def accepts(self, record: Any) -> bool:
        if isinstance(record, list | tuple):
            return _first_has(record, "role")
        if not is_object(record):
            return False
        for key in self._keys:
            if key in record:
                return key != "conversations" or self._named or _first_has(record[key], "role")
        return False

    def read(self, record: Any) -> RecordContent:
        if isinstance(record, list | tuple):
            return _chat(record, None)
        key = next((key for key in self._keys if key in record), None)
        if key is None:
            raise DataError(f"{self._keys[0]}: missing; {_keys_of(record)}")
        messages = record[key]
        if not isinstance(messages, list | tuple):
            raise DataError(f"{key}: expected a list of messages, found {kind_of(messages)}")
        return _chat(messages, read_tools(record.get(self._tools), self._tools))


class ShareGPTRecords:
    """Built ShareGPTFormat."""

    def __init__(self, config: ShareGPTFormat.Config) -> None:
        self._config = config

    def accepts(self, record: Any) -> bool:
        key = self._config.conversations
        return is_object(record) and key in record and _first_has(record[key], "from")

    def read(self, record: Any) -> RecordContent:
        key = self._config.conversations
        turns = _get(record, key)
        if not isinstance(turns, list | tuple):
            raise DataError(f"{key}: expected a list of turns, found {kind_of(turns)}")
        messages = _system(record, self._config.system)
        messages += [_sharegpt_message(turn, f"{key}[{i}]") for i, turn in enumerate(turns)]
        tools = read_tools(record.get(self._config.tools), self._config.tools)
        return RecordChat(messages, tools)


class AlpacaRecords:
    """Built AlpacaFormat."""

    def __init__(self, config: AlpacaFormat.Config) -> None:
        self._config = config

    def accepts(self, record: Any) -> bool:
        config = self._config
        return is_object(record) and config.instruction in record and config.output in record

    def read(self, record: Any) -> RecordContent:
        config = self._config
        messages = _system(record, config.system)
        pairs = _get(record, config.history, None) or []
        if not isinstance(pairs, list | tuple):
            raise DataError(f"{config.history}: expected a list of pairs, found {kind_of(pairs)}")
        for i, pair in enumerate(pairs):
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise DataError(f"{config.history}[{i}]: expected [question, answer]")
            messages += _question_and_answer(pair[0], pair[1], f"{config.history}[{i}]")
        question = _text(record, config.instruction)
        more = _text(record, config.input, "")
        asked = f"{question}\n{more}" if question and more else question or more
        answer = _text(record, config.output)
        return RecordChat([*messages, *_question_and_answer(asked, answer, config.instruction)])


class PromptCompletionRecords:
    """Built PromptCompletionFormat."""

    def __init__(self, config: PromptCompletionFormat.Config) -> None:
        self._config = config

    def accepts(self, record: Any) -> bool:
        return (
            is_object(record)
            and self._config.prompt in record
            and self._config.completion in record
        )

    def read(self, record: Any) -> RecordContent:
        config = self._config
        prompt, completion = _get(record, config.prompt), _get(record, config.completion)
        tools = read_tools(record.get("tools"), "tools")
        if isinstance(prompt, list | tuple) and isinstance(completion, list | tuple):
            # Answers in the prompt are history: only the completion's are to be learnt.
            quiet = [
                {**message, "loss": False} if _is_answer(message) else message for message in prompt
            ]
            return RecordChat([*quiet, *completion], tools)
        question, answer = _text(record, config.prompt), _text(record, config.completion)
        if config.as_chat:
            return RecordChat(_question_and_answer(question, answer, config.prompt), tools)
        return RecordText([(question, False), (answer, True)])


def read_tools(tools: Any, where: str) -> list[Any] | None:
    """Function definitions as a list; None for none.

    Many published sets keep them as JSON text, since their schemas differ from row to row.
    """
    if isinstance(tools, str):
        if not tools.strip():
            return None
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(
                f"{where}: expected a list or its JSON text, found a string that is not JSON ({error})"
            ) from None
    if tools is None:
        return None
    if not isinstance(tools, list | tuple):
        raise DataError(f"{where}: expected a list of objects, found {kind_of(tools)}")
    return list(tools) or None


def is_object(value: Any) -> bool:
    """Whether it is a JSON object; asking a dict's type first is several times as fast."""
    return type(value) is dict or isinstance(value, Mapping)


def kind_of(value: Any) -> str:
    """A value's type in JSON's words, for a message."""
    if value is None:
        return "null or nothing"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


def _chat(messages: Sequence[Any], tools: list[Any] | None) -> RecordContent:
    """A chat; or plain text, where the messages are of role `pretrain`."""
    pretrain = [is_object(m) and m.get("role") == "pretrain" for m in messages]
    if not any(pretrain):
        return RecordChat(messages, tools)
    if not all(pretrain):
        raise DataError(
            f"messages[{pretrain.index(True)}].role: 'pretrain' is plain text and can't be mixed "
            "with the messages of a chat; give it a record of its own"
        )
    pieces = []
    for i, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, str):
            raise DataError(
                f"messages[{i}].content: expected a string, found {kind_of(content)}; media "
                "need a vision tokenize fn"
            )
        pieces.append((content, message.get("loss") is not False))
    return RecordText(pieces)


def _sharegpt_message(turn: Any, where: str) -> dict[str, Any]:
    if not is_object(turn):
        raise DataError(f"{where}: expected an object with from and value, found {kind_of(turn)}")
    name = turn.get("from")
    role = _SHAREGPT_ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        known = ", ".join(_SHAREGPT_ROLES)
        raise DataError(f"{where}.from: expected one of {known}; found {name!r}")
    value = turn.get("value")
    rest = {k: v for k, v in turn.items() if k not in ("from", "value")}
    if role != "call":
        return {**rest, "role": role, "content": value}
    calls = value
    if isinstance(value, str):
        try:
            calls = json.loads(value)
        except ValueError as error:
            raise DataError(f"{where}.value: a call that is not JSON ({error})") from None
    calls = calls if isinstance(calls, list | tuple) else [calls]
    for call in calls:
        if not is_object(call) or "name" not in call:
            raise DataError(f"{where}.value: expected a call with name and arguments")
    functions = [{"type": "function", "function": dict(call)} for call in calls]
    return {**rest, "role": "assistant", "content": "", "tool_calls": functions}


def _question_and_answer(question: Any, answer: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(question, str) or not isinstance(answer, str):
        raise DataError(f"{where}: expected two strings")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _system(record: Any, key: str) -> list[dict[str, Any]]:
    text = _text(record, key, "")
    return [{"role": "system", "content": text}] if text else []


def _is_answer(message: Any) -> bool:
    return is_object(message) and message.get("role") == "assistant"


_REQUIRED = object()


def _get(record: Any, key: str, default: Any = _REQUIRED) -> Any:
    if not is_object(record):
        raise DataError(f"{key}: expected a record that is an object, found {kind_of(record)}")
    if key not in record and default is _REQUIRED:
        raise DataError(f"{key}: missing; {_keys_of(record)}")
    return record.get(key, default)


def _text(record: Any, key: str, default: Any = _REQUIRED) -> str:
    text = _get(record, key, default)
    if text is None and default is not _REQUIRED:
        return str(default)
    if not isinstance(text, str):
        raise DataError(f"{key}: expected a string, found {kind_of(text)}")
    return text


def _first_has(items: Any, key: str) -> bool:
    return (
        isinstance(items, list | tuple) and bool(items) and is_object(items[0]) and key in items[0]
    )


def _keys_of(record: Any) -> str:
    if not is_object(record):
        return f"the record is {kind_of(record)}"
    return f"the record has the keys {', '.join(repr(key) for key in list(record)[:8]) or '(none)'}"
