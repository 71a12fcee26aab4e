"""Each history policy trains exactly the answers it says, after exactly the prompts it says."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pegboard.component import ComponentConfig, ModelComponent
from pegboard.contracts import SampleKey
from pegboard.errors import DataError, DroppedSample
from pegboard.token_store import build_store
from pegboard_plugins.chat.component import ChatTokenizeFn
from pegboard_plugins.tokenizers.component import ByteTokenizer, HFTokenizer

ASSETS = Path(__file__).resolve().parents[4] / "shared" / "assets"
MODEL = ModelComponent(ComponentConfig())  # a chat tokenize fn asks nothing of the model
USER = {"role": "user", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TEXTS = ("gsm8k_train", "gsm8k_test", "glaive_toolcall_en", "self_instruct", "identity")
POLICIES = ("strip", "split", "chain", "keep")


@pytest.fixture(scope="module")
def byte() -> Any:
    return ByteTokenizer(ByteTokenizer.Config()).build()


@pytest.fixture(scope="module")
def qwen3() -> Any:
    if not (ASSETS / "qwen3_tokenizer").is_dir():
        pytest.skip("the Qwen3 tokenizer is not on this machine")
    return HFTokenizer(HFTokenizer.Config(path=str(ASSETS / "qwen3_tokenizer"))).build()


def built(tokenizer: Any, **fields: Any) -> Any:
    config = ChatTokenizeFn.Config(**{"max_length": 1_000_000, **fields})
    return ChatTokenizeFn(config).build(tokenizer, MODEL)


def answer(text: Any, **more: Any) -> Any:
    return {"role": "assistant", "content": text, **more}


def shown(tokenizer: Any, example: Any) -> str:
    """The text, with what has loss in [[ ]]."""
    out, inside = "", False
    for token, loss in zip(example.input_ids, example.loss_mask, strict=True):
        if loss != inside:
            out, inside = out + ("[[" if loss else "]]"), bool(loss)
        out += tokenizer.decode([token])
    return out + ("]]" if inside else "")


def prompt_of(tokenizer: Any, messages: Any, tools: Any, j: int) -> str:
    """What a server gives the model for turn j: the longest prompt that the turn's own render begins with."""
    ended = tokenizer.render(messages[: j + 1], tools=tools)
    prompts = [
        tokenizer.render(
            messages[:j], tools=tools, add_generation_prompt=True, template_kwargs=kwargs
        )
        for kwargs in ({}, {"enable_thinking": False}, {"enable_thinking": True})
    ]
    return str(max((prompt for prompt in prompts if ended.startswith(prompt)), key=len))


TWO_QUESTIONS = [USER, answer("b", reasoning_content="r"), USER, answer("c", reasoning_content="s")]
ONE_TASK = [
    USER,
    {**answer("", reasoning_content="r"), "tool_calls": [CALL]},
    {"role": "tool", "content": "9"},
    answer("c", reasoning_content="s"),
]

HEAD, END = "<|im_start|>assistant\n", "<|im_end|>"
ASKED = f"<|im_start|>user\na{END}\n"


def test_strip_is_the_one_render(byte: Any) -> None:
    (example,) = built(byte, history="strip")(TWO_QUESTIONS)
    assert example.part is None
    assert shown(byte, example) == (
        f"{ASKED}{HEAD}b{END}\n{ASKED}{HEAD}[[<think>\ns\n</think>\n\nc{END}]]\n"
    )


def test_split_is_each_prompt_with_its_answer(byte: Any) -> None:
    first, second = built(byte, history="split")(TWO_QUESTIONS)
    assert shown(byte, first) == f"{ASKED}{HEAD}[[<think>\nr\n</think>\n\nb{END}]]"
    assert shown(byte, second) == (
        f"{ASKED}{HEAD}b{END}\n{ASKED}{HEAD}[[<think>\ns\n</think>\n\nc{END}]]"
    )
    assert (first.part, second.part) == (0, 1)


def test_chain_splits_where_history_is_rewritten(byte: Any) -> None:
    first, second = built(byte)(TWO_QUESTIONS)
    split = built(byte, history="split")(TWO_QUESTIONS)
    assert first.input_ids.tolist() == split[0].input_ids.tolist()
    assert second.input_ids[:-1].tolist() == split[1].input_ids.tolist()
    assert second.input_ids.tolist() == byte.encode(byte.render(TWO_QUESTIONS))
    assert (first.part, second.part) == (0, 1)


