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
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from pegboard.contracts import Example, ImageTokens, TokenizeFn
from pegboard.errors import ConfigError, DataError, DroppedSample
from pegboard_plugins.media.frames import count_frames, pick_frames, read_frames
from pegboard_plugins.media.images import decode_image, read_image_size
from pegboard_plugins.media.parts import MediaPart, read_media_part
from pegboard_plugins.media.places import MediaError, is_data_url
from pegboard_plugins.media.references import RecordSource, open_part, part_name
from pegboard_plugins.media.tiling import choose_grid, count_tiles

if TYPE_CHECKING:
    from pegboard.contracts import Tokenizer

    from .component import InternS1TokenizeFn

__all__ = ["TOKENIZER_VERSION", "MediaChatTokenizer", "check_image_tokens"]

TOKENIZER_VERSION = 1
"""Raised whenever the ids, the mask or the media of some record change."""

IMAGE_TOKEN, IMAGE_START, IMAGE_END = "<IMG_CONTEXT>", "<img>", "</img>"
_PLACEHOLDERS = {"image": IMAGE_TOKEN, "video": "<VIDEO_CONTEXT>"}
_PLACEHOLDER = re.compile("|".join(re.escape(token) for token in _PLACEHOLDERS.values()))
_PROBE = "pegboardprobe"


@dataclass
class _Plan:
    """The media of one record, as planned: what the store keeps, and the tokens of each."""

    items: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    """Image tokens of each item: of the picture, or of each frame of the video."""

    def reorder(self, order: Sequence[int]) -> None:
        self.items = [self.items[number] for number in order]
        self.tokens = [self.tokens[number] for number in order]


class MediaChatTokenizer:
    """Built InternS1TokenizeFn; see `pegboard.contracts.TokenizeFn`.

    Counts what the inner tokenize function counts, and `truncated`, `pictures`, `frames`, `tiles`,
    `samples with pictures over max_length`.

    Args:
        chat: text around the pictures -> examples; it must not cut them.
        tokenizer: what `chat` encodes with; it has the three image tokens.
        image_tokens: what the model says of pictures.
    """

    def __init__(
        self,
        config: InternS1TokenizeFn.Config,
        chat: TokenizeFn,
        tokenizer: Tokenizer,
        image_tokens: ImageTokens,
    ) -> None:
        self.max_length = config.max_length
        self._config = config
        self._chat = chat
        self._image_tokens = image_tokens
        self._start_id, self._end_id = check_image_tokens(tokenizer, image_tokens)
        self._image_text = _learn_image_text(tokenizer)
        self._counts: Counter[str] = Counter()

    def __call__(self, record: Mapping[str, Any] | Sequence[Any]) -> Sequence[Example]:
        source = getattr(record, "source", None)
        messages, plan = self._place_media(record)
        examples = []
        for example in self._chat(self._with_messages(record, messages)):
            grown = self._grown(example, plan, messages)
            if isinstance(source, RecordSource):
                self._add_media(grown, plan, source)
            if self._fits(grown):
                examples.append(grown)
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
        messages, plan = self._place_media(record)
        counts = iter([count for tokens in plan.tokens for count in tokens])

        def grow(found: re.Match[str]) -> str:
            count = next(counts, None)
            return found[0] if count is None else f"{IMAGE_START}{found[0] * count}{IMAGE_END}"

        chat = self._chat.read_messages(self._with_messages(record, messages))  # type: ignore[attr-defined]
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

    def _place_media(self, record: Any) -> tuple[list[Any], _Plan]:
        """The messages with `<IMG_CONTEXT>` for each picture and frame, and the plan of these."""
        source = getattr(record, "source", None)
        parts, flat = _take_media(_messages(record))
        if parts and not isinstance(source, RecordSource):
            raise DataError(
                "messages: they hold pictures, but this dataset does not say where pictures lie; "
                "use VLMJsonlDataset"
            )
        plan = self._plan_media(parts, source) if isinstance(source, RecordSource) else _Plan()
        placer = _Placer(flat, parts, self._image_text, self._frame_texts(parts, plan))
        messages = [placer.place(message) for message in flat]
        plan.reorder(placer.order)
        return messages, plan

    def _plan_media(self, parts: Sequence[MediaPart], source: RecordSource) -> _Plan:
        plan = _Plan()
        num_pictures = sum(part.kind == "image" for part in parts)
        most = max(1, self._config.max_dynamic_patch // max(1, num_pictures))
        for number, part in enumerate(parts):
            if part.kind == "image":
                self._plan_picture(plan, part, _reference(part, number, source), most, source)
            else:
                self._plan_video(plan, part, source)
        return plan

    def _plan_picture(
        self,
        plan: _Plan,
        part: MediaPart,
        reference: str | dict[str, Any],
        most: int,
        source: RecordSource,
    ) -> None:
        size = part.size
        if size is None or source.check != "lazy":
            with open_part(part, source.place) as file:
                if source.check == "decode":
                    found = decode_image(file, source.limits, part_name(part)).size
                else:
                    found = read_image_size(file, source.limits, part_name(part))
            if size is not None and size != found:
                raise MediaError(
                    "image_wh differs",
                    f"{part_name(part)} is {found[0]}x{found[1]}, but image_wh says "
                    f"{size[0]}x{size[1]}; put it right, or leave it out",
                )
            size = found
        elif isinstance(part.reference, str) and not is_data_url(part.reference):
            source.place.resolve(part.reference)  # a path that leads out fails now, not in training
        grid = (1, 1)
        if self._config.dynamic_image_size:
            grid = choose_grid(
                *size,
                tile_size=self._image_tokens.tile_size,
                min_tiles=min(self._config.min_dynamic_patch, most),
                max_tiles=most,
            )
        tiles = count_tiles(grid, use_thumbnail=self._config.use_thumbnail)
        plan.items.append({"ref": reference, "wh": list(size), "grid": list(grid)})
        plan.tokens.append([tiles * self._image_tokens.tokens_per_tile])
        self._counts["pictures"] += 1

    def _plan_video(self, plan: _Plan, part: MediaPart, source: RecordSource) -> None:
        if not isinstance(part.reference, str) or is_data_url(part.reference):
            raise MediaError(
                "video not a path", f"{part_name(part)}: a video is given by its path only"
            )
        num_frames = count_frames(part.reference, source.place, source.limits)
        picks = pick_frames(num_frames, self._config.max_num_frames)
        if source.check == "decode":
            for _ in read_frames(part.reference, picks, source.place, source.limits):
                pass
        plan.items.append({"ref": part.reference, "frames": picks})
        plan.tokens.append([self._image_tokens.tokens_per_tile] * len(picks))
        self._counts["frames"] += len(picks)

    # -- text and ids ------------------------------------------------------------------------

    def _frame_texts(self, parts: Sequence[MediaPart], plan: _Plan) -> dict[int, str]:
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

    def _grown(self, example: Example, plan: _Plan, messages: Sequence[Any]) -> Example:
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

    def _add_media(self, example: Example, plan: _Plan, source: RecordSource) -> None:
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
            f"{IMAGE_TOKEN} is {found[IMAGE_TOKEN]}"
        )
    return found[IMAGE_START], found[IMAGE_END]


