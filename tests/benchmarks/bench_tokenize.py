"""Tokenizing chats with loss masks: tokens per CPU second against encoding the same text without.

Run `python tests/benchmarks/bench_tokenize.py [--rounds N] [--records N]`; not collected by pytest.
Genuine Qwen3 tokenizer, GSM8K and tool-call chats of the shared assets, one thread. Rounds are
interleaved, so that a busy machine slows every row alike; a ratio is of two rows of one round, and
the median of all rounds is given with the smallest and the largest. Each round reads records that no
round before it read, as a worker does; a set with fewer starts again at its first.

    bare           the rendered texts through one `encode_batch`: no rendering, no masks
    hf mask        `apply_chat_template(return_assistant_tokens_mask=True)` per record, with TRL's
                   training template (only where TRL is installed)
    strip, chain   ChatTokenizeFn with that history policy, from the record to ids and mask
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import resources, util
from pathlib import Path
from typing import Any

os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

ASSETS = Path(__file__).resolve().parents[2].parent / "shared" / "assets"
SETS = {"gsm8k": "gsm8k_train", "tool calls": "glaive_toolcall_en"}


def read(name: str, limit: int) -> list[Any]:
    with (ASSETS / "text" / f"{name}_messages.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in itertools.islice(lines, limit)]


def open_tokenizer(folder: str) -> Any:
    from pegboard_plugins.tokenizers.component import HFTokenizer

    return HFTokenizer(HFTokenizer.Config(path=folder)).build()


def chat_function(tokenizer: Any, history: Any) -> Callable[[Any], Any]:
    from pegboard.component import ComponentConfig, ModelComponent
    from pegboard_plugins.chat.component import ChatTokenizeFn

    config = ChatTokenizeFn.Config(max_length=1_000_000, history=history)
    return ChatTokenizeFn(config).build(tokenizer, ModelComponent(ComponentConfig()))


def own(folder: str, history: str) -> Callable[[Sequence[Any]], int]:
    """A function and a tokenizer of their own: no word of the data is known yet."""
    tokenize = chat_function(open_tokenizer(folder), history)

    def run(records: Sequence[Any]) -> int:
        return sum(len(e.input_ids) for record in records for e in tokenize(record))

    return run


def with_trl_template(reference: Any) -> Callable[[Sequence[Any]], int] | None:
    if util.find_spec("trl") is None:
        return None
    template = resources.files("trl").joinpath("chat_templates/qwen3_training.jinja").read_text()

    def run(records: Sequence[Any]) -> int:
        tokens = 0
        for record in records:
            encoded = reference.apply_chat_template(
                record["messages"],
                tools=record.get("tools"),
                chat_template=template,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            tokens += len(encoded["input_ids"])
        return tokens

    return run


def check(tokenizer: Any, reference: Any, records: Sequence[Any]) -> None:
    """Ids of the one render are the template's; the last sample of a chain is that render too."""
    strip, chain = chat_function(tokenizer, "strip"), chat_function(tokenizer, "chain")
    for record in records:
        ids = reference.apply_chat_template(
            record["messages"], tools=record.get("tools"), return_dict=False
        )
        assert strip(record)[0].input_ids.tolist() == ids
        assert chain(record)[-1].input_ids.tolist() == ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--records", type=int, default=1000, help="of each set in a round, at most")
    options = parser.parse_args()

    from transformers import AutoTokenizer

    folder = str(ASSETS / "qwen3_tokenizer")
    reference: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer = open_tokenizer(folder)
    rust = reference.backend_tokenizer
    for title, name in SETS.items():
        everything = read(name, options.records * options.rounds)
        check(tokenizer, reference, everything)
        rendered = {
            id(record): tokenizer.render(record["messages"], tools=record.get("tools"))
            for record in everything
        }

        def bare(records: Sequence[Any], rendered: dict[int, str] = rendered) -> int:
            texts = [rendered[id(record)] for record in records]
            encoded = rust.encode_batch(texts, add_special_tokens=False)
            return sum(len(one.ids) for one in encoded)

        rows: dict[str, Callable[[Sequence[Any]], int]] = {"bare": bare}
        if (hf := with_trl_template(reference)) is not None:
            rows["hf mask"] = hf
        # As in a worker: the words of earlier records are known, those of this round may not be.
        rows["strip"], rows["chain"] = own(folder, "strip"), own(folder, "chain")
        rates: dict[str, list[float]] = {row: [] for row in rows}
        tokens = dict.fromkeys(rows, 0)
        taking_turns = itertools.cycle(everything)
        for _ in range(options.rounds):
            records = list(itertools.islice(taking_turns, min(options.records, len(everything))))
            for row, run in rows.items():
                start = time.process_time()
                count = run(records)
                tokens[row] += count
                rates[row].append(count / (time.process_time() - start))
        print(
            f"{title}: {len(everything):,} records, {len(records):,} in each of {options.rounds} "
            f"rounds, load {os.getloadavg()}"
        )
        for row in rows:
            line = (
                f"  {row:<8} {tokens[row]:>10,} tokens  {statistics.median(rates[row]):>10,.0f}/s"
            )
            for base in ("bare", "hf mask"):
                if base in rows and base != row:
                    ratios = [a / b for a, b in zip(rates[row], rates[base], strict=True)]
                    line += f"  {statistics.median(ratios):.2f} x {base}"
                    line += f" ({min(ratios):.2f} to {max(ratios):.2f})"
            print(line)
        # Nothing known at all: the first records that a process sees.
        pieces = type(tokenizer)(reference).pieces
        first = [rendered[id(record)] for record in everything[: options.records]]
        start = time.process_time()
        cold = sum(len(pieces.encode(text)) // 4 for text in first)
        print(f"  pieces, cold: {cold / (time.process_time() - start):,.0f}/s")


if __name__ == "__main__":
    main()
