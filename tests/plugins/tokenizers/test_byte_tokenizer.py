"""The byte tokenizer is lossless, saves as an ordinary folder, and keeps Qwen3's chat rules."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from pegboard_plugins.tokenizers.byte_tokenizer import CHAT_TOKENS
from pegboard_plugins.tokenizers.component import ByteTokenizer

CHAT: Any = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "reasoning_content": "Greet.", "content": "Hello \u00e9\u4e2d\U0001f600"},
    {"role": "user", "content": "Sum?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
    },
    {"role": "tool", "content": "3"},
    {"role": "assistant", "reasoning_content": "Easy.", "content": "3"},
]
TOOLS: Any = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return ByteTokenizer(ByteTokenizer.Config()).build()


def test_id_of_a_byte_is_the_byte(tokenizer: Any) -> None:
    text = "".join(map(chr, range(0x80))) + "\u00e9\u4e2d\U0001f600"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_each_chat_token_is_one_id_after_the_bytes(tokenizer: Any) -> None:
    assert tokenizer.encode("".join(CHAT_TOKENS)) == list(range(256, 256 + len(CHAT_TOKENS)))
    assert tokenizer.vocab_size == 256 + len(CHAT_TOKENS)
    assert tokenizer.decode(tokenizer.eos_token_ids) == "<|im_end|>"
    assert tokenizer.decode([tokenizer.pad_token_id]) == "<|endoftext|>"


def test_without_special_tokens_their_spelling_is_plain_text(tokenizer: Any) -> None:
    assert tokenizer.encode("a<|im_end|><think>", special_tokens=False) == list(
        b"a<|im_end|><think>"
    )


def test_saved_folder_opens_with_auto_tokenizer_and_gives_the_same_ids(
    tokenizer: Any, tmp_path: Any
) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(str(tmp_path))
    opened = AutoTokenizer.from_pretrained(tmp_path)
    text = tokenizer.render(CHAT, tools=TOOLS)
    assert opened.chat_template == tokenizer.chat_template
    assert opened.apply_chat_template(CHAT, tools=TOOLS, tokenize=False) == text
    assert opened.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert opened.eos_token_id == tokenizer.eos_token_ids[0]
    assert opened.decode(tokenizer.encode(text)) == text


def test_template_shows_reasoning_only_after_the_last_question(tokenizer: Any) -> None:
    text = tokenizer.render(CHAT)
    assert "Greet." not in text
    assert text.startswith(
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )
    assert text.endswith(
        '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
        "<|im_end|>\n<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\nEasy.\n</think>\n\n3<|im_end|>\n"
    )


def test_template_reads_reasoning_written_inside_the_content(tokenizer: Any) -> None:
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nr\n</think>\n\nb"},
    ]
    assert tokenizer.render(chat).endswith("assistant\n<think>\nr\n</think>\n\nb<|im_end|>\n")


def test_prompt_without_thinking_holds_an_empty_think_block(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "a"}]
    prompt = tokenizer.render(chat, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    kwargs = {"enable_thinking": False}
    silent = tokenizer.render(chat, add_generation_prompt=True, template_kwargs=kwargs)
    assert silent == prompt + "<think>\n\n</think>\n\n"


def test_chat_text_equals_the_published_qwen3_template(tokenizer: Any) -> None:
    folder = Path(__file__).resolve().parents[4] / "shared" / "assets" / "qwen3_tokenizer"
    if not folder.is_dir():
        pytest.skip("the Qwen3 tokenizer is not on this machine")
    from transformers import AutoTokenizer

    qwen3 = AutoTokenizer.from_pretrained(folder)
    for length in range(2, len(CHAT) + 1):
        chat = CHAT[:length]
        assert tokenizer.render(chat) == qwen3.apply_chat_template(chat, tokenize=False)


def test_fingerprint_is_stable_and_survives_pickling(tokenizer: Any) -> None:
    again = ByteTokenizer(ByteTokenizer.Config()).build()
    assert tokenizer.fingerprint() == again.fingerprint()
    assert pickle.loads(pickle.dumps(tokenizer)).fingerprint() == tokenizer.fingerprint()
