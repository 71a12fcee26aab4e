"""The genuine Qwen3 tokenizer with Intern-S1's tokens at Intern-S1's ids.

The published tokenizer has three more vocabularies between Qwen3's and its own tokens; here their
ids are filled with tokens that no text spells.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["INTERN_S1_TOKENS", "save_intern_s1_tokenizer"]

INTERN_S1_TOKENS = {
    "<SMILES>": 151925,
    "</SMILES>": 151926,
    "<SELFIES>": 151927,
    "</SELFIES>": 151928,
    "<IUPAC>": 152441,
    "</IUPAC>": 152442,
    "<FASTA>": 152955,
    "</FASTA>": 152956,
    "<IMG_CONTEXT>": 152957,
    "<img>": 152958,
    "</img>": 152959,
    "<quad>": 152960,
    "</quad>": 152961,
    "<ref>": 152962,
    "</ref>": 152963,
    "<box>": 152964,
    "</box>": 152965,
    "<|action_start|>": 152966,
    "<|action_end|>": 152967,
    "<|interpreter|>": 152968,
    "<|plugin|>": 152969,
    "<video>": 152970,
}


def save_intern_s1_tokenizer(qwen3_folder: Path, folder: Path) -> None:
    """Write the extended tokenizer to `folder`."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(qwen3_folder)
    spelling = {number: token for token, number in INTERN_S1_TOKENS.items()}
    first, last = len(tokenizer), max(spelling)
    tokenizer.add_tokens(
        [
            AddedToken(spelling.get(number, f"<|unused {number}|>"), normalized=False, special=True)
            for number in range(first, last + 1)
        ]
    )
    found = {token: tokenizer.convert_tokens_to_ids(token) for token in INTERN_S1_TOKENS}
    assert found == INTERN_S1_TOKENS
    tokenizer.save_pretrained(folder)
