"""Claim: packed attention is causal, exact, grouped, and blind across sample boundaries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pegboard_plugins.blocks.attention import packed_attention


def dense_reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Softmax over a materialised mask: causal and same sample."""
    tokens, heads, width = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    sample = torch.bucketize(torch.arange(tokens), cu_seqlens[1:], right=True)
    mask = (sample[:, None] == sample[None]) & torch.ones(tokens, tokens).tril().bool()
    scores = torch.einsum("qnh,knh->nqk", q, k) * width**-0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("nqk,knh->qnh", weights, v)


def states(
    tokens: int, kv_heads: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (
        torch.randn(tokens, heads, 16, generator=generator, dtype=dtype, requires_grad=True)
        for heads in (8, kv_heads, kv_heads)
    )
    return q, k, v


@pytest.mark.parametrize("kv_heads", [1, 4, 8])
def test_output_and_gradients_equal_a_dense_mask(kv_heads: int) -> None:
    cu_seqlens = torch.tensor([0, 7, 8, 8, 20], dtype=torch.int32)  # one sample is empty
    qkv = states(20, kv_heads)
    out, want = packed_attention(*qkv, cu_seqlens, 12), dense_reference(*qkv, cu_seqlens)
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-12)
    pull = torch.randn_like(out)
    for got, expected in zip(
        torch.autograd.grad(out, qkv, pull), torch.autograd.grad(want, qkv, pull), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_changing_a_sample_changes_no_other() -> None:
    cu_seqlens = torch.tensor([0, 7, 20], dtype=torch.int32)
    q, k, v = (x.detach() for x in states(20, 4))
    before = packed_attention(q, k, v, cu_seqlens, 13)
    k[:7] += 1.0
    v[:7] -= 1.0
    after = packed_attention(q, k, v, cu_seqlens, 13)
    assert torch.equal(before[7:], after[7:])
    assert not torch.equal(before[:7], after[:7])


def test_an_empty_row_gives_an_empty_result_with_a_graph_to_all_three() -> None:
    qkv = states(0, 2)
    out = packed_attention(*qkv, torch.zeros(1, dtype=torch.int32), 0)
    assert out.shape == (0, 8, 16)
    torch.autograd.backward(out.sum())
    assert all(x.grad is not None for x in qkv)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kv_heads", [1, 4, 8])
def test_the_cuda_kernel_equals_a_dense_mask(kv_heads: int) -> None:
    cu_seqlens = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
    qkv = states(20, kv_heads, torch.float32)
    want = dense_reference(*qkv, cu_seqlens)
    q, k, v = (x.cuda().bfloat16() for x in qkv)
    out = packed_attention(q, k, v, cu_seqlens.cuda(), 12)
    torch.testing.assert_close(out.cpu().float(), want, rtol=3e-2, atol=3e-2)
    pull = torch.randn_like(want)
    got = torch.autograd.grad(out, qkv, pull.cuda().bfloat16())
    for one, expected in zip(got, torch.autograd.grad(want, qkv, pull), strict=True):
        torch.testing.assert_close(one, expected, rtol=5e-2, atol=5e-2)
