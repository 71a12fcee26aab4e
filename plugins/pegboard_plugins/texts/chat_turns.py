"""Find, in a rendered chat, exactly the characters that the model generates at inference.

For assistant turn j: P is the prompt at inference, E the chat up to and with turn j, and G = E
less P up to the first stop token. The template is a black box: nothing is known of its headers or
tags, so the same definition holds for any of them.

    exact      the whole chat begins with P + G
    shown      G is intact in the whole chat, but the text before it is not the prompt of inference
    rewritten  G is not in the whole chat (history whose reasoning the template strips), or the
               answer itself changes how the text before it is rendered
    noprefix   E does not begin with any prompt: no chat of this template has such a turn
    noend      the template writes no stop token after the turn
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pegboard.errors import DataError
from pegboard_plugins.texts.rendering import ChatRenderer

__all__ = ["Turn", "TurnKind", "find_turns"]

TurnKind = Literal["exact", "shown", "rewritten", "noprefix", "noend"]
"""How a turn of the chat relates to what the model generates at inference; the top of the module says each."""

# Private use: in no text, and no template trims it.
_MARK = "\ue0f1\ue0f2"


class Turn(NamedTuple):
    """One assistant turn in the rendered chat."""

    message: int
    """Index in the messages."""
    kind: TurnKind
    start: int
    """First generated character in the rendered chat; 0 unless exact or shown."""
    end: int
    """One past the stop token; 0 unless exact or shown."""
    prompt: str = ""
    """What the model is given at inference; empty where there is no such prompt."""
    generated: str = ""
    """What it then writes, stop token included; empty where there is no prompt."""


def find_turns(
    renderer: ChatRenderer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    chosen: Sequence[int],
    stops: Sequence[str],
    *,
    locate: bool = True,
) -> tuple[str, list[Turn]]:
    """Render the chat and locate the assistant messages `chosen` by index.

    Args:
        stops: the spellings of the tokens that end a turn.
        locate: find the place of a shown turn, which takes another render; without it `start` and
            `end` of a shown turn are 0, and a turn that is quoted word for word counts as shown.

    Returns:
        The rendered chat, equal to the template's own text, and one Turn for each of `chosen`.

    Raises:
        DataError: the template refuses the messages.
    """
    full = renderer.full(messages, tools)
    return full, [_find_turn(renderer, messages, tools, j, stops, full, locate) for j in chosen]


def _find_turn(
    renderer: ChatRenderer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    j: int,
    stops: Sequence[str],
    full: str,
    locate: bool,
) -> Turn:
    if j == 0:  # nobody asked: there is no prompt to generate from
        return Turn(j, "noprefix", 0, 0)
    try:
        ended = full if j == len(messages) - 1 else renderer.full(messages[: j + 1], tools)
        prompts = renderer.prompts(messages[:j], tools)
    except DataError:  # the whole chat renders, this beginning does not (no user yet)
        return Turn(j, "noprefix", 0, 0)
    fitting = [prompt for prompt in prompts if ended.startswith(prompt)]
    if not fitting:
        return _find_after_header(renderer, messages, tools, j, stops, ended, prompts[0])
    prompt = max(fitting, key=len)
    generated = _generated(ended, len(prompt), stops, full)
    if generated is None:
        return Turn(j, "noend", 0, 0)
    if full.startswith(generated, len(prompt)) and full.startswith(prompt):
        return Turn(j, "exact", len(prompt), len(prompt) + len(generated), prompt, generated)
    if generated not in full:
        return Turn(j, "rewritten", 0, 0, prompt, generated)
    if not locate:
        return Turn(j, "shown", 0, 0, prompt, generated)
    start = _locate(renderer, messages, tools, j, generated, full)
    if start is None:
        return Turn(j, "rewritten", 0, 0, prompt, generated)
    return Turn(j, "shown", start, start + len(generated), prompt, generated)


def _find_after_header(
    renderer: ChatRenderer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    j: int,
    stops: Sequence[str],
    ended: str,
    prompt: str,
) -> Turn:
    """The turn whose answer changes the text before it (gpt-oss drops the reasoning of a tool call
    once the final answer is there): it still follows the header that its prompt ends with."""
    try:
        before = renderer.full(messages[:j], tools)
        if prompt == before:
            return _find_after_question(renderer, messages, tools, j, stops, ended, prompt)
        marked = renderer.full([*messages[:j], {"role": "assistant", "content": _MARK}], tools)
    except DataError:
        return Turn(j, "noprefix", 0, 0)
    header = prompt[len(before) :]
    place = marked.find(_MARK)
    if not header or not prompt.startswith(before) or place < 0:
        return Turn(j, "noprefix", 0, 0)
    start = marked.rfind(header, 0, place) + len(header)
    if start < len(header) or not ended.startswith(marked[:start]):
        return Turn(j, "noprefix", 0, 0)
    generated = _generated(ended, start, stops, ended)
    if generated is None:
        return Turn(j, "noend", 0, 0)
    return Turn(j, "rewritten", 0, 0, prompt, generated)


def _find_after_question(
    renderer: ChatRenderer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    j: int,
    stops: Sequence[str],
    ended: str,
    prompt: str,
) -> Turn:
    """The same where no header is written before an answer (Mistral's templates put the system text
    into the last question, but only until it is answered): the turn follows what ends its prompt, and
    that is what stands after the content of the message before it."""
    asked = [*messages[: j - 1], {**messages[j - 1], "content": _MARK}]
    try:
        before = renderer.full(asked, tools)
        after = renderer.full([*asked, messages[j]], tools)
    except DataError:
        return Turn(j, "noprefix", 0, 0)
    end, rest = before.rpartition(_MARK)[2], after.rpartition(_MARK)[2]
    # With a mark in it each way, and the same as without: what is found is of this very chat.
    known = len(end) < len(before) and len(rest) < len(after)
    if not known or not prompt.endswith(end) or not rest.startswith(end):
        return Turn(j, "noprefix", 0, 0)
    generated = _generated(rest, len(end), stops, rest)
    if generated is None:
        return Turn(j, "noend", 0, 0)
    if not ended.endswith(rest):
        return Turn(j, "noprefix", 0, 0)
    return Turn(j, "rewritten", 0, 0, prompt, generated)


def _generated(ended: str, start: int, stops: Sequence[str], full: str) -> str | None:
    """Text from `start` through the first stop token, or None."""
    ends = [(at, at + len(stop)) for stop in stops if (at := ended.find(stop, start)) >= 0]
    if ends:
        return ended[start : min(ends)[1]]
    # In GLM templates the next header is the stop token: it shows only in the longer chat.
    if full.startswith(ended):
        for stop in stops:
            if full.startswith(stop, len(ended)):
                return full[start : len(ended) + len(stop)]
    return None


def _locate(
    renderer: ChatRenderer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    j: int,
    generated: str,
    full: str,
) -> int | None:
    """Start of `generated` in `full` at turn j's own place, or None.

    The place is where a mark shows when it stands for the turn's content: a plain search would take
    an equal turn elsewhere for this one.
    """
    marked = [*messages[:j], {**messages[j], "content": _MARK}, *messages[j + 1 :]]
    try:
        text = renderer.full(marked, tools)
    except DataError:
        return None
    place = text.find(_MARK)
    if place < 0 or not full.startswith(text[:place]):
        return None
    start = full.find(generated, max(0, place - len(generated) + 1), place + len(generated))
    return start if start >= 0 else None
