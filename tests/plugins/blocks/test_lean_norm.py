"""The claim: the norm used on the CPU has torch's values and gradients, in every dtype, and keeps less for backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pegboard_plugins.blocks.norm import RMSNorm


def both(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[RMSNorm, Tensor]:
    torch.manual_seed(0)
    norm = RMSNorm(shape[-1], 1e-6).to(dtype)
    torch.nn.init.normal_(norm.weight)
    return norm, torch.randn(shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)],
)
@pytest.mark.parametrize("shape", [(7, 16), (5, 3, 16), (0, 16)])
def test_values_and_gradients_are_torchs(
    dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]
) -> None:
    norm, hidden = both(dtype, shape)
    weights = torch.randn(shape, dtype=dtype)
    inputs = [hidden, norm.weight]
    ours = norm(hidden)
    theirs = functional.rms_norm(hidden, (16,), norm.weight, 1e-6)
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    for one, two in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((theirs * weights).sum(), inputs),
        strict=True,
    ):
        assert one.dtype == dtype
        torch.testing.assert_close(one, two, atol=4 * tolerance, rtol=4 * tolerance)


def test_gradients_are_those_of_finite_differences() -> None:
    norm, hidden = both(torch.float64, (4, 8))
    assert torch.autograd.gradcheck(norm, (hidden,))


def test_backward_keeps_the_input_and_one_number_per_row() -> None:
    norm, hidden = both(torch.float32, (64, 32))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        norm(hidden)
    assert sum(tensor.numel() for tensor in kept) == 64 * 32 + 32 + 64
