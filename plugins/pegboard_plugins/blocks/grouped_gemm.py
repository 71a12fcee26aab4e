"""Matrix products of rows that are sorted by group with one matrix per group: the one seam for it.

`torch.nn.functional.grouped_mm` where it runs, else a loop over the groups, which is also the
reference that tests compare it with. Which one is used is logged by name, never silent.

M rows, E groups (experts), I and O widths of input and output rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import torch
from loguru import logger
from torch import Tensor
from torch.nn import functional

__all__ = ["LOOP", "TORCH_GROUPED_MM", "GroupedGemm", "choose_grouped_gemm", "why_not_torch"]


class GroupedGemm(NamedTuple):
    """One implementation of both products. Neither has a graph: callers write the backward."""

    name: str
    rows: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(rows_MI, weight_EIO, ends_E) -> (M, O): each row times the matrix of its group."""
    weights: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(left_MO, right_MI, ends_E) -> (E, O, I): per group, left transposed times right; 0 for an
    empty group."""


def choose_grouped_gemm(rows: Tensor, *widths: int) -> GroupedGemm:
    """The implementation for tensors of this device and dtype whose rows have these widths.

    `ends_E` is (E,) int32 on the device, the end of each group's rows; the last is M.
    """
    aligned = all(width * rows.element_size() % 16 == 0 for width in widths)
    capability = torch.cuda.get_device_capability(rows.device) if rows.is_cuda else None
    reason = why_not_torch(rows.device.type, rows.dtype, aligned=aligned, capability=capability)
    _log_choice(rows.device.type, rows.dtype, reason)
    return TORCH_GROUPED_MM if reason is None else LOOP


def why_not_torch(
    device_type: str, dtype: torch.dtype, *, aligned: bool, capability: tuple[int, int] | None
) -> str | None:
    """Why torch's kernel can't take such tensors; None if it can.

    Args:
        aligned: every row is a multiple of 16 bytes long.
        capability: of a CUDA device, such as (9, 0).
    """
    if not hasattr(functional, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    if not aligned:
        return "rows are not a multiple of 16 bytes long"
    if device_type == "cpu":
        known = (torch.float32, torch.bfloat16)
        return None if dtype in known else f"no {_short(dtype)} on the CPU"
    if device_type == "cuda":
        if dtype != torch.bfloat16:
            return f"no {_short(dtype)} on CUDA"
        if capability is None or capability < (8, 0):
            return f"no kernel for compute capability {capability}"
        return None
    return f"not known to run on '{device_type}'"


def _torch_rows(rows_MI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    # Without a row there is nothing to launch a kernel for: not all of torch's take an empty matrix.
    if not rows_MI.shape[0]:
        return rows_MI.new_empty(0, weight_EIO.shape[2])
    return functional.grouped_mm(rows_MI, weight_EIO, offs=ends_E)


def _torch_weights(left_MO: Tensor, right_MI: Tensor, ends_E: Tensor) -> Tensor:
    if not left_MO.shape[0]:
        return left_MO.new_zeros(ends_E.shape[0], left_MO.shape[1], right_MI.shape[1])
    out_EOI = functional.grouped_mm(left_MO.t(), right_MI, offs=ends_E)
    # NOTE: since Blackwell (10, 0) the kernel leaves the products of empty groups unwritten; may go
    # when pytorch/pytorch#172439 is closed.
    if left_MO.is_cuda and torch.cuda.get_device_capability(left_MO.device) >= (10, 0):
        _clear_empty_groups(out_EOI, ends_E)
    return out_EOI


def _clear_empty_groups(out_EOI: Tensor, ends_E: Tensor) -> None:
    """Put 0 where a group has no row; no host sync."""
    empty_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
    out_EOI.masked_fill_(empty_E[:, None, None], 0)


def _loop_rows(rows_MI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    out_MO = rows_MI.new_empty(rows_MI.shape[0], weight_EIO.shape[2])
    # unbind, not an index per group: it makes all views at once.
    for (start, end), weight_IO in zip(_spans(ends_E), weight_EIO.unbind(0), strict=True):
        if start < end:
            torch.mm(rows_MI[start:end], weight_IO, out=out_MO[start:end])
    return out_MO


def _loop_weights(left_MO: Tensor, right_MI: Tensor, ends_E: Tensor) -> Tensor:
    out_EOI = left_MO.new_empty(ends_E.shape[0], left_MO.shape[1], right_MI.shape[1])
    for (start, end), out_OI in zip(_spans(ends_E), out_EOI.unbind(0), strict=True):
        if start < end:
            torch.mm(left_MO[start:end].t(), right_MI[start:end], out=out_OI)
        else:
            out_OI.zero_()
    return out_EOI


def _spans(ends_E: Tensor) -> Iterator[tuple[int, int]]:
    start = 0
    for end in ends_E.tolist():  # a host sync on an accelerator: what torch's kernel avoids
        yield start, end
        start = end


TORCH_GROUPED_MM = GroupedGemm("torch.nn.functional.grouped_mm", _torch_rows, _torch_weights)
"""One kernel for all experts."""
LOOP = GroupedGemm("loop over experts", _loop_rows, _loop_weights)
"""One product after the other: anywhere, in any dtype."""


@cache
def _log_choice(device_type: str, dtype: torch.dtype, reason: str | None) -> None:
    where = f"experts in {_short(dtype)} on {device_type}"
    if reason is None:
        logger.info(f"{where}: {TORCH_GROUPED_MM.name}")
    else:
        logger.warning(f"{where}: {LOOP.name} instead of {TORCH_GROUPED_MM.name}: {reason}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