def test_chain_joins_the_steps_of_one_task(byte: Any) -> None:
    (example,) = built(byte)(ONE_TASK)
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    assert shown(byte, example) == (
        f"{ASKED}{HEAD}[[<think>\nr\n</think>\n\n{call}{END}]]\n<|im_start|>user\n"
        f"<tool_response>\n9\n</tool_response>{END}\n{HEAD}[[<think>\ns\n</think>\n\nc{END}]]\n"
    )
    assert example.part == 0
    assert len(built(byte, history="split")(ONE_TASK)) == 2


def test_keep_has_every_turn_as_it_was_generated(byte: Any) -> None:
    (example,) = built(byte, history="keep")(TWO_QUESTIONS)
    assert shown(byte, example) == (
        f"{ASKED}{HEAD}[[<think>\nr\n</think>\n\nb{END}]]\n"
        f"{ASKED}{HEAD}[[<think>\ns\n</think>\n\nc{END}]]\n"
    )
    # Without reasoning the prompt of inference has an empty block, and keeps it.
    (plain,) = built(byte, history="keep")([USER, answer("b"), USER, answer("c")])
    empty = "<think>\n\n</think>\n\n"
    assert shown(byte, plain) == (
        f"{ASKED}{HEAD}{empty}[[b{END}]]\n{ASKED}{HEAD}{empty}[[c{END}]]\n"
    )


def test_keep_masks_what_must_not_be_learnt_and_still_keeps_it(byte: Any) -> None:
    chat = [USER, answer("b", reasoning_content="r", loss=False), *TWO_QUESTIONS[2:]]
    (example,) = built(byte, history="keep")(chat)
    assert shown(byte, example) == (
        f"{ASKED}{HEAD}<think>\nr\n</think>\n\nb{END}\n"
        f"{ASKED}{HEAD}[[<think>\ns\n</think>\n\nc{END}]]\n"
    )


def test_a_part_is_the_number_of_the_turn_whatever_is_left_out(byte: Any) -> None:
    chat = [USER, answer("b", loss=False), USER, answer("c"), USER, answer("d")]
    for policy in ("split", "chain"):
        assert [example.part for example in built(byte, history=policy)(chat)] == [1, 2]
    greeting = [answer("hi"), USER, answer("b")]
    assert [example.part for example in built(byte, history="split")(greeting)] == [1]


def test_the_token_store_keeps_the_part(byte: Any, tmp_path: Path) -> None:
    class Records:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Any:
            return {"messages": [USER, answer("b", loss=False), USER, answer("c")]}

        def key(self, index: int) -> SampleKey:
            return SampleKey("d", "f", 7)

        def fingerprint(self) -> None:
            return None

    store = build_store(tmp_path / "store", Records(), built(byte, history="split"), name="d")
    assert (store.key(0).line, store.key(0).part) == (7, 1)


def test_samples_that_truncation_leaves_without_loss_are_dropped_and_counted(byte: Any) -> None:
    lengths = [len(e.input_ids) for e in built(byte, history="split")(TWO_QUESTIONS)]
    fn = built(byte, history="split", max_length=lengths[0])
    (example,) = fn(TWO_QUESTIONS)
    counts = fn.take_counts()
    assert example.part == 0 and counts["samples without loss"] == 1 and counts["truncated"] == 1
    with pytest.raises(DroppedSample, match="no supervised token"):
        built(byte, max_length=10)(TWO_QUESTIONS)


def test_a_turn_without_a_prompt_is_counted_or_refused_under_any_policy(byte: Any) -> None:
    greeting = [answer("hi"), USER, answer("b")]
    for policy in POLICIES:
        fn = built(byte, history=policy)
        assert len(fn(greeting)) == 1
        assert fn.take_counts()["turns noprefix"] == 1
        with pytest.raises(DataError, match=r"^messages\[0\]: the chat template does not render"):
            built(byte, history=policy, rewritten_turns="error")(greeting)


def test_a_rewritten_turn_is_an_error_only_where_it_can_not_be_trained(byte: Any) -> None:
    with pytest.raises(DataError, match=r"^messages\[1\]: the chat template changes this turn"):
        built(byte, history="strip", rewritten_turns="error")(TWO_QUESTIONS)
    for policy in ("split", "chain", "keep"):
        assert built(byte, history=policy, rewritten_turns="error")(TWO_QUESTIONS)


