"""Record formats that a config can name, and the one that tells them apart.

A format is an adapter: the keys it knows, and how to read them as a chat, a text or token ids. A
record's format is told from its keys alone; where two fit, the config has to name one, because a
guess would train a model on the wrong half of somebody's data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from pegboard.component import ComponentConfig, RecordFormatComponent
from pegboard.component_field import ComponentOf
from pegboard.errors import DataError

if TYPE_CHECKING:
    from pegboard.contracts import RecordContent, RecordFormat

__all__ = [
    "AlpacaFormat",
    "AutoFormat",
    "OpenAIFormat",
    "PlainTextFormat",
    "PretokenizedFormat",
    "PromptCompletionFormat",
    "ShareGPTFormat",
    "built_in_formats",
    "describe_keys",
]


def _key(default: str, description: str) -> Any:
    return Field(default=default, min_length=1, description=description)


class OpenAIFormat(RecordFormatComponent):
    """OpenAI messages: a bare list, or a record with `messages`, `dialogs` or `conversations`."""

    known_as = ("openai", "chatml", "messages", "openai_messages")

    class Config(ComponentConfig):
        messages: str | None = Field(
            default=None,
            min_length=1,
            description="Key of the list of messages; null: messages, dialogs or conversations.",
        )
        tools: str = _key("tools", "Key of the function definitions, a list or its JSON text.")

    config: Config

    def build(self) -> RecordFormat:
        from pegboard_plugins.records.chat_forms import OpenAIRecords

        return OpenAIRecords(self.config)


class ShareGPTFormat(RecordFormatComponent):
    """ShareGPT conversations: turns of `from` (human, gpt, ...) and `value`."""

    known_as = ("sharegpt", "conversations")

    class Config(ComponentConfig):
        conversations: str = _key("conversations", "Key of the list of turns.")
        system: str = _key("system", "Key of a system text; a record may lack it.")
        tools: str = _key("tools", "Key of the function definitions, a list or its JSON text.")

    config: Config

    def build(self) -> RecordFormat:
        from pegboard_plugins.records.chat_forms import ShareGPTRecords

        return ShareGPTRecords(self.config)


class AlpacaFormat(RecordFormatComponent):
    """Alpaca: `instruction`, maybe `input`, `system` and `history`, and `output`."""

    known_as = ("alpaca", "instruction")

    class Config(ComponentConfig):
        instruction: str = _key("instruction", "Key of what is asked.")
        input: str = _key("input", "Key of a text put under the instruction; a record may lack it.")
        output: str = _key("output", "Key of the answer.")
        system: str = _key("system", "Key of a system text; a record may lack it.")
        history: str = _key(
            "history", "Key of earlier [question, answer] pairs; a record may lack it."
        )

    config: Config

    def build(self) -> RecordFormat:
        from pegboard_plugins.records.chat_forms import AlpacaRecords

        return AlpacaRecords(self.config)


class PromptCompletionFormat(RecordFormatComponent):
    """A prompt and its completion: two texts, or two lists of messages."""

    known_as = ("prompt_completion", "prompt_response", "question_answer")

    class Config(ComponentConfig):
        prompt: str = _key("prompt", "Key of the prompt.")
        completion: str = _key("completion", "Key of the completion.")
        as_chat: bool = Field(
            default=True,
            description="Read two texts as a question and its answer in the chat template; false: "
            "as one plain text whose completion gets loss.",
        )

    config: Config

    def build(self) -> RecordFormat:
        from pegboard_plugins.records.chat_forms import PromptCompletionRecords

        return PromptCompletionRecords(self.config)


class PlainTextFormat(RecordFormatComponent):
    """Plain text, such as for pre-training: no template, loss on all of it."""

    known_as = ("text", "plain_text", "pretrain", "raw")

    class Config(ComponentConfig):
        text: str | None = Field(
            default=None, min_length=1, description="Key of the text; null: text or content."
        )

    config: Config

    def build(self) -> RecordFormat:
        from pegboard_plugins.records.text_forms import TextRecords

        return TextRecords(self.config)


class PretokenizedFormat(RecordFormatComponent):
    """Token ids with `labels` or a 0/1 mask: nothing is tokenized again."""

    known_as = ("tokenized", "input_ids", "pretokenized", "ftdp_tokenized")

    class Config(ComponentConfig):
        input_ids: str = _key("input_ids", "Key of the ids.")
        labels: str = _key(
            "labels",
            "Key of labels: unshifted, as long as the ids, -100 where there is no loss.",
        )
        loss_mask: str | None = Field(
            default=None,
            min_length=1,
            description="Key of a mask of 0 and 1 that stands for labels; null: loss_mask, "
            "completion_mask or assistant_masks.",
        )
        without_mask: Literal["error", "train_all"] = Field(
            default="error", description="A record with ids alone: an error, or loss on all of it."
        )

    config: Config

    def build(self) -> RecordFormat:
        from pegboard_plugins.records.text_forms import TokenRecords

        return TokenRecords(self.config)


def built_in_formats() -> tuple[type[RecordFormatComponent], ...]:
    """The formats that a record's keys can tell, in the order of the documentation."""
    return (
        OpenAIFormat,
        ShareGPTFormat,
        AlpacaFormat,
        PromptCompletionFormat,
        PlainTextFormat,
        PretokenizedFormat,
    )


def _all_built_in() -> tuple[RecordFormatComponent, ...]:
    return tuple(cls(cls.Config()) for cls in built_in_formats())


class AutoFormat(RecordFormatComponent):
    """Each record in the one of several formats that its keys fit."""

    known_as = ("auto", "detect", "any")

    class Config(ComponentConfig):
        formats: tuple[Annotated[RecordFormatComponent, ComponentOf("record_format")], ...] = Field(
            default_factory=_all_built_in,
            min_length=1,
            description="The formats to tell apart; default: every built-in one.",
        )

    config: Config

    def build(self) -> RecordFormat:
        return _Auto([(type(one).__name__, one.build()) for one in self.config.formats])


class _Auto:
    """Built AutoFormat."""

    def __init__(self, formats: list[tuple[str, RecordFormat]]) -> None:
        self._formats = formats

    def accepts(self, record: Any) -> bool:
        return any(one.accepts(record) for _, one in self._formats)

    def read(self, record: Any) -> RecordContent:
        fitting = [pair for pair in self._formats if pair[1].accepts(record)]
        if len(fitting) == 1:
            return fitting[0][1].read(record)
        found = describe_keys(record)
        if fitting:
            names = " and ".join(name for name, _ in fitting)
            raise DataError(
                f"record: {found}, which fits {names}; name one in tokenize_fn.record_format, "
                f'such as {{"class_name": "{fitting[0][0]}"}}'
            )
        names = ", ".join(name for name, _ in self._formats)
        raise DataError(
            f"record: {found}, which fits no record format ({names}); name one and its keys in "
            "tokenize_fn.record_format"
        )


def describe_keys(record: Any) -> str:
    """What the record is, for a message: its keys, at most ten, or its type."""
    if isinstance(record, Mapping):
        keys = [repr(key) for key in record]
        shown = ", ".join(keys[:10]) + (", ..." if len(keys) > 10 else "")
        return f"found the keys {shown}" if keys else "found an object without keys"
    if isinstance(record, list | tuple):
        return f"found a list of {len(record)}"
    return f"found a value of type {type(record).__name__}"
