"""Tokenize functions for text records that a config can name: chats, and plain text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pegboard.component import ComponentConfig, ModelComponent, TokenizeFnComponent

if TYPE_CHECKING:
    from pegboard.contracts import TokenizeFn, Tokenizer

__all__ = ["ChatTokenizeFn", "TextTokenizeFn"]


class ChatTokenizeFn(TokenizeFnComponent):
    """Chats in any chat template, with loss exactly on what the model generates."""

    known_as = ("OpenaiTokenizeFunction", "OpenAITokenizeFn", "FTDPTokenizeFn", "SFTTokenizeFn")

    class Config(ComponentConfig):
        max_length: int = Field(
            default=4096,
            gt=0,
            description="Longest example in tokens; the rest is cut off and counted.",
        )
        train_on: Literal["all", "last"] = Field(
            default="all",
            description="Which assistant messages get loss: all, or the last alone. "
            '`"loss": false` in a message switches it off either way.',
        )
        rewritten_turns: Literal["skip", "error"] = Field(
            default="skip",
            description="An assistant turn that the chat template changes or can't render as "
            "generated (Qwen3 strips the reasoning of earlier turns): no loss, or an error.",
        )
        shown_turns: Literal["train", "skip"] = Field(
            default="skip",
            description="An assistant turn that is intact but follows another prompt than at "
            "inference (an earlier Qwen3 turn without reasoning lacks the empty think block that "
            "its prompt had): loss, or none. Both are counted.",
        )
        template_kwargs: dict[str, bool | int | str] = Field(
            default={},
            description="Arguments of the chat template, such as enable_thinking; an explicit "
            "enable_thinking is taken as the one prompt of inference.",
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

    config: Config

    def build(self, tokenizer: Tokenizer, model: ModelComponent) -> TokenizeFn:
        """Raises ConfigError for a tokenizer without an end token."""
        from pegboard_plugins.chat.text_tokenize import TextTokenizer

        del model
        return TextTokenizer(self.config, tokenizer)