@pytest.mark.parametrize("chat", [TWO_QUESTIONS, ONE_TASK, [USER, answer("b"), *ONE_TASK]])
def test_counts_say_under_any_policy_what_each_would_train(byte: Any, chat: Any) -> None:
    measured = {}
    for policy in POLICIES:
        examples = built(byte, history=policy)(chat)
        measured[f"history {policy}: tokens"] = sum(len(e.input_ids) for e in examples)
        measured[f"history {policy}: supervised tokens"] = sum(
            int(e.loss_mask.sum()) for e in examples
        )
    del measured["history keep: tokens"]
    for policy in POLICIES:
        fn = built(byte, history=policy)
        fn(chat)
        counts = fn.take_counts()
        assert {name: counts[name] for name in measured} == measured, policy


def test_an_answer_that_changes_the_text_before_it_keeps_its_own_prompt(byte: Any) -> None:
    # As gpt-oss: the reasoning of a call is dropped as soon as a final answer follows.
    template = (
        "{% set final = messages[-1].role == 'assistant' and not messages[-1].tool_calls %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.tool_calls and m.reasoning_content and not final %}({{ m.reasoning_content }})"
        "{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = pickle.loads(pickle.dumps(byte))
    tokenizer.chat_template = template
    first, second = built(tokenizer, history="split")(ONE_TASK)
    assert shown(tokenizer, first).endswith(f"{HEAD}[[(r){END}]]")
    assert f"{HEAD}(r){END}<|im_start|>tool" in shown(tokenizer, second)
    assert shown(tokenizer, second).endswith(f"{HEAD}[[c{END}]]")


def test_typed_special_tokens_are_text_unless_asked_for(byte: Any) -> None:
    chat = [{"role": "user", "content": "say <|im_end|> and <think>"}, answer("<|im_end|> b")]
    fn = built(byte)
    (example,) = fn(chat)
    assert byte.decode(example.input_ids) == byte.render(chat)
    end = byte.encode(END)[0]
    assert (example.input_ids == end).sum() == 2  # the template's own
    assert fn.take_counts()["records with typed special tokens"] == 1
    tokens = built(byte, typed_special_tokens="tokens")
    (controls,) = tokens(chat)
    assert controls.input_ids.tolist() == byte.encode(byte.render(chat))
    assert (controls.input_ids == end).sum() == 4
    plain = built(byte)([{"role": "user", "content": "say it"}, answer("b")])
    same = tokens([{"role": "user", "content": "say it"}, answer("b")])
    assert plain[0].input_ids.tolist() == same[0].input_ids.tolist()


def test_texts_and_tokens_pass_through_the_same_function(byte: Any) -> None:
    fn = built(byte)
    (text,) = fn({"text": "ab<|im_end|>"})
    assert shown(byte, text) == f"a[[b<|im_end|>{END}]]" and len(text.input_ids) == 13
    (raw,) = fn({"input_ids": [97, 98, 99], "labels": [97, -100, 99]})
    assert raw.loss_mask.tolist() == [False, False, True]
    with pytest.raises(DataError, match="^input_ids: 900 is no id of this tokenizer"):
        fn({"input_ids": [97, 900], "labels": [-100, 900]})
    with pytest.raises(DroppedSample):
        fn({"text": ""})
    counts = fn.take_counts()
    for policy in ("strip", "split", "chain"):
        assert counts[f"history {policy}: tokens"] == 16
    (pair,) = built(byte, record_format=prompt_completion(as_chat=False))(
        {"prompt": "ab<|im_end|>", "completion": "cd"}
    )
    assert shown(byte, pair) == f"ab<|im_end|>[[cd{END}]]" and len(pair.input_ids) == 15


def prompt_completion(**fields: Any) -> Any:
    from pegboard_plugins.records.formats import PromptCompletionFormat

    return PromptCompletionFormat(PromptCompletionFormat.Config(**fields))


def test_templates_that_want_objects_or_text_get_them(byte: Any) -> None:
    head = "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    tail = "<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    forms = {
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}": '{"x": 1}',
        "{% for c in m.tool_calls or [] %}{% for k, v in c.function.arguments | items %}"
        "{{ k }}={{ v }}{% endfor %}{% endfor %}": "x=1",
        "{% for c in m.tool_calls or [] %}{{ '' + c.function.arguments }}{% endfor %}": '{"x": 1}',
    }
    for calls, expected in forms.items():
        tokenizer = pickle.loads(pickle.dumps(byte))
        tokenizer.chat_template = head + calls + tail
        for arguments in ({"x": 1}, '{"x": 1}'):
            call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
            (example,) = built(tokenizer)([USER, answer("b", tool_calls=[call])])
            assert f"[[b{expected}{END}]]" in shown(tokenizer, example)
    bad = {"type": "function", "function": {"name": "f", "arguments": "{x"}}
    tokenizer.chat_template = head + next(iter(forms)) + tail
    with pytest.raises(DataError, match=r"^messages\[1\].tool_calls\[0\]: arguments that are not"):
        built(tokenizer)([USER, answer("b", tool_calls=[bad])])


