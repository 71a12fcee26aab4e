"""Claim: Qwen3-MoE computes what transformers' Qwen3MoeForCausalLM computes, forward and backward,
its auxiliary loss included, for every mix of dense and sparse layers; and its weights go to disk
and back without changing a bit or a name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from pegboard.contracts import Batch, BuiltModel, Head, LossOutput, Targets, TextModel
from pegboard.errors import WeightsError
from pegboard.initialization import init_module_weights
from pegboard.weight_export import iter_published
from pegboard.weight_loading import load_published_weights
from pegboard_plugins.qwen3_moe.component import Qwen3MoE
from pegboard_plugins.qwen3_moe.modeling import Qwen3MoECausalLM

LENGTHS = (5, 1, 9)
COEF = 0.05
MIXES: list[dict[str, Any]] = [
    {},
    {"mlp_only_layers": [0], "tie_word_embeddings": True},
    {"decoder_sparse_step": 2, "norm_topk_prob": False, "attention_bias": True},
]
mixes = pytest.mark.parametrize("mix", MIXES, ids=["sparse", "first_dense_tied", "every_second"])


class ReferenceCrossEntropy:
    """The plainest loss that keeps the Loss protocol."""

    def __call__(self, hidden_TD: Tensor, head: Head, targets: Targets) -> LossOutput:
        logits = head.logits(hidden_TD[targets.positions_K])
        losses = torch.nn.functional.cross_entropy(logits, targets.labels_K, reduction="none")
        return LossOutput(
            (losses * targets.weights_K).sum() * targets.scale, losses.detach().float()
        )

    def step_counts(self, batch: Batch) -> Mapping[str, float]:
        return {"targets": float(batch.targets.weights_K.sum())}


def packed(ids: Tensor, lengths: tuple[int, ...]) -> Batch:
    """A row of samples in which every token but a sample's first is a target."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    none = torch.zeros(0, dtype=torch.long)
    positions = torch.cat(
        [
            none,
            *(
                torch.arange(int(s), int(s) + n - 1)
                for s, n in zip(starts[:-1], lengths, strict=True)
            ),
        ]
    )
    count = len(positions)
    return Batch(
        input_ids_T=ids,
        position_ids_T=torch.cat([none, *(torch.arange(n) for n in lengths)]),
        cu_seqlens=starts.int(),
        max_seqlen=max(lengths, default=0),
        targets=Targets(
            positions,
            ids[positions + 1] if count else none,
            torch.ones(count),
            torch.zeros(count, dtype=torch.long),
            1 / max(count, 1),
        ),
        num_tokens=len(ids),
        scales={"tokens": 1 / max(len(ids), 1)},
    )


def reference(mix: Mapping[str, Any]) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "initializer_range": 0.2,
        "router_aux_loss_coef": COEF,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**config, **mix}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if "gate.weight" in name or "experts." in name:
                parameter.normal_(0, 0.3)
    return model


def ours_from(folder: Path, **changes: Any) -> tuple[BuiltModel, Qwen3MoECausalLM]:
    fields = Qwen3MoE.config_from_hf(json.loads((folder / "config.json").read_text()))
    config = Qwen3MoE.Config.model_validate_json(
        json.dumps({"balancing": "hf_pooled", **fields, **changes})
    )
    with torch.device("meta"):
        built = Qwen3MoE(config).build()
    module = built.module.to_empty(device="cpu")
    init_module_weights(module, seed=1)
    load_published_weights(module, built.weight_map, folder)
    assert isinstance(module, Qwen3MoECausalLM)
    return built, module


