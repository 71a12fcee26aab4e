"""Tokenizers and tokenize functions with one fault each."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from broken_parts import Broken, Sound
from pydantic import Field

import pegboard
from pegboard import DataError, DroppedSample, Example

__all__ = ["BROKEN", "SOUND"]


class Bytes:
    """The built-in tokenizer of bytes, method by method."""

    def __init__(self) -> None:
        from pegboard_plugins.tokenizers.byte_tokenizer import make_byte_tokenizer

        self.inner: Any = make_byte_tokenizer()
        self.eos_token_ids = self.inner.eos_token_ids
        self.pad_token_id = self.inner.pad_token_id
        self.vocab_size = self.inner.vocab_size
        self.chat_template = self.inner.chat_template

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        ids: list[int] = self.inner.encode(text, special_tokens=special_tokens)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.inner.decode(ids))

    def render(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> str:
        return str(self.inner.render(messages, **more))

    def save(self, folder: str) -> None:
        self.inner.save(folder)

    def fingerprint(self) -> str:
        return str(self.inner.fingerprint())


class Stripping(Bytes):
    def decode(self, ids: Iterable[int]) -> str:
        return super().decode(ids).strip()


class Endless(Bytes):
    def __init__(self) -> None:
        super().__init__()
        self.eos_token_ids = ()


class Typed(Bytes):
    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        return super().encode(text)


class Promptless(Bytes):
    def render(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> str:
        return super().render(messages)


class Unsaved(Bytes):
    def save(self, folder: str) -> None:
        del folder


class RestlessBytes(Bytes):
    def fingerprint(self) -> str:
        return os.urandom(8).hex()


class ClosedBytes(Bytes):
    def __init__(self) -> None:
        super().__init__()
        self.open = lambda: 1


def tokenizer(cls: type[Bytes]) -> type[pegboard.TokenizerComponent]:
    class ByteByByte(pegboard.TokenizerComponent):
        """Bytes."""

        config: Any

        def build(self, *, trust_remote_code: bool = False) -> Any:
            return cls()

    return ByteByByte


class Words:
    """A prompt, and a text with loss."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        self.tokenizer, self.max_length = tokenizer, config.max_length
        self.prompt = config.prompt
        self.counts: Counter[str] = Counter()

    def __call__(self, record: Any) -> list[Example]:
        if not isinstance(record.get("text"), str):
            raise DataError("text: expected a string")
        self.counts["records"] += 1
        return self.cut(*self.parts(record["text"]))

    def parts(self, text: str) -> tuple[list[int], list[int]]:
        encode = self.tokenizer.encode
        return encode(self.prompt), [*encode(text), self.tokenizer.eos_token_ids[0]]

    def cut(self, prompt: list[int], text: list[int]) -> list[Example]:
        ids = np.array([*prompt, *text], dtype=np.int32)[: self.max_length]
        mask = np.arange(len(ids)) >= len(prompt)
        if not mask.any():
            raise DroppedSample("no text")
        return [Example(input_ids=ids, loss_mask=mask)]

    def take_counts(self) -> Mapping[str, int]:
        counts, self.counts = self.counts, Counter()
        return dict(counts)

    def fingerprint(self) -> str:
        return f"{self.max_length} {self.prompt} {self.tokenizer.fingerprint()}"


class Wide(Words):
    def cut(self, prompt: list[int], text: list[int]) -> list[Example]:
        [example] = super().cut(prompt, text)
        example.input_ids = example.input_ids.astype(np.int64)
        return [example]


class Long(Words):
    def cut(self, prompt: list[int], text: list[int]) -> list[Example]:
        limit, self.max_length = self.max_length, 10**6
        examples = super().cut(prompt, text)
        self.max_length = limit
        return examples


class Marking(Words):
    def __call__(self, record: Any) -> list[Example]:
        examples = super().__call__(record)
        record["seen"] = True
        return examples


class Moody(Words):
    def cut(self, prompt: list[int], text: list[int]) -> list[Example]:
        return super().cut(prompt, text if self.counts["records"] % 2 else text[1:])


class Trusting(Words):
    def __call__(self, record: Any) -> list[Example]:
        self.counts["records"] += 1
        return self.cut(*self.parts(record["text"]))


class ClosedWords(Words):
    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self.open = lambda: 1


class Counting(Words):
    def take_counts(self) -> Mapping[str, int]:
        return dict(self.counts)


