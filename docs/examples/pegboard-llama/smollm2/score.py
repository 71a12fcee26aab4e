"""Score a folder on held-out chats with transformers alone: nothing of Pegboard is imported.

    python score.py work_dirs/smollm2/base held_out.jsonl
    python score.py work_dirs/smollm2/base held_out.jsonl --adapter work_dirs/smollm2/lora/adapter

Prints one JSON object:
    loss          nats per token of the answers, end of turn included, in float32
    format_rate   share of greedy answers that the model ends itself, with a line `#### number`
    right_rate    share whose number is the right one
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from gsm8k import FINAL_LINE, read_chats

__all__ = ["main", "score"]


def main(argv: list[str] | None = None) -> int:
    """Print the scores."""
    parser = argparse.ArgumentParser(description="Held-out loss and form of the answers.")
    parser.add_argument("folder", type=Path, help="Hugging Face folder of the model")
    parser.add_argument("chats", type=Path, help="JSON lines of held-out chats")
    parser.add_argument("--adapter", type=Path, help="folder of a peft adapter to put on it")
    parser.add_argument(
        "--answers",
        type=int,
        default=16,
        help="of the first so many chats; 0: loss only (default: 16)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=192)
    arguments = parser.parse_args(argv)
    model, tokenizer = _open(arguments.folder, arguments.adapter)
    chats = read_chats(arguments.chats)
    print(json.dumps(score(model, tokenizer, chats, arguments.answers, arguments.max_new_tokens)))
    return 0


def score(
    model: Any, tokenizer: Any, chats: list[dict[str, Any]], num_answers: int, max_new_tokens: int
) -> dict[str, float]:
    """Loss over all chats, the rates over the first `num_answers` of them."""
    loss = answer_loss(model, tokenizer, chats)
    if num_answers == 0:
        return {"loss": loss}
    model.bfloat16()  # half the bytes a token, and what it was trained in
    asked = chats[:num_answers]
    formed = right = 0
    for chat, answer in zip(asked, _answers(model, tokenizer, asked, max_new_tokens), strict=True):
        found = FINAL_LINE.search(answer or "")
        wanted = FINAL_LINE.search(chat["messages"][1]["content"])
        assert wanted is not None  # read_chats saw to it
        formed += found is not None
        right += found is not None and _number(found[1]) == _number(wanted[1])
    return {
        "loss": loss,
        "format_rate": formed / len(asked),
        "right_rate": right / len(asked),
    }


@torch.no_grad()
def answer_loss(model: Any, tokenizer: Any, chats: list[dict[str, Any]]) -> float:
    """Mean nats per answer token."""
    total, count = 0.0, 0
    for chat in chats:
        prompt = _prompt_ids(tokenizer, chat)
        answer = tokenizer.encode(chat["messages"][1]["content"], add_special_tokens=False)
        answer.append(tokenizer.eos_token_id)
        ids = torch.tensor([prompt + answer])
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
        wanted = torch.tensor(answer)
        total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        count += len(answer)
    return total / count


def _answers(
    model: Any, tokenizer: Any, chats: list[dict[str, Any]], max_new_tokens: int
) -> list[str | None]:
    """Greedy answers, all in one batch; None for one that did not end by itself."""
    prompts = [_prompt_ids(tokenizer, chat) for chat in chats]
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    replies = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers: list[str | None] = []
    for reply in replies[:, longest:].tolist():
        ended = tokenizer.eos_token_id in reply
        length = reply.index(tokenizer.eos_token_id) if ended else 0
        answers.append(tokenizer.decode(reply[:length]) if ended else None)
    return answers


def _prompt_ids(tokenizer: Any, chat: dict[str, Any]) -> list[int]:
    text = tokenizer.apply_chat_template(
        chat["messages"][:1], tokenize=False, add_generation_prompt=True
    )
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _open(folder: Path, adapter: Path | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.eval(), tokenizer


if __name__ == "__main__":
    sys.exit(main())
