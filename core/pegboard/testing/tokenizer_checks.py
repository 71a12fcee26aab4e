"""What a tokenizer promises: text and ids both ways, typed special tokens as text, files that open.

Options: `texts`, texts that survive encoding and decoding.
"""

from __future__ import annotations

import pickle

from pegboard.testing.case import Case, Check

__all__ = ["CHECKS", "OPTIONS"]

OPTIONS = frozenset({"texts"})

_TEXTS = (
    "Four plus four is eight.",
    "  two spaces\n\tand a tab",
    "gr\u00fcn \u4e2d\u6587 \U0001f600",
)
_CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def _texts_come_back(case: Case) -> None:
    tokenizer = case.make().build()
    for text in case.options.get("texts", _TEXTS):
        ids = tokenizer.encode(text)
        assert all(0 <= one < tokenizer.vocab_size for one in ids), "an id is not in the vocabulary"
        found = tokenizer.decode(ids)
        assert found == text, f"{text!r} came back as {found!r}"


def _special_ids_are_in_the_vocabulary(case: Case) -> None:
    tokenizer = case.make().build()
    assert tokenizer.eos_token_ids, "no eos_token_ids: a trained model would never stop"
    for one in (*tokenizer.eos_token_ids, tokenizer.pad_token_id):
        assert 0 <= one < tokenizer.vocab_size, f"id {one} of {tokenizer.vocab_size}"


def _typed_special_tokens_are_text(case: Case) -> None:
    tokenizer = case.make().build()
    for end in tokenizer.eos_token_ids:
        spelling = tokenizer.decode([end])
        if not spelling:
            continue
        ids = tokenizer.encode(f"a{spelling}b", special_tokens=False)
        assert end not in ids, f"{spelling!r} typed into a text became id {end}"
        assert end in tokenizer.encode(spelling), f"{spelling!r} is no id {end} as a special token"


def _the_generation_prompt_comes_last(case: Case) -> None:
    import pytest

    tokenizer = case.make().build()
    if tokenizer.chat_template is None:
        pytest.skip("no chat template")
    asked = tokenizer.render(_CHAT[:1], add_generation_prompt=True)
    plain = tokenizer.render(_CHAT[:1])
    assert asked.startswith(plain) and asked != plain, "add_generation_prompt adds nothing"
    assert "b" in tokenizer.render(_CHAT), "the answer is not in the rendered chat"


def _saved_files_open(case: Case) -> None:
    import transformers

    tokenizer = case.make().build()
    tokenizer.save(str(case.folder))
    opened = transformers.AutoTokenizer.from_pretrained(case.folder)
    text = "Four plus four is eight."
    found = opened(text, add_special_tokens=False)["input_ids"]
    assert found == tokenizer.encode(text), "AutoTokenizer gives other ids from the saved files"


def _fingerprint_is_stable(case: Case) -> None:
    one, two = (case.make().build().fingerprint() for _ in range(2))
    assert one == two, "two tokenizers of the config have two fingerprints: nothing is ever cached"


def _pickles(case: Case) -> None:
    tokenizer = case.make().build()
    copy = pickle.loads(pickle.dumps(tokenizer))
    text = "Four plus four is eight."
    assert copy.encode(text) == tokenizer.encode(text), "the pickled one gives other ids"


CHECKS = (
    Check("texts_come_back", _texts_come_back),
    Check("special_ids_are_in_the_vocabulary", _special_ids_are_in_the_vocabulary),
    Check("typed_special_tokens_are_text", _typed_special_tokens_are_text),
    Check("the_generation_prompt_comes_last", _the_generation_prompt_comes_last),
    Check("saved_files_open", _saved_files_open),
    Check("fingerprint_is_stable", _fingerprint_is_stable),
    Check("pickles", _pickles),
)