def published(built: BuiltModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(iter_published(tensors, built.weight_map, lambda tensor: tensor))


def by_expert(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Transformers' tensors in memory under the released names."""
    split: dict[str, Tensor] = {}
    for name, tensor in named.items():
        prefix, _, leaf = name.rpartition(".")
        if not prefix.endswith("experts"):
            split[name] = tensor
            continue
        for expert, one in enumerate(tensor.unbind(0)):
            if leaf == "gate_up_proj":
                gate, up = one.chunk(2)
                split[f"{prefix}.{expert}.gate_proj.weight"] = gate
                split[f"{prefix}.{expert}.up_proj.weight"] = up
            else:
                split[f"{prefix}.{expert}.down_proj.weight"] = one
    return split


@mixes
def test_logits_and_gradients_equal_transformers(mix: dict[str, Any], tmp_path: Path) -> None:
    theirs = reference(mix)
    theirs.save_pretrained(tmp_path)
    built, ours = ours_from(tmp_path, router_aux_loss_coef=0.0)
    ids = torch.randint(0, 61, (sum(LENGTHS),))
    batch = packed(ids, LENGTHS)
    expected = torch.cat([theirs(input_ids=part[None]).logits[0] for part in ids.split(LENGTHS)])
    torch.testing.assert_close(ours.logits(batch), expected, rtol=1e-5, atol=1e-5)

    loss = torch.nn.functional.cross_entropy(
        expected[batch.targets.positions_K], batch.targets.labels_K
    )
    torch.autograd.backward(loss)
    output = ours(batch, ReferenceCrossEntropy())
    torch.autograd.backward(output.loss)
    torch.testing.assert_close(output.loss, loss, rtol=1e-5, atol=1e-6)
    compare_gradients(built, ours, theirs)


@mixes
def test_loss_with_the_auxiliary_loss_equals_transformers(
    mix: dict[str, Any], tmp_path: Path
) -> None:
    theirs = reference(mix)
    theirs.save_pretrained(tmp_path)
    built, ours = ours_from(tmp_path)
    ids = torch.randint(0, 61, (17,))
    batch = packed(ids, (17,))
    expected = theirs(input_ids=ids[None], labels=ids[None], output_router_logits=True)
    torch.autograd.backward(expected.loss)
    output = ours(batch, ReferenceCrossEntropy())
    torch.autograd.backward(output.loss)
    found = output.metrics["balancing_loss"] / COEF
    torch.testing.assert_close(found, expected.aux_loss.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-6, atol=1e-6)
    compare_gradients(built, ours, theirs)


def compare_gradients(
    built: BuiltModel, ours: Qwen3MoECausalLM, theirs: Qwen3MoeForCausalLM
) -> None:
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    wanted = by_expert({n: p.grad for n, p in theirs.named_parameters() if p.grad is not None})
    found = published(built, gradients)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-9, name


@mixes
def test_a_round_trip_keeps_every_name_and_bit(mix: dict[str, Any], tmp_path: Path) -> None:
    theirs = reference(mix)
    theirs.save_pretrained(tmp_path)
    built, ours = ours_from(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    exported = published(built, dict(ours.named_parameters()))
    assert set(exported) == set(on_disk)
    assert all(torch.equal(exported[name], tensor) for name, tensor in on_disk.items())
    # The released layout: one tensor for each projection of each expert.
    sparse = [i for i in range(3) if ours.balance and f"layer_{i}" in ours.balance.layer_names]
    for name in (f"model.layers.{sparse[0]}.mlp.experts.5.up_proj.weight",):
        assert exported[name].shape == (24, 32)
    assert not any("gate_up_proj" in name for name in exported)


def test_experts_stacked_as_in_memory_are_read_as_well(tmp_path: Path) -> None:
    theirs = reference({})
    theirs.save_pretrained(tmp_path / "released")
    _, expected = ours_from(tmp_path / "released")
    stacked = tmp_path / "stacked"
    stacked.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors
    save_file(tensors, stacked / "model.safetensors")
    (stacked / "config.json").write_text((tmp_path / "released" / "config.json").read_text())
    built, found = ours_from(stacked)
    for (name, one), two in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, two), name
    # And it leaves in the released layout.
    assert "model.layers.0.mlp.experts.0.up_proj.weight" in built.weight_map.published_shapes()


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    reference({}).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.experts\.3\.down_proj"):
        ours_from(tmp_path)


def test_the_exported_config_and_weights_open_in_transformers(tmp_path: Path) -> None:
    theirs = reference({"mlp_only_layers": [1]})
    theirs.save_pretrained(tmp_path)
    built, ours = ours_from(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    tensors = published(built, dict(ours.named_parameters()))
    save_file(
        {n: t.detach().clone() for n, t in tensors.items()},
        out / "model.safetensors",
        {"format": "pt"},
    )
    (out / "config.json").write_text(json.dumps(built.hf_config))
    reopened: Any = Qwen3MoeForCausalLM.from_pretrained(
        out, output_loading_info=True, dtype=torch.float32
    )
    model, report = reopened
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for (name, one), two in zip(theirs.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_a_packed_sample_computes_what_it_computes_alone(tmp_path: Path) -> None:
    reference({}).save_pretrained(tmp_path)
    _, ours = ours_from(tmp_path)
    ours.double()
    ids = torch.randint(0, 61, (sum(LENGTHS),))
    together = ours.logits(packed(ids, LENGTHS))
    alone = torch.cat([ours.logits(packed(part, (len(part),))) for part in ids.split(LENGTHS)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_bfloat16_weights_keep_the_hidden_states_in_bfloat16(tmp_path: Path) -> None:
    reference({}).save_pretrained(tmp_path)
    _, ours = ours_from(tmp_path)
    assert isinstance(ours, TextModel)
    ours.bfloat16()
    batch = packed(torch.randint(0, 61, (sum(LENGTHS),)), LENGTHS)
    hidden_TD, auxiliary = ours.run_layers(ours.embed(batch.input_ids_T), batch)
    assert hidden_TD.dtype == torch.bfloat16
    assert auxiliary["balancing_loss"].dtype == torch.float32


@pytest.mark.parametrize("balancing", ["lagged", "per_sequence", "hf_pooled", "two_pass"])
def test_a_batch_without_a_token_runs_and_gives_zero_gradients(
    balancing: str, tmp_path: Path
) -> None:
    reference({}).save_pretrained(tmp_path)
    _, ours = ours_from(tmp_path, balancing=balancing, router_z_loss_coef=0.1)
    batch = packed(torch.zeros(0, dtype=torch.long), ())
    torch.autograd.backward(ours(batch, ReferenceCrossEntropy()).loss)
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())