def _messages(record: Any) -> Any:
    return record.get("messages") if isinstance(record, Mapping) else record


def _take_media(messages: Any) -> tuple[list[MediaPart], list[Any]]:
    """The record's pictures and videos, and its messages with only the kinds of those parts."""
    parts: list[MediaPart] = []
    flat: list[Any] = []
    if not isinstance(messages, list | tuple):
        return parts, flat
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, list | tuple):
            flat.append(message)
            continue
        kept: list[Any] = []
        for j, part in enumerate(content):
            where = f"messages[{i}].content[{j}]"
            found = read_media_part(part, where) if isinstance(part, Mapping) else None
            if found is None:
                kept.append(part)
            else:
                parts.append(found)
                kept.append({"type": found.kind})
        flat.append({**message, "content": kept})
    return parts, flat


def _images_in(message: Any) -> int:
    return _count([message], IMAGE_TOKEN)


def _reference(part: MediaPart, number: int, source: RecordSource) -> str | dict[str, Any]:
    """What the token store keeps of a picture: its path, or its place inside the record."""
    if isinstance(part.reference, str) and not is_data_url(part.reference):
        return part.reference
    if source.at is None:
        raise MediaError(
            "image inside a record",
            f"{part_name(part)} is written inside its record, which can't be found again in a "
            "file of this format; write the picture to a file",
        )
    return {**source.at, "part": number}


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


class _Placer:
    """Writes a record's media into the text of its messages.

    Where the text holds placeholders of a kind, they say where its pictures (videos) go, in order;
    else each goes where its part stands.
    """

    def __init__(
        self,
        messages: Sequence[Any],
        parts: Sequence[MediaPart],
        image_text: str,
        frame_texts: Mapping[int, str],
    ) -> None:
        self.order: list[int] = []
        """Numbers of the media in the order of the text."""
        self._image_text = image_text
        self._frame_texts = frame_texts
        self._waiting = {
            kind: deque(n for n, part in enumerate(parts) if part.kind == kind)
            for kind in _PLACEHOLDERS
        }
        self._written = set()
        for kind, token in _PLACEHOLDERS.items():
            written, given = _count(messages, token), len(self._waiting[kind])
            if written and written != given:
                raise MediaError(
                    "placeholders differ",
                    f"messages: their text holds {written} {token}, but {given} {kind}s are "
                    "given; write one for each, or none",
                )
            if written:
                self._written.add(kind)

    def place(self, message: Any) -> Any:
        """The message with text parts alone, one `<IMG_CONTEXT>` for each picture and frame."""
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, str):
            return {**message, "content": self._fill(content)}
        if not isinstance(content, list | tuple):
            return message
        return {**message, "content": [p for part in content for p in self._place_part(part)]}

    def _place_part(self, part: Any) -> list[Any]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image" or kind == "video":
            if kind in self._written:
                return []
            text = self._take(kind)
            text = self._image_text if kind == "image" else f"{text}\n"
            return [{"type": "text", "text": text}]
        if _text_of(part):
            return [{**part, "text": self._fill(part["text"])}]
        return [part]

    def _fill(self, text: str) -> str:
        """Text whose placeholders are filled in the order they stand."""
        if not self._written:
            return text
        kinds = {token: kind for kind, token in _PLACEHOLDERS.items()}
        return _PLACEHOLDER.sub(lambda found: self._take(kinds[found[0]]), text)

    def _take(self, kind: str) -> str:
        number = self._waiting[kind].popleft()
        self.order.append(number)
        return self._frame_texts.get(number, IMAGE_TOKEN)


def _text_of(part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    return text if isinstance(text, str) else ""


def _count(messages: Sequence[Any], token: str) -> int:
    """How often the text of all messages holds `token`."""
    total = 0
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, str):
            total += content.count(token)
        elif isinstance(content, list | tuple):
            total += sum(_text_of(part).count(token) for part in content)
    return total
