"""HFTokenizer opens a folder, knows each token that ends a turn, and names a wrong path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pegboard.errors import ConfigError
from pegboard_plugins.texts.encoding import encode_with_mask
from pegboard_plugins.tokenizers.byte_tokenizer import CHAT_TEMPLATE
from pegboard_plugins.tokenizers.component import ByteTokenizer, HFTokenizer
from pegboard_plugins.tokenizers.hf_tokenizer import wrap_tokenizer

NO_RUN: Any = None  # its check looks at the disk alone
AT = ("tokenizer",)


@pytest.fixture
def folder(tmp_path: Any) -> Any:
    ByteTokenizer(ByteTokenizer.Config()).build().save(str(tmp_path))
    return tmp_path


def opened(**fields: Any) -> Any:
    return HFTokenizer(HFTokenizer.Config(**fields)).build()


def problems(**fields: Any) -> Any:
    return list(HFTokenizer(HFTokenizer.Config(**fields)).check(NO_RUN, AT))


def test_a_saved_tokenizer_reopens_with_the_same_ids(folder: Any, tmp_path: Any) -> None:
    byte = ByteTokenizer(ByteTokenizer.Config()).build()
    tokenizer = opened(path=str(folder))
    text = byte.render(
        [{"role": "user", "content": "h\u00e9"}, {"role": "assistant", "content": "b"}]
    )
    assert tokenizer.encode(text) == byte.encode(text)
    tokenizer.save(str(tmp_path / "again"))
    assert opened(path=str(tmp_path / "again")).encode(text) == byte.encode(text)


def test_a_saved_tokenizer_speaks_words_that_transformers_4_knows(
    folder: Any, tmp_path: Any
) -> None:
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(folder)
    plain.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|new|>"]})
    wrap_tokenizer(plain).save(str(tmp_path / "again"))
    said = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text(encoding="utf-8"))
    # 4 has no class TokenizersBackend, and takes an object for extra_special_tokens.
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in said
    assert said["additional_special_tokens"] == ["<|im_start|>", "<|new|>"]
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert set(again.all_special_tokens) == set(plain.all_special_tokens)
    assert again.encode("a<|new|>") == plain.encode("a<|new|>") == [97, len(plain) - 1]


def test_end_ids_join_tokenizer_generation_config_and_template(folder: Any) -> None:
    settings = folder / "tokenizer_config.json"
    config = json.loads(settings.read_text())
    settings.write_text(json.dumps({**config, "eos_token": "<|endoftext|>"}))
    assert opened(path=str(folder)).eos_token_ids == (256, 258)
    (folder / "generation_config.json").write_text('{"eos_token_id": [256, 262]}')
    assert opened(path=str(folder)).eos_token_ids == (256, 262, 258)


def test_a_template_file_replaces_the_tokenizers_own(folder: Any, tmp_path: Any) -> None:
    own = opened(path=str(folder))
    file = tmp_path / "t.jinja"
    file.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    tokenizer = opened(path=str(folder), chat_template=str(file))
    assert tokenizer.render([{"role": "user", "content": "a"}]) == "[a]"
    assert tokenizer.fingerprint() != own.fingerprint()


def test_check_names_a_missing_folder_an_empty_one_and_a_missing_template(
    folder: Any, tmp_path: Any
) -> None:
    (tmp_path / "empty").mkdir()
    assert problems(path=str(folder)) == []
    assert problems(path="owner/name") == []
    for missing in (str(tmp_path / "no"), "./no", "~/surely/not/there", "no/"):
        (problem,) = problems(path=missing)
        assert problem.path == ("tokenizer", "path") and missing in problem.message
    (problem,) = problems(path=str(tmp_path / "empty"))
    assert "holds no tokenizer" in problem.message
    (problem,) = problems(path=str(folder), chat_template=str(tmp_path / "no.jinja"))
    assert problem.path == ("tokenizer", "chat_template")


def test_a_folder_that_is_no_tokenizer_fails_in_one_line(tmp_path: Any) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError) as error:
        opened(path=str(tmp_path))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_tokenizer_written_in_python_works_without_offsets() -> None:
    from transformers import ByT5Tokenizer

    slow: Any = ByT5Tokenizer()
    slow.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    slow.chat_template = CHAT_TEMPLATE
    tokenizer: Any = wrap_tokenizer(slow)
    end = slow.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token_ids == (slow.eos_token_id, end)
    assert tokenizer.vocab_size == end + 1
    chat = [{"role": "user", "content": "h\u00e9"}, {"role": "assistant", "content": " b"}]
    text = tokenizer.render(chat)
    start = text.rindex(" b")
    ids, mask = encode_with_mask(tokenizer, text, [(start, start + 2 + len("<|im_end|>"))])
    assert ids.tolist() == slow.apply_chat_template(chat, return_dict=False)
    assert tokenizer.decode(ids[mask]) == " b<|im_end|>"
    assert end not in tokenizer.encode("<|im_end|>", special_tokens=False)


def test_published_qwen3_keeps_its_ids() -> None:
    folder = Path(__file__).resolve().parents[4] / "shared" / "assets" / "qwen3_tokenizer"
    if not folder.is_dir():
        pytest.skip("the Qwen3 tokenizer is not on this machine")
    tokenizer = opened(path=str(folder))
    assert tokenizer.encode("hello world") == [14990, 1879]
    assert tokenizer.vocab_size == 151669
    assert 151645 in tokenizer.eos_token_ids
    assert tokenizer.encode("<|im_end|>") == [151645]
    plain = tokenizer.encode("<|im_end|>", special_tokens=False)
    assert 151645 not in plain and tokenizer.decode(plain) == "<|im_end|>"
