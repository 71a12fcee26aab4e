"""Record formats: OpenAI messages, ShareGPT, Alpaca, prompt and completion, text, token ids."""

from __future__ import annotations

from collections.abc import Callable

import pegboard
from pegboard.component import RecordFormatComponent
from pegboard_plugins.records.formats import AutoFormat, built_in_formats

__all__ = ["register_record_formats"]


@pegboard.hookimpl
def register_record_formats(register: Callable[[type[RecordFormatComponent]], None]) -> None:
    register(AutoFormat)
    for cls in built_in_formats():
        register(cls)
