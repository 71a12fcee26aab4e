"""Tokenizers that a config can name: a published one, and one of bytes that needs no file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from pegboard.component import ComponentConfig, Problem, TokenizerComponent

if TYPE_CHECKING:
    from pegboard.contracts import Tokenizer
    from pegboard.run_config import RunConfig

__all__ = ["ByteTokenizer", "HFTokenizer"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class HFTokenizer(TokenizerComponent):
    """A published tokenizer, from a folder or the Hugging Face hub."""

    known_as = ("AutoTokenizer", "PretrainedTokenizer", "HuggingFaceTokenizer")

    class Config(ComponentConfig):
        path: str = Field(
            min_length=1,
            description="Folder with tokenizer files, relative to the current folder, or a hub id.",
        )
        chat_template: str | None = Field(
            default=None,
            description="Path of a jinja file that replaces the tokenizer's own chat template.",
        )

    config: Config

    def check(self, run: RunConfig, path: tuple[str | int, ...]) -> Iterable[Problem]:
        del run
        folder = Path(self.config.path).expanduser()
        if folder.is_dir():
            if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
                yield Problem(
                    (*path, "path"),
                    f"folder '{self.config.path}' holds no tokenizer; expected one of "
                    f"{', '.join(_TOKENIZER_FILES)}",
                )
        elif _looks_local(self.config.path):
            yield Problem(
                (*path, "path"),
                f"folder '{self.config.path}' does not exist; expected one with tokenizer.json",
            )
        template = self.config.chat_template
        if template is not None and not Path(template).expanduser().is_file():
            yield Problem(
                (*path, "chat_template"),
                f"file '{template}' does not exist; expected the path of a jinja file",
            )

    def build(self, *, trust_remote_code: bool = False) -> Tokenizer:
        """Load it.

        Raises:
            ConfigError: no tokenizer there, or one whose code is remote and not trusted.
        """
        from pegboard_plugins.tokenizers.hf_tokenizer import load_hf_tokenizer

        return load_hf_tokenizer(
            self.config.path,
            chat_template_file=self.config.chat_template,
            trust_remote_code=trust_remote_code,
        )


class ByteTokenizer(TokenizerComponent):
    """256 bytes and a few chat tokens: for tests and training from scratch, without any file."""

    class Config(ComponentConfig):
        image_tokens: bool = Field(
            default=False,
            description="Three more tokens, for a model with pictures: <IMG_CONTEXT> (id 265), "
            "<img> and </img>.",
        )

    config: Config

    def build(self, *, trust_remote_code: bool = False) -> Tokenizer:
        from pegboard_plugins.tokenizers.byte_tokenizer import make_byte_tokenizer

        del trust_remote_code
        return make_byte_tokenizer(image_tokens=self.config.image_tokens)


def _looks_local(path: str) -> bool:
    """Whether a path that is no folder was meant as one (a hub id is `name` or `owner/name`)."""
    if path.startswith((".", "~", "/")) or path.endswith(("/", os.sep)):
        return True
    return os.sep in path and Path(path).parent.is_dir()
