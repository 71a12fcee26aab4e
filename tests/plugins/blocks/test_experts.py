"""Claim: the experts compute the plain definition, forward and backward, through either kernel; an
expert or a rank without a token is an ordinary case; results repeat bit by bit; and little is kept
for backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from loguru import logger
from torch import Tensor
from torch.nn import functional

from pegboard_plugins.blocks import grouped_gemm
from pegboard_plugins.blocks.experts import Experts
from pegboard_plugins.blocks.grouped_gemm import LOOP, TORCH_GROUPED_MM, GroupedGemm

D, F, E, K = 16, 24, 6, 3
KERNELS = [pytest.param(LOOP, id="loop"), pytest.param(TORCH_GROUPED_MM, id="torch")]


def make(dtype: torch.dtype, kernel: GroupedGemm | None = None, seed: int = 0) -> Experts:
    generator = torch.Generator().manual_seed(seed)
    experts = Experts(D, F, E, kernel=kernel)
    for parameter in experts.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return experts.to(dtype)


def inputs(num_tokens: int, dtype: torch.dtype, avoid: int | None = None) -> list[Tensor]:
    """Hidden states, expert ids and weights; no token goes to expert `avoid`."""
    generator = torch.Generator().manual_seed(1)
    hidden_TD = torch.randn(num_tokens, D, generator=generator).to(dtype)
    scores_TE = torch.rand(num_tokens, E, generator=generator)
    if avoid is not None:
        scores_TE[:, avoid] = -1
    ids_TK = scores_TE.topk(K).indices
    wide = torch.promote_types(dtype, torch.float32)
    weights_TK = torch.rand(num_tokens, K, generator=generator).to(wide)
    return [hidden_TD, ids_TK, weights_TK]


def plain(experts: Experts, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    rows = []
    for hidden_D, ids_K, weights_K in zip(hidden_TD, ids_TK.tolist(), weights_TK, strict=True):
        total_D = torch.zeros(D, dtype=weights_TK.dtype)
        for expert, weight in zip(ids_K, weights_K, strict=True):
            gate, up = (experts.gate_up_proj[expert] @ hidden_D).chunk(2)
            total_D = total_D + weight * (experts.down_proj[expert] @ (functional.silu(gate) * up))
        rows.append(total_D)
    return torch.stack(rows)


def gradients(experts: Experts, call: Any, values: list[Tensor]) -> list[Tensor]:
    hidden_TD, ids_TK, weights_TK = values
    leaves = [hidden_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()]
    out_TD = call(leaves[0], ids_TK, leaves[1])
    push = torch.linspace(-1, 1, out_TD.numel(), dtype=out_TD.dtype).view_as(out_TD)
    wanted = [*leaves, experts.gate_up_proj, experts.down_proj]
    return [out_TD.detach(), *torch.autograd.grad((out_TD * push).sum(), wanted)]


@pytest.mark.parametrize(
    ("dtype", "kernel", "tolerance"),
    [
        (torch.float64, LOOP, 1e-12),
        (torch.float32, LOOP, 2e-5),
        (torch.float32, TORCH_GROUPED_MM, 2e-5),
    ],
)
@pytest.mark.parametrize("avoid", [None, 0, E - 1])
def test_result_and_gradients_are_those_of_the_definition(
    dtype: torch.dtype, kernel: GroupedGemm, tolerance: float, avoid: int | None
) -> None:
    experts, values = make(dtype, kernel), inputs(11, dtype, avoid)
    expected = gradients(experts, lambda *v: plain(experts, *v), values)
    found = gradients(experts, experts, values)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)
    if avoid is not None:
        assert not found[3][avoid].any() and not found[4][avoid].any()


def test_bfloat16_stays_bfloat16_and_near_the_wide_result() -> None:
    experts, values = make(torch.bfloat16), inputs(32, torch.bfloat16)
    found = gradients(experts, experts, values)
    assert [tensor.dtype for tensor in found[:3]] == [
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    ]
    wide = make(torch.bfloat16).double()
    expected = gradients(wide, wide, [values[0].double(), values[1], values[2].double()])
    for one, two in zip(found, expected, strict=True):
        assert (one.double() - two).norm() <= 2e-2 * two.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 9], [9, 0, 0, 0], [0, 0, 0, 0]])
def test_both_kernels_agree_also_on_empty_groups(dtype: torch.dtype, counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(2)
    total = sum(counts)
    rows = torch.randn(total, 16, generator=generator).to(dtype)
    other = torch.randn(total, 8, generator=generator).to(dtype)
    weight = torch.randn(len(counts), 16, 8, generator=generator).to(dtype)
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name, operands in (("rows", (rows, weight)), ("weights", (rows, other))):
        found = getattr(TORCH_GROUPED_MM, name)(*operands, ends)
        expected = getattr(LOOP, name)(*operands, ends)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_what_a_kernel_leaves_unwritten_for_empty_groups_is_cleared() -> None:
    out_EOI = torch.full((4, 2, 3), float("nan"))
    out_EOI[[1, 3]] = 7.0
    grouped_gemm._clear_empty_groups(out_EOI, torch.tensor([0, 5, 5, 6], dtype=torch.int32))
    assert out_EOI.sum((1, 2)).tolist() == [0.0, 42.0, 0.0, 42.0]


def test_torch_is_not_asked_about_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its CUDA kernels were seen to refuse, and to leave unwritten, what has no rows.
    monkeypatch.setattr(functional, "grouped_mm", None)
    ends = torch.zeros(4, dtype=torch.int32)
    rows, other = torch.ones(0, 16), torch.ones(0, 8)
    assert TORCH_GROUPED_MM.rows(rows, torch.ones(4, 16, 8), ends).shape == (0, 8)
    found = TORCH_GROUPED_MM.weights(rows, other, ends)
    assert found.shape == (4, 16, 8) and not found.any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_token_at_all_gives_zero_gradients(kernel: GroupedGemm) -> None:
    experts = make(torch.float32, kernel)
    out, *found = gradients(experts, experts, inputs(0, torch.float32))
    assert out.shape == (0, D)
    assert [g.shape for g in found[:2]] == [(0, D), (0, K)]
    assert not any(gradient.any() for gradient in found)


def test_results_repeat_bit_by_bit() -> None:
    experts, values = make(torch.float32), inputs(64, torch.float32)
    first = gradients(experts, experts, values)
    for _ in range(3):
        again = gradients(experts, experts, values)
        assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))


class Mirror:
    """A dispatcher to a rank that keeps all experts and orders rows backwards within each."""

    def dispatch(self, rows: Tensor, counts_E: Tensor, /) -> tuple[Tensor, Tensor, Tensor]:
        spans = torch.split(torch.arange(len(rows)), counts_E.tolist())
        order = torch.cat([span.flip(0) for span in spans])
        self.seen = counts_E
        return rows[order], counts_E, order

    def combine(self, out: Tensor, order: Tensor, /) -> Tensor:
        return out[order.argsort()]


@pytest.mark.parametrize("num_tokens", [0, 13])
def test_a_dispatcher_between_changes_only_rounding(num_tokens: int) -> None:
    experts, values = make(torch.float64), inputs(num_tokens, torch.float64, avoid=2)
    expected = gradients(experts, experts, values)
    experts.dispatcher = Mirror()
    found = gradients(experts, experts, values)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    assert experts.dispatcher.seen.tolist() == [
        int((values[1] == expert).sum()) for expert in range(E)
    ]


def test_what_is_frozen_gets_no_gradient_and_costs_none() -> None:
    experts, (hidden_TD, ids_TK, weights_TK) = make(torch.float32), inputs(9, torch.float32)
    experts.gate_up_proj.requires_grad_(False)
    calls = []

    def counted(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
        calls.append(left.shape)
        return LOOP.weights(left, right, ends)

    experts.kernel = LOOP._replace(weights=counted)
    hidden_TD.requires_grad_()
    torch.autograd.backward(experts(hidden_TD, ids_TK, weights_TK).sum())
    assert experts.gate_up_proj.grad is None and weights_TK.grad is None
    assert experts.down_proj.grad is not None and hidden_TD.grad is not None
    assert len(calls) == 1


def test_backward_keeps_one_product_of_the_copies_and_no_copy_of_the_input() -> None:
    experts, (hidden_TD, ids_TK, weights_TK) = make(torch.float32), inputs(40, torch.float32)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hidden_TD.requires_grad_()
    weights_TK.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        experts(hidden_TD, ids_TK, weights_TK)
    for known in (hidden_TD, *experts.parameters()):
        kept.pop(known.untyped_storage().data_ptr(), None)
    copies = 40 * K
    indices_and_weights = copies * (3 * 8 + 4) + 64
    assert sum(kept.values()) <= copies * 2 * F * 4 + indices_and_weights


@contextmanager
def logged() -> Iterator[list[str]]:
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(str(message)), format="{level} {message}")
    grouped_gemm._log_choice.cache_clear()
    try:
        yield lines
    finally:
        logger.remove(sink)
        grouped_gemm._log_choice.cache_clear()


def test_a_fallback_is_logged_by_name_and_once() -> None:
    values = inputs(4, torch.float64)
    with logged() as lines:
        make(torch.float64)(*values)
        make(torch.float64)(*values)
        make(torch.float32)(*inputs(4, torch.float32))
    assert len(lines) == 2
    assert lines[0].startswith("WARNING") and "float64 on cpu: loop over experts" in lines[0]
    assert lines[1].startswith("INFO") and "torch.nn.functional.grouped_mm" in lines[1]


@pytest.mark.parametrize(
    ("device", "dtype", "aligned", "capability", "why"),
    [
        ("cuda", torch.bfloat16, True, (9, 0), None),
        ("cuda", torch.float32, True, (9, 0), "float32"),
        ("cuda", torch.bfloat16, True, (7, 5), "capability"),
        ("cuda", torch.bfloat16, False, (9, 0), "16 bytes"),
        ("cpu", torch.float64, True, None, "float64"),
        ("mps", torch.bfloat16, True, None, "mps"),
    ],
)
def test_the_choice_of_kernel_says_why(
    device: str,
    dtype: torch.dtype,
    aligned: bool,
    capability: tuple[int, int] | None,
    why: str | None,
) -> None:
    found = grouped_gemm.why_not_torch(device, dtype, aligned=aligned, capability=capability)
    assert found is None if why is None else found is not None and why in found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("counts", [[300, 0, 500, 200], [0, 0, 0, 999], [0, 0, 0, 0]])
def test_torch_kernel_on_cuda_equals_the_loop(counts: list[int]) -> None:
    total = sum(counts)
    rows = torch.randn(total, 256, device="cuda", dtype=torch.bfloat16)
    other = torch.randn(total, 128, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(len(counts), 128, 256, device="cuda", dtype=torch.bfloat16)
    ends = torch.tensor(counts, device="cuda").cumsum(0, dtype=torch.int32)
    for name, operands in (("rows", (rows, weight.transpose(1, 2))), ("weights", (rows, other))):
        found = getattr(TORCH_GROUPED_MM, name)(*operands, ends)
        expected = getattr(LOOP, name)(*operands, ends)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_experts_on_cuda_are_near_float64_and_repeat() -> None:
    experts, values = make(torch.bfloat16).cuda(), inputs(256, torch.bfloat16)
    on_device = [value.cuda() for value in values]
    found = gradients_on(experts, on_device)
    again = gradients_on(experts, on_device)
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
    wide = make(torch.bfloat16).double()
    expected = gradients_on(wide, [values[0].double(), values[1], values[2].double()])
    for one, two in zip(found, expected, strict=True):
        assert (one.double().cpu() - two).norm() <= 3e-2 * two.norm()


def gradients_on(experts: Experts, values: list[Tensor]) -> list[Tensor]:
    hidden_TD, ids_TK, weights_TK = values
    leaves = [hidden_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()]
    out_TD = experts(leaves[0], ids_TK, leaves[1])
    wanted = [*leaves, experts.gate_up_proj, experts.down_proj]
    return [out_TD.detach(), *torch.autograd.grad(out_TD.float().square().sum(), wanted)]
