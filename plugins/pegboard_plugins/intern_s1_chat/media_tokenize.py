"""A chat with pictures -> ids with image tokens, a loss mask, and where the pictures lie.

Pictures become `<IMG_CONTEXT>` in the text, one for each picture or frame, and an ordinary tokenize
function of chats makes examples of that. Then each of those ids grows to `<img>`, the tiles' image
tokens, `</img>`: the ids equal those of the text written out, since these tokens are never merged
with their neighbours. A picture is opened only if nothing else tells its size.

Source: prompt layout of transformers' InternVLProcessor and of XTuner's Intern-S1 data.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from pegboard.contracts import (
    Example,
    ImageTokens,
    RecordFormat,
    RecordText,
    RecordTokens,
    TokenizeFn,
)
from pegboard.errors import ConfigError, DataError, DroppedSample
from pegboard_plugins.intern_s1_chat.placing import (
    IMAGE_TOKEN,
    Placer,
    check_placeholders,
    count_text,
    take_media,
)
from pegboard_plugins.intern_s1_chat.plain_text import encode_with_pictures, is_plain_text
from pegboard_plugins.intern_s1_chat.planning import MediaPlan, MediaPlanner
from pegboard_plugins.media.listed import Kind, read_listed_media
from pegboard_plugins.media.parts import MediaPart
from pegboard_plugins.media.references import RecordSource

if TYPE_CHECKING:
    from pegboard.contracts import Tokenizer

    from .component import InternS1TokenizeFn

__all__ = ["TOKENIZER_VERSION", "MediaChatTokenizer", "check_image_tokens"]

TOKENIZER_VERSION = 3
"""Raised whenever the ids, the mask or the media of some record change."""

IMAGE_START, IMAGE_END = "<img>", "</img>"
_JPEG_QUALITIES = (75, 100)
_PROBE = "pegboardprobe"


class MediaChatTokenizer:
    """Built InternS1TokenizeFn; see `pegboard.contracts.TokenizeFn`.

    Counts what the inner tokenize function counts, and `truncated`, `pictures`, `frames`, `tiles`,
    `samples with pictures over max_length`; `<image> without a picture`, where the text of a record
    says that a picture is there, but neither its messages nor `image_keys` name one; `pictures in
    no sample`, where they come after everything that is trained.

    Args:
        chat: text around the pictures -> examples; it must not cut them. With `reader` it is given
            records of the keys `messages` and `tools`, or `input_ids` and `loss_mask`.
        reader: the form of the records; None: `chat` knows it, and they have `messages`.
        tokenizer: what `chat` encodes with; it has the three image tokens.
        image_tokens: what the model says of pictures.
    """

    def __init__(
        self,
        config: InternS1TokenizeFn.Config,
        chat: TokenizeFn,
        tokenizer: Tokenizer,
        image_tokens: ImageTokens,
        reader: RecordFormat | None = None,
    ) -> None:
        self.max_length = config.max_length
        self._config = config
        self._chat = chat
        self._reader = reader
        self._keys: Mapping[Kind, Sequence[str]] = {
            "image": config.image_keys,
            "video": config.video_keys,
        }
        self._marks: Mapping[Kind, str] = {
            "image": config.image_placeholder,
            "video": config.video_placeholder,
        }
        self._image_tokens = image_tokens
        self._tokenizer = tokenizer
        typed = getattr(config.chat.config, "typed_special_tokens", "text")
        self._typed_as_text = typed == "text"
        self._start_id, self._end_id = check_image_tokens(tokenizer, image_tokens)
        self._image_text = _learn_image_text(tokenizer)
        self._counts: Counter[str] = Counter()
        self._plan = MediaPlanner(config, image_tokens, self._counts)

    def __call__(self, record: Mapping[str, Any] | Sequence[Any]) -> Sequence[Example]:
        source = getattr(record, "source", None)
        turns, plan = self._place_media(record)
        messages = _messages(turns) or ()
        examples = []
        for example in self._tokenize(turns, messages, plan):
            grown = self._grown(example, plan, messages)
            if isinstance(source, RecordSource):
                self._add_media(grown, plan, source)
            if self._fits(grown):
                examples.append(grown)
        if examples and plan.items and not any(example.num_tiles for example in examples):
            self._counts["pictures in no sample"] += len(plan.items)
        if not examples:
            raise DroppedSample("pictures over max_length" if plan.items else "no supervised token")
        return examples

    def take_counts(self) -> Mapping[str, int]:
        counts = {**self._chat.take_counts(), **self._counts}
        self._counts.clear()
        return counts

    def fingerprint(self) -> str:
        config = self._config.model_dump(mode="json")
        state = [TOKENIZER_VERSION, config, self._chat.fingerprint(), self._image_tokens]
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    @property
    def renderer(self) -> Any:
        """The inner tokenize function's, if it has one; see ChatTokenizer."""
        return getattr(self._chat, "renderer", None)

    def read_messages(self, record: Any) -> Any:
        """What the inner tokenize function says of the record, with the image tokens written out.

        Raises:
            DataError: it is broken.
        """
        turns, plan = self._place_media(record)
        counts = iter([count for tokens in plan.tokens for count in tokens])

        def grow(found: re.Match[str]) -> str:
            count = next(counts, None)
            return found[0] if count is None else f"{IMAGE_START}{found[0] * count}{IMAGE_END}"

        chat = self._chat.read_messages(turns)  # type: ignore[attr-defined]
        if chat is None:
            return None
        grown = []
        for message in chat.messages:
            content = message.get("content")
            if isinstance(content, str):
                message = {**message, "content": re.sub(re.escape(IMAGE_TOKEN), grow, content)}
            grown.append(message)
        return chat._replace(messages=grown)

    # -- media of the record -----------------------------------------------------------------

    def _place_media(self, record: Any) -> tuple[Any, MediaPlan]:
        """What the inner tokenize function reads, with `<IMG_CONTEXT>` for each picture and frame,
        and the plan of these."""
        source = getattr(record, "source", None)
        turns = self._read_turns(record)
        listed = read_listed_media(record, self._keys)
        found, flat = take_media(_messages(turns), listed, self._marks)
        if (found or listed) and not isinstance(source, RecordSource):
            raise DataError(
                "messages: they hold pictures, but this dataset does not say where pictures lie; "
                "use VLMJsonlDataset"
            )
        if listed and not flat:
            raise DataError(
                f"{listed[0].path[0]}: the record lists pictures, but has no messages that could "
                "hold them; name its form in tokenize_fn.chat.record_format"
            )
        if found:
            check_placeholders(flat, turns.get("tools") if isinstance(turns, Mapping) else None)
        elif count_text(flat, self._marks["image"]):
            self._counts[f"{self._marks['image']} without a picture"] += 1
        parts = [one.part for one in found]
        plan = MediaPlan()
        if isinstance(source, RecordSource):
            plan = self._plan(found, record, source)
        placer = Placer(flat, parts, self._image_text, self._frame_texts(parts, plan))
        messages = [placer.place(message) for message in flat]
        plan.reorder(placer.order)
        return self._with_messages(turns, messages), plan

    def _read_turns(self, record: Any) -> Any:
        """The record in OpenAI's form, its media still in it."""
        if self._reader is None or is_plain_text(_messages(record)):
            return record
        content = self._reader.read(record)
        if isinstance(content, RecordText):
            pieces = [
                {"role": "pretrain", "content": text, "loss": trained}
                for text, trained in content.pieces
            ]
            return {"messages": pieces}
        if isinstance(content, RecordTokens):
            ids, mask = content.input_ids, content.loss_mask
            return {"input_ids": ids.tolist(), "loss_mask": mask.astype(int).tolist()}
        return {"messages": content.messages, "tools": content.tools}

    def _tokenize(self, turns: Any, messages: Sequence[Any], plan: MediaPlan) -> Sequence[Example]:
        if not plan.items or not is_plain_text(messages):
            return self._chat(turns)
        ids, mask = encode_with_pictures(
            self._tokenizer, messages, self._image_tokens.image_token_id, self._typed_as_text
        )
        return [Example(input_ids=ids, loss_mask=mask)]

    # -- text and ids ------------------------------------------------------------------------

    def _frame_texts(self, parts: Sequence[MediaPart], plan: MediaPlan) -> dict[int, str]:
        """Text of each video, by its number among the record's media."""
        prefix = self._config.frame_prefix
        return {
            number: "\n".join(f"{prefix.format(k + 1)}{IMAGE_TOKEN}" for k in range(len(tokens)))
            for number, (part, tokens) in enumerate(zip(parts, plan.tokens, strict=True))
            if part.kind == "video"
        }

    def _with_messages(self, record: Any, messages: list[Any]) -> Any:
        """The record with these messages, and a system message if the config asks for one."""
        if not messages:
            return record  # another form; or what the inner tokenize function refuses
        first = messages[0].get("role") if isinstance(messages[0], Mapping) else None
        if self._config.system_message and first != "system":
            messages = [{"role": "system", "content": self._config.system_message}, *messages]
        return {**record, "messages": messages} if isinstance(record, Mapping) else messages

    def _grown(self, example: Example, plan: MediaPlan, messages: Sequence[Any]) -> Example:
        """The example with each image id grown to <img>, its picture's tokens, </img>."""
        image_id = self._image_tokens.image_token_id
        ids, mask = example.input_ids, example.loss_mask
        places = np.flatnonzero(ids == image_id)
        counts = [count for tokens in plan.tokens for count in tokens]
        # An example may end before the record does: its pictures are those up to a message's end.
        whole = {0, *accumulate(map(_images_in, messages))}
        if len(places) not in whole:
            raise DataError(
                f"messages: the chat template shows {len(places)} {IMAGE_TOKEN}, but "
                f"{len(counts)} pictures and frames are given"
            )
        if not len(places):
            return example
        ids_of: list[np.ndarray] = []
        mask_of: list[np.ndarray] = []
        first = 0
        for place, count in zip(places.tolist(), counts, strict=False):
            run = np.full(count + 2, image_id, dtype=ids.dtype)
            run[0], run[-1] = self._start_id, self._end_id
            ids_of += [ids[first:place], run]
            mask_of += [mask[first:place], np.zeros(count + 2, dtype=np.bool_)]
            first = place + 1
        example.input_ids = np.concatenate([*ids_of, ids[first:]])
        example.loss_mask = np.concatenate([*mask_of, mask[first:]])
        return example

    def _add_media(self, example: Example, plan: MediaPlan, source: RecordSource) -> None:
        """What the token store keeps of the pictures in this example."""
        rows = np.flatnonzero(example.input_ids == self._image_tokens.image_token_id).tolist()
        items = []
        at = num_tiles = 0
        for item, tokens in zip(plan.items, plan.tokens, strict=True):
            if at == len(rows):
                break
            spans = []
            for count in tokens:
                spans.append([rows[at], count])
                at += count
            num_tiles += sum(tokens) // self._image_tokens.tokens_per_tile
            items.append({**item, "at": spans})
        if not items:
            return
        example.media = {
            "tile_size": self._image_tokens.tile_size,
            "thumbnail": self._config.use_thumbnail,
            "root": source.place.root,
            "outside": source.place.allow_outside,
            "max_pixels": source.limits.max_pixels,
            **({"jpeg": list(_JPEG_QUALITIES)} if self._config.data_augment else {}),
            "items": items,
        }
        example.num_tiles = num_tiles

    def _fits(self, example: Example) -> bool:
        """Cut text behind the last picture; False where the pictures or no answer would be left."""
        if len(example.input_ids) > self.max_length:
            if example.media:
                start, count = example.media["items"][-1]["at"][-1]
                if start + count + 1 > self.max_length:
                    self._counts["samples with pictures over max_length"] += 1
                    return False
            example.input_ids = example.input_ids[: self.max_length].copy()
            example.loss_mask = example.loss_mask[: self.max_length].copy()
            self._counts["truncated"] += 1
        # The first token of a sample has nothing before it to be predicted from.
        if not example.loss_mask[1:].any():
            return False
        self._counts["tiles"] += example.num_tiles
        return True


