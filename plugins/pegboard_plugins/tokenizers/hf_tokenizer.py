"""A transformers tokenizer behind Pegboard's Tokenizer contract.

Encoding goes to the Rust tokenizer where there is one, rendering to the template as transformers
compiles it, so that text and ids equal its `apply_chat_template`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pegboard.errors import ConfigError
from pegboard_plugins.texts.pieces import PieceEncoder
from pegboard_plugins.texts.typed_tokens import is_blank
from pegboard_plugins.tokenizers.compiled_template import CompiledTemplate

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

__all__ = [
    "FastTransformersTokenizer",
    "TransformersTokenizer",
    "load_hf_tokenizer",
    "wrap_tokenizer",
]

_PROBE_ANSWER = "pegboardprobe"


def load_hf_tokenizer(
    path: str, *, chat_template_file: str | None = None, trust_remote_code: bool = False
) -> TransformersTokenizer:
    """Open a folder or a hub id with AutoTokenizer.

    Raises:
        ConfigError: it can't be opened.
    """
    from transformers import AutoTokenizer

    local = Path(path).expanduser()
    source = str(local) if local.is_dir() else path
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        line = " ".join(str(error).split())
        if not trust_remote_code and "trust_remote_code" in line:
            raise ConfigError(
                f"tokenizer.path: '{path}' holds Python code that its tokenizer needs; read it, and if "
                "you trust it start the run with --trust-remote-code"
            ) from error
        raise ConfigError(f"tokenizer.path: '{path}' can't be opened: {line}") from error
    if chat_template_file is not None:
        try:
            file = Path(chat_template_file).expanduser()
            tokenizer.chat_template = file.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"tokenizer.chat_template: '{chat_template_file}': {error.strerror}"
            ) from error
    return wrap_tokenizer(tokenizer, generation_eos=_generation_eos(source))


def wrap_tokenizer(tokenizer: Any, *, generation_eos: Sequence[int] = ()) -> TransformersTokenizer:
    """Wrap a PreTrainedTokenizerFast, or another PreTrainedTokenizerBase (encoded without offsets).

    Args:
        generation_eos: end-of-turn ids of the model's generation_config.json.
    """
    fast = getattr(tokenizer, "is_fast", False)
    cls = FastTransformersTokenizer if fast else TransformersTokenizer
    return cls(tokenizer, generation_eos)


class TransformersTokenizer:
    """A tokenizer of transformers; see `pegboard.contracts.Tokenizer`."""

    def __init__(self, tokenizer: Any, generation_eos: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._compiled: CompiledTemplate | None = None
        vocabulary = tokenizer.get_vocab()
        self.vocab_size: int = 1 + max(vocabulary.values())
        self._added: dict[str, int] = dict(tokenizer.get_added_vocab())
        ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        # One that the tokenizer can't spell (of a model with a larger vocabulary) is in no chat.
        known = frozenset(vocabulary.values())
        ids += [int(i) for i in generation_eos if int(i) in known]
        ids += self._template_end()
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(ids))
        self.added_tokens: dict[str, bool] = {
            token.content: bool(token.special)
            for token in tokenizer.added_tokens_decoder.values()
            if token.content
        }
        """Spelling -> whether it is special, of each token that is no ordinary text."""
        pad = tokenizer.pad_token_id
        self.pad_token_id: int = int(pad) if pad is not None else (ids[0] if ids else 0)

    @property
    def chat_template(self) -> str | None:
        template = self._tokenizer.chat_template
        if isinstance(template, Mapping):
            template = template.get("default")
        return template if isinstance(template, str) else None

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        self._tokenizer.chat_template = template

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        if special_tokens:
            return list(self._tokenizer.encode(text, add_special_tokens=False))
        return list(
            self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        )

    def decode(self, ids: Iterable[int]) -> str:
        return str(
            self._tokenizer.decode(
                [int(i) for i in ids],
                skip_special_tokens=False,
                clean_up_tokenization_spaces=False,
            )
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        source = self._tokenizer.chat_template
        if not isinstance(source, str):  # several, of which transformers picks one
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages),
                    tools=None if tools is None else list(tools),
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                    **(template_kwargs or {}),
                )
            )
        if self._compiled is None or self._compiled.source != source:
            self._compiled = CompiledTemplate(source, self._tokenizer.special_tokens_map)
        return self._compiled.render(messages, tools, add_generation_prompt, template_kwargs or {})

    def save(self, folder: str) -> None:
        self._tokenizer.save_pretrained(folder)
        _let_older_read(Path(folder) / "tokenizer_config.json")

    def fingerprint(self) -> str:
        state = {
            "class": type(self._tokenizer).__name__,
            "content": self._content(),
            "template": self._tokenizer.chat_template,
            "special": {k: str(v) for k, v in self._tokenizer.special_tokens_map.items()},
            "eos": self.eos_token_ids,
        }
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}

    def _content(self) -> Any:
        return [sorted(self._tokenizer.get_vocab().items()), repr(self._tokenizer.init_kwargs)]

    def _template_end(self) -> list[int]:
        """Id of the added token that the template writes right after an answer.

        It is the end of a turn even where `eos_token` names another (Qwen3-Base, Phi-3).
        """
        if self.chat_template is None:
            return []
        from jinja2 import TemplateError

        try:
            text = self.render(
                [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": _PROBE_ANSWER},
                ]
            )
        except (TemplateError, TypeError, ValueError, KeyError):
            return []
        before, found, tail = text.rpartition(_PROBE_ANSWER)
        del before
        if not found:
            return []
        # Line ends are tokens of their own in some vocabularies (Gemma's); they end no turn.
        tokens = [token for token in self._added if not is_blank(token)]
        ends = [token for token in tokens if tail.startswith(token)]
        return [self._added[max(ends, key=len)]] if ends else []


class FastTransformersTokenizer(TransformersTokenizer):
    """One with a Rust tokenizer, which knows where its tokens lie."""

    def __init__(self, tokenizer: Any, generation_eos: Sequence[int] = ()) -> None:
        super().__init__(tokenizer, generation_eos)
        self._rust: RustTokenizer = tokenizer.backend_tokenizer
        self._rust.no_truncation()
        self._rust.no_padding()
        self._pieces: PieceEncoder | None | Literal["not looked for"] = "not looked for"
        self._byte_of: dict[str, int] | None = None
        controls = [token for token in self._added if not is_blank(token)]
        self._control_ids = frozenset(self._added[token] for token in controls)

    @property
    def pieces(self) -> PieceEncoder | None:
        """Encodes between added tokens; None where cutting there could change ids."""
        if self._pieces == "not looked for":
            self._pieces = PieceEncoder.of(self._rust)
        return self._pieces

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        ids = list(self._rust.encode(text, add_special_tokens=False).ids)
        if special_tokens or self._control_ids.isdisjoint(ids):
            return ids
        return list(self._without_added_tokens().encode(text, add_special_tokens=False).ids)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the (start, end) of its characters in `text`, in order."""
        encoding = self._rust.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def token_bytes(self, token_id: int) -> bytes | None:
        """Bytes that a token of a byte-level vocabulary (or a byte token, `<0xE4>`) stands for.

        None for an added token, and for one that stands for characters.
        """
        if self._byte_of is None:
            self._byte_of = self._learn_bytes()
        token = self._rust.id_to_token(token_id)
        if token is None or token in self._added or not self._byte_of:
            return None
        if token in self._byte_of:
            return bytes((self._byte_of[token],))
        try:
            return bytes([self._byte_of[character] for character in token])
        except KeyError:
            return None

    def _learn_bytes(self) -> dict[str, int]:
        """Spelling -> byte; empty for a vocabulary without bytes."""
        from pegboard_plugins.tokenizers.byte_tokenizer import byte_characters

        decoder = self._rust.decoder
        state = decoder.__getstate__().decode() if decoder is not None else ""
        if '"ByteLevel"' in state:
            return {character: byte for byte, character in enumerate(byte_characters())}
        if '"ByteFallback"' in state:
            return {f"<0x{byte:02X}>": byte for byte in range(256)}
        return {}

    def _content(self) -> Any:
        return self._rust.to_str()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pieces": "not looked for"}

    def _without_added_tokens(self) -> RustTokenizer:
        from tokenizers import Tokenizer as RustTokenizer

        plain = RustTokenizer(self._rust.model)  # the same model: shared, not copied
        if self._rust.normalizer is not None:
            plain.normalizer = self._rust.normalizer
        if self._rust.pre_tokenizer is not None:
            plain.pre_tokenizer = self._rust.pre_tokenizer
        return plain


def _let_older_read(file: Path) -> None:
    """Say in words of transformers 4 too what only 5 writes in words of its own.

    Programs that serve an export (vLLM) may have 4, which fails on both; 5 reads the older words.
    """
    if not file.is_file():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # 4 expects an object under this key, of names and spellings.
    if isinstance(config.get("extra_special_tokens"), list):
        config.setdefault("additional_special_tokens", config.pop("extra_special_tokens"))
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")


def _generation_eos(source: str) -> list[int]:
    """End-of-turn ids in generation_config.json, [] if there is none."""
    from transformers.utils.hub import cached_file

    file = cached_file(
        source,
        "generation_config.json",
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return []
    try:
        ids = json.loads(Path(file).read_text(encoding="utf-8")).get("eos_token_id")
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON: {error}") from error
    if ids is None:
        return []
    return [int(i) for i in ids] if isinstance(ids, list) else [int(ids)]
