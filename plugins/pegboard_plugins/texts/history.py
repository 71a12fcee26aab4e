"""What stands before a trained turn: four answers for templates that rewrite history.

Many templates render an assistant turn in one way while it is the last and in another once turns
follow: Qwen3 strips reasoning and empty think blocks. One render then shows most turns after a
prompt that the model never sees, or not at all. So each turn has a prompt P and an answer G of its
own (`pegboard_plugins.texts.chat_turns`), and samples are made of those:

    split  one sample for each turn, P + G: exactly what inference gives and expects
    chain  the same, but a turn joins the sample before it while that is the beginning of its P
    keep   one sample that keeps each G as it was generated: cheap, but inference must keep it too

The fourth, strip, trains on the one render as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pegboard.errors import DataError
from pegboard_plugins.texts.chat_turns import Turn
from pegboard_plugins.texts.encoding import Segment
from pegboard_plugins.texts.messages import REASONING_KEYS
from pegboard_plugins.texts.rendering import ChatRenderer

__all__ = ["Chain", "chain_turns", "keep_turns"]

_MARK = "\ue0f1\ue0f2"


class Chain:
    """Turns whose prompts continue one another, in order.

    Attributes:
        turns: at least one.
        segments: the text as (text, whether it gets loss), in order.
        text: prompt and answer of the last turn: the whole, less an end that has no loss.
    """

    __slots__ = ("segments", "text", "turns")

    def __init__(self, turn: Turn) -> None:
        self.turns = [turn]
        self.segments: list[Segment] = [(turn.prompt, False), (turn.generated, True)]
        self.text = turn.prompt + turn.generated

    def append(self, turn: Turn) -> None:
        """Join a turn whose prompt begins with `text`."""
        self.turns.append(turn)
        self.segments += [(turn.prompt[len(self.text) :], False), (turn.generated, True)]
        self.text = turn.prompt + turn.generated


def chain_turns(turns: Sequence[Turn], end: str = "") -> list[Chain]:
    """Join turns while the prompt of each begins with the text so far.

    Args:
        turns: in order; those without a prompt are left out.
        end: what the template writes after the last turn, such as a newline: the last chain is
            given it, without loss, so that it is the template's own render where nothing differs.
    """
    chains: list[Chain] = []
    for turn in turns:
        if not turn.generated:
            continue
        text = chains[-1].text if chains else ""
        # Longer, not equal: each turn has to begin with a prompt of its own.
        if text and len(turn.prompt) > len(text) and turn.prompt.startswith(text):
            chains[-1].append(turn)
        else:
            chains.append(Chain(turn))
    if chains and end:
        chains[-1].segments.append((end, False))
    return chains


def keep_turns(
    renderer: ChatRenderer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    turns: Sequence[Turn],
    stops: Sequence[str],
    trained: Collection[int],
) -> list[Segment]:
    """One text in which every turn stays as it was generated.

    Args:
        turns: of all assistant messages, in order; those without a prompt stand as they are rendered.
        trained: indices of the messages that get loss.

    Returns:
        Segments that join to the text; none if no turn has a prompt.

    Raises:
        DataError: the template does not render the text between two turns in a way that shows.
    """
    with_prompt = [turn for turn in turns if turn.generated]
    if not with_prompt:
        return []
    first = with_prompt[0]
    segments: list[Segment] = [(first.prompt, False), (first.generated, first.message in trained)]
    text = first.prompt + first.generated
    for before, turn in zip(with_prompt, with_prompt[1:], strict=False):
        if turn.prompt.startswith(text):  # nothing was rewritten so far
            between = turn.prompt[len(text) :]
        else:
            between = _between(renderer, messages, tools, before.message, turn, stops)
        text += between + turn.generated
        segments += [(between, False), (turn.generated, turn.message in trained)]
    return segments


def _between(
    renderer: ChatRenderer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    j: int,
    turn: Turn,
    stops: Sequence[str],
) -> str:
    """From the end of the turn of message `j` to where the next one starts to be generated.

    With a mark for what turn j said, the text after its stop token is what follows it in any chat.
    """
    marked = [*messages[:j], _marked(messages[j]), *messages[j + 1 : turn.message]]
    text = renderer.prompts(marked, tools)[0]
    place = text.find(_MARK)
    ends = [at + len(stop) for stop in stops if place >= 0 and (at := text.find(stop, place)) >= 0]
    default = renderer.prompts(messages[: turn.message], tools)[0]
    if ends:
        rest = text[min(ends) :]
        if default.endswith(rest):
            if turn.prompt.startswith(default):  # and the empty think block that it may add
                return rest + turn.prompt[len(default) :]
            if turn.prompt.endswith(rest):
                return rest
    raise DataError(
        f"messages[{j}]: the chat template does not show where this turn ends, so it can't be kept "
        "in the history as generated; use history 'chain'"
    )


def _marked(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without reasoning, and a mark where every template shows one: many leave out the
    content beside calls, but none the name of the last function called."""
    said = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    if not said.get("tool_calls"):
        return {**said, "content": _MARK}
    *calls, last = said["tool_calls"]
    if "function" in last:
        last = {**last, "function": {**last["function"], "name": _MARK}}
    else:
        last = {**last, "name": _MARK}
    return {**said, "tool_calls": [*calls, last]}
