"""An assistant turn as it trains, beside the same turn at inference.

At inference the model is given the chat template's prompt for the history and writes until a token
that ends a turn. That text, prompt and answer, is compared with the sample's text up to the end of
the turn: where they differ, the model trains after something else than what it will be given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any, Literal

from pegboard import DataError

from .contents import DiffPart, Turn

if TYPE_CHECKING:
    from pegboard_plugins.texts.rendering import ChatRenderer

    from .roles import TextSpan

__all__ = ["compare_texts", "compare_turns"]

_CONTEXT = 60
_MOST_WORDS = 1500


def compare_turns(
    text: str,
    spans: Sequence[TextSpan],
    has_loss: Sequence[bool],
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    renderer: ChatRenderer,
    stops: Sequence[str],
) -> list[Turn]:
    """One Turn for each assistant message in a sample; left out where there is no such prompt.

    Args:
        text: the sample, decoded.
        spans: whose text is whose; see `find_roles`.
        has_loss: for each span, whether any of its tokens is trained.
    """
    turns = []
    for span, trained in zip(spans, has_loss, strict=True):
        if span.role != "assistant" or span.message < 1:
            continue
        inference = _at_inference(span.message, messages, tools, renderer, stops)
        if inference is None:
            continue
        training = text[: _past_stop(text, span.start, span.end, stops)]
        if training == inference:
            turns.append(Turn(span.message, "same" if trained else "no loss"))
        # A cut inside a character leaves a replacement character of it.
        elif span.end == len(text) and inference.startswith(text.rstrip("\ufffd")):
            turns.append(Turn(span.message, "cut" if trained else "no loss"))
        else:
            diff = compare_texts(training, inference)
            turns.append(Turn(span.message, "differs" if trained else "rewritten", diff))
    return turns


def _at_inference(
    j: int,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    renderer: ChatRenderer,
    stops: Sequence[str],
) -> str | None:
    """The prompt of assistant message j and its answer, through the token that ends it."""
    try:
        ended = renderer.full(messages[: j + 1], tools)
        prompts = [p for p in renderer.prompts(messages[:j], tools) if ended.startswith(p)]
    except DataError:
        return None
    if not prompts:
        return None
    start = max(len(prompt) for prompt in prompts)
    return ended[: _past_stop(ended, start, len(ended), stops)]


def _past_stop(text: str, start: int, end: int, stops: Sequence[str]) -> int:
    ends = [at + len(stop) for stop in stops if (at := text.find(stop, start, end)) >= 0]
    return min(ends, default=end)


def compare_texts(training: str, inference: str) -> tuple[DiffPart, ...]:
    """What stands in one text only; of long equal stretches, the ends."""
    before = _common(training, inference)
    after = _common(training[before:][::-1], inference[before:][::-1])
    ends = len(training) - after, len(inference) - after
    old = re.findall(r"\w+|\s+|[^\w\s]", training[before : ends[0]])
    new = re.findall(r"\w+|\s+|[^\w\s]", inference[before : ends[1]])
    parts: list[DiffPart] = []

    def add(kind: Literal["same", "training", "inference", "elided"], text: str) -> None:
        if text:
            parts.append(DiffPart(kind, text))

    _add_context(parts, training[:before], keep_start=False, keep_end=True)
    if max(len(old), len(new)) > _MOST_WORDS:
        add("training", "".join(old))
        add("inference", "".join(new))
    else:
        matcher = SequenceMatcher(None, old, new, autojunk=False)
        for kind, a, b, c, d in matcher.get_opcodes():
            if kind == "equal":
                _add_context(parts, "".join(old[a:b]), keep_start=True, keep_end=True)
            else:
                add("training", "".join(old[a:b]))
                add("inference", "".join(new[c:d]))
    _add_context(parts, training[ends[0] :], keep_start=True, keep_end=False)
    return tuple(parts)


def _add_context(parts: list[DiffPart], text: str, *, keep_start: bool, keep_end: bool) -> None:
    kept = _CONTEXT * (keep_start + keep_end)
    if len(text) <= kept + 20:
        if text:
            parts.append(DiffPart("same", text))
        return
    if keep_start:
        parts.append(DiffPart("same", text[:_CONTEXT]))
    parts.append(DiffPart("elided", f"{len(text) - kept:,} equal characters"))
    if keep_end:
        parts.append(DiffPart("same", text[-_CONTEXT:]))


def _common(a: str, b: str) -> int:
    """Length of the common beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
