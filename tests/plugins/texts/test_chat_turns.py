"""Each assistant turn is found where the model would generate it, or its kind says why not."""

from __future__ import annotations

from typing import Any

import pytest

from pegboard.errors import ConfigError, DataError
from pegboard_plugins.texts.chat_turns import find_turns
from pegboard_plugins.texts.rendering import ChatRenderer
from pegboard_plugins.tokenizers.byte_tokenizer import make_byte_tokenizer

USER = {"role": "user", "content": "a"}


def answer(text: Any, **more: Any) -> Any:
    return {"role": "assistant", "content": text, **more}


def turns(chat: Any, template: Any = None, stops: Any = ("<|im_end|>",), **kwargs: Any) -> Any:
    tokenizer = make_byte_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    chosen = [j for j, message in enumerate(chat) if message["role"] == "assistant"]
    text, found = find_turns(ChatRenderer(tokenizer, kwargs), chat, None, chosen, stops)
    assert text == tokenizer.render(chat, template_kwargs=kwargs)
    return [(turn.kind, text[turn.start : turn.end]) for turn in found]


def test_an_answer_without_reasoning_masks_the_empty_think_block() -> None:
    assert turns([USER, answer("b")]) == [("exact", "b<|im_end|>")]


def test_an_explicit_thinking_switch_trains_the_empty_think_block() -> None:
    expected = [("exact", "<think>\n\n</think>\n\nb<|im_end|>")]
    assert turns([USER, answer("b")], enable_thinking=True) == expected


def test_reasoning_is_trained_with_its_tags() -> None:
    expected = [("exact", "<think>\nr\n</think>\n\nb<|im_end|>")]
    assert turns([USER, answer("b", reasoning_content="r")]) == expected


def test_history_is_shown_without_reasoning_and_rewritten_with_it() -> None:
    chat = [USER, answer("b"), USER, answer("c", reasoning_content="r"), USER, answer("d")]
    assert turns(chat) == [("shown", "b<|im_end|>"), ("rewritten", ""), ("exact", "d<|im_end|>")]


def test_equal_turns_are_told_apart_by_place() -> None:
    chat = [USER, answer("b", reasoning_content="r"), USER, answer("b", reasoning_content="r")]
    found = turns(chat)
    assert [kind for kind, _ in found] == ["rewritten", "exact"]
    tokenizer = make_byte_tokenizer()
    chat = [USER, answer("b"), USER, answer("b"), USER, answer("b")]
    text, located = find_turns(ChatRenderer(tokenizer), chat, None, [1, 3, 5], ["<|im_end|>"])
    assert len({turn.start for turn in located}) == 3
    assert [text[t.start : t.end] for t in located] == ["b<|im_end|>"] * 3


def test_a_turn_quoted_by_the_user_is_not_taken_for_it() -> None:
    quote = {"role": "user", "content": "<think>\nr\n</think>\n\nb<|im_end|>"}
    chat = [quote, answer("b", reasoning_content="r"), USER, answer("c")]
    assert [kind for kind, _ in turns(chat)] == ["rewritten", "exact"]


HEADER = "{% for m in messages %}<{{ m.role }}>{{ m.content }}"


def test_the_next_header_may_be_the_stop_token() -> None:
    template = HEADER + "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    found = turns([USER, answer("b"), USER, answer("c")], template, stops=("<user>",))
    assert found == [("exact", "b<user>"), ("noend", "")]


def test_a_prompt_that_the_template_never_renders_is_noprefix() -> None:
    template = HEADER + "!{% endfor %}{% if add_generation_prompt %}<assistant><think>{% endif %}"
    assert turns([USER, answer("b")], template, stops=("!",)) == [("noprefix", "")]


def test_a_variant_that_rewrites_the_system_prompt_is_rendered_whole() -> None:
    template = (
        "{% if enable_thinking is defined and not enable_thinking %}quiet{% endif %}"
        + HEADER
        + "!{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert turns([USER, answer("b")], template, stops=("!",)) == [("exact", "b!")]


def test_what_a_template_raises_is_a_data_error_in_one_line() -> None:
    template = "{{ raise_exception('roles must\nalternate') }}"
    with pytest.raises(DataError) as error:
        turns([USER, answer("b")], template)
    assert str(error.value) == "messages: the chat template refuses them: roles must alternate"


def test_a_beginning_that_the_template_refuses_costs_that_turn_alone() -> None:
    template = (
        "{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
        "{{ raise_exception('no user') }}{% endif %}"
        + HEADER
        + "!{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = [{"role": "system", "content": "s"}, answer("hi"), USER, answer("b")]
    assert turns(chat, template, stops=("!",)) == [("noprefix", ""), ("exact", "b!")]


def test_an_answer_to_nobody_has_no_prompt() -> None:
    assert turns([answer("hi"), USER, answer("b")]) == [("noprefix", ""), ("exact", "b<|im_end|>")]


def test_no_template_and_a_broken_template_are_config_errors() -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        ChatRenderer(tokenizer)
    tokenizer.chat_template = "{% for %}"
    with pytest.raises(ConfigError, match="line 1"):
        ChatRenderer(tokenizer)
