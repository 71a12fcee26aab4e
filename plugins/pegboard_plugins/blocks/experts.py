"""Experts of a sparse feed-forward layer: dropless, sorted by expert, two grouped products.

Token copies are sorted by expert (stable), pass `down(silu(gate(x)) * up(x))` of their expert, and
are summed per token by an inverse gather: no atomics, so the result repeats bit by bit. The routing
weight is applied once, in float32. Backward recomputes what is cheap: only the gate and up
products are kept beside the input.

Source: Shazeer et al. 2017, "Outrageously Large Neural Networks"; Gale et al. 2022, "MegaBlocks"
    (dropless).

T tokens, K experts per token, M = T * K token copies, E experts, D hidden, F expert feed-forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pegboard.weight_map import Entry, Piece
from pegboard_plugins.blocks.grouped_gemm import GroupedGemm, choose_grouped_gemm

__all__ = ["Dispatcher", "Experts"]


class Dispatcher(Protocol):
    """Moves rows between the ranks that share a layer's experts."""

    def dispatch(self, rows_MD: Tensor, counts_E: Tensor, /) -> tuple[Tensor, Tensor, Any]:
        """Send each row to the rank that keeps its expert; collective over the expert axis.

        Args:
            rows_MD: (M, D) this rank's token copies, sorted by (global) expert; M may be 0.
            counts_E: (E,) int64 rows of each global expert, on the device.

        Returns:
            (N, D) rows that came to this rank's experts, sorted by local expert, with a graph back
            to those sent; (local E,) integer rows of each, on the device; what `combine` needs.
        """
        ...

    def combine(self, out_ND: Tensor, handle: Any, /) -> Tensor:
        """(N, D) results -> (M, D), in the order that `dispatch` was given; with a graph."""
        ...


class Experts(nn.Module):
    """E gated feed-forward layers, of which each token passes K.

    Parameters are `gate_up_proj` (E, 2F, D), gate rows first, and `down_proj` (E, D, F). With
    expert parallelism they are DTensors of which this rank keeps some experts, and `dispatcher` is
    set; None means that all experts are here.

    Args:
        hidden_size: D.
        intermediate_size: F.
        num_experts: E.
        kernel: grouped product to use; None chooses by device and dtype.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        kernel: GroupedGemm | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.intermediate_size = num_experts, intermediate_size
        self.kernel = kernel
        self.dispatcher: Dispatcher | None = None
        self.gate_up_proj = nn.Parameter(
            torch.empty(num_experts, 2 * intermediate_size, hidden_size)
        )
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def forward(self, hidden_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sum of each token's experts.

        Args:
            hidden_TD: (T, D); T may be 0.
            expert_ids_TK: (T, K) int64 in [0, E), all different within a token.
            weights_TK: (T, K) float32 (float64 for float64 hidden states), with or without graph.

        Returns:
            (T, D), dtype of `hidden_TD`.
        """
        gate_up_EGD, down_EDF = _local(self.gate_up_proj), _local(self.down_proj)
        order = _sort_by_expert(expert_ids_TK, self.num_experts)
        kernel = self.kernel or choose_grouped_gemm(
            hidden_TD, hidden_TD.shape[1], self.intermediate_size
        )
        if self.dispatcher is None:
            out_TD: Tensor = _LocalExperts.apply(  # type: ignore[no-untyped-call]
                hidden_TD, weights_TK, gate_up_EGD, down_EDF, order, kernel
            )
            return out_TD
        rows_MD = _Spread.apply(hidden_TD, order)  # type: ignore[no-untyped-call]
        rows_ND, counts_E, handle = self.dispatcher.dispatch(rows_MD, order.counts_E())
        ends_E = counts_E.cumsum(0, dtype=torch.int32)
        out_ND = _RowExperts.apply(rows_ND, gate_up_EGD, down_EDF, ends_E, kernel)  # type: ignore[no-untyped-call]
        out_MD = self.dispatcher.combine(out_ND, handle)
        out_TD = _WeightedSum.apply(out_MD, weights_TK, order)  # type: ignore[no-untyped-call]
        return out_TD

    def weight_entries(self, ours: str, published: str) -> list[Entry]:
        """Entries of both parameters, published expert by expert; prefixes with their dot.

        A folder that stacks the experts as transformers 5 does in memory is read as well.
        """
        inner = self.intermediate_size
        gate_up, down = [], []
        for expert in range(self.num_experts):
            one, prefix = (expert, expert + 1), f"{published}{expert}."
            gate_up += [
                Piece(prefix + "gate_proj.weight", ours=(one, (0, inner)), squeeze=True),
                Piece(prefix + "up_proj.weight", ours=(one, (inner, 2 * inner)), squeeze=True),
            ]
            down.append(Piece(prefix + "down_proj.weight", ours=(one,), squeeze=True))
        return [
            Entry(
                f"{ours}{name}",
                tuple(self.get_parameter(name).shape),
                tuple(pieces),
                or_pieces=(Piece(f"{published}{name}"),),
            )
            for name, pieces in (("gate_up_proj", gate_up), ("down_proj", down))
        ]

    def extra_repr(self) -> str:
        experts, inner, hidden = self.num_experts, self.intermediate_size, self.down_proj.shape[1]
        return f"{experts} experts, {hidden} -> {inner} -> {hidden}"


