"""Load of the experts: the losses that even it out, and what is reported of it.

Per sparse layer the balancing loss is `E * sum_e F_e * P_e`, 1 at perfect balance: F_e is the share
of token copies that went to expert e (no gradient), P_e the mean score of e. P is a sum over tokens
divided by the step's token count, so it adds up over ranks and micro-batches; F has to be that of
the whole step at the time of backward, and the modes differ in where they take it from.

Source: Fedus et al. 2021, "Switch Transformers", equations 4 to 6 (balancing); Zoph et al. 2022,
    "ST-MoE", equation 5 (z-loss); DeepSeek-AI 2024, "DeepSeek-V3", section 2.1.2 (per sequence);
    Qiu et al. 2025, "Demons in the Detail" (why F of the whole batch).

T tokens, S samples, L sparse layers, E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from loguru import logger
from torch import Tensor, nn

from pegboard.contracts import Batch, StepReport, Table
from pegboard_plugins.blocks.router import BiasedSigmoidRouter, Routing

__all__ = ["BALANCING_MODES", "ExpertBalance", "RouterSums", "sum_routing"]

BALANCING_MODES = ("lagged", "two_pass", "per_sequence", "hf_pooled", "per_micro_batch")
"""Where F comes from.

lagged: the step before; exact under any ranks, packing and accumulation, and free. 0 at first.
two_pass: this step, from a forward pass without gradients first (not needed, and not made, with one
    micro-batch per step); exact.
per_sequence: each sample its own F and P, weighted by its tokens; exact, and stricter.
hf_pooled: transformers' definition: this micro-batch on this rank, F and P pooled over layers, F
    not divided by K (perfect balance is K). Changes with ranks and accumulation.
per_micro_batch: this micro-batch on this rank, layer by layer. Changes with ranks and accumulation.
"""


class RouterSums(NamedTuple):
    """Sums over the real tokens of one micro-batch in one layer: outputs of the layer, because
    under FSDP what has a graph must leave a sharded module as its output."""

    counts_E: Tensor
    """(E,) float32, no graph: token copies that each expert got."""
    scores_E: Tensor
    """(E,) sum of scores."""
    squared_log_z: Tensor
    """() sum of `logsumexp(logits) ** 2`."""
    per_sequence: Tensor
    """() sum over samples of tokens times the sample's own balancing loss; 0 unless asked for."""


def sum_routing(
    routing: Routing, num_tokens: int, cu_seqlens: Tensor, *, per_sequence: bool
) -> RouterSums:
    """Sums for the auxiliary losses; padding, which stands at the end, is not counted.

    Args:
        num_tokens: real tokens; may be 0.
        cu_seqlens: (S+1,) int32, padding segments at the end included.
    """
    scores_TE = routing.scores_TE[:num_tokens]
    num_experts, top_k = scores_TE.shape[1], routing.expert_ids_TK.shape[1]
    with torch.no_grad():
        # What is chosen, as 0 and 1: sums of it are exact, and need no atomics.
        chosen_TE = torch.zeros_like(scores_TE, dtype=torch.float32)
        chosen_TE.scatter_(1, routing.expert_ids_TK[:num_tokens], 1.0)
        counts_E = chosen_TE.sum(0)
    log_z_T = routing.logits_TE[:num_tokens].logsumexp(-1)
    of_samples = scores_TE.new_zeros(())
    if per_sequence and num_tokens:
        offsets = cu_seqlens.long().clamp(max=num_tokens)
        counts_SE = torch.segment_reduce(chosen_TE, "sum", offsets=offsets, unsafe=True)
        scores_SE = torch.segment_reduce(scores_TE, "sum", offsets=offsets, unsafe=True)
        lengths_S = offsets.diff().clamp(min=1).to(scores_TE.dtype)
        products_S = (counts_SE.to(scores_TE.dtype) * scores_SE).sum(-1)
        of_samples = (products_S / lengths_S).sum() * (num_experts / top_k)
    return RouterSums(counts_E, scores_TE.sum(0), log_z_T.square().sum(), of_samples)