def test_a_developer_message_is_not_lost(byte: Any) -> None:
    chat = [{"role": "developer", "content": "dev"}, USER, answer("b")]
    (known,) = built(byte)(chat)
    assert "<|im_start|>developer\ndev" in shown(byte, known)
    tokenizer = pickle.loads(pickle.dumps(byte))
    tokenizer.chat_template = (
        "{% for m in messages if m.role in ('system', 'user', 'assistant') %}"
        "<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (mapped,) = built(tokenizer)(chat)
    assert shown(tokenizer, mapped).startswith("<system>dev<|im_end|>")


def test_merged_tool_results_and_parallel_calls_are_the_templates_own(qwen3: Any) -> None:
    result = {"role": "tool", "content": "9"}
    chat = [USER, {**answer(None), "tool_calls": [CALL, CALL]}, result, result, answer("c")]
    (example,) = built(qwen3, history="strip")(chat)
    cleaned = [{k: v for k, v in m.items() if v is not None} for m in chat]
    assert example.input_ids.tolist() == qwen3.encode(qwen3.render(cleaned))
    assert qwen3.decode(example.input_ids).count("<tool_response>") == 2
    assert qwen3.decode(example.input_ids).count("<|im_start|>user") == 2


def assistant_turns(limit: int | None) -> Any:
    for name in TEXTS:
        file = ASSETS / "text" / f"{name}_messages.jsonl"
        if not file.is_file():
            pytest.skip(f"{file.name} is not on this machine")
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                if number == limit:
                    break
                yield json.loads(line)


def check_every_turn(tokenizer: Any, limit: int | None) -> int:
    fn = built(tokenizer, history="split")
    chain = built(tokenizer)
    turns = 0
    for record in assistant_turns(limit):
        messages, tools = record["messages"], record.get("tools")
        places = [j for j, m in enumerate(messages) if m["role"] == "assistant"]
        examples = fn(record)
        assert [example.part for example in examples] == list(range(len(places)))
        supervised = 0
        for j, example in zip(places, examples, strict=True):
            start = int(np.argmax(example.loss_mask))
            assert example.loss_mask[start:].all()
            prompt = prompt_of(tokenizer, messages, tools, j)
            generated = tokenizer.decode(example.input_ids[start:])
            ended = tokenizer.render(messages[: j + 1], tools=tools)
            assert ended.startswith(prompt + generated) and generated.endswith(END)
            assert example.input_ids[:start].tolist() == tokenizer.encode(prompt)
            assert example.input_ids[start:].tolist() == tokenizer.encode(generated)
            # What training sees is what the text of both would be, read at once.
            assert example.input_ids.tolist() == tokenizer.encode(prompt + generated)
            supervised += len(example.input_ids) - start
            turns += 1
        chained = chain(record)
        assert sum(int(e.loss_mask.sum()) for e in chained) == supervised
        assert chained[-1].input_ids.tolist() == tokenizer.encode(
            tokenizer.render(messages, tools=tools)
        )
    return turns


def test_prompt_and_answer_apart_are_the_ids_of_both_together(qwen3: Any) -> None:
    assert check_every_turn(qwen3, 25) > 5 * 25


@pytest.mark.slow
def test_prompt_and_answer_apart_are_the_ids_of_both_together_on_all_shared_data(
    qwen3: Any,
) -> None:
    assert check_every_turn(qwen3, None) > 10_000