class _Order(NamedTuple):
    """How token copies are sorted by expert."""

    token_M: Tensor
    """(M,) int64 token of each sorted row."""
    row_TK: Tensor
    """(T, K) int64 sorted row of each token copy."""
    place_M: Tensor
    """(M,) int64 index into the flat (T * K,) of each sorted row."""
    ends_E: Tensor
    """(E,) int32 end of each expert's rows."""

    def counts_E(self) -> Tensor:
        return self.ends_E.long().diff(prepend=self.ends_E.new_zeros(1, dtype=torch.int64))


def _sort_by_expert(expert_ids_TK: Tensor, num_experts: int) -> _Order:
    num_tokens, top_k = expert_ids_TK.shape
    # Stable, so that rows of an expert stay in token order whatever the sort does.
    sorted_M, place_M = torch.sort(expert_ids_TK.reshape(num_tokens * top_k), stable=True)
    row_M = torch.empty_like(place_M)
    row_M[place_M] = torch.arange(place_M.shape[0], device=place_M.device)
    experts_E = torch.arange(num_experts, device=place_M.device)
    # Neither bincount (a host sync on CUDA) nor histc (float on the CPU).
    ends_E = torch.searchsorted(sorted_M, experts_E, right=True, out_int32=True)
    return _Order(place_M // top_k, row_M.view(num_tokens, top_k), place_M, ends_E)


def _local(parameter: Tensor) -> Tensor:
    # Experts on an axis of their own stay DTensors on it; this rank's part has a graph to them.
    to_local = getattr(parameter, "to_local", None)
    return to_local() if to_local is not None else parameter


def _sum_rows(rows_MD: Tensor, row_TK: Tensor) -> Tensor:
    """(T, D): per token, the sum of its K rows, accumulated in float32, in the order of K."""
    if row_TK.shape[0] == 0:
        return rows_MD.new_zeros(0, rows_MD.shape[1])
    # A gather that adds as it goes: never holds M rows a second time.
    return functional.embedding_bag(row_TK, rows_MD, mode="sum")


def _activation(gate_up_MG: Tensor, weights_M1: Tensor | None) -> Tensor:
    """(M, F) `silu(gate) * up * weight`, computed in float32, dtype of the input."""
    wide = _wide(gate_up_MG.dtype)
    out_MF = gate_up_MG.new_empty(gate_up_MG.shape[0], gate_up_MG.shape[1] // 2)
    for rows in _blocks(gate_up_MG):
        gate, up = gate_up_MG[rows].to(wide).chunk(2, dim=-1)
        inner = functional.silu(gate)
        if weights_M1 is not None:
            inner.mul_(weights_M1[rows])
        torch.mul(inner, up, out=out_MF[rows])
    return out_MF


def _activation_backward(
    grad_MF: Tensor, gate_up_MG: Tensor, weights_M1: Tensor | None, *, needs_weights: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(gradient of gate_up, the activation again, gradient of the weights as (M,)).

    NOTE: the activation is written over `grad_MF`.
    """
    wide = _wide(gate_up_MG.dtype)
    gate_up_grad_MG = torch.empty_like(gate_up_MG)
    weights_grad_M = None
    if weights_M1 is not None and needs_weights:
        weights_grad_M = weights_M1.new_empty(weights_M1.shape[0])
    for rows in _blocks(gate_up_MG):
        gate, up = gate_up_MG[rows].to(wide).chunk(2, dim=-1)
        gate_grad, up_grad = gate_up_grad_MG[rows].chunk(2, dim=-1)
        grad = grad_MF[rows].to(wide)
        silu = functional.silu(gate)
        inner = silu * up
        if weights_M1 is not None:
            if weights_grad_M is not None:
                weights_grad_M[rows] = torch.linalg.vecdot(grad, inner)
            inner.mul_(weights_M1[rows])
            grad = grad * weights_M1[rows]
        torch.mul(grad, silu, out=up_grad)
        gate_grad.copy_(torch.ops.aten.silu_backward(torch.mul(grad, up, out=silu), gate))
        grad_MF[rows] = inner
    return gate_up_grad_MG, grad_MF, weights_grad_M


def _blocks(rows_MG: Tensor) -> Iterator[slice]:
    """Rows to do at a time: few enough to stay in the cache on the CPU, and elsewhere to keep what
    is wide and temporary small beside what is kept."""
    elements = 2**17 if rows_MG.device.type == "cpu" else 2**26
    step = max(1, elements // max(1, rows_MG.shape[1]))
    for start in range(0, rows_MG.shape[0], step):
        yield slice(start, start + step)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _LocalExperts(torch.autograd.Function):
    """All of it where every expert is here. Keeps the input (T, D) and gate_up (M, 2F)."""

    clear_saved_tensors_on_access = True  # torch 2.11 takes no notice of it

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weights_TK: Tensor,
        gate_up_EGD: Tensor,
        down_EDF: Tensor,
        order: _Order,
        kernel: GroupedGemm,
    ) -> Tensor:
        weights_M1 = weights_TK.reshape(order.place_M.shape)[order.place_M].unsqueeze(1)
        rows_MD = hidden_TD.index_select(0, order.token_M)
        gate_up_MG = kernel.rows(rows_MD, gate_up_EGD.transpose(1, 2), order.ends_E)
        del rows_MD
        inner_MF = _activation(gate_up_MG, weights_M1)
        out_MD = kernel.rows(inner_MF, down_EDF.transpose(1, 2), order.ends_E)
        ctx.save_for_backward(hidden_TD, weights_M1, gate_up_MG, gate_up_EGD, down_EDF, *order)
        ctx.kernel = kernel
        return _sum_rows(out_MD, order.row_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weights_M1, gate_up_MG, gate_up_EGD, down_EDF, *saved = ctx.saved_tensors
        order, kernel = _Order(*saved), ctx.kernel
        needs_hidden, needs_weights, needs_gate_up, needs_down = ctx.needs_input_grad[:4]
        hidden_grad = weights_grad = gate_up_weight_grad = down_grad = None
        grad_MD = grad_TD.index_select(0, order.token_M)
        grad_MF = kernel.rows(grad_MD, down_EDF, order.ends_E)
        gate_up_grad_MG, inner_MF, weights_grad_M = _activation_backward(
            grad_MF, gate_up_MG, weights_M1, needs_weights=needs_weights
        )
        # What is not needed any more goes at once: weight gradients are the largest of all.
        del grad_MF, gate_up_MG
        if needs_down:
            down_grad = kernel.weights(grad_MD, inner_MF, order.ends_E)
        del grad_MD, inner_MF
        if weights_grad_M is not None:
            weights_grad = weights_grad_M[order.row_TK]
        if needs_hidden:
            rows_grad_MD = kernel.rows(gate_up_grad_MG, gate_up_EGD, order.ends_E)
            hidden_grad = _sum_rows(rows_grad_MD, order.row_TK)
            del rows_grad_MD
        if needs_gate_up:
            rows_MD = hidden_TD.index_select(0, order.token_M)
            gate_up_weight_grad = kernel.weights(gate_up_grad_MG, rows_MD, order.ends_E)
        return hidden_grad, weights_grad, gate_up_weight_grad, down_grad, None, None


class _Spread(torch.autograd.Function):
    """(T, D) -> (M, D) token copies sorted by expert. Keeps indices only."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, order: _Order) -> Tensor:
        ctx.save_for_backward(order.row_TK)
        return hidden_TD.index_select(0, order.token_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None]:
        (row_TK,) = ctx.saved_tensors
        return _sum_rows(grad_MD.contiguous(), row_TK), None


class _RowExperts(torch.autograd.Function):
    """Rows that are sorted already, unweighted. Keeps them (N, D) and gate_up (N, 2F)."""

    clear_saved_tensors_on_access = True  # torch 2.11 takes no notice of it

    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        gate_up_EGD: Tensor,
        down_EDF: Tensor,
        ends_E: Tensor,
        kernel: GroupedGemm,
    ) -> Tensor:
        gate_up_NG = kernel.rows(rows_ND, gate_up_EGD.transpose(1, 2), ends_E)
        inner_NF = _activation(gate_up_NG, None)
        ctx.save_for_backward(rows_ND, gate_up_NG, gate_up_EGD, down_EDF, ends_E)
        ctx.kernel = kernel
        return kernel.rows(inner_NF, down_EDF.transpose(1, 2), ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        rows_ND, gate_up_NG, gate_up_EGD, down_EDF, ends_E = ctx.saved_tensors
        kernel: GroupedGemm = ctx.kernel
        needs_rows, needs_gate_up, needs_down = ctx.needs_input_grad[:3]
        grad_ND = grad_ND.contiguous()
        grad_NF = kernel.rows(grad_ND, down_EDF, ends_E)
        gate_up_grad_NG, inner_NF, _ = _activation_backward(
            grad_NF, gate_up_NG, None, needs_weights=False
        )
        del grad_NF, gate_up_NG
        down_grad = kernel.weights(grad_ND, inner_NF, ends_E) if needs_down else None
        del grad_ND, inner_NF
        gate_up_weight_grad = None
        if needs_gate_up:
            gate_up_weight_grad = kernel.weights(gate_up_grad_NG, rows_ND, ends_E)
        rows_grad = kernel.rows(gate_up_grad_NG, gate_up_EGD, ends_E) if needs_rows else None
        return rows_grad, gate_up_weight_grad, down_grad, None, None


class _WeightedSum(torch.autograd.Function):
    """(M, D) results -> (T, D), weighted in float32."""

    @staticmethod
    def forward(ctx: Any, out_MD: Tensor, weights_TK: Tensor, order: _Order) -> Tensor:
        ctx.save_for_backward(out_MD, weights_TK, order.token_M, order.row_TK, order.place_M)
        weighted_TKD = out_MD[order.row_TK].to(weights_TK.dtype).mul_(weights_TK.unsqueeze(-1))
        return weighted_TKD.sum(1).to(out_MD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        out_MD, weights_TK, token_M, row_TK, place_M = ctx.saved_tensors
        grad_MD = grad_TD.index_select(0, token_M).to(weights_TK.dtype)
        weights_grad = None
        if ctx.needs_input_grad[1]:
            weights_grad = torch.linalg.vecdot(grad_MD, out_MD.to(weights_TK.dtype))[row_TK]
        weights_M1 = weights_TK.reshape(place_M.shape)[place_M].unsqueeze(1)
        return grad_MD.mul_(weights_M1).to(out_MD.dtype), weights_grad, None
