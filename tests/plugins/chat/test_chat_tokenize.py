"""Ids equal the tokenizer's own chat encoding; loss lies exactly on what the model generates."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from pegboard.component import ComponentConfig, ModelComponent
from pegboard.errors import ConfigError, DataError, DroppedSample
from pegboard_plugins.chat.component import ChatTokenizeFn
from pegboard_plugins.tokenizers.component import ByteTokenizer, HFTokenizer

ASSETS = Path(__file__).resolve().parents[4] / "shared" / "assets"
MODEL = ModelComponent(ComponentConfig())  # a chat tokenize fn asks nothing of the model
USER = {"role": "user", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x":  1}'}}


@pytest.fixture(scope="module")
def byte() -> Any:
    return ByteTokenizer(ByteTokenizer.Config()).build()


@pytest.fixture(scope="module")
def qwen3() -> Any:
    if not (ASSETS / "qwen3_tokenizer").is_dir():
        pytest.skip("the Qwen3 tokenizer is not on this machine")
    return HFTokenizer(HFTokenizer.Config(path=str(ASSETS / "qwen3_tokenizer"))).build()


def built(tokenizer: Any, **fields: Any) -> Any:
    return ChatTokenizeFn(ChatTokenizeFn.Config(**fields)).build(tokenizer, MODEL)


def answer(text: Any, **more: Any) -> Any:
    return {"role": "assistant", "content": text, **more}


def trained(tokenizer: Any, chat: Any, **fields: Any) -> Any:
    (example,) = built(tokenizer, **fields)(chat)
    return tokenizer.decode(example.input_ids[example.loss_mask])


def records(name: Any) -> Any:
    file = ASSETS / "text" / f"{name}_messages.jsonl"
    if not file.is_file():
        pytest.skip(f"{file.name} is not on this machine")
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in itertools.islice(lines, 50)]


def test_an_example_is_int32_ids_and_a_bool_mask(byte: Any) -> None:
    (example,) = built(byte)({"messages": [USER, answer("b")]})
    assert example.input_ids.dtype == np.int32 and example.loss_mask.dtype == bool
    assert example.input_ids.shape == example.loss_mask.shape
    assert example.input_ids.tolist() == byte.encode(byte.render([USER, answer("b")]))


def test_loss_excludes_empty_think_block_and_trailing_newline(byte: Any) -> None:
    assert trained(byte, [USER, answer("b")]) == "b<|im_end|>"


def test_tool_calls_are_trained_as_rendered_and_tool_results_are_not(byte: Any) -> None:
    chat = [
        USER,
        {**answer(None), "tool_calls": [CALL]},
        {"role": "tool", "content": "9"},
        answer("c"),
    ]
    record = {"messages": chat, "tools": [CALL]}
    # A step before the last has no think block of its own, so its empty one was not in its prompt.
    assert trained(byte, record, history="strip") == "c<|im_end|>"
    shown = trained(byte, record, history="strip", shown_turns="train")
    call = '<tool_call>\n{"name": "f", "arguments": {"x":  1}}\n</tool_call>'
    assert shown == f"{call}<|im_end|>c<|im_end|>"


def test_strip_trains_what_the_render_shows_and_counts_the_rest(byte: Any) -> None:
    chat = [USER, answer("b"), USER, answer("c", reasoning_content="r"), USER, answer("d")]
    fn = built(byte, history="strip")
    fn(chat)
    turns = {"turns shown": 1, "turns rewritten": 1, "turns exact": 1}
    assert turns.items() <= fn.take_counts().items()
    assert fn.take_counts() == {}
    assert trained(byte, chat, history="strip") == "d<|im_end|>"
    shown = trained(byte, chat, history="strip", shown_turns="train")
    assert shown == "b<|im_end|>d<|im_end|>"
    with pytest.raises(DataError, match=r"^messages\[3\]: the chat template changes this turn"):
        built(byte, history="strip", rewritten_turns="error")(chat)


@pytest.mark.parametrize("history", ["chain", "strip"])
def test_turns_after_a_prompt_that_must_be_asked_for_are_counted(byte: Any, history: str) -> None:
    name = "turns prompted with enable_thinking=false"
    fn = built(byte, history=history)
    fn([USER, answer("b", reasoning_content="r")])
    assert name not in fn.take_counts()
    fn([USER, answer("b"), USER, answer("c", reasoning_content="r"), USER, answer("d")])
    assert fn.take_counts()[name] == 2
    fn([USER, answer("b", loss=False), USER, answer("d")])
    assert fn.take_counts()[name] == 1
    # Trained as part of the answer: the default prompt is the one of inference.
    fn = built(byte, history=history, template_kwargs={"enable_thinking": True})
    fn([USER, answer("b")])
    assert name not in fn.take_counts()


def test_loss_false_and_train_on_last_choose_turns(byte: Any) -> None:
    chat = [USER, answer("b"), USER, answer("c")]
    both = {"history": "strip", "shown_turns": "train"}
    assert trained(byte, chat, **both) == "b<|im_end|>c<|im_end|>"
    assert trained(byte, chat, train_on="last", **both) == "c<|im_end|>"
    assert (
        trained(byte, [USER, answer("b"), USER, answer("c", loss=False)], **both) == "b<|im_end|>"
    )
    with pytest.raises(DroppedSample) as error:
        built(byte, train_on="last")([USER, answer("b"), USER, answer("c", loss=False)])
    assert error.value.reason == "no supervised token"


def test_truncation_keeps_a_half_turn_and_drops_one_without_loss(byte: Any) -> None:
    whole = built(byte)([USER, answer("bcdef")])[0]
    start = int(np.argmax(whole.loss_mask))
    fn = built(byte, max_length=start + 2)
    (cut,) = fn([USER, answer("bcdef")])
    assert cut.input_ids.tolist() == whole.input_ids[: start + 2].tolist()
    assert byte.decode(cut.input_ids[cut.loss_mask]) == "bc"
    assert fn.take_counts()["truncated"] == 1
    with pytest.raises(DroppedSample, match="no supervised token"):
        built(byte, max_length=start)([USER, answer("bcdef")])


def test_pictures_that_a_record_lists_are_counted_as_not_read(byte: Any) -> None:
    fn = built(byte)
    lists: Any = ({}, {"image": ""}, {"images": []}, {"images": ["a.png"]}, {"image": "b.png"})
    for listed in lists:
        fn({"messages": [USER, answer("b")], **listed})
    assert fn.take_counts()["records with pictures, which are not read"] == 2


def test_fields_that_the_template_drops_are_counted(byte: Any) -> None:
    tokenizer = pickle.loads(pickle.dumps(byte))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    fn = built(tokenizer)
    fn([USER, answer("b", reasoning_content="r", tool_calls=[CALL])])
    counts = fn.take_counts()
    assert counts["reasoning not rendered"] == 1 and counts["tool calls not rendered"] == 1


def test_fingerprint_follows_config_and_template_but_not_the_process(byte: Any) -> None:
    fn = built(byte)
    assert fn.fingerprint() == built(byte).fingerprint()
    assert fn.fingerprint() != built(byte, max_length=5).fingerprint()
    other = pickle.loads(pickle.dumps(byte))
    other.chat_template += " "
    assert fn.fingerprint() != built(other).fingerprint()


def test_a_pickled_copy_gives_the_same_example(byte: Any) -> None:
    fn = built(byte)
    copy = pickle.loads(pickle.dumps(fn))
    chat = [USER, answer("b")]
    assert copy(chat)[0].input_ids.tolist() == fn(chat)[0].input_ids.tolist()


def test_unusable_settings_are_refused(byte: Any) -> None:
    with pytest.raises(ValidationError):
        ChatTokenizeFn.Config(max_length=0)
    with pytest.raises(ValidationError):
        ChatTokenizeFn.Config.model_validate({"train_on": "some"})
    tokenizer = pickle.loads(pickle.dumps(byte))
    tokenizer.eos_token_ids = ()
    with pytest.raises(ConfigError, match="no token that ends a turn"):
        built(tokenizer)


@pytest.mark.parametrize("name", ["gsm8k_train", "glaive_toolcall_en"])
@pytest.mark.parametrize("which", ["byte", "qwen3"])
def test_real_records_have_the_tokenizers_ids_and_the_answers_as_loss(
    name: Any, which: Any, request: Any
) -> None:
    tokenizer = request.getfixturevalue(which)
    fn = built(tokenizer, max_length=1_000_000, history="strip", shown_turns="train")
    for record in records(name):
        (example,) = fn(record)
        messages = record["messages"]
        reference = tokenizer._tokenizer.apply_chat_template(
            messages, tools=record.get("tools"), return_dict=False
        )
        assert example.input_ids.tolist() == reference
        generated = tokenizer.decode(example.input_ids[example.loss_mask])
        expected = "".join(spelt(m) for m in messages if m["role"] == "assistant")
        assert generated == expected


def spelt(message: Any) -> Any:
    """What Qwen3 generates for a message without reasoning."""
    calls = [
        f'<tool_call>\n{{"name": "{call["function"]["name"]}", '
        f'"arguments": {call["function"]["arguments"]}}}\n</tool_call>'
        for call in message.get("tool_calls") or []
    ]
    content = message["content"] or ""
    return "\n".join(([content] if content else []) + calls) + "<|im_end|>"


def test_stock_qwen3_trains_the_last_turn_of_a_tool_chat_exactly(qwen3: Any) -> None:
    fn = built(qwen3, max_length=1_000_000, history="strip")
    for record in records("glaive_toolcall_en"):
        fn(record)
    counts = fn.take_counts()
    assert counts["turns exact"] == 50 and counts["turns shown"] == 117


def test_qwen3_reasoning_is_trained_last_and_rewritten_in_history(qwen3: Any) -> None:
    chat = [
        USER,
        answer("b", reasoning_content="r"),
        USER,
        answer("c", reasoning_content="s"),
    ]
    fn = built(qwen3, history="strip")
    (example,) = fn(chat)
    text = qwen3.decode(example.input_ids[example.loss_mask])
    assert text == "<think>\ns\n</think>\n\nc<|im_end|>"
    counts = fn.take_counts()
    assert counts["turns rewritten"] == 1 and counts["turns exact"] == 1
