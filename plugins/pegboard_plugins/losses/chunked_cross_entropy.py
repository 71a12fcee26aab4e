"""Cross-entropy with one chunk of logits in memory at a time, gradients made in the forward.

Only supervised rows are multiplied. A chunk's logits become, in place, their own gradient, and
are folded into d(hidden) and d(weight) at once: no logits are kept or computed twice. Matrix
products run in the compute dtype, softmax and the sums over chunks in fp32 (fp64 stays fp64), and
nothing waits for the device. With several chunks a bf16 weight gradient is summed from fp32
products: bf16 ones would be rounded once per chunk and again in the end, and be up to 1.2 times
as wrong as the plain loss's.

Source: d nll / d logits = softmax(logits) - onehot(label); gradients of a linear cross-entropy in
its forward as in Hsu et al., Liger Kernel, 2024 (arXiv:2410.10989), section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pegboard.contracts import LossOutput

from .cross_entropy import weight_count

if TYPE_CHECKING:
    from pegboard.contracts import Batch, Head, Targets

__all__ = ["ChunkedCrossEntropyLoss"]

CPU_CHUNK_BYTES = 160 * 2**20
GPU_CHUNK_BYTES = 2**30
PRODUCT_BYTES = 64 * 2**20
"""Largest fp32 product that a GPU makes beside the weight gradient before adding it."""


class ChunkedCrossEntropyLoss:
    """Same numbers as `CrossEntropyLoss` up to rounding, in about one fp32 chunk of logits.

    Args:
        chunk_size: rows per chunk; None sizes it by bytes (`CPU_CHUNK_BYTES`, `GPU_CHUNK_BYTES`).
    """

    def __init__(self, chunk_size: int | None = None) -> None:
        self.chunk_size = chunk_size

    def __call__(self, hidden_TD: Tensor, head: Head, targets: Targets) -> LossOutput:
        """Scaled weighted sum of -log p(label), from `head.weight_VD` and `head.bias_V`.

        Backward runs once per call: it gives the gradients away (RuntimeError the second time).

        Returns:
            `loss` () and `token_losses_K` (K,), both in promote_types(hidden dtype, float32).
        """
        hidden_KD = hidden_TD.index_select(0, targets.positions_K)
        grad_mode = torch.is_grad_enabled()
        wanted = tuple(
            grad_mode and part is not None and part.requires_grad
            for part in (hidden_KD, head.weight_VD, head.bias_V)
        )
        loss, nll_K = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden_KD,
            head.weight_VD,
            head.bias_V,
            targets.labels_K,
            targets.weights_K,
            targets.scale,
            self._rows(hidden_KD, head.weight_VD.shape[0]),
            wanted,
        )
        return LossOutput(loss, nll_K)

    def step_counts(self, batch: Batch) -> Mapping[str, float]:
        """`{"targets": sum of weights}` of one micro-batch, from CPU tensors."""
        return {"targets": weight_count(batch.targets)}

    def _rows(self, hidden_KD: Tensor, vocab_size: int) -> int:
        """Rows per chunk, evened out so that the last chunk is no stub."""
        limit = self.chunk_size
        if limit is None:
            room = CPU_CHUNK_BYTES if hidden_KD.device.type == "cpu" else GPU_CHUNK_BYTES
            itemsize = torch.promote_types(hidden_KD.dtype, torch.float32).itemsize
            limit = max(1, room // (itemsize * vocab_size))
        num_chunks = max(1, -(-hidden_KD.shape[0] // limit))
        return max(1, -(-hidden_KD.shape[0] // num_chunks))


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_KD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_K: Tensor,
        weights_K: Tensor,
        scale: float,
        rows: int,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor]:
        want_hidden, want_weight, want_bias = wanted
        num_rows, vocab_size = hidden_KD.shape[0], weight_VD.shape[0]
        wide = torch.promote_types(hidden_KD.dtype, torch.float32)
        narrow = hidden_KD.dtype != wide
        rows = min(rows, num_rows)
        # One chunk has nothing to sum: its product is the gradient, in the compute dtype.
        sum_dtype = wide if rows < num_rows else weight_VD.dtype

        # One pair of buffers for all chunks: fresh pages for each would cost more than the softmax.
        logits_CV = hidden_KD.new_empty(rows, vocab_size)
        work_CV = hidden_KD.new_empty(rows, vocab_size, dtype=wide) if narrow else logits_CV
        nll_K = hidden_KD.new_empty(num_rows, dtype=wide)
        coefficients_K = weights_K.to(wide) * scale
        dhidden_KD = torch.empty_like(hidden_KD) if want_hidden else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=sum_dtype) if want_weight else None
        dbias_V = torch.zeros_like(bias_V, dtype=wide) if bias_V is not None and want_bias else None

        for start in range(0, num_rows, max(1, rows)):
            stop = min(start + rows, num_rows)
            hidden_CD, labels_C1 = hidden_KD[start:stop], labels_K[start:stop, None]
            logits, work = logits_CV[: stop - start], work_CV[: stop - start]
            if bias_V is None:
                torch.mm(hidden_CD, weight_VD.t(), out=logits)
            else:
                torch.addmm(bias_V, hidden_CD, weight_VD.t(), out=logits)
            if narrow:
                work.copy_(logits)
            work.sub_(work.amax(dim=1, keepdim=True))
            label_logits_C1 = work.gather(1, labels_C1)
            sums_C1 = work.exp_().sum(dim=1, keepdim=True)
            nll_K[start:stop] = (sums_C1.log() - label_logits_C1).squeeze(1)
            if not any(wanted):
                continue
            coefficients_C1 = coefficients_K[start:stop, None]
            work.mul_(coefficients_C1 / sums_C1)
            work.scatter_(1, labels_C1, work.gather(1, labels_C1) - coefficients_C1)
            if dbias_V is not None:
                dbias_V.add_(work.sum(dim=0))
            if narrow:
                logits.copy_(work)
            if dhidden_KD is not None:
                torch.mm(logits, weight_VD, out=dhidden_KD[start:stop])
            if dweight_VD is not None:
                _add_product(dweight_VD, work, logits, hidden_CD)

        # The chunk is freed before the narrow copy of the weight gradient is made.
        del logits_CV, work_CV
        if num_rows:
            del logits, work
        loss = torch.dot(nll_K, coefficients_K)
        ctx.gradients = [
            dhidden_KD,
            None if dweight_VD is None else dweight_VD.to(weight_VD.dtype),
            None if dbias_V is None or bias_V is None else dbias_V.to(bias_V.dtype),
        ]
        ctx.mark_non_differentiable(nll_K)
        return loss, nll_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, grad_nll_K: Tensor) -> tuple[Any, ...]:
        del grad_nll_K
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "ChunkedCrossEntropy: backward ran a second time, but its gradients were given "
                "away the first; call the loss again, or use CrossEntropy with retain_graph=True"
            )
        # In place, as nothing else holds them; a factor of one changes no bit.
        scaled = (None if gradient is None else gradient.mul_(grad_loss) for gradient in gradients)
        return (*scaled, None, None, None, None, None)


def _add_product(total_VD: Tensor, work_CV: Tensor, logits_CV: Tensor, hidden_CD: Tensor) -> None:
    """total_VD += gradient^T @ hidden_CD, without a second tensor of total's size.

    `work_CV` and `logits_CV` both hold the logits' gradient, in fp32 and in the compute dtype.
    """
    if total_VD.dtype == logits_CV.dtype:
        total_VD.addmm_(logits_CV.t(), hidden_CD)
    elif total_VD.device.type == "cuda":
        step = max(1, PRODUCT_BYTES // (total_VD.shape[1] * total_VD.dtype.itemsize))
        for start in range(0, total_VD.shape[0], step):
            part_CV = logits_CV[:, start : start + step]
            product = torch.mm(part_CV.t(), hidden_CD, out_dtype=total_VD.dtype)
            total_VD[start : start + step].add_(product)
    else:  # no product of bf16 factors with an fp32 result there
        total_VD.addmm_(work_CV.t(), hidden_CD.to(total_VD.dtype))
