"""Ask the model of the quick start five of its questions.

The export is an ordinary transformers folder, so this file imports nothing of Pegboard: the newest
export is opened with AutoModelForCausalLM and AutoTokenizer, and decoded greedily.

    python docs/examples/quickstart/ask.py [FOLDER]

FOLDER is an export, or a folder of exports (default: work_dirs/quickstart/export). Exit code 0 if
at least four of the five answers are right, 1 if fewer are, 2 if there is no export.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["main", "newest_export", "questions"]

REPOSITORY = Path(__file__).resolve().parents[3]
DATA = REPOSITORY / "configs" / "data" / "quickstart_chat.jsonl"
NUM_QUESTIONS = 5
NUM_NEEDED = 4


def main(argv: list[str] | None = None) -> int:
    """Print question, answer, and right or wrong; return the exit code."""
    parser = argparse.ArgumentParser(description="Ask the quick start's model its questions.")
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path("work_dirs/quickstart/export"),
        help="an export, or a folder that holds exports (default: %(default)s)",
    )
    folder: Path = parser.parse_args(argv).folder
    export = newest_export(folder)
    if export is None:
        print(
            f"{folder}: no export found (config.json beside *.safetensors); train first: "
            "python core/run.py configs/quickstart.json",
            file=sys.stderr,
        )
        return 2

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModelForCausalLM.from_pretrained(export)  # in eval mode
    print(f"model: {export}")
    num_right = 0
    for question, expected in questions(DATA, NUM_QUESTIONS):
        answer = _answer(model, tokenizer, question)
        right = answer == expected
        num_right += right
        verdict = "right" if right else f"wrong, expected {expected!r}"
        print(f"Q: {question}\nA: {answer}   [{verdict}]")
    print(f"{num_right} of {NUM_QUESTIONS} right")
    return 0 if num_right >= NUM_NEEDED else 1


def newest_export(folder: Path) -> Path | None:
    """The newest folder at or under `folder` with a config.json and weights; None if there is none.

    Names that start with a dot (something still being written) don't count.
    """
    exports = [
        config.parent
        for config in folder.rglob("config.json")
        if any(config.parent.glob("*.safetensors"))
        and not any(part.startswith(".") for part in config.relative_to(folder).parts)
    ]
    return max(exports, key=lambda export: (export / "config.json").stat().st_mtime, default=None)


def questions(data: Path, count: int) -> list[tuple[str, str]]:
    """`count` questions and their answers, spread evenly over a file of one-turn conversations."""
    conversations = [
        json.loads(line)["messages"] for line in data.read_text(encoding="utf-8").splitlines()
    ]
    spread = [conversations[index * len(conversations) // count] for index in range(count)]
    return [(user["content"], assistant["content"]) for user, assistant in spread]


def _answer(model: Any, tokenizer: Any, question: str) -> str:
    """The model's greedy answer to one question."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,  # trained without thoughts: the prompt ends with an empty think block
    )
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    reply = model.generate(
        ids,
        attention_mask=ids.new_ones(ids.shape),
        do_sample=False,
        max_new_tokens=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return str(tokenizer.decode(reply[0, ids.shape[1] :], skip_special_tokens=True)).strip()


if __name__ == "__main__":
    sys.exit(main())
