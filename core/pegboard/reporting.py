"""The numbers of a step: loss sums per source, metrics, and the line that a person reads.

Sums stay on the device until the step is over and come back in one all-reduce and one host sync.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from pegboard.contracts import Batch, ModelOutput
    from pegboard.parallel import Ranks

__all__ = ["SourceSums", "StepResult", "progress_bar", "step_line", "step_metrics"]


@dataclass
class StepResult:
    """Numbers of one optimizer step, global over ranks."""

    loss: float
    grad_norm: float
    applied: bool
    """False if a non-finite gradient made the step be skipped."""
    counts: Mapping[str, float]
    source_losses: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


class SourceSums:
    """Loss sums and counts by source, kept on the device until they are reduced once."""

    def __init__(self, num_sources: int, device: torch.device) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._sums = torch.zeros(2, num_sources, dtype=torch.float64, device=device)
        self._metrics: dict[str, torch.Tensor] = {}
        self.mean_loss = math.nan

    def add(self, batch: Batch, output: ModelOutput) -> None:
        """Count one micro-batch in; `batch` is on the device."""
        targets = batch.targets
        weights_K = targets.weights_K.double()
        self._loss += output.loss.detach()
        self._sums[0].index_add_(
            0, targets.source_ids_K, output.token_losses_K.double() * weights_K
        )
        self._sums[1].index_add_(0, targets.source_ids_K, weights_K)
        for name, value in output.metrics.items():
            self._metrics[name] = self._metrics.get(name, 0.0) + value.detach().double()

    def reduce(
        self, names: Sequence[str], ranks: Ranks
    ) -> tuple[float, dict[str, float], dict[str, float]]:
        """(loss, mean loss by source, metrics), global. One all-reduce and one host sync."""
        extra = [self._metrics[name].reshape(1) for name in sorted(self._metrics)]
        flat = torch.cat([self._loss.reshape(1), self._sums.flatten(), *extra])
        if ranks.world_size > 1:
            dist.all_reduce(flat)
        loss, *rest = flat.tolist()
        sums, counts = rest[: len(names)], rest[len(names) : 2 * len(names)]
        self.mean_loss = sum(sums) / sum(counts) if sum(counts) else math.nan
        by_source = {n: s / c for n, s, c in zip(names, sums, counts, strict=True) if c > 0}
        return (
            loss,
            by_source,
            dict(zip(sorted(self._metrics), rest[2 * len(names) :], strict=True)),
        )


def step_metrics(
    result: StepResult,
    *,
    lr: float,
    epoch: int,
    step_s: float,
    data_wait_s: float,
    peak_memory_gib: float,
    bad_steps: int,
) -> dict[str, float]:
    """What `metrics.jsonl` says of a training step; the keys are published."""
    counts = result.counts
    return {
        "loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        "epoch": float(epoch),
        "tokens": counts["tokens"],
        # Not the sum of weights that the loss is divided by.
        "targets": counts["supervised"],
        "samples": counts["samples"],
        "skipped_samples": counts["skipped_samples"],
        # Of a model that sees pictures only.
        **({"tiles": counts["tiles"]} if "tiles" in counts else {}),
        "tokens_per_s": counts["tokens"] / step_s,
        "targets_per_s": counts["supervised"] / step_s,
        "step_s": step_s,
        "data_wait_s": data_wait_s,
        "peak_memory_gib": peak_memory_gib,
        "bad_steps": float(bad_steps),
        **result.metrics,
        **{f"loss/{name}": value for name, value in result.source_losses.items()},
    }


def step_line(step: int, total_steps: int, metrics: Mapping[str, float], pace_s: float) -> str:
    """One line of the log; `pace_s` is the mean time of a step, for the ETA."""
    eta = int(pace_s * (total_steps - step))
    return (
        f"step {step}/{total_steps}  loss {metrics['loss']:.4f}  lr {metrics['lr']:.3e}  "
        f"grad_norm {metrics['grad_norm']:.3f}  {metrics['targets_per_s']:,.0f} targets/s  "
        f"{metrics['tokens_per_s']:,.0f} tokens/s  {metrics['peak_memory_gib']:.2f} GiB  "
        f"ETA {eta // 3600}:{eta // 60 % 60:02}:{eta % 60:02}"
    )


def progress_bar(total: int, initial: int, *, shown: bool) -> Any:
    """A bar of steps on a terminal; nothing elsewhere, or if it is not `shown`."""
    from tqdm import tqdm

    # None: only on a terminal.
    return tqdm(total=total, initial=initial, unit="step", disable=None if shown else True)
