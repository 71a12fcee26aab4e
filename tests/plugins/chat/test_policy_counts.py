"""What the policies that aren't used would train is estimated for large spans, and marked so."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pegboard import store_parts
from pegboard.component import ComponentConfig, ModelComponent
from pegboard.contracts import SampleKey
from pegboard.data_report import describe_store, read_counts
from pegboard.errors import DroppedSample
from pegboard.token_store import build_store
from pegboard_plugins.chat.component import ChatTokenizeFn
from pegboard_plugins.tokenizers.component import ByteTokenizer

POLICIES = ("strip", "split", "chain", "keep")
NUMBER = 800
WHOLE = 32


def chat(i: int) -> list[dict[str, Any]]:
    """Reasoning of the first answer is stripped from the history, so the policies differ."""
    answers = [
        {"role": "assistant", "content": f"b{i}", "reasoning_content": "r" * (i % 50)},
        {"role": "assistant", "content": "c", "reasoning_content": "s" * (i % 7)},
    ]
    user = {"role": "user", "content": f"a{i}"}
    return [user, answers[0], user, answers[1]]


def built(policy: Any) -> Any:
    config = ChatTokenizeFn.Config(max_length=1_000_000, history=policy)
    tokenizer = ByteTokenizer(ByteTokenizer.Config()).build()
    return ChatTokenizeFn(config).build(tokenizer, ModelComponent(ComponentConfig()))


def counts_of(policy: Any, chats: Any) -> dict[str, int]:
    """Args: policy: its name, or a function that was built with it."""
    function = built(policy) if isinstance(policy, str) else policy
    for one in chats:
        with suppress(DroppedSample):  # under strip, where each turn is rewritten
            function(one)
    return dict(function.take_counts())


@pytest.fixture(scope="module")
def exact() -> Counter[str]:
    """What each policy trains, by its own samples."""
    totals: Counter[str] = Counter()
    for policy in POLICIES:
        function = built(policy)
        for i in range(NUMBER):
            for example in function(chat(i)):
                if policy != "keep":
                    totals[f"history {policy}: tokens"] += len(example.input_ids)
                totals[f"history {policy}: supervised tokens"] += int(example.loss_mask.sum())
    return totals


@pytest.mark.parametrize("policy", POLICIES)
def test_the_policy_in_use_is_exact_and_the_others_are_near(
    exact: Counter[str], policy: str
) -> None:
    counts = counts_of(policy, map(chat, range(NUMBER)))
    for name, expected in exact.items():
        # Chains are made under chain and split anyway, and the last of them is the one render.
        if policy in ("split", "chain", name.split()[1].rstrip(":")):
            assert counts[name] == expected and f"~{name}" not in counts, name
        else:
            estimated = counts[name] + counts[f"~{name}"]
            assert counts[f"~{name}"] > 0 and estimated == pytest.approx(expected, rel=0.25), name


@pytest.mark.parametrize("policy", ["split", "chain"])
def test_the_render_of_a_chat_that_ends_with_a_question_is_estimated(policy: str) -> None:
    asking = [[*chat(i), {"role": "user", "content": "d"}] for i in range(NUMBER)]
    counts, stripped = counts_of(policy, asking), counts_of("strip", asking)
    used = counts_of("chain" if policy == "split" else "split", asking)
    for what in ("tokens", "supervised tokens"):
        strip, chain = f"history strip: {what}", f"history chain: {what}"
        assert f"~{strip}" in counts and f"~{strip}" not in stripped
        assert counts[strip] + counts[f"~{strip}"] == pytest.approx(stripped[strip], rel=0.25)
        assert counts[chain] == used[chain] and f"~{chain}" not in counts


def test_all_of_few_records_are_counted_and_each_span_begins_anew() -> None:
    function = built("strip")
    whole = [counts_of(function, [chat(i)]) for i in range(2 * WHOLE)]
    for first in (0, WHOLE):
        for i in range(first, first + WHOLE):
            function(chat(i))
        expected: Counter[str] = Counter()
        for counts in whole[first : first + WHOLE]:
            expected.update(counts)
        assert function.take_counts() == expected
        assert not any(name.startswith("~") for name in expected)


def test_what_is_left_out_is_told_even_if_no_record_stands_for_it() -> None:
    function, left_out = built("strip"), 0
    for i in range(WHOLE, WHOLE + 12):
        counts = counts_of(function, [*map(chat, range(WHOLE)), chat(i)])
        estimate = counts["~history chain: tokens"]
        left_out += estimate == 0
        assert estimate in (0, 16 * counts_of(function, [chat(i)])["history chain: tokens"])
    assert 0 < left_out


def test_a_chat_that_every_policy_renders_alike_is_always_exact() -> None:
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for policy in ("strip", "split", "chain"):
        counts = counts_of(policy, [plain] * 100)
        assert counts["history chain: tokens"] == counts["history strip: tokens"]
        assert not any(name.startswith("~") for name in counts)


class Chats:
    """A dataset of `number` chats."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> Any:
        return chat(index)

    def key(self, index: int) -> SampleKey:
        return SampleKey("d", "d.jsonl", index + 1)

    def fingerprint(self) -> None:
        return None


def test_the_table_marks_estimates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lines(size: int) -> dict[str, str]:
        """Of the table, by policy, where parts are of `size` records."""
        monkeypatch.setattr(store_parts, "_SMALLEST_PART", size)
        store = build_store(tmp_path / str(size), Chats(200), built("strip"), name="d")
        found = (line.partition("  ") for line in describe_store(store) if "history" in line)
        return {policy.split()[-1]: numbers.strip() for policy, _, numbers in found}

    few, many = lines(WHOLE), lines(4 * WHOLE)
    assert few["strip"] == many["strip"] and "~" not in "".join(few.values())
    for policy in ("chain", "split"):
        assert re.fullmatch(r"~[\d,]+ tokens, ~[\d,]+ supervised tokens", many[policy])
    assert re.fullmatch(r"~[\d,]+ supervised tokens", many["keep"])


def test_an_estimate_is_added_to_what_was_counted() -> None:
    counts = read_counts({"a": 1234, "a: b": 3, "~a: b": 123_456, "~c": 0})
    assert {name: str(count) for name, count in counts.items()} == {
        "a": "1,234",
        "a: b": "~123,000",
        "c": "~0",
    }