def check_image_tokens(tokenizer: Tokenizer, image_tokens: ImageTokens) -> tuple[int, int]:
    """Ids of <img> and </img>.

    Raises:
        ConfigError: one of the three tokens is missing, or <IMG_CONTEXT> is not the model's.
    """
    found = {}
    for token in (IMAGE_TOKEN, IMAGE_START, IMAGE_END):
        ids = tokenizer.encode(token)
        if len(ids) != 1:
            raise ConfigError(
                f"tokenizer: it has no token {token}, which pictures are written with; use the "
                "model's own tokenizer"
            )
        found[token] = ids[0]
    if found[IMAGE_TOKEN] != image_tokens.image_token_id:
        raise ConfigError(
            f"model.image_token_id: {image_tokens.image_token_id}, but the tokenizer's "
            f"{IMAGE_TOKEN} is {found[IMAGE_TOKEN]}; set it to that"
        )
    return found[IMAGE_START], found[IMAGE_END]


def _messages(record: Any) -> Any:
    return record.get("messages") if isinstance(record, Mapping) else record


def _images_in(message: Any) -> int:
    return count_text([message], IMAGE_TOKEN)


def _learn_image_text(tokenizer: Tokenizer) -> str:
    """What the chat template writes for a picture part, such as `<IMG_CONTEXT>` and a newline.

    Learned by a probe; the published form where the template knows no picture parts.
    """
    from jinja2 import TemplateError

    default = f"{IMAGE_TOKEN}\n"
    parts = [{"type": "image"}, {"type": "text", "text": _PROBE}]
    try:
        plain = tokenizer.render([{"role": "user", "content": _PROBE}])
        rendered = tokenizer.render([{"role": "user", "content": parts}])
        start, end = plain.find(_PROBE), rendered.find(_PROBE)
        learned = rendered[max(start, 0) : end]
        if start < 0 or rendered[:start] != plain[:start] or learned.count(IMAGE_TOKEN) != 1:
            return default
        same = tokenizer.render([{"role": "user", "content": learned + _PROBE}])
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
        return default
    return learned if same == rendered else default