class ExpertBalance(nn.Module):
    """Auxiliary losses of a model's sparse layers, and their load over a step.

    Keeps `pegboard.contracts.StepState`. The load of the last step is a persistent buffer, so that
    `lagged` goes on after a restart as if there had been none.

    Args:
        layer_names: L names, for reports.
        num_experts: E.
        top_k: K.
        mode: one of `BALANCING_MODES`.
        balancing_coef: of the balancing loss, summed over layers (pooled in `hf_pooled`).
        z_coef: of the z-loss, summed over layers.
        routers: biased routers by layer, whose bias follows the load.
    """

    load_LE: Tensor
    sums_LX: Tensor

    def __init__(
        self,
        layer_names: Sequence[str],
        num_experts: int,
        top_k: int,
        *,
        mode: str,
        balancing_coef: float,
        z_coef: float = 0.0,
        routers: Sequence[BiasedSigmoidRouter] = (),
    ) -> None:
        super().__init__()
        if mode not in BALANCING_MODES:
            raise ValueError(f"mode {mode!r} is not one of {', '.join(BALANCING_MODES)}")
        self.layer_names, self.num_experts, self.top_k = tuple(layer_names), num_experts, top_k
        self.mode, self.balancing_coef, self.z_coef = mode, balancing_coef, z_coef
        self._routers = tuple(routers)  # a tuple: they are modules of the layers, not of this one
        shape = (len(self.layer_names), num_experts)
        self.register_buffer("load_LE", torch.zeros(shape, dtype=torch.float32))
        # Counts, scores and squared log z of the step so far.
        wide = torch.zeros(shape[0], 2 * num_experts + 1, dtype=torch.float32)
        self.register_buffer("sums_LX", wide, persistent=False)
        self._one_micro_batch = True
        self._first_pass_load_LE: Tensor | None = None
        self._last_LX: Tensor | None = None
        self._collapsed: set[str] = set()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Everything 0; draws nothing."""
        del generator
        nn.init.zeros_(self.load_LE)
        nn.init.zeros_(self.sums_LX)

    @property
    def per_sequence(self) -> bool:
        """Whether layers have to sum per sample."""
        return self.mode == "per_sequence" and self.balancing_coef > 0

    def forward(self, layers: Sequence[RouterSums], batch: Batch) -> dict[str, Tensor]:
        """Auxiliary losses of one micro-batch by name, scaled, with graph; none in evaluation.

        `batch.scales["tokens"]` is 1 / the step's tokens; without it the batch is the whole step.
        """
        if not self.training or not layers:
            return {}
        counts_LE = torch.stack([sums.counts_E for sums in layers])
        scores_LE = torch.stack([sums.scores_E for sums in layers])
        log_z_L = torch.stack([sums.squared_log_z for sums in layers])
        with torch.no_grad():
            seen = (counts_LE, scores_LE.detach(), log_z_L.detach().unsqueeze(1))
            self.sums_LX.add_(torch.cat([part.to(self.sums_LX.dtype) for part in seen], dim=1))
        scale = batch.scales.get("tokens", 1.0 / max(batch.num_tokens, 1))
        losses = {}
        if self.balancing_coef:
            if self.mode == "per_sequence":
                balancing = torch.stack([sums.per_sequence for sums in layers]).sum()
            elif self.mode == "hf_pooled":
                # Both means are over layers and tokens; the count of tokens, once, makes it a sum.
                rows = max(len(layers) * batch.num_tokens, 1)
                pooled_E = counts_LE.sum(0).to(scores_LE.dtype) / rows * (scores_LE.sum(0) / rows)
                balancing = self.num_experts * pooled_E.sum() * batch.num_tokens
            else:
                load_LE = self._load_for(counts_LE).to(scores_LE.dtype)
                balancing = self.num_experts * (load_LE * scores_LE).sum()
            losses["balancing_loss"] = self.balancing_coef * scale * balancing
        if self.z_coef:
            losses["z_loss"] = self.z_coef * scale * log_z_L.sum()
        return losses

    def wants_first_pass(self, num_micro_batches: int) -> bool:
        """In `two_pass` with more than one micro-batch."""
        self.sums_LX.zero_()  # of a step that was skipped
        self._one_micro_batch = num_micro_batches == 1
        self._first_pass_load_LE = None
        two_pass = self.mode == "two_pass" and self.balancing_coef > 0
        return two_pass and not self._one_micro_batch

    def end_first_pass(self, sum_over_ranks: Callable[[Tensor], None]) -> None:
        """The step's load is known now."""
        counts_LE = self.sums_LX[:, : self.num_experts].contiguous()
        sum_over_ranks(counts_LE)
        self._first_pass_load_LE = _shares(counts_LE)
        self.sums_LX.zero_()

    def end_step(self, sum_over_ranks: Callable[[Tensor], None]) -> None:
        """Sum over ranks, keep the load for the next step, let biases follow it."""
        total_LX = self.sums_LX.clone()
        sum_over_ranks(total_LX)
        self.sums_LX.zero_()
        self._last_LX = total_LX
        self.load_LE.copy_(_shares(total_LX[:, : self.num_experts]))
        for router, load_E in zip(self._routers, self.load_LE, strict=False):
            router.follow_load(load_E)

    def report(self) -> StepReport:
        """Load by layer; warns of a layer that uses few of its experts.

        Numbers: `experts/max_violation` (largest load over the mean load, less 1),
        `experts/entropy` (of the load, 1 at perfect balance), `experts/idle` (experts without a
        token), each as the mean over layers and by layer under `.../layer_<n>`;
        `experts/balancing` (1 at perfect balance) and `experts/squared_log_z`, means over layers.
        Table `expert_load`: load over mean load.
        """
        if self._last_LX is None:
            return StepReport()
        experts = self.num_experts
        total_LX = self._last_LX.double().cpu()
        counts_LE, scores_LE = total_LX[:, :experts], total_LX[:, experts : 2 * experts]
        tokens = float(counts_LE[0].sum()) / self.top_k
        if not tokens:
            return StepReport()
        load_LE = _shares(counts_LE)
        entropy_L = -torch.special.xlogy(load_LE, load_LE).sum(1)
        by_layer = {
            "max_violation": load_LE.amax(1) * experts - 1,
            "entropy": entropy_L / math.log(experts) if experts > 1 else entropy_L + 1,
            "idle": (counts_LE == 0).double().sum(1),
        }
        numbers = {
            "experts/balancing": float(experts * (load_LE * scores_LE / tokens).sum(1).mean()),
            "experts/squared_log_z": float(total_LX[:, -1].mean()) / tokens,
        }
        for name, values_L in by_layer.items():
            numbers[f"experts/{name}"] = float(values_L.mean())
            for layer, value in zip(self.layer_names, values_L.tolist(), strict=True):
                numbers[f"experts/{name}/{layer}"] = value
        if tokens * self.top_k >= 8 * experts:  # of fewer, idle experts say nothing
            self._warn_of_collapse(entropy_L.exp().tolist())
        table = Table(self.layer_names, (load_LE * experts).tolist())
        return StepReport(numbers, {"expert_load": table})

    def extra_repr(self) -> str:
        return (
            f"{len(self.layer_names)} layers, {self.top_k} of {self.num_experts}, {self.mode}, "
            f"balancing {self.balancing_coef}, z {self.z_coef}"
        )

    def _load_for(self, counts_LE: Tensor) -> Tensor:
        if self.mode == "lagged":
            # NOTE: 0 in the first step. A uniform load has no gradient on paper, but its rounding
            # noise does, on rows that have none otherwise, and Adam makes full steps of it.
            return self.load_LE.clone()
        if self.mode == "per_micro_batch":
            return _shares(counts_LE)
        if not self._one_micro_batch:
            assert self._first_pass_load_LE is not None or not torch.is_grad_enabled()
            # During the first pass itself, nothing is known and nothing needs to be.
            known = self._first_pass_load_LE
            return torch.zeros_like(counts_LE) if known is None else known
        counts_LE = counts_LE.clone()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(counts_LE)
        return _shares(counts_LE)

    def _warn_of_collapse(self, used_L: Sequence[float]) -> None:
        threshold = self.top_k + (self.num_experts - self.top_k) / 8
        for layer, used in zip(self.layer_names, used_L, strict=True):
            if used >= threshold or self.num_experts <= self.top_k:
                self._collapsed.discard(layer)
            elif layer not in self._collapsed:
                self._collapsed.add(layer)
                logger.warning(
                    f"{layer}: routing has collapsed: as uneven as if {used:.1f} of "
                    f"{self.num_experts} experts shared all tokens ({self.top_k} per token); raise "
                    "router_aux_loss_coef, lower the learning rate, or freeze the router"
                )


def _shares(counts_LE: Tensor) -> Tensor:
    """Rows that sum to 1; 0 where nothing was counted."""
    return counts_LE / counts_LE.sum(-1, keepdim=True).clamp(min=1.0)
