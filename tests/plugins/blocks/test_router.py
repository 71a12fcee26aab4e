"""Claim: both routers choose and weight as their definitions say, in float32 whatever the compute
dtype, and the biased one evens out the load without a loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pegboard_plugins.blocks.router import BiasedSigmoidRouter, Routing, SoftmaxRouter

D, E, K = 8, 6, 2


def softmax_router(norm: bool = True) -> SoftmaxRouter:
    router = SoftmaxRouter(D, E, K, norm_topk_prob=norm)
    router.weight.data.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    return router


def biased_router(**options: float) -> BiasedSigmoidRouter:
    router = BiasedSigmoidRouter(D, E, K, norm_topk_prob=True, **options)
    router.reset_parameters(torch.Generator().manual_seed(0))
    router.weight.data.mul_(50)
    return router


def hidden(num_tokens: int = 50) -> Tensor:
    return torch.randn(num_tokens, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm", [True, False])
def test_softmax_takes_the_largest_and_divides_by_their_sum_if_told(norm: bool) -> None:
    router, states = softmax_router(norm), hidden()
    routing: Routing = router(states)
    scores = (states @ router.weight.T).softmax(-1)
    expected, ids = scores.sort(descending=True)
    assert torch.equal(routing.expert_ids_TK, ids[:, :K])
    expected = expected[:, :K]
    if norm:
        expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.weights_TK, expected)
    torch.testing.assert_close(routing.scores_TE, scores)


def test_bfloat16_states_are_routed_in_float32() -> None:
    states = hidden().bfloat16()
    routing = softmax_router()(states)
    assert routing.weights_TK.dtype == routing.logits_TE.dtype == torch.float32
    wide = softmax_router()(states.float())
    assert torch.equal(routing.logits_TE, wide.logits_TE)
    leaf = states.clone().requires_grad_()
    torch.autograd.backward(softmax_router()(leaf).logits_TE.sum())
    assert leaf.grad is not None and leaf.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("make", [softmax_router, biased_router])
def test_gradients_are_those_of_the_plain_computation(
    make: type[SoftmaxRouter] | type[BiasedSigmoidRouter],
) -> None:
    router = make().double()  # type: ignore[call-arg]
    states = hidden(5).double().requires_grad_()

    def run(states: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        routing = torch.func.functional_call(router, {"weight": weight}, (states,))
        return routing.weights_TK, routing.scores_TE, routing.logits_TE

    assert torch.autograd.gradcheck(run, (states, router.weight))


def test_the_bias_changes_the_choice_and_never_the_weight() -> None:
    router, states = biased_router(scaling_factor=2.5), hidden()
    before = router(states)
    router.e_score_correction_bias[3] = 10.0
    after = router(states)
    assert (after.expert_ids_TK == 3).any(-1).all()
    scores = (states @ router.weight.T).sigmoid()
    chosen = scores.gather(-1, after.expert_ids_TK)
    expected = 2.5 * chosen / chosen.sum(-1, keepdim=True)
    torch.testing.assert_close(after.weights_TK, expected)
    torch.testing.assert_close(before.scores_TE, after.scores_TE)


def test_following_the_load_evens_it_out() -> None:
    router = biased_router(bias_update_speed=0.02)
    states = hidden(400) + 0.6  # most tokens like the same experts

    def worst() -> float:
        counts = torch.bincount(router(states).expert_ids_TK.flatten(), minlength=E)
        router.follow_load(counts.float())
        return float(counts.max() / counts.float().mean())

    first = worst()
    for _ in range(200):
        last = worst()
    assert first > 1.5
    assert last < 1.25


def test_no_token_is_routed_without_complaint() -> None:
    for router in (softmax_router(), biased_router()):
        routing = router(hidden(0))
        assert routing.expert_ids_TK.shape == routing.weights_TK.shape == (0, K)
        torch.autograd.backward(routing.weights_TK.sum() + routing.logits_TE.sum())
        assert router.weight.grad is not None and not router.weight.grad.any()
