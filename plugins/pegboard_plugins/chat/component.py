"""Tokenize functions for text records that a config can name: chats, and plain text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from pegboard.component import (
    ComponentConfig,
    ModelComponent,
    RecordFormatComponent,
    TokenizeFnComponent,
)
from pegboard.component_field import ComponentOf
from pegboard_plugins.records.formats import AutoFormat

if TYPE_CHECKING:
    from pegboard.contracts import TokenizeFn, Tokenizer

__all__ = ["ChatTokenizeFn", "TextTokenizeFn"]


TypedSpecialTokens = Literal["text", "tokens"]


def _auto_format() -> RecordFormatComponent:
    return AutoFormat(AutoFormat.Config())


class ChatTokenizeFn(TokenizeFnComponent):
    """Chats in any chat template, with loss exactly on what the model generates."""

    known_as = ("OpenaiTokenizeFunction", "OpenAITokenizeFn", "FTDPTokenizeFn", "SFTTokenizeFn")

    class Config(ComponentConfig):
        max_length: int = Field(
            default=4096,
            gt=0,
            description="Longest example in tokens; the rest is cut off and counted.",
        )
        record_format: Annotated[RecordFormatComponent, ComponentOf("record_format")] = Field(
            default_factory=_auto_format,
            description="Form of the records; default: AutoFormat, which tells it from their keys.",
        )
        history: Literal["chain", "split", "strip", "keep"] = Field(
            default="chain",
            description="What stands before a trained turn. chain: its prompt at inference, turns "
            "sharing a sample while each prompt continues the one before; split: one sample a "
            "turn; strip: the template's one render, which trains only the turns that it shows "
            "as generated; keep: earlier turns as they were generated, with their reasoning.",
        )
        train_on: Literal["all", "last"] = Field(
            default="all",
            description="Which assistant messages get loss: all, or the last alone. "
            '`"loss": false` in a message switches it off either way.',
        )
        rewritten_turns: Literal["skip", "error"] = Field(
            default="skip",
            description="An assistant turn that can't be trained: one without a prompt or an end, "
            "and with history strip one that the template rewrites: no loss, or an error.",
        )
        shown_turns: Literal["train", "skip"] = Field(
            default="skip",
            description="With history strip, a turn that is intact but follows another prompt than "
            "at inference (an earlier Qwen3 turn lacks the empty think block that its prompt had): "
            "loss, or none. Both are counted.",
        )
        template_kwargs: dict[str, bool | int | str] = Field(
            default={},
            description="Arguments of the chat template, such as enable_thinking; an explicit "
            "enable_thinking is taken as the one prompt of inference.",
        )
        typed_special_tokens: TypedSpecialTokens = Field(
            default="text",
            description="The spelling of a special token inside a record: text, or that token.",
        )

    config: Config

    def build(self, tokenizer: Tokenizer, model: ModelComponent) -> TokenizeFn:
        """Raises ConfigError for a tokenizer without a chat template or end token."""
        from pegboard_plugins.chat.chat_tokenize import ChatTokenizer

        del model
        return ChatTokenizer(self.config, tokenizer)


class TextTokenizeFn(TokenizeFnComponent):
    """Plain text with an end token, with loss on every token but the first."""

    known_as = ("PretrainTokenizeFunction", "LongTextPretrainTokenizeFunction")

    class Config(ComponentConfig):
        max_length: int = Field(
            default=4096,
            gt=0,
            description="Longest example in tokens; the rest is cut off and counted.",
        )
        text_field: str = Field(
            default="text", min_length=1, description="Key of the record that holds the text."
        )
        typed_special_tokens: TypedSpecialTokens = Field(
            default="text",
            description="The spelling of a special token inside a text: text, or that token.",
        )

    config: Config

    def build(self, tokenizer: Tokenizer, model: ModelComponent) -> TokenizeFn:
        """Raises ConfigError for a tokenizer without an end token."""
        from pegboard_plugins.chat.text_tokenize import TextTokenizer

        del model
        return TextTokenizer(self.config, tokenizer)
