"""Tokenizers: HFTokenizer, ByteTokenizer."""

from __future__ import annotations

from collections.abc import Callable

import pegboard
from pegboard.component import TokenizerComponent
from pegboard_plugins.tokenizers.component import ByteTokenizer, HFTokenizer

__all__ = ["register_tokenizers"]


@pegboard.hookimpl
def register_tokenizers(register: Callable[[type[TokenizerComponent]], None]) -> None:
    register(HFTokenizer)
    register(ByteTokenizer)
