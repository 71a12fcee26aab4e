"""Claim: a GGUF file becomes the very folder that it was made of: weights bit by bit, config.json,
tokenizer and chat template; and what can't be carried over exactly is refused by name."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

gguf = pytest.importorskip("gguf", reason="reads and writes GGUF: pip install gguf")

SCRIPTS = Path(__file__).resolve().parents[1] / "smollm2"
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
HEADS, KV_HEADS = 4, 2


def script(name: str) -> Any:
    """A script that is no module of the package."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


convert_gguf = script("convert_gguf")


def byte_letters() -> list[str]:
    """The 256 letters that byte-level BPE writes bytes as."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


TOKENS = ["<pad>", "<s>", "</s>", *byte_letters(), "ab", "Ġab"]


def llama(tied: bool) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=1e-5,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 777.0},
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def pairs_from_halves(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Query or key rows as GGUF has them: the two of a rotated pair beside each other."""
    out = np.empty_like(rows)
    size = len(rows) // num_heads
    for head in range(num_heads):
        for pair in range(size // 2):
            for half in range(2):
                out[head * size + 2 * pair + half] = rows[head * size + half * size // 2 + pair]
    return out


def write_gguf(file: Path, model: Any, change: Callable[[Any], None] | None = None) -> None:
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(777.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 3)])
    writer.add_token_merges(["a b", "Ġ ab"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    (change or (lambda one: one.add_tokenizer_pre("smollm")))(writer)
    names = {theirs: ours for ours, theirs in convert_gguf.LAYER_TENSORS.items()}
    others = {theirs: ours for ours, theirs in convert_gguf.OTHER_TENSORS.items()}
    for name, tensor in model.state_dict().items():
        path, values = name.removesuffix(".weight"), tensor.numpy()
        if path == "lm_head" and config.tie_word_embeddings:
            continue
        if path in others:
            kind = others[path]
        else:
            _, _, layer, inner = path.split(".", 3)
            kind = f"blk.{layer}.{names[inner]}"
        if kind.endswith("attn_q"):
            values = pairs_from_halves(values, HEADS)
        if kind.endswith("attn_k"):
            values = pairs_from_halves(values, KV_HEADS)
        writer.add_tensor(f"{kind}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [False, True])
def test_the_folder_opens_as_the_model_that_was_written(tied: bool, tmp_path: Path) -> None:
    model = llama(tied)
    write_gguf(tmp_path / "model.gguf", model)
    convert_gguf.convert(tmp_path / "model.gguf", tmp_path / "folder")
    on_disk = load_file(tmp_path / "folder" / "model.safetensors")
    wanted = {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    assert on_disk.keys() == wanted.keys()
    assert all(torch.equal(on_disk[name], tensor) for name, tensor in wanted.items())

    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(opened(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert opened.config.rms_norm_eps == 1e-5
    assert opened.generation_config.eos_token_id == 2


def test_the_tokenizer_cuts_digits_apart_and_gives_every_text_back(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", llama(tied=True))
    convert_gguf.convert(tmp_path / "model.gguf", tmp_path / "folder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("ab ab123</s>")) == [
        *("ab", "Ġab", "1", "2", "3", "</s>")
    ]
    text = "It's 12.50 ~ \n\n  é 你好"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<s>ab</s>"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<s>",
        "</s>",
        "<pad>",
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda writer: writer.add_tokenizer_pre("llama-bpe"), "llama-bpe"),
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN), "yarn"),
        (lambda writer: writer.add_rope_dimension_count(4), "rope.dimension_count is 4"),
        (lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(4, "f4")), "rope_freqs"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    change: Callable[[Any], None], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def changed(writer: Any) -> None:
        if named != "llama-bpe":
            writer.add_tokenizer_pre("smollm")
        change(writer)

    write_gguf(tmp_path / "model.gguf", llama(tied=True), changed)
    words = [str(tmp_path / "model.gguf"), str(tmp_path / "folder")]
    assert convert_gguf.main(words) == 2
    line = capsys.readouterr().err
    assert named in line and line.count("\n") == 1
    assert not (tmp_path / "folder").exists()


def test_another_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(json.dumps({"no": "GGUF"}).encode() * 10)
    assert convert_gguf.main([str(file), str(tmp_path / "folder")]) == 2
    assert "is no readable GGUF file" in capsys.readouterr().err
