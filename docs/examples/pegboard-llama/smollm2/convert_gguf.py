"""A GGUF file of a Llama model becomes a folder that transformers opens.

    python convert_gguf.py SmolLM2-135M-Instruct.Q4_1.gguf work_dirs/smollm2/base

Writes config.json, generation_config.json, model.safetensors (float32) and the tokenizer with its
chat template, all from what stands in the file. What this script can't carry over exactly is
refused by name: another architecture, a tokenizer cut by other rules, a tensor it does not know.

Source: the GGUF specification (metadata keys, tensor names); llama.cpp's convert_hf_to_gguf.py,
    whose reordering of query and key rows is undone here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["convert", "main"]

TOKEN_CONTROL, TOKEN_USER_DEFINED = 3, 4
"""`tokenizer.ggml.token_type` of what is never cut into pieces."""
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


class ConversionError(Exception):
    """The file holds what can't be carried over exactly."""


def main(argv: list[str] | None = None) -> int:
    """Convert, print where; exit code 2 with one line if it can't be done."""
    parser = argparse.ArgumentParser(description="A GGUF file as a Hugging Face folder.")
    parser.add_argument("gguf", type=Path, help="file of a Llama model")
    parser.add_argument("folder", type=Path, help="where to write; made if it is missing")
    arguments = parser.parse_args(argv)
    try:
        convert(arguments.gguf, arguments.folder)
    except ConversionError as error:
        print(f"{arguments.gguf}: {error}", file=sys.stderr)
        return 2
    print(arguments.folder)
    return 0


def convert(gguf_file: Path, folder: Path) -> None:
    """Write the folder.

    Raises:
        ConversionError: the file is none, or holds something that is not known here.
    """
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    try:
        reader = GGUFReader(gguf_file)
    except (OSError, ValueError) as error:
        raise ConversionError(f"is no readable GGUF file: {error}") from error
    said = {name: field.contents() for name, field in reader.fields.items()}
    tensors = dict(_published_tensors(reader.tensors, said))
    config = _config(said, tied="lm_head.weight" not in tensors)
    tokenizer = _tokenizer(said)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", special)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _write_json(folder / "config.json", config)


def _need(said: dict[str, Any], key: str) -> Any:
    if key not in said:
        raise ConversionError(f"has no {key}, which a Llama model's file says")
    return said[key]


def _config(said: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM."""
    heads, hidden = _need(said, "llama.attention.head_count"), _need(said, "llama.embedding_length")
    head_dim = said.get("llama.attention.key_length", hidden // heads)
    rotated = said.get("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ConversionError(
            f"llama.rope.dimension_count is {rotated}, but heads are {head_dim} wide; only whole "
            "heads can be rotated"
        )
    scaling = said.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ConversionError(f"llama.rope.scaling.type is {scaling!r}; only 'none' is known")
    # Stored as float32: the shortest decimal that means the same float32 is what was meant.
    eps = float(str(np.float32(_need(said, "llama.attention.layer_norm_rms_epsilon"))))
    eos = said.get("tokenizer.ggml.eos_token_id")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(_need(said, "tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": _need(said, "llama.feed_forward_length"),
        "num_hidden_layers": _need(said, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": said.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": eps,
        "rope_theta": float(said.get("llama.rope.freq_base", 10000.0)),
        "max_position_embeddings": _need(said, "llama.context_length"),
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": said.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos,
        "pad_token_id": said.get("tokenizer.ggml.padding_token_id", eos),
        "torch_dtype": "float32",
    }


def _published_tensors(tensors: Any, said: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    from gguf.quants import dequantize

    if (architecture := _need(said, "general.architecture")) != "llama":
        raise ConversionError(f"is a {architecture!r} model; only 'llama' is known")
    heads = _need(said, "llama.attention.head_count")
    kv_heads = said.get("llama.attention.head_count_kv", heads)
    for tensor in tensors:
        kind, values = tensor.name.split(".")[-2], dequantize(tensor.data, tensor.tensor_type)
        if kind in ("attn_q", "attn_k"):
            values = _halves_from_pairs(values, heads if kind == "attn_q" else kv_heads)
        yield _published_name(tensor.name), np.ascontiguousarray(values, dtype=np.float32)


def _published_name(name: str) -> str:
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in OTHER_TENSORS and parts[1] == "weight":
        return f"{OTHER_TENSORS[parts[0]]}.weight"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER_TENSORS and parts[3] == "weight":
        return f"model.layers.{parts[1]}.{LAYER_TENSORS[parts[2]]}.weight"
    raise ConversionError(f"has a tensor {name!r}, which is not known here")


def _halves_from_pairs(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of every head: GGUF rotates neighbours (0, 1), transformers rows H/2 apart (0, H/2)."""
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _tokenizer(said: dict[str, Any]) -> Any:
    """Byte-level BPE as SmolLM cuts text: digits apart, then GPT-2's pattern.

    Source: llama.cpp's LLAMA_VOCAB_PRE_TYPE_SMOLLM.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    found = (said.get("tokenizer.ggml.model"), said.get("tokenizer.ggml.pre"))
    if found != ("gpt2", "smollm"):
        raise ConversionError(
            f"cuts text by tokenizer.ggml.model {found[0]!r} and pre {found[1]!r}; only 'gpt2' and "
            "'smollm' are known"
        )
    tokens, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in said["tokenizer.ggml.merges"]]
    bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (TOKEN_CONTROL, TOKEN_USER_DEFINED):
            special = kind == TOKEN_CONTROL
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {ours: said.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in names.items()}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=said["llama.context_length"],
        **{f"{name}_token": tokens[i] for name, i in ids.items() if i is not None},
    )
    wrapped.chat_template = said.get("tokenizer.chat_template")
    return wrapped


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
