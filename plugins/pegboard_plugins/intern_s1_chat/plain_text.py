"""Plain text with pictures in it -> token ids; no chat template, loss on the text alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pegboard.errors import DataError
from pegboard_plugins.intern_s1_chat.placing import IMAGE_TOKEN
from pegboard_plugins.texts.encoding import encode_with_mask

if TYPE_CHECKING:
    from pegboard.contracts import Tokenizer

__all__ = ["encode_with_pictures", "is_plain_text"]


def is_plain_text(messages: Any) -> bool:
    """Whether messages are plain text, in the form of the role `pretrain`."""
    return isinstance(messages, list | tuple) and any(
        isinstance(message, Mapping) and message.get("role") == "pretrain" for message in messages
    )


def encode_with_pictures(
    tokenizer: Tokenizer, messages: Sequence[Any], image_id: int, typed_as_text: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the messages' texts, joined, and an end token; `image_id` for each `<IMG_CONTEXT>`.

    The text is cut at these, as the tokenizer does at its own tokens.

    Args:
        typed_as_text: the spelling of any other special token is text.

    Returns:
        ids (T,) int32; mask (T,) bool, False for pictures, for the first token and for messages
        with `"loss": false`.

    Raises:
        DataError: a message is no plain text.
    """
    at, borders, text = 0, [], ""
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, str) or message.get("role") != "pretrain":
            raise DataError(
                f"messages[{i}]: expected text and pictures of the role 'pretrain', as in the other "
                "messages of this record; give a chat a record of its own"
            )
        text += content
        if message.get("loss") is not False:
            borders.append((at, len(text)))
        at = len(text)
    ids, masks, start = [], [], 0
    for fragment in text.split(IMAGE_TOKEN):
        if start:
            ids.append(np.array([image_id], dtype=np.int32))
            masks.append(np.zeros(1, dtype=bool))
        end = start + len(fragment)
        inside = [(max(a, start) - start, min(b, end) - start) for a, b in borders]
        spans = [span for span in inside if span[0] < span[1]]
        some_ids, some_mask = encode_with_mask(tokenizer, fragment, spans, plain=typed_as_text)
        ids.append(some_ids)
        masks.append(some_mask)
        start = end + len(IMAGE_TOKEN)
    ids.append(np.array([tokenizer.eos_token_ids[0]], dtype=np.int32))
    masks.append(np.array([bool(borders) and borders[-1][1] == len(text)]))
    mask = np.concatenate(masks)
    mask[:1] = False
    return np.concatenate(ids), mask
