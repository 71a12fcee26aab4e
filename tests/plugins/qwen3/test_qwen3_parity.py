"""Claim: Qwen3 computes what transformers' Qwen3ForCausalLM computes, forward and backward, and its
weights go to disk and back without changing a bit or a name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from pegboard.contracts import Batch, BuiltModel, Head, LossOutput, Targets, TextModel
from pegboard.initialization import init_module_weights
from pegboard.weight_export import iter_published
from pegboard.weight_loading import load_published_weights
from pegboard_plugins.qwen3.component import Qwen3
from pegboard_plugins.qwen3.modeling import Qwen3CausalLM

LENGTHS = (5, 1, 9)
VARIANTS = [
    pytest.param(
        tied,
        query_ratio,
        bias,
        id=f"{'tied' if tied else 'untied'}-query_ratio{query_ratio}-bias{bias}",
    )
    for tied, query_ratio, bias in [
        (True, 4, False),
        (False, 2, False),
        (False, 1, True),
        (True, 8, False),
    ]
]


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
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    positions = torch.cat(
        [torch.arange(s, s + n - 1) for s, n in zip(starts, lengths, strict=False)]
    )
    count = len(positions)
    return Batch(
        input_ids_T=ids,
        position_ids_T=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        max_seqlen=max(lengths),
        targets=Targets(
            positions,
            ids[positions + 1],
            torch.ones(count),
            torch.zeros(count, dtype=torch.long),
            1 / max(count, 1),
        ),
        num_tokens=len(ids),
    )


def reference(tied: bool, query_ratio: int, bias: bool) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=8 // query_ratio,
            head_dim=8,
            tie_word_embeddings=tied,
            attention_bias=bias,
            initializer_range=0.2,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def ours_from(folder: Path) -> tuple[BuiltModel, Qwen3CausalLM]:
    import json

    fields = Qwen3.config_from_hf(json.loads((folder / "config.json").read_text()))
    with torch.device("meta"):
        built = Qwen3(Qwen3.Config(**fields)).build()
    module = built.module.to_empty(device="cpu")
    init_module_weights(module, seed=1)
    load_published_weights(module, built.weight_map, folder)
    assert isinstance(module, Qwen3CausalLM)
    return built, module


def published(built: BuiltModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(iter_published(tensors, built.weight_map, lambda tensor: tensor))


def reference_logits(model: Qwen3ForCausalLM, ids: Tensor) -> Tensor:
    return torch.cat(
        [model(input_ids=part[None]).logits[0] for part in torch.split(ids, list(LENGTHS))]
    )


@pytest.mark.parametrize(("tied", "query_ratio", "bias"), VARIANTS)
def test_logits_and_gradients_equal_transformers(
    tied: bool, query_ratio: int, bias: bool, tmp_path: Path
) -> None:
    theirs = reference(tied, query_ratio, bias)
    theirs.save_pretrained(tmp_path)
    built, ours = ours_from(tmp_path)
    batch = packed(torch.randint(0, 61, (sum(LENGTHS),)), LENGTHS)

    expected = reference_logits(theirs, batch.input_ids_T)
    torch.testing.assert_close(ours.logits(batch), expected, rtol=1e-5, atol=1e-5)

    loss = torch.nn.functional.cross_entropy(
        expected[batch.targets.positions_K], batch.targets.labels_K
    )
    torch.autograd.backward(loss)
    output = ours(batch, ReferenceCrossEntropy())
    torch.autograd.backward(output.loss)
    torch.testing.assert_close(output.loss, loss, rtol=1e-5, atol=1e-6)
    assert output.token_losses_K.shape == batch.targets.labels_K.shape

    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    named = dict(theirs.named_parameters())
    for name, gradient in published(built, gradients).items():
        want = named[name].grad
        assert want is not None
        assert (gradient - want).norm() <= 1e-4 * want.norm(), name


@pytest.mark.parametrize(("tied", "query_ratio", "bias"), VARIANTS)
def test_a_round_trip_keeps_every_name_and_bit(
    tied: bool, query_ratio: int, bias: bool, tmp_path: Path
) -> None:
    reference(tied, query_ratio, bias).save_pretrained(tmp_path)
    built, ours = ours_from(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    exported = published(built, dict(ours.named_parameters()))
    assert set(exported) == set(on_disk)
    assert all(torch.equal(exported[name], tensor) for name, tensor in on_disk.items())


def test_the_exported_config_and_weights_open_in_transformers(tmp_path: Path) -> None:
    theirs = reference(False, 2, False)
    theirs.save_pretrained(tmp_path)
    built, ours = ours_from(tmp_path)
    reopened = Qwen3ForCausalLM(Qwen3Config.from_dict(built.hf_config))
    reopened.load_state_dict(published(built, dict(ours.named_parameters())))
    ids = torch.randint(0, 61, (sum(LENGTHS),))
    torch.testing.assert_close(
        reference_logits(reopened, ids), reference_logits(theirs, ids), rtol=0, atol=0
    )


def test_a_packed_sample_computes_what_it_computes_alone(tmp_path: Path) -> None:
    reference(False, 2, False).save_pretrained(tmp_path)
    _, ours = ours_from(tmp_path)
    ours.double()
    ids = torch.randint(0, 61, (sum(LENGTHS),))
    together = ours.logits(packed(ids, LENGTHS))
    alone = torch.cat(
        [ours.logits(packed(part, (len(part),))) for part in torch.split(ids, list(LENGTHS))]
    )
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_it_is_a_text_model_whose_tied_head_owns_nothing(tmp_path: Path) -> None:
    reference(True, 4, False).save_pretrained(tmp_path)
    built, ours = ours_from(tmp_path)
    assert isinstance(ours, TextModel)
    assert list(ours.lm_head.parameters()) == []
    assert all(unit.path != "lm_head" for unit in built.shard_units)
    assert built.weight_map.unmapped(name for name, _ in ours.named_parameters()) == []


def test_bfloat16_weights_keep_the_hidden_states_in_bfloat16(tmp_path: Path) -> None:
    reference(True, 4, False).save_pretrained(tmp_path)
    _, ours = ours_from(tmp_path)
    ours.bfloat16()
    batch = packed(torch.randint(0, 61, (sum(LENGTHS),)), LENGTHS)
    hidden_TD, auxiliary = ours.run_layers(ours.embed(batch.input_ids_T), batch)
    assert hidden_TD.dtype == torch.bfloat16
    assert auxiliary == {}


def test_a_batch_without_a_token_runs_and_gives_zero_gradients(tmp_path: Path) -> None:
    reference(False, 2, False).save_pretrained(tmp_path)
    _, ours = ours_from(tmp_path)
    none = torch.zeros(0, dtype=torch.long)
    batch = Batch(
        input_ids_T=none,
        position_ids_T=none,
        cu_seqlens=torch.zeros(1, dtype=torch.int32),
        max_seqlen=0,
        targets=Targets(none, none, torch.zeros(0), none, 1.0),
        num_tokens=0,
    )
    torch.autograd.backward(ours(batch, ReferenceCrossEntropy()).loss)
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())
