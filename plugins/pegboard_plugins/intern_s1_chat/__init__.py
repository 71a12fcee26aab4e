"""Tokenize function for chats with pictures and videos: InternS1TokenizeFn."""

from __future__ import annotations

from collections.abc import Callable

import pegboard
from pegboard import TokenizeFnComponent

from .component import InternS1TokenizeFn

__all__ = ["register_tokenize_fns"]


@pegboard.hookimpl
def register_tokenize_fns(register: Callable[[type[TokenizeFnComponent]], None]) -> None:
    register(InternS1TokenizeFn)
