"""Claim: Llama keeps every promise of a model, and computes what transformers' LlamaForCausalLM
computes, forward and backward, tied and untied, grouped, biased and stretched; a folder of
transformers comes back with every name and bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pegboard_llama.component import Llama
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from pegboard import Batch
from pegboard.testing import contract_for

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
STRETCHED = {
    # So small a context that the three kinds of frequencies all occur in a head of 16.
    "head_dim": 16,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def transformers_logits(folder: Path, batch: Batch, model: Any = None) -> Tensor:
    """Every sample alone through transformers; its names must be the folder's."""
    model = model or transformers_model(folder)
    parts = torch.split(batch.input_ids_T, batch.cu_seqlens.diff().tolist())
    return torch.cat([model(input_ids=part[None]).logits[0] for part in parts])


def transformers_model(folder: Path) -> Any:
    opened: Any = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, report = opened
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return model


def transformers_gradients(folder: Path, batch: Batch) -> dict[str, Tensor]:
    model, targets = transformers_model(folder), batch.targets
    logits = transformers_logits(folder, batch, model)[targets.positions_K]
    loss = functional.cross_entropy(logits, targets.labels_K, reduction="sum") * targets.scale
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def equals_transformers(on_two_ranks: bool = False, **fields: Any) -> Any:
    """All checks for one shape of Llama."""

    def publish(folder: Path) -> None:
        said = {**TINY, **fields, "rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}
        if scaling := said.pop("rope_scaling", None):
            said["rope_parameters"] = {"rope_theta": 777.0, **scaling}
        LlamaForCausalLM(LlamaConfig(**said)).save_pretrained(folder)

    skip = {} if on_two_ranks else {"two_ranks_are_one": "two shapes of the others do"}
    return contract_for(
        Llama,
        config={**TINY, **fields},
        skip=skip,
        reference=transformers_logits,
        tolerance=1e-5,
        reference_gradients=transformers_gradients,
        gradient_tolerance=1e-4,
        publish=publish,
    )


test_untied = equals_transformers(on_two_ranks=True)
test_tied = equals_transformers(on_two_ranks=True, tie_word_embeddings=True)
test_one_key_for_all_queries = equals_transformers(num_key_value_heads=1)
test_every_query_its_key = equals_transformers(num_key_value_heads=None)
test_biased_attention = equals_transformers(attention_bias=True)
test_biased_feed_forward = equals_transformers(mlp_bias=True, tie_word_embeddings=True)
test_stretched_positions = equals_transformers(**STRETCHED)
