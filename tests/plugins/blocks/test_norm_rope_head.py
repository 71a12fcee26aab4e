"""Claim: norm and rope compute their formulas in wide enough numbers; a head hands its weight
to the loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pegboard.contracts import Head, LossOutput, Targets
from pegboard_plugins.blocks.head import LMHead
from pegboard_plugins.blocks.norm import RMSNorm
from pegboard_plugins.blocks.rope import apply_rope, rope_cos_sin


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm_is_the_formula_rounded_once(dtype: torch.dtype) -> None:
    hidden = (torch.randn(5, 16) * 30).to(dtype)
    norm = RMSNorm(16, 1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    wide = hidden.double()
    want = norm.weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    got = norm(hidden)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want.to(dtype))


def test_rope_rotates_so_that_scores_depend_on_distance_only() -> None:
    q, k = torch.randn(2, 1, 8, dtype=torch.float64)[:, None]

    def score(at: int, other: int) -> Tensor:
        cos, sin = rope_cos_sin(
            torch.tensor([at, other]), head_dim=8, theta=100.0, dtype=torch.float64
        )
        return (apply_rope(q, cos[:1], sin[:1]) * apply_rope(k, cos[1:], sin[1:])).sum()

    torch.testing.assert_close(score(3, 1), score(1003, 1001))
    assert not torch.isclose(score(3, 1), score(3, 2))


def test_rope_angles_of_far_positions_keep_float32_precision_in_bfloat16() -> None:
    far = torch.tensor([40_000])
    cos, _ = rope_cos_sin(far, head_dim=8, theta=1e6, dtype=torch.bfloat16)
    exact, _ = rope_cos_sin(far, head_dim=8, theta=1e6, dtype=torch.float64)
    torch.testing.assert_close(cos.double(), exact, rtol=0, atol=8e-3)


def test_rescaled_frequencies_are_those_that_are_used() -> None:
    seen: list[Tensor] = []

    def halved(frequencies: Tensor) -> Tensor:
        seen.append(frequencies)
        return frequencies / 2

    cos, sin = rope_cos_sin(
        torch.tensor([6]), head_dim=8, theta=100.0, dtype=torch.float64, rescale=halved
    )
    half = rope_cos_sin(torch.tensor([3]), head_dim=8, theta=100.0, dtype=torch.float64)
    torch.testing.assert_close((cos, sin), half)
    torch.testing.assert_close(seen[0], 100.0 ** -(torch.arange(4, dtype=torch.float64) / 4))


class Spy:
    """A loss that returns what it saw."""

    def __call__(self, hidden_TD: Tensor, head: Head, targets: Targets) -> LossOutput:
        self.head = head
        return LossOutput(head.logits(hidden_TD).sum(), torch.zeros(0))


def test_a_tied_head_uses_the_weight_it_is_given_and_asks_for_it() -> None:
    head, weight, hidden = LMHead(4, 6, tied=True), torch.randn(6, 4), torch.randn(3, 4)
    none = torch.zeros(0, dtype=torch.long)
    targets, spy = Targets(none, none, torch.zeros(0), none, 1.0), Spy()
    out = head(hidden, targets, spy, weight)
    torch.testing.assert_close(out.loss, (hidden @ weight.T).sum())
    assert spy.head.weight_VD is weight
    with pytest.raises(ValueError, match="tied"):
        head(hidden, targets, spy)
