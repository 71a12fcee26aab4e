"""Tokenizers built like published families' train what those models generate, and nothing else."""

from __future__ import annotations

import string
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from pegboard.component import ComponentConfig, ModelComponent
from pegboard.errors import DataError
from pegboard_plugins.chat.component import ChatTokenizeFn, TextTokenizeFn
from pegboard_plugins.tokenizers.hf_tokenizer import wrap_tokenizer

MODEL = ModelComponent(ComponentConfig())  # a chat tokenize fn asks nothing of the model
USER = {"role": "user", "content": "a"}

PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def added(spelling: str, **more: Any) -> AddedToken:
    return AddedToken(spelling, **{"normalized": False, "special": True, **more})


def sentencepiece(template: str, eos: str, tokens: list[AddedToken], *, prepend: bool) -> Any:
    """One of characters and bytes, with spaces as U+2581; `prepend` puts one before each text."""
    spellings = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    spellings += ["\u2581", "\n", *string.ascii_letters, *string.punctuation]
    vocabulary = {spelling: i for i, spelling in enumerate(spellings)}
    rust = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    spaces: Any = normalizers.Replace(" ", "\u2581")
    rust.normalizer = (
        normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prepend else spaces
    )
    rust.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    rust.add_tokens(tokens)
    make: Any = PreTrainedTokenizerFast
    return wrap_tokenizer(make(tokenizer_object=rust, eos_token=eos, chat_template=template))


def built(tokenizer: Any, **fields: Any) -> Any:
    return ChatTokenizeFn(ChatTokenizeFn.Config(**fields)).build(tokenizer, MODEL)


def answer(text: str) -> Any:
    return {"role": "assistant", "content": text}


def trained(tokenizer: Any, examples: Any) -> list[str]:
    """The spelling of each token with loss."""
    return [
        tokenizer.decode([token])
        for example in examples
        for token in example.input_ids[example.loss_mask]
    ]


@pytest.fixture(scope="module")
def phi3() -> Any:
    """Its chat tokens take the white space that follows them."""
    names = ("<|user|>", "<|assistant|>", "<|end|>")
    tokens = [added(name, rstrip=True) for name in names]
    return sentencepiece(PHI3, "<|endoftext|>", [*tokens, added("<|endoftext|>")], prepend=True)


@pytest.mark.parametrize("history", ["chain", "split", "strip", "keep"])
def test_an_end_that_takes_the_newline_after_it_is_trained(phi3: Any, history: Any) -> None:
    chat = [USER, answer("b"), USER, answer("c")]
    examples = built(phi3, history=history)(chat)
    assert trained(phi3, examples) == [" ", "b", "<|end|>", " ", "c", "<|end|>"]
    whole = phi3._tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert examples[-1].input_ids.tolist() == whole[: len(examples[-1].input_ids)]


@pytest.mark.parametrize("history", ["chain", "split", "strip", "keep"])
def test_an_empty_answer_is_its_end_alone(phi3: Any, history: Any) -> None:
    examples = built(phi3, history=history)([USER, answer(""), USER, answer("c")])
    assert trained(phi3, examples) == ["<|end|>", " ", "c", "<|end|>"]


def test_an_end_that_takes_the_white_space_before_it_is_trained() -> None:
    template = PHI3.replace("{% else %}{{ eos_token }}", "")
    tokens = [added("<|user|>"), added("<|assistant|>"), added("<|end|>", lstrip=True)]
    tokenizer = sentencepiece(template, "<|end|>", tokens, prepend=False)
    examples = built(tokenizer)([USER, answer(""), USER, answer("c ")])
    assert trained(tokenizer, examples) == ["<|end|>", "c", "<|end|>"]


GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m.role + '\n' + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
)
GEMMA_TOKENS = [
    *(added(name) for name in ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")),
    *(added(name, special=False) for name in ("\n\n", "\n\n\n", "\u2581\u2581", "<table>")),
]


def test_line_ends_that_are_added_tokens_are_the_text_they_are() -> None:
    tokenizer = sentencepiece(GEMMA, "<eos>", GEMMA_TOKENS, prepend=False)
    chat = [{"role": "user", "content": "a\n\nb\n\n\nc"}, answer("d\n\ne")]
    tokenize = built(tokenizer)
    [example] = tokenize(chat)
    whole = tokenizer._tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert example.input_ids.tolist() == whole
    assert trained(tokenizer, [example]) == ["d", "\n\n", "e", "<end_of_turn>"]
    assert "records with typed special tokens" not in tokenize.take_counts()
    text = "a\n\nb"
    [plain] = TextTokenizeFn(TextTokenizeFn.Config()).build(tokenizer, MODEL)({"text": text})
    assert plain.input_ids.tolist() == [*tokenizer.encode(text), tokenizer.eos_token_ids[0]]


def test_tokens_that_are_typed_beside_such_line_ends_are_still_text() -> None:
    tokenizer = sentencepiece(GEMMA, "<eos>", GEMMA_TOKENS, prepend=False)
    tokenize = built(tokenizer)
    [example] = tokenize([{"role": "user", "content": "a\n\n<end_of_turn>"}, answer("<eos>")])
    ends = [tokenizer.encode(end)[0] for end in ("<end_of_turn>", "<eos>")]
    assert [example.input_ids.tolist().count(end) for end in ends] == [2, 0]
    assert tokenizer.decode(example.input_ids[example.loss_mask]) == "<eos><end_of_turn>"
    assert tokenize.take_counts()["records with typed special tokens"] == 1


def test_a_line_end_after_an_answer_is_no_end_of_turn() -> None:
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' + eos_token }}{% endfor %}"
    )
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = sentencepiece(template, "<eos>", GEMMA_TOKENS, prepend=False)
    examples = built(tokenizer)([USER, answer("b\n\nc")])
    assert trained(tokenizer, examples) == ["b", "\n\n", "c", "\n\n", "<eos>"]


@pytest.mark.parametrize("unknown", [100_000, -1])
def test_an_end_that_the_tokenizer_does_not_know_ends_nothing(unknown: Any) -> None:
    plain = sentencepiece(GEMMA, "<end_of_turn>", GEMMA_TOKENS, prepend=False)
    tokenizer = wrap_tokenizer(plain._tokenizer, generation_eos=[unknown])
    assert tokenizer.eos_token_ids == plain.eos_token_ids
    examples = built(tokenizer)([USER, answer("b")])
    assert trained(tokenizer, examples) == ["b", "<end_of_turn>"]


MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "{{ m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% elif not loop.first %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)
MISTRAL_TOKENS = [added(name) for name in ("[INST]", "[/INST]", "</s>")]


@pytest.mark.parametrize("history", ["chain", "split"])
def test_answers_to_a_question_that_loses_the_system_text_are_trained(history: Any) -> None:
    """Mistral v0.3 and Nemo: the system text is in the last question until that is answered."""
    tokenizer = sentencepiece(MISTRAL, "</s>", MISTRAL_TOKENS, prepend=False)
    chat = [{"role": "system", "content": "s"}, USER, answer("b"), USER, answer("c")]
    tokenize = built(tokenizer, history=history)
    texts = []
    for example in tokenize(chat):
        first = int(example.loss_mask.argmax())
        assert example.loss_mask[first:].all()
        ids = example.input_ids
        texts.append((tokenizer.decode(ids[:first]), tokenizer.decode(ids[first:])))
    prompts = [tokenizer.render(chat[:j], add_generation_prompt=True) for j in (2, 4)]
    assert texts == [(prompts[0], " b</s>"), (prompts[1], " c</s>")]
    assert prompts == ["[INST] s\n\na[/INST]", "[INST] a[/INST] b</s>[INST] s\n\na[/INST]"]
    assert tokenize.take_counts()["turns rewritten"] == 2


def test_such_answers_are_kept_in_a_history_as_generated() -> None:
    tokenizer = sentencepiece(MISTRAL, "</s>", MISTRAL_TOKENS, prepend=False)
    chat = [{"role": "system", "content": "s"}, USER, answer("b"), USER, answer("c")]
    [example] = built(tokenizer, history="keep")(chat)
    text = "[INST] s\n\na[/INST] b</s>[INST] s\n\na[/INST] c</s>"
    assert tokenizer.decode(example.input_ids) == text
    assert trained(tokenizer, [example]) == [" ", "b", "</s>", " ", "c", "</s>"]


def test_an_answer_that_changes_the_question_itself_has_no_prompt() -> None:
    template = "{% for m in messages %}{{ m.content + ('?' if loop.last else '!') }}{% endfor %}"
    tokenizer = sentencepiece(template + "{{ eos_token }}", "</s>", MISTRAL_TOKENS, prepend=False)
    tokenize = built(tokenizer, rewritten_turns="error")
    with pytest.raises(DataError, match=r"messages\[1\]: .* after its own generation prompt"):
        tokenize([USER, answer("b")])
