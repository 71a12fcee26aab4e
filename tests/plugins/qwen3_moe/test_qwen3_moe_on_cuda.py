"""Claim, on a CUDA device: at the shapes of Qwen3-30B-A3B and of a deep model with 48 experts, a sparse layer in
bfloat16 runs torch's kernel, computes what the loop over experts does, repeats bit by bit, waits for the device
nowhere, and gives experts without a token a gradient of 0; a whole step through the sharded model is finite.

T tokens, D hidden, K experts per token, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pegboard.contracts import Batch, Targets
from pegboard.device import local_device
from pegboard.initialization import init_module_weights
from pegboard.parallel import (
    clip_gradients,
    gradient_norm,
    join_ranks,
    leave_ranks,
    shard_model,
)
from pegboard_plugins.blocks.experts import Experts
from pegboard_plugins.blocks.grouped_gemm import LOOP, choose_grouped_gemm
from pegboard_plugins.losses.chunked_cross_entropy import ChunkedCrossEntropyLoss
from pegboard_plugins.qwen3_moe.component import Qwen3MoE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
M1 = {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
}
M2 = {
    "hidden_size": 1024,
    "moe_intermediate_size": 768,
    "num_experts": 48,
    "num_experts_per_tok": 4,
    "num_attention_heads": 16,
}
SHAPES = [pytest.param(M1, id="m1"), pytest.param(M2, id="m2")]


def layer(shape: dict[str, int]) -> Experts:
    torch.manual_seed(0)
    with torch.device("cuda"):
        experts = Experts(
            shape["hidden_size"], shape["moe_intermediate_size"], shape["num_experts"]
        )
        for parameter in experts.parameters():
            parameter.data.normal_(0, 0.02)
    return experts.bfloat16()


def inputs(shape: dict[str, int], used: int, num_tokens: int = 2048) -> list[Tensor]:
    """Hidden states, ids among the first `used` experts, and weights."""
    torch.manual_seed(1)
    hidden_TD = torch.randn(num_tokens, shape["hidden_size"], device="cuda").bfloat16()
    scores = torch.rand(num_tokens, used, device="cuda")
    weights_TK, ids_TK = scores.topk(shape["num_experts_per_tok"], dim=-1)
    return [hidden_TD, ids_TK, weights_TK / weights_TK.sum(-1, keepdim=True)]


def gradients(experts: Experts, values: list[Tensor]) -> list[Tensor]:
    hidden_TD, ids_TK, weights_TK = values
    leaves = [hidden_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()]
    out_TD = experts(leaves[0], ids_TK, leaves[1])
    wanted = [*leaves, experts.gate_up_proj, experts.down_proj]
    return [out_TD.detach(), *torch.autograd.grad(out_TD, wanted, hidden_TD)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_of_this_shape_is_what_the_loop_computes(shape: dict[str, int]) -> None:
    experts, values = layer(shape), inputs(shape, shape["num_experts"])
    widths = (shape["hidden_size"], shape["moe_intermediate_size"])
    assert choose_grouped_gemm(values[0], *widths) is not LOOP
    found, again = gradients(experts, values), gradients(experts, values)
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
    experts.kernel = LOOP
    for one, two in zip(found, gradients(experts, values), strict=True):
        assert (one.float() - two.float()).norm() <= 2e-2 * two.float().norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_experts_without_a_token_get_no_gradient(shape: dict[str, int]) -> None:
    used = 2 * shape["num_experts_per_tok"]
    found = gradients(layer(shape), inputs(shape, used))
    for gradient in found[3:]:
        assert gradient[:used].abs().sum((1, 2)).all() and not gradient[used:].any()
    assert all(torch.isfinite(one).all() for one in found)


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_wait_for_the_device_nowhere(shape: dict[str, int]) -> None:
    experts, values = layer(shape), inputs(shape, shape["num_experts"])
    gradients(experts, values)  # what is set up once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(experts, values)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_of_the_sharded_model_is_finite_and_moves_every_weight(
    shape: dict[str, Any],
) -> None:
    ranks = join_ranks(local_device())
    try:
        fields = {
            **shape,
            "vocab_size": 4096,
            "intermediate_size": 2048,
            "num_hidden_layers": 2,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "norm_topk_prob": True,
        }
        with torch.device("meta"):
            built = Qwen3MoE(Qwen3MoE.Config.model_validate(fields)).build()
        module = shard_model(built, ranks, torch.bfloat16, torch.float32)
        module.to_empty(device=ranks.device)
        init_module_weights(module, 0)
        batch = packed_batch(4096, [700, 1, 1347]).to(ranks.device)
        module.train()
        module(batch, ChunkedCrossEntropyLoss()).loss.backward()
        parameters = dict(module.named_parameters())
        norm = gradient_norm(parameters.values(), ranks)
        assert torch.isfinite(norm) and norm > 0
        clip_gradients(parameters.values(), norm, float(norm) / 2)
        assert float(gradient_norm(parameters.values(), ranks)) == pytest.approx(
            float(norm) / 2, rel=1e-3
        )
        for name, parameter in parameters.items():
            assert parameter.dtype == torch.float32, name
            assert parameter.grad is not None and bool(parameter.grad.to_local().any()), name  # type: ignore[attr-defined]
    finally:
        leave_ranks()


def packed_batch(vocab_size: int, lengths: list[int]) -> Batch:
    """Random samples of these lengths; all but the last token of each is supervised."""
    generator = torch.Generator().manual_seed(2)
    ids_T = torch.randint(0, vocab_size, (sum(lengths),), generator=generator)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    keep_T = torch.ones(len(ids_T), dtype=torch.bool)
    keep_T[ends[1:] - 1] = False
    places_K = keep_T.nonzero().flatten()
    return Batch(
        input_ids_T=ids_T,
        position_ids_T=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=ends.int(),
        max_seqlen=max(lengths),
        targets=Targets(
            places_K,
            ids_T[places_K + 1],
            torch.ones(len(places_K)),
            torch.zeros_like(places_K),
            1.0 / len(places_K),
        ),
        num_tokens=len(ids_T),
    )
