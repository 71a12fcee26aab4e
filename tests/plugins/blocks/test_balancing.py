"""Claim: the auxiliary losses are means over the real tokens of the step; the exact modes do not
change with packing, accumulation or filler batches; the copied one equals transformers'; and what
is reported of the load is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from loguru import logger
from torch import Tensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from pegboard.contracts import Batch, StepState, Targets
from pegboard_plugins.blocks.balancing import BALANCING_MODES, ExpertBalance, sum_routing
from pegboard_plugins.blocks.router import BiasedSigmoidRouter, SoftmaxRouter
from pegboard_plugins.qwen3_moe.component import Qwen3MoE

D, E, K, L = 8, 6, 2, 3
SAMPLES = (4, 7, 1, 5, 9)


def nothing(tensor: Tensor) -> None:
    """The sum over one rank."""


class Layers:
    """L routers over given hidden states, in float64."""

    def __init__(self, mode: str, *, balancing: float = 0.1, z: float = 0.01) -> None:
        self.routers = [SoftmaxRouter(D, E, K, norm_topk_prob=True).double() for _ in range(L)]
        for seed, router in enumerate(self.routers):
            router.weight.data.normal_(0, 1, generator=torch.Generator().manual_seed(seed))
        names = [f"layer_{i}" for i in range(L)]
        self.balance = ExpertBalance(names, E, K, mode=mode, balancing_coef=balancing, z_coef=z)

    def losses(self, samples: Sequence[int], tokens: int, pad: int = 0) -> dict[str, Tensor]:
        """Of one micro-batch that holds these samples (by number), in a step of `tokens`."""
        states = torch.cat([*(states_of(i) for i in samples), torch.ones(pad, D).double() * 9])
        lengths = [SAMPLES[i] for i in samples] + ([pad] if pad else [])
        batch = batch_of(lengths, sum(SAMPLES[i] for i in samples), 1 / tokens)
        sums = [
            sum_routing(
                router(states),
                batch.num_tokens,
                batch.cu_seqlens,
                per_sequence=self.balance.per_sequence,
            )
            for router in self.routers
        ]
        return dict(self.balance(sums, batch))

    def step(self, cut: Sequence[Sequence[int]], pad: int = 0) -> list[Tensor]:
        """Sum of losses and gradients of a whole step, cut into these micro-batches."""
        tokens = sum(SAMPLES[i] for samples in cut for i in samples)
        if self.balance.wants_first_pass(len(cut)):
            with torch.no_grad():
                for samples in cut:
                    self.losses(samples, tokens, pad)
            self.balance.end_first_pass(nothing)
        total = torch.zeros((), dtype=torch.float64)
        for router in self.routers:
            router.weight.grad = None
        for samples in cut:
            loss = torch.stack(list(self.losses(samples, tokens, pad).values())).sum()
            torch.autograd.backward(loss)
            total += loss.detach()
        self.balance.end_step(nothing)
        return [total, *(r.weight.grad.clone() for r in self.routers if r.weight.grad is not None)]


def states_of(sample: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + sample)
    return torch.randn(SAMPLES[sample], D, generator=generator).double()


def batch_of(lengths: Sequence[int], num_tokens: int, scale: float) -> Batch:
    none = torch.zeros(0, dtype=torch.long)
    return Batch(
        input_ids_T=torch.zeros(sum(lengths), dtype=torch.long),
        position_ids_T=torch.cat([none, *(torch.arange(n) for n in lengths)]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_seqlen=max(lengths, default=0),
        targets=Targets(none, none, torch.zeros(0), none, 1.0),
        num_tokens=num_tokens,
        scales={"tokens": scale},
    )


WHOLE: list[list[int]] = [[0, 1, 2, 3, 4]]
CUTS: list[list[list[int]]] = [
    [[0, 1], [2, 3, 4]],
    [[4], [3], [2], [1], [0]],
    [[0, 1, 2, 3, 4], []],
]


@pytest.mark.parametrize("mode", ["lagged", "two_pass", "per_sequence"])
@pytest.mark.parametrize("cut", CUTS)
def test_the_exact_modes_do_not_change_with_micro_batches_fillers_or_padding(
    mode: str, cut: list[list[int]]
) -> None:
    whole, parts = Layers(mode), Layers(mode)
    for _ in range(2):  # lagged has no load to use in the first step
        expected, found = whole.step(WHOLE), parts.step(cut, pad=3)
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", ["hf_pooled", "per_micro_batch"])
def test_the_other_modes_do_change(mode: str) -> None:
    whole, parts = Layers(mode).step(WHOLE), Layers(mode).step(CUTS[1])
    assert not torch.allclose(whole[0], parts[0], rtol=1e-3)


def shares(layers: Layers, states: Tensor) -> tuple[Tensor, Tensor]:
    """(F, mean scores), each (L, E), by the definition."""
    routed = [router(states) for router in layers.routers]
    load = [torch.bincount(r.expert_ids_TK.flatten(), minlength=E) for r in routed]
    return torch.stack(load).double() / (K * len(states)), torch.stack(
        [r.scores_TE.mean(0) for r in routed]
    )


def test_two_pass_is_the_definition_and_lagged_the_same_with_the_load_of_the_step_before() -> None:
    states = torch.cat([states_of(i) for i in range(5)])
    for mode in ("two_pass", "lagged"):
        layers = Layers(mode, balancing=1.0, z=0.0)
        load, scores = shares(layers, states)
        first, second = (layers.step(WHOLE)[0] for _ in range(2))
        expected = E * (load * scores).sum()
        torch.testing.assert_close(second, expected.detach(), rtol=1e-6, atol=0)
        assert float(first) == (0.0 if mode == "lagged" else float(second))


def test_per_sequence_is_a_mean_over_tokens_of_each_samples_own_loss() -> None:
    layers = Layers("per_sequence", balancing=1.0, z=0.0)
    expected = 0.0
    for sample, length in enumerate(SAMPLES):
        load, scores = shares(layers, states_of(sample))
        expected += length * float((E * load * scores).sum().detach()) / sum(SAMPLES)
    assert float(layers.step(WHOLE)[0]) == pytest.approx(expected, rel=1e-12)


def test_hf_pooled_equals_transformers() -> None:
    layers = Layers("hf_pooled", balancing=1.0, z=0.0)
    states = torch.cat([states_of(i) for i in range(5)])
    logits = tuple(router(states).logits_TE for router in layers.routers)
    theirs = load_balancing_loss_func(logits, E, K)
    assert isinstance(theirs, Tensor)
    gradients = torch.autograd.grad(theirs, [router.weight for router in layers.routers])
    found = layers.step(WHOLE, pad=4)
    torch.testing.assert_close(found[0], theirs.detach().double(), rtol=1e-6, atol=1e-6)
    for one, two in zip(found[1:], gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


def test_the_z_loss_is_a_mean_over_tokens_summed_over_layers() -> None:
    layers = Layers("lagged", balancing=0.0, z=1.0)
    states = torch.cat([states_of(i) for i in range(5)])
    expected = sum(
        float((router(states).logits_TE.logsumexp(-1) ** 2).mean().detach())
        for router in layers.routers
    )
    for cut in (WHOLE, *CUTS):
        assert float(layers.step(cut, pad=2)[0]) == pytest.approx(expected, rel=1e-12)


def test_evaluation_counts_nothing_and_adds_no_loss() -> None:
    layers = Layers("lagged")
    layers.balance.eval()
    assert layers.losses([0, 1], 11) == {}
    assert not layers.balance.sums_LX.any()


def test_only_two_pass_over_several_micro_batches_asks_for_a_first_pass() -> None:
    for mode in BALANCING_MODES:
        balance = Layers(mode).balance
        assert isinstance(balance, StepState)
        assert not balance.wants_first_pass(1)
        assert balance.wants_first_pass(2) == (mode == "two_pass")
    assert not Layers("two_pass", balancing=0.0).balance.wants_first_pass(2)


def test_the_config_offers_these_modes() -> None:
    field = Qwen3MoE.Config.model_fields["balancing"]
    assert set(field.annotation.__args__) == set(BALANCING_MODES)  # type: ignore[union-attr]


def counted(counts: list[list[int]]) -> ExpertBalance:
    names = [f"layer_{i}" for i in range(len(counts))]
    balance = ExpertBalance(names, len(counts[0]), 2, mode="lagged", balancing_coef=0.1)
    experts = len(counts[0])
    balance.sums_LX[:, :experts] = torch.tensor(counts)
    balance.sums_LX[:, experts : 2 * experts] = sum(counts[0]) / 2 / experts
    return balance


def test_the_report_says_violation_entropy_and_idle_experts_by_layer() -> None:
    balance = counted([[20, 20, 20, 20], [40, 40, 0, 0]])
    balance.end_step(nothing)
    numbers, tables = balance.report()
    assert numbers["experts/max_violation/layer_0"] == pytest.approx(0.0)
    assert numbers["experts/max_violation/layer_1"] == pytest.approx(1.0)
    assert numbers["experts/max_violation"] == pytest.approx(0.5)
    assert numbers["experts/entropy/layer_0"] == pytest.approx(1.0)
    assert numbers["experts/entropy/layer_1"] == pytest.approx(0.5)
    assert numbers["experts/idle/layer_1"] == 2
    assert numbers["experts/balancing"] == pytest.approx(1.0)  # scores are even
    table = tables["expert_load"]
    assert table.row_names == ("layer_0", "layer_1")
    assert table.values == [[1, 1, 1, 1], [2, 2, 0, 0]]


def test_a_layer_that_collapses_is_warned_of_once_until_it_recovers() -> None:
    even, collapsed = [50] * 8, [200, 199, 1, 0, 0, 0, 0, 0]
    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    balance = counted([even, even])
    try:
        for counts in ([even, collapsed], [even, collapsed], [even, even], [even, collapsed]):
            balance.sums_LX[:, :8] = torch.tensor(counts)
            balance.end_step(nothing)
            balance.report()
    finally:
        logger.remove(sink)
    assert len(lines) == 2
    assert lines[0].startswith("layer_1: routing has collapsed: as uneven as if 2.0 of 8 experts")


def test_nothing_is_reported_before_a_step_or_of_an_empty_one() -> None:
    balance = counted([[0, 0, 0, 0]])
    assert balance.report() == ({}, {})
    balance.end_step(nothing)
    assert balance.report() == ({}, {})


def test_the_bias_of_routers_follows_the_load_of_the_step() -> None:
    router = BiasedSigmoidRouter(D, 4, 2, norm_topk_prob=True, bias_update_speed=0.5)
    router.reset_parameters()
    balance = ExpertBalance(["layer_0"], 4, 2, mode="lagged", balancing_coef=0.0, routers=[router])
    balance.sums_LX[0, :4] = torch.tensor([30.0, 20.0, 20.0, 10.0])
    balance.end_step(nothing)
    assert router.e_score_correction_bias.tolist() == [-0.5, 0.0, 0.0, 0.5]
    assert all(name in ("load_LE", "sums_LX") for name, _ in balance.named_buffers())


def test_a_step_that_was_skipped_counts_nothing_in_the_next() -> None:
    balance = counted([[80, 0, 0, 0]])
    balance.sums_LX[:, 4:] = float("nan")
    balance.wants_first_pass(1)
    assert not balance.sums_LX.any()


def test_sums_over_ranks_are_what_the_next_step_uses() -> None:
    layers = Layers("lagged", balancing=1.0, z=0.0)

    def other_rank_too(tensor: Tensor) -> None:
        tensor[:, 0] += 1e6  # all its tokens went to the first expert

    layers.losses([0, 1], 11)
    layers.balance.end_step(other_rank_too)
    torch.testing.assert_close(layers.balance.load_LE.sum(-1), torch.ones(L))
    assert (layers.balance.load_LE[:, 0] > 0.99).all()
    assert layers.balance.report().numbers["experts/max_violation"] > 0.99 * (E - 1)
    state: dict[str, Any] = layers.balance.state_dict()
    assert list(state) == ["load_LE"]


def test_an_unknown_mode_is_refused() -> None:
    build: Callable[..., Any] = ExpertBalance
    with pytest.raises(ValueError, match="not one of lagged"):
        build(["layer_0"], 4, 2, mode="often", balancing_coef=0.1)
