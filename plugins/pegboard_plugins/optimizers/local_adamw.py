"""AdamW that updates this rank's shards as the plain tensors they are.

AdamW is element by element, so nothing of a sharded tensor's layout matters to it. Handing the
kernels local tensors spares the dispatch of every distributed tensor (a noticeable part of a small
model's step) and lets one parameter group hold tensors of different meshes, which the fused and
foreach kernels refuse otherwise. The state keeps the parameters' layout: checkpoints see no change.

Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["LocalAdamW"]


class LocalAdamW(torch.optim.AdamW):
    """torch's AdamW, run on local shards; arguments, state and numbers are the same."""

    # NOTE: torch has no public seam between collecting a group's tensors and updating them.
    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """Collect the group's tensors, in one list per role, as local ones."""
        has_complex: bool = super()._init_group(group, *lists)  # type: ignore[no-untyped-call]
        for tensors in lists:
            tensors[:] = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        return has_complex