class WithoutFields(Words):
    def fingerprint(self) -> str:
        return f"{self.max_length} {self.tokenizer.fingerprint()}"


class WithoutTokenizer(Words):
    def fingerprint(self) -> str:
        return f"{self.max_length} {self.prompt}"


class LowerCase(Words):
    def parts(self, text: str) -> tuple[list[int], list[int]]:
        return super().parts(text.lower())


class TrainsThePrompt(Words):
    def cut(self, prompt: list[int], text: list[int]) -> list[Example]:
        return super().cut(prompt[:2], [*prompt[2:], *text])


def tokenize_fn(cls: type[Words]) -> type[pegboard.TokenizeFnComponent]:
    class PromptedText(pegboard.TokenizeFnComponent):
        """A prompt, and a text with loss."""

        class Config(pegboard.ComponentConfig):
            max_length: int = Field(default=64, gt=0, description="Longest example.")
            prompt: str = Field(default="Say: ", description="Stands before the text.")

        config: Config

        def build(self, tokenizer: Any, model: Any) -> Any:
            return cls(self.config, tokenizer)

    return PromptedText


def segments(record: Any, tokenizer: Any) -> list[list[tuple[str, bool]]]:
    return [[("Say: ", False), (record["text"] + tokenizer.decode(tokenizer.eos_token_ids), True)]]


def schema_tokenize_fn(cls: type[Words]) -> type[pegboard.TokenizeFnComponent]:
    """The same part, its config said by a JSON Schema."""

    class SchemaText(pegboard.TokenizeFnComponent):
        """A prompt, and a text with loss."""

        config_schema: ClassVar[Any] = {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "max_length": {"type": "integer", "default": 64, "description": "Longest example."},
                "prompt": {"type": "string", "default": "Say: ", "description": "Before the text."},
            },
        }
        config: Any

        def build(self, tokenizer: Any, model: Any) -> Any:
            given = SimpleNamespace(
                max_length=self.config["max_length"], prompt=self.config["prompt"]
            )
            return cls(given, tokenizer)

    return SchemaText


def texts() -> dict[str, Any]:
    """Fresh ones: a part that changes them must not spoil the next test."""
    return {
        "records": [{"text": "Some Words"}],
        "broken": [{}, {"text": 3}],
        "other_values": {"prompt": "Write: "},
        "segments": segments,
    }


SOUND = {
    "tokenize_fn": Sound(tokenize_fn(Words), {}, texts()),
    "tokenizer": Sound(tokenizer(Bytes)),
}


def _words(fault: str, check: str, cls: type[Words], *also: str) -> Broken:
    return Broken(fault, check, tokenize_fn(cls), {}, texts(), frozenset(also))


def _bytes(fault: str, check: str, cls: type[Bytes], *also: str) -> Broken:
    return Broken(fault, check, tokenizer(cls), also=frozenset(also))


BROKEN = [
    _words("gives ids as int64", "gives_whole_examples", Wide),
    _words("lets an example be longer than max_length", "keeps_to_max_length", Long),
    _words("writes into the record", "same_record_same_example", Marking),
    _words("gives other ids every second time", "same_record_same_example", Moody),
    _words("raises KeyError for a broken record", "broken_records_are_data_errors", Trusting),
    _words("holds what does not pickle", "pickles", ClosedWords),
    _words("never forgets what it counted", "counts_are_taken_once", Counting),
    _words(
        "leaves a field out of its fingerprint",
        "fingerprint_changes_with_every_field",
        WithoutFields,
    ),
    _words(
        "leaves the tokenizer out of its fingerprint",
        "fingerprint_changes_with_the_tokenizer",
        WithoutTokenizer,
    ),
    _words("lower-cases the text", "ids_spell_the_text", LowerCase),
    _words("trains a part of the prompt", "loss_lies_where_it_should", TrainsThePrompt),
    _bytes("strips what it decodes", "texts_come_back", Stripping),
    _bytes("has no end token", "special_ids_are_in_the_vocabulary", Endless),
    _bytes("takes typed special tokens for real ones", "typed_special_tokens_are_text", Typed),
    _bytes("renders no generation prompt", "the_generation_prompt_comes_last", Promptless),
    _bytes("saves nothing", "saved_files_open", Unsaved),
    _bytes("has a fingerprint of its own each time", "fingerprint_is_stable", RestlessBytes),
    _bytes("holds what does not pickle", "pickles", ClosedBytes),
]
