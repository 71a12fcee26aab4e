"""Each form of record is told from its keys and read; an unknown or ambiguous one names its keys."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest

from pegboard.contracts import RecordChat, RecordText, RecordTokens
from pegboard.errors import DataError
from pegboard_plugins.records.formats import (
    AlpacaFormat,
    AutoFormat,
    OpenAIFormat,
    PlainTextFormat,
    PretokenizedFormat,
    PromptCompletionFormat,
    ShareGPTFormat,
    built_in_formats,
)
from pegboard_plugins.texts.messages import read_chat

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
CALL = {"name": "f", "arguments": {"x": 1}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]

ONE_OF_EACH = {
    "OpenAIFormat": {"messages": [USER, ANSWER], "id": 3},
    "ShareGPTFormat": {"conversations": [{"from": "human", "value": "q"}]},
    "AlpacaFormat": {"instruction": "q", "input": "", "output": "a"},
    "PromptCompletionFormat": {"prompt": "q", "completion": "a"},
    "PlainTextFormat": {"text": "t", "meta": {}},
    "PretokenizedFormat": {"input_ids": [1, 2], "labels": [-100, 2]},
}


def auto() -> Any:
    return pickle.loads(pickle.dumps(AutoFormat(AutoFormat.Config()).build()))


def built(cls: Any, **fields: Any) -> Any:
    return cls(cls.Config(**fields)).build()


def chat(record: Any) -> Any:
    content = auto().read(record)
    assert isinstance(content, RecordChat)
    return [dict(message) for message in content.messages], content.tools


def test_exactly_one_built_in_format_accepts_each_form() -> None:
    assert set(ONE_OF_EACH) == {cls.__name__ for cls in built_in_formats()}
    for name, record in ONE_OF_EACH.items():
        accepting = [cls.__name__ for cls in built_in_formats() if built(cls).accepts(record)]
        assert accepting == [name]
        auto().read(record)


@pytest.mark.parametrize(
    "record",
    [
        [USER, ANSWER],
        {"messages": [USER, ANSWER]},
        {"dialogs": [USER, ANSWER]},
        {"conversations": [USER, ANSWER]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "input": None, "output": "a", "system": None, "history": None},
        {"prompt": "q", "completion": "a"},
        {"prompt": [USER], "completion": [ANSWER]},
    ],
    ids=lambda record: "-".join(record) if isinstance(record, dict) else "bare list",
)
def test_one_question_and_answer_in_every_form_of_chat(record: Any) -> None:
    assert chat(record) == ([USER, ANSWER], None)


def test_tools_may_be_a_list_or_its_json_text() -> None:
    assert chat({"messages": [USER, ANSWER], "tools": TOOLS})[1] == TOOLS
    assert chat({"messages": [USER, ANSWER], "tools": json.dumps(TOOLS)})[1] == TOOLS
    nothing: list[Any] = ["", None, [], "[]"]
    for none in nothing:
        assert chat({"messages": [USER, ANSWER], "tools": none})[1] is None
    with pytest.raises(DataError, match="^tools: expected a list or its JSON text"):
        chat({"messages": [USER, ANSWER], "tools": "[oops"})


def test_sharegpt_turns_become_messages_calls_and_results() -> None:
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "9"},
        {"from": "gpt", "value": "a", "loss": False},
    ]
    messages, tools = chat({"conversations": turns, "tools": json.dumps(TOOLS)})
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": CALL}],
    }
    result = {"role": "tool", "content": "9"}
    assert messages == [SYSTEM, USER, call, result, {**ANSWER, "loss": False}]
    assert tools == TOOLS


@pytest.mark.parametrize("switch", [{"loss": False}, {"weight": 0}])
def test_a_sharegpt_call_keeps_its_loss_switch(switch: Any) -> None:
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": json.dumps(CALL), **switch},
        {"from": "observation", "value": "9"},
        {"from": "gpt", "value": "a"},
    ]
    messages, tools = chat({"conversations": turns})
    assert read_chat(messages, tools).loss == [False, False, False, True]


def test_alpaca_joins_input_and_history() -> None:
    record = {
        "system": "s",
        "history": [["q0", "a0"]],
        "instruction": "q",
        "input": "more",
        "output": "a",
    }
    messages, _ = chat(record)
    assert [m["content"] for m in messages] == ["s", "q0", "a0", "q\nmore", "a"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]


def test_answers_in_a_prompt_are_history() -> None:
    messages, _ = chat({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert messages == [USER, {**ANSWER, "loss": False}, USER, ANSWER]


def test_keys_can_be_named() -> None:
    form = built(PromptCompletionFormat, prompt="question", completion="answer")
    assert form.read({"question": "q", "answer": "a"}).messages == [USER, ANSWER]
    raw = built(PromptCompletionFormat, as_chat=False)
    assert raw.read({"prompt": "q", "completion": "a"}) == RecordText([("q", False), ("a", True)])
    assert built(OpenAIFormat, messages="chat").read({"chat": [USER, ANSWER]}).messages
    assert built(AlpacaFormat, output="response").accepts({"instruction": "q", "response": "a"})
    assert built(ShareGPTFormat, conversations="c").accepts({"c": [{"from": "human"}]})
    assert built(PlainTextFormat, text="body").read({"body": "t"}) == RecordText([("t", True)])


def test_plain_text_and_role_pretrain_are_text() -> None:
    whole = RecordText([("t", True)])
    assert auto().read({"text": "t"}) == whole
    assert auto().read({"content": "t"}) == whole
    assert auto().read({"messages": [{"role": "pretrain", "content": "t"}]}) == whole
    assert auto().read([{"role": "pretrain", "content": "t"}]) == whole
    with pytest.raises(DataError, match=r"^messages\[1\].role: 'pretrain' is plain text"):
        auto().read([USER, {"role": "pretrain", "content": "t"}])


def test_tokens_come_with_labels_or_a_mask() -> None:
    for record in (
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]},
        {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]},
        {"input_ids": [5, 6, 7], "completion_mask": [False, True, True]},
        {"input_ids": [5, 6, 7], "assistant_masks": [0, 1, 1], "labels": None},
    ):
        content = auto().read(record)
        assert isinstance(content, RecordTokens)
        assert content.input_ids.dtype == np.int32 and content.input_ids.tolist() == [5, 6, 7]
        assert content.loss_mask.dtype == bool and content.loss_mask.tolist() == [False, True, True]
    everything = built(PretokenizedFormat, without_mask="train_all").read({"input_ids": [5, 6]})
    assert everything.loss_mask.all()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "q", "answer": "a"}, "record: found the keys 'question', 'answer', which"),
        ({}, "record: found an object without keys"),
        ([], "record: found a list of 0"),
        (3, "record: found a value of type int"),
        (
            {"instruction": "q", "output": "a", "text": "t"},
            "record: found the keys 'instruction', 'output', 'text', which fits AlpacaFormat and "
            "PlainTextFormat; name one",
        ),
        ({"messages": "x"}, "messages: expected a list of messages, found a string"),
        ({"conversations": [{"from": "bot", "value": "a"}]}, "conversations[0].from: expected one"),
        ({"conversations": [{"from": "gpt"}, 3]}, "conversations[1]: expected an object"),
        (
            {"conversations": [{"from": "function_call", "value": "{"}]},
            "conversations[0].value: a call that is not JSON",
        ),
        ({"instruction": 3, "output": "a"}, "instruction: expected a string"),
        ({"instruction": "q", "output": None}, "output: expected a string"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "history[0]: expected"),
        ({"prompt": "q", "completion": [ANSWER]}, "completion: expected a string, found a list"),
        ({"text": None}, "text: expected a string"),
        ({"text": "t", "content": "t"}, "record: it has both text and content"),
        ({"input_ids": [1, 2]}, "record: it has input_ids but neither labels nor loss_mask"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels: 1 of them for 2 ids"),
        ({"input_ids": [1, 2], "labels": [-100, 3]}, "labels[1]: 3, but the id there is 2"),
        ({"input_ids": [1, -2], "labels": [1, -2]}, "input_ids: a negative id"),
        ({"input_ids": [1, 2], "loss_mask": [0, 2]}, "loss_mask: expected 0 and 1"),
        ({"input_ids": [1.5], "loss_mask": [1]}, "input_ids: expected a list of integers"),
        ({"input_ids": [[1], [2, 3]], "loss_mask": [1]}, "input_ids: expected a list of integers"),
        ({"input_ids": [2**40], "loss_mask": [1]}, "input_ids: a number that no token id can be"),
        (
            {"input_ids": [1], "loss_mask": [1], "labels": [1]},
            "record: it has loss_mask and labels",
        ),
    ],
)
def test_a_record_that_is_none_of_them_is_named_by_its_keys(record: Any, message: str) -> None:
    with pytest.raises(DataError) as error:
        auto().read(record)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_naming_a_format_settles_what_is_ambiguous() -> None:
    record = {"instruction": "q", "output": "a", "text": "t"}
    assert built(AlpacaFormat).read(record).messages == [USER, ANSWER]
    few = built(AutoFormat, formats=(AlpacaFormat(AlpacaFormat.Config()),))
    assert few.read(record).messages == [USER, ANSWER]
