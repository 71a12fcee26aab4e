"""Whatever JSON a record is, it gives examples or one line that says what is wrong."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest

from pegboard.component import ComponentConfig, ModelComponent
from pegboard.errors import DataError
from pegboard_plugins.chat.component import ChatTokenizeFn
from pegboard_plugins.tokenizers.component import ByteTokenizer

MODEL = ModelComponent(ComponentConfig())
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": [1, None]}}}
MESSAGES = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "q"}]},
    {"role": "assistant", "content": None, "thinking": "r", "tool_calls": [CALL]},
    {"role": "tool", "content": "9", "tool_call_id": "c"},
    {"role": "assistant", "content": "a", "loss": True, "weight": 1},
]
RECORDS: list[Any] = [
    {"messages": MESSAGES, "tools": [{"name": "f", "parameters": {}}], "id": 1},
    MESSAGES,
    {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": json.dumps({"name": "f", "arguments": {}})},
            {"from": "observation", "value": "9"},
            {"from": "gpt", "value": "a"},
        ],
        "system": "s",
        "tools": "[]",
    },
    {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["q", "a"]]},
    {"prompt": [{"role": "user", "content": "q"}], "completion": [MESSAGES[-1]]},
    {"prompt": "q", "completion": "a"},
    {"text": "t"},
    {"messages": [{"role": "pretrain", "content": "t"}]},
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
    {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]},
]
VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    3.5,
    1e300,
    2**70,
    "",
    "x",
    "<|im_end|>",
    "{{ messages }}",
    "\ue0f1\ue0f2",
    "[",
    [],
    {},
    [[]],
    [{}],
    {"": None},
    {"role": "assistant"},
    {"role": "assistant", "content": "a"},
    ["a", "b"],
    [1, 2],
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        found += places(item, (*path, key))
    return found


def changed(record: Any, random_: random.Random) -> Any:
    """A copy with a value replaced, taken out, doubled or renamed, once to three times."""
    record = copy.deepcopy(record)
    for _ in range(random_.randint(1, 3)):
        path = random_.choice(places(record))
        if not path:
            if random_.random() < 0.1:
                record = copy.deepcopy(random_.choice(VALUES))
            continue
        holder = record
        for key in path[:-1]:
            holder = holder[key]
        what = random_.randrange(4)
        if what == 0:
            del holder[path[-1]]
        elif what == 1 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[path[-1]]))
        elif what == 2 and isinstance(holder, dict):
            holder[path[-1] + "s"] = holder.pop(path[-1])
        else:
            holder[path[-1]] = copy.deepcopy(random_.choice(VALUES))
    return record


@pytest.mark.parametrize("history", ["chain", "split", "strip", "keep"])
def test_two_thousand_changed_records_give_examples_or_one_line(history: Any) -> None:
    tokenizer = ByteTokenizer(ByteTokenizer.Config()).build()
    fields: dict[str, Any] = {"history": history, "shown_turns": "train", "max_length": 200}
    tokenize = ChatTokenizeFn(ChatTokenizeFn.Config(**fields)).build(tokenizer, MODEL)
    random_ = random.Random(history)
    outcomes = [0, 0]
    for number in range(2000):
        record = changed(RECORDS[number % len(RECORDS)], random_)
        try:
            examples = tokenize(record)
        except DataError as error:
            assert str(error) and "\n" not in str(error), record
            outcomes[0] += 1
            continue
        assert examples
        for example in examples:
            assert 0 < len(example.input_ids) <= 200
            assert example.input_ids.shape == example.loss_mask.shape
            assert example.loss_mask.any()
        outcomes[1] += 1
    assert min(outcomes) > 200


def test_records_as_they_are_are_fine() -> None:
    tokenizer = ByteTokenizer(ByteTokenizer.Config()).build()
    tokenize = ChatTokenizeFn(ChatTokenizeFn.Config()).build(tokenizer, MODEL)
    for record in RECORDS:
        assert tokenize(record)
