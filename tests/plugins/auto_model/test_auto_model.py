"""Claim: a model that transformers writes gives, over a packed row and with gradients, what transformers gives for
each sample alone; its weights go in and out under the same keys, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pegboard
from pegboard import Batch, BuiltModel, Targets
from pegboard.initialization import init_module_weights
from pegboard.weight_export import iter_published
from pegboard.weight_loading import load_published_weights
from pegboard_plugins.auto_model.component import AutoModelForCausalLM
from pegboard_plugins.losses.component import ChunkedCrossEntropy, CrossEntropy

LENGTHS = (5, 1, 9, 4)
COMMON: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4, "head_dim": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8, "attention_bias": True},
    "gemma": {"head_dim": 8, "hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0,
             "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "stablelm": {"use_qkv_bias": True, "attention_dropout": 0.0},
    "olmo2": {},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
                "attention_multiplier": 0.3},
    "cohere": {"logit_scale": 0.25},
    "starcoder2": {"sliding_window": None, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "phi": {"resid_pdrop": 0.0, "embd_pdrop": 0.0},
}  # fmt: skip


def config_json(name: str) -> dict[str, Any]:
    return {**COMMON, **ARCHITECTURES[name], "model_type": name}


def component(name: str, **fields: Any) -> AutoModelForCausalLM:
    text = json.dumps({"hf_config": config_json(name), **fields})
    return AutoModelForCausalLM(AutoModelForCausalLM.Config.model_validate_json(text))


# It does not hand the samples' bounds on to attention.
FIELDS = {"stablelm": {"attention": "sdpa"}}


def ours(name: str, **fields: Any) -> BuiltModel:
    with torch.device("meta"):
        built = component(name, **{**FIELDS.get(name, {}), **fields}).build()
    assert not built.weight_map.unmapped(n for n, _ in built.module.named_parameters())
    init_module_weights(built.module.to_empty(device="cpu"), seed=1)
    return built


def reference(name: str, folder: Path) -> Any:
    import transformers

    torch.manual_seed(0)
    fields = config_json(name)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def packed(ids: torch.Tensor) -> Batch:
    positions, labels, start = list[int](), list[int](), 0
    for length in LENGTHS:
        positions += range(start, start + length - 1)
        labels += ids[start + 1 : start + length].tolist()
        start += length
    count = len(positions)
    return Batch(
        input_ids_T=ids,
        position_ids_T=torch.cat([torch.arange(length) for length in LENGTHS]),
        cu_seqlens=torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32),
        max_seqlen=max(LENGTHS),
        targets=Targets(
            torch.tensor(positions),
            torch.tensor(labels),
            torch.ones(count),
            torch.zeros(count, dtype=torch.long),
            1 / count,
        ),
        num_tokens=len(ids),
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_loss_and_gradients_equal_transformers(name: str, tmp_path: Path) -> None:
    theirs = reference(name, tmp_path)
    built = ours(name)
    load_published_weights(built.module, built.weight_map, tmp_path)
    ids = torch.randint(3, 67, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    batch = packed(ids)
    theirs.eval()
    module: Any = built.module.eval()
    expected = torch.cat([theirs(input_ids=part[None]).logits[0] for part in ids.split(LENGTHS)])
    torch.testing.assert_close(module.logits(batch), expected, rtol=1e-4, atol=1e-5)

    loss_part = CrossEntropy if "gemma2" in name else ChunkedCrossEntropy
    output = module(batch, loss_part(loss_part.Config()).build())
    output.loss.backward()
    targets = batch.targets
    wanted = torch.nn.functional.cross_entropy(expected[targets.positions_K], targets.labels_K)
    wanted.backward()
    torch.testing.assert_close(output.loss, wanted, rtol=1e-5, atol=1e-6)
    gradients = {key: p.grad for key, p in theirs.named_parameters()}
    for key, parameter in module.named_parameters():
        scale = gradients[key].abs().max() + 1e-6
        assert (parameter.grad - gradients[key]).abs().max() / scale < 1e-4, key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_go_in_and_out_bit_for_bit(name: str, tmp_path: Path) -> None:
    import transformers

    reference(name, tmp_path)
    published = load_file(tmp_path / "model.safetensors")
    built = ours(name)
    load_published_weights(built.module, built.weight_map, tmp_path)
    tensors = dict(built.module.named_parameters())
    again = dict(iter_published(tensors, built.weight_map, lambda tensor: tensor))
    assert again.keys() == published.keys()
    assert all(torch.equal(again[key], published[key]) for key in published)
    out = tmp_path / "out"
    out.mkdir()
    save_file(
        {k: t.contiguous() for k, t in again.items()}, out / "model.safetensors", {"format": "pt"}
    )
    (out / "config.json").write_text(json.dumps(built.hf_config), encoding="utf-8")
    opened: Any = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    report = opened[1]
    assert not report["missing_keys"] and not report["unexpected_keys"]


@pytest.mark.parametrize("name", ["llama", "gemma", "gemma2", "gpt2"])
def test_fresh_weights_depend_on_the_seed_alone(name: str) -> None:
    one, two = ours(name), ours(name)
    torch.manual_seed(7)
    for (key, a), (_, b) in zip(
        one.module.state_dict().items(), two.module.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), key
        assert torch.isfinite(a).all(), key


def test_all_attentions_give_the_same() -> None:
    ids = torch.randint(3, 67, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    logits = [
        ours("llama", attention=attention).module.eval().logits(packed(ids))  # type: ignore[operator]
        for attention in ("packed", "sdpa", "eager")
    ]
    for other in logits[1:]:
        torch.testing.assert_close(logits[0], other, rtol=1e-5, atol=1e-5)


def test_a_window_under_packed_attention_is_refused_rather_than_ignored() -> None:
    built: Any = ours("mistral", attention="packed").module
    with pytest.raises(NotImplementedError, match='sliding_window.*attention to "sdpa"'):
        built.logits(packed(torch.arange(3, 3 + sum(LENGTHS))))


def test_an_architecture_that_transformers_does_not_know_is_an_error() -> None:
    text = json.dumps({"hf_config": {**COMMON, "model_type": "lama"}})
    config = AutoModelForCausalLM.Config.model_validate_json(text)
    with pytest.raises(pegboard.ConfigError, match="no causal language model of model_type 'lama'"):
        AutoModelForCausalLM(config).build()


def test_an_architecture_that_hides_the_bounds_is_told_which_attention_to_use() -> None:
    built: Any = ours("stablelm", attention="packed").module
    with pytest.raises(NotImplementedError, match='StableLmAttention.*attention to "sdpa"'):
        built.logits(packed(torch.arange(3, 3 + sum(LENGTHS))))
