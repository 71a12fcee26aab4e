"""Intern-S1's tokenize function as a config names it; what the model dictates comes from its component."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import Field

from pegboard import (
    ComponentConfig,
    ConfigError,
    ModelComponent,
    Problem,
    TokenizeFnComponent,
)
from pegboard.component import RecordFormatComponent
from pegboard.component_field import ComponentOf
from pegboard_plugins.records.formats import AutoFormat

if TYPE_CHECKING:
    from pegboard.contracts import TokenizeFn, Tokenizer
    from pegboard.run_config import RunConfig

__all__ = ["InternS1TokenizeFn"]


class InternS1TokenizeFn(TokenizeFnComponent):
    """Chats with pictures and videos, cut into tiles as InternVL and Intern-S1 do."""

    known_as: ClassVar[tuple[str, ...]] = (
        "InternS1VLTokenizeFnConfig",
        "InternS1VLTokenizeFunction",
        "InternVLTokenizeFn",
    )

    class Config(ComponentConfig):
        max_length: int = Field(
            default=4096,
            gt=0,
            description="Longest example in tokens. Text after the last picture is cut off and "
            "counted; a sample whose pictures do not fit whole is dropped and counted.",
        )
        min_dynamic_patch: int = Field(
            default=1, ge=1, description="Fewest tiles of a picture, the thumbnail not counted."
        )
        max_dynamic_patch: int = Field(
            default=12,
            ge=1,
            description="Most tiles that the pictures of a sample share, thumbnails not counted.",
        )
        use_thumbnail: bool = Field(
            default=True,
            description="A picture of several tiles gets one more: the whole of it, small.",
        )
        dynamic_image_size: bool = Field(
            default=True, description="Cut pictures into tiles; false makes each one tile."
        )
        max_num_frames: int = Field(
            default=24,
            ge=1,
            description="Most frames of a video, evenly spread; each is one tile.",
        )
        data_augment: bool = Field(
            default=False,
            description="Degrade each tile as a JPEG file of a quality from 75 to 100 would, drawn "
            "anew each time that a sample is taken, from the run's seed.",
        )
        frame_prefix: str = Field(
            default="Frame{}: ",
            description="Written before each frame; {} is its number, from 1.",
        )
        image_keys: tuple[str, ...] = Field(
            default=("images", "image"),
            description="Keys under which a record may list pictures beside its turns; the first "
            "that lists any counts, [] reads none.",
        )
        video_keys: tuple[str, ...] = Field(
            default=("videos", "video"), description="The same of videos."
        )
        image_placeholder: str = Field(
            default="<image>",
            min_length=1,
            description="What the text of a record that lists pictures writes where one goes.",
        )
        video_placeholder: str = Field(
            default="<video>", min_length=1, description="The same of videos."
        )
        chat: Annotated[TokenizeFnComponent, ComponentOf("tokenize_fn")] = Field(
            default={"class_name": "ChatTokenizeFn"},
            validate_default=True,
            description="Tokenize function of the text around the pictures, which decides what is "
            "trained; its max_length is this one's.",
        )
        chat_template: Literal["tokenizer", "intern-s1"] = Field(
            default="tokenizer",
            description="The tokenizer's own chat template, or Intern-S1's format as written here "
            "for tokenizers without one.",
        )
        system_message: str | None = Field(
            default=None,
            description="System message for chats that bring none; null adds none.",
        )

    config: Config

    def check(self, run: RunConfig, path: tuple[str | int, ...]) -> Iterable[Problem]:
        if run.model.image_tokens() is None:
            yield Problem(
                (*path, "class_name"),
                f"InternS1TokenizeFn makes image tokens, but {type(run.model).__name__} takes no "
                "pictures; use ChatTokenizeFn",
            )
        if not re.fullmatch(r"[^{}]*\{\}[^{}]*", self.config.frame_prefix):
            yield Problem(
                (*path, "frame_prefix"),
                f"{self.config.frame_prefix!r} has no place for the number, or other braces; "
                "expected one {}, such as 'Frame{}: '",
            )
        if self.config.min_dynamic_patch > self.config.max_dynamic_patch:
            yield Problem(
                (*path, "min_dynamic_patch"),
                f"{self.config.min_dynamic_patch} is more than max_dynamic_patch "
                f"{self.config.max_dynamic_patch}",
            )

    def build(self, tokenizer: Tokenizer, model: ModelComponent) -> TokenizeFn:
        """Raises ConfigError for a model without pictures, or a tokenizer without their tokens."""
        from .media_tokenize import MediaChatTokenizer
        from .tokenizers import WithPlaceholders, with_intern_s1_template

        image_tokens = model.image_tokens()
        if image_tokens is None:
            raise ConfigError(
                f"InternS1TokenizeFn: {type(model).__name__} takes no pictures; use ChatTokenizeFn"
            )
        if self.config.chat_template == "intern-s1":
            tokenizer = with_intern_s1_template(tokenizer)
        chat = self.config.chat
        # Cut only once the pictures are in.
        changes: dict[str, Any] = {"max_length": _UNCUT}
        reader = None
        record_format = getattr(chat.config, "record_format", None)
        if isinstance(record_format, RecordFormatComponent):
            # Records are read before pictures are placed in them, so the form is the usual one then.
            reader = record_format.build()
            changes["record_format"] = AutoFormat(AutoFormat.Config())
        uncut = type(chat)(chat.config.model_copy(update=changes))
        inner = uncut.build(cast("Tokenizer", WithPlaceholders(tokenizer)), model)
        return MediaChatTokenizer(self.config, inner, tokenizer, image_tokens, reader)


_UNCUT = 2**31 - 1
