"""Tokenize functions for text: ChatTokenizeFn, TextTokenizeFn."""

from __future__ import annotations

from collections.abc import Callable

import pegboard
from pegboard.component import TokenizeFnComponent
from pegboard_plugins.chat.component import ChatTokenizeFn, TextTokenizeFn

__all__ = ["register_tokenize_fns"]


@pegboard.hookimpl
def register_tokenize_fns(register: Callable[[type[TokenizeFnComponent]], None]) -> None:
    register(ChatTokenizeFn)
    register(TextTokenizeFn)
