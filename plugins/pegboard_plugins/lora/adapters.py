"""Low-rank changes of linear layers, in place.

A linear layer keeps its weight, its name and its place; it gets a child `lora` with the factors A
and B, and adds `scale * B(A(x))`. A fused layer (q, k and v rows in one weight) gets factors for
each of its published parts, one below the other, so that what is trained is what peft would train
on the published model and the adapter can be written in its layout.

Source: Hu et al. 2021, "LoRA", section 4.1; the scale of rsLoRA is Kalajdzievski 2023
    (arXiv:2312.03732).

R rank, P parts of a fused layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase, translate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pegboard import Adapter, BuiltModel, ConfigError
from pegboard.weight_map import Entry, WeightMap, fused

if TYPE_CHECKING:
    from .component import LoRA

__all__ = ["AdaptedLinear", "LowRank", "with_adapters"]

_PEFT_PREFIX = "base_model.model."


class Part(NamedTuple):
    """A published linear layer that is rows of one of ours."""

    published: str
    """Published name of the layer, without `.weight`."""
    start: int
    stop: int
    """Its rows."""


class LowRank(nn.Module):
    """Factors of the change of one linear layer.

    Args:
        in_features: columns of the layer's weight.
        out_features: rows of the layer's weight.
        parts: the rows that change, ascending and apart.
        rank: R.
        scale: factor of the change.
        dropout: share of the input that the change doesn't see in training.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        parts: Sequence[Part],
        *,
        rank: int,
        scale: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.rank, self.scale, self.dropout = rank, scale, dropout
        self.out_features = out_features
        self.rows = [(part.start, part.stop) for part in parts]
        num_rows = sum(stop - start for start, stop in self.rows)
        self.A = nn.Parameter(torch.empty(len(parts) * rank, in_features))
        """(P * R, in_features)."""
        self.B = nn.Parameter(torch.empty(num_rows, rank))
        """(changed rows, R)."""

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """A uniform as a linear layer's, B zero: the model starts as it was."""
        bound = 1 / math.sqrt(self.A.shape[1])
        nn.init.uniform_(self.A, -bound, bound, generator=generator)
        nn.init.zeros_(self.B)

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        """(..., in_features), (..., out_features) -> base plus the change."""
        low = functional.linear(functional.dropout(x, self.dropout, self.training), self.A)
        if self.rows == [(0, self.out_features)]:
            return base + self.scale * functional.linear(low, self.B)
        pieces, position, row = [], 0, 0
        for index, (start, stop) in enumerate(self.rows):
            if start > position:
                pieces.append(base[..., position:start])
            factor = self.B[row : row + stop - start]
            change = functional.linear(
                low[..., index * self.rank : (index + 1) * self.rank], factor
            )
            pieces.append(base[..., start:stop] + self.scale * change)
            position, row = stop, row + stop - start
        if position < self.out_features:
            pieces.append(base[..., position:])
        return torch.cat(pieces, dim=-1)

    def merge(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """The layer's weight with the change in it, in float32 at least."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        merged, row = weight.to(wide, copy=True), 0
        for index, (start, stop) in enumerate(self.rows):
            factor_a = a[index * self.rank : (index + 1) * self.rank].to(wide)
            factor_b = b[row : row + stop - start].to(wide)
            merged[start:stop].addmm_(factor_b, factor_a, alpha=self.scale)
            row += stop - start
        return merged

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, rows={self.rows}"


class AdaptedLinear(nn.Linear):
    """A linear layer with a low-rank change; its own weight keeps its name."""

    lora: LowRank

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        out: Tensor = self.lora(x, functional.linear(x, self.weight, self.bias))
        return out


def with_adapters(built: BuiltModel, config: LoRA.Config) -> BuiltModel:
    """Change the linear layers that `target_modules` names, freeze everything else.

    A part of the model that is frozen already (a vision tower) gets no change.

    Raises:
        ConfigError: a target names no linear layer, or one that can't be changed in place.
    """
    if config.load_adapter is not None:
        _check_same(Path(config.load_adapter), config)
    names = tuple(name for name, _ in built.module.named_parameters())
    scale = config.alpha / (math.sqrt(config.rank) if config.use_rslora else config.rank)
    entries, adapter_entries, added = [], list[Entry](), list[str]()
    found: set[str] = set()
    for entry in built.weight_map.entries:
        parts = _parts(entry, config)
        if not parts or (built.frozen and entry.ours.startswith(built.frozen)):
            entries.append(entry)
            continue
        path = entry.ours.removesuffix(".weight")
        layer = _linear(built.module, path, parts[0])
        found |= {part.published.rpartition(".")[2] for part in parts}
        lora = LowRank(
            layer.in_features,
            layer.out_features,
            parts,
            rank=config.rank,
            scale=scale,
            dropout=config.dropout,
        )
        layer.__class__ = AdaptedLinear
        layer.lora = lora
        factors = (f"{path}.lora.A", f"{path}.lora.B")
        added += factors
        entries.append(replace(entry, also=factors, merge=lora.merge))
        adapter_entries += _adapter_entries(factors, lora, parts)
    missing = [name for name in config.target_modules if name not in found]
    if missing and ("target_modules" in config.model_fields_set or not found):
        raise ConfigError(_nothing_to_change(missing, built.weight_map))
    return replace(
        built,
        weight_map=replace(
            built.weight_map,
            entries=tuple(entries),
            unpublished=(*built.weight_map.unpublished, *added),
        ),
        frozen=(*built.frozen, *names),
        adapter=Adapter(
            WeightMap(tuple(adapter_entries)),
            _peft_config(config, sorted(found)),
            config.load_adapter,
        ),
    )


def _parts(entry: Entry, config: LoRA.Config) -> list[Part]:
    """The published linear layers of an entry that are to change."""
    if not entry.ours.endswith(".weight") or len(entry.shape) != 2:
        return []
    parts = []
    for piece in entry.pieces:
        name = piece.published.removesuffix(".weight")
        wanted = name.rpartition(".")[2] in config.target_modules
        if wanted and not any(fnmatchcase(name, pattern) for pattern in config.exclude):
            start, stop = piece.ours[0] if piece.ours else (0, entry.shape[0])
            parts.append(Part(name, start, stop))
    return sorted(parts, key=lambda part: part.start)


def _linear(module: nn.Module, path: str, part: Part) -> nn.Linear:
    layer = module.get_submodule(path)
    # A subclass has a forward of its own, which the change would replace.
    if type(layer) is not nn.Linear:
        raise ConfigError(
            f"transforms: LoRA: {part.published} is {type(layer).__name__} here, expected a plain "
            "linear layer; leave it out of target_modules or exclude it"
        )
    return layer


def _adapter_entries(factors: tuple[str, str], lora: LowRank, parts: Sequence[Part]) -> list[Entry]:
    name_a, name_b = factors
    prefix = [_PEFT_PREFIX + part.published for part in parts]
    rows_a = [(f"{name}.lora_A.weight", lora.rank) for name in prefix]
    rows_b = [
        (f"{name}.lora_B.weight", part.stop - part.start)
        for name, part in zip(prefix, parts, strict=True)
    ]
    return [fused(name_a, rows_a, lora.A.shape), fused(name_b, rows_b, lora.B.shape)]


def _peft_config(config: LoRA.Config, found: Sequence[str]) -> dict[str, Any]:
    """`adapter_config.json`; the saver adds the base model's name."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "target_modules": list(found),
        "exclude_modules": _as_regex(config.exclude),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _check_same(folder: Path, config: LoRA.Config) -> None:
    """The adapter to start from must mean the same by its numbers as this config."""
    file = folder / "adapter_config.json"
    try:
        theirs = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"transforms: LoRA: load_adapter: {file}: {error}; expected a folder that peft or "
            "AdapterSaver wrote"
        ) from error
    wanted = {"rank": "r", "alpha": "lora_alpha", "use_rslora": "use_rslora"}
    for ours, name in wanted.items():
        value = getattr(config, ours)
        if theirs.get(name, False) != value:
            raise ConfigError(
                f"transforms: LoRA: {ours}: {value} differs from {name} {theirs.get(name)} of {file}; "
                "set it to that"
            )
    for name, plain in (
        ("rank_pattern", {}),
        ("alpha_pattern", {}),
        ("use_dora", False),
        ("bias", "none"),
    ):
        if (value := theirs.get(name) or plain) != plain:
            raise ConfigError(
                f"transforms: LoRA: load_adapter: {file}: {name} is {json.dumps(value)}, and layers of one rank "
                "and scale, without biases, are all that can be started from; merge it into the base model with peft "
                "and load that"
            )


def _as_regex(patterns: Sequence[str]) -> str | None:
    """One expression for shell patterns, as peft takes it."""
    return "|".join(f"(?:{translate(pattern)})" for pattern in patterns) if patterns else None


def _nothing_to_change(missing: Sequence[str], weight_map: WeightMap) -> str:
    known = sorted(
        {
            piece.published.removesuffix(".weight").rpartition(".")[2]
            for entry in weight_map.entries
            if len(entry.shape) == 2
            for piece in entry.pieces
        }
    )
    return (
        f"transforms: LoRA: no layer to change is named {', '.join(missing)}; the matrices of this "
        f"model are named {', '.join(known)}"
    )
