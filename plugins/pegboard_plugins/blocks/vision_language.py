"""Tower, projector and a text model as one module, over packed rows with pictures in them.

Features of the tiles, in order, take the places of the rows that hold the image token; everything else is
the text model's. A batch without pictures runs the tower on no tiles, so that all ranks issue the same
collectives; a step without pictures anywhere leaves it out on every rank, and then nothing of it gets a
gradient: no weight decay, no moment update.

M tiles, P rows that hold features, T tokens, D hidden, S pixels of a side, C colours, K supervised positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pegboard.contracts import (
    Batch,
    BuiltModel,
    ImageTokens,
    Loss,
    LossOutput,
    ModelOutput,
    ShardUnit,
)
from pegboard.errors import DataError
from pegboard.weight_map import WeightMap
from pegboard_plugins.blocks.vision import TileProjector, VisionTower, pixel_shuffle

if TYPE_CHECKING:
    from pegboard_plugins.blocks.vision_config import VisionLanguageComponent

__all__ = ["VisionLanguageModel", "build_vision_language", "check_pictures"]

_VISION, _PROJECTOR, _TEXT = "vision_tower.", "multi_modal_projector.", "language_model."


class VisionLanguageModel(nn.Module):
    """A text model that sees pictures.

    Args:
        config: the component's config.
        tokens: how tiles become rows.
        text: module of a text model (`pegboard.contracts.TextModel`).
        text_hidden_size: width of its rows.
    """

    def __init__(
        self,
        config: VisionLanguageComponent.Config,
        tokens: ImageTokens,
        text: nn.Module,
        text_hidden_size: int,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.join = round(1 / config.projector_config.downsample_ratio)
        self.image_mean, self.image_std = config.image_mean, config.image_std
        self.vision_tower = VisionTower(
            config.vision_config, recompute_ratio=config.vision_recompute_ratio
        )
        self.multi_modal_projector = TileProjector(
            config.vision_config.hidden_size * self.join**2, text_hidden_size
        )
        self.language_model: Any = text

    def forward(self, batch: Batch, loss: Loss) -> ModelOutput:
        """Loss of one micro-batch, the text model's own losses included."""
        hidden_TD, auxiliary = self._run(batch)
        out = self.language_model.compute_loss(hidden_TD, batch.targets, loss)
        total = out.loss + sum(auxiliary.values()) if auxiliary else out.loss
        metrics = {name: value.detach() for name, value in auxiliary.items()}
        return ModelOutput(total, out.token_losses_K, metrics)

    def image_features(self, pixels_MCSS: Tensor) -> Tensor:
        """Rows for the text model.

        Args:
            pixels_MCSS: (M, 3, S, S) uint8 colours, or float ones between 0 and 1.

        Returns:
            (P, D), the tiles' rows one after the other.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and _trains(self.vision_tower)):
            rows_MLD = self.vision_tower(self._normalised(pixels_MCSS))
        side = round((rows_MLD.shape[1] - 1) ** 0.5)
        patches = rows_MLD[:, 1:].unflatten(1, (side, side))
        # Rows, not tiles of rows: a product of those is a view, and what a shard unit returns must not be one.
        joined = pixel_shuffle(patches, self.join).flatten(0, 2)
        with torch.set_grad_enabled(
            torch.is_grad_enabled()
            and (joined.requires_grad or _trains(self.multi_modal_projector))
        ):
            features_PD: Tensor = self.multi_modal_projector(joined)
        return features_PD

    def embed(self, batch: Batch) -> Tensor:
        """(T, D): embeddings of the ids, features in the pictures' rows."""
        # First the tower: what a frozen one needed is free again when the text model begins.
        features_PD = None
        if batch.scales.get("tiles") != 0.0:
            pixels = batch.media.get("pixel_values")
            if pixels is None:
                size = self.tokens.tile_size
                pixels = batch.input_ids_T.new_zeros((0, 3, size, size), dtype=torch.uint8)
            features_PD = self.image_features(pixels)
        hidden_TD: Tensor = self.language_model.embed(batch.input_ids_T)
        if features_PD is None:
            return hidden_TD
        rows_P = batch.media.get("image_positions")
        if rows_P is None:
            rows_P = batch.input_ids_T.new_zeros(0)
        if rows_P.shape[0] != features_PD.shape[0]:
            raise DataError(
                f"{_places(batch)}: {rows_P.shape[0]} rows for pictures, but "
                f"{features_PD.shape[0]} rows of features"
            )
        return hidden_TD.index_copy(0, rows_P, features_PD.to(hidden_TD.dtype))

    def logits(self, batch: Batch) -> Tensor:
        """(T, V) logits of an unsharded model: for tests and comparisons, not for training."""
        found: list[Tensor] = []

        def keep(hidden_TD: Tensor, head: Any, targets: Any) -> Any:
            found.append(head.logits(hidden_TD))
            return LossOutput(hidden_TD.sum(), hidden_TD.new_zeros(0))

        hidden_TD, _ = self._run(batch)
        self.language_model.compute_loss(hidden_TD, batch.targets, keep)
        return found[0]

    def _run(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        hidden_TD: Tensor
        hidden_TD, auxiliary = self.language_model.run_layers(self.embed(batch), batch)
        return hidden_TD, auxiliary

    def _normalised(self, pixels_MCSS: Tensor) -> Tensor:
        """Float pixels, each colour by its own mean and deviation; numbers of the config, no tensors, so
        that nothing waits for a copy to the device."""
        unit = 255.0 if pixels_MCSS.dtype == torch.uint8 else 1.0
        wide = torch.promote_types(
            torch.float32, self.vision_tower.embeddings.position_embeddings.dtype
        )
        colours = [
            pixels_MCSS[:, index].to(wide).div(unit).sub(mean).div(std)
            for index, (mean, std) in enumerate(zip(self.image_mean, self.image_std, strict=True))
        ]
        return torch.stack(colours, dim=1)


def check_pictures(batch: Batch, tokens: ImageTokens) -> int:
    """Tiles of a batch that is still on the host, after a look at what belongs together.

    Raises:
        DataError: rows of the image token and rows of features are not as many, or tiles have another
            size; names the sample, where it is from, and both counts.
    """
    pixels, rows_P = batch.media.get("pixel_values"), batch.media.get("image_positions")
    num_tiles = 0 if pixels is None else int(pixels.shape[0])
    if pixels is not None and num_tiles and pixels.shape[-1] != tokens.tile_size:
        raise DataError(
            f"{_places(batch)}: tiles of {pixels.shape[-1]} pixels, but the model takes "
            f"{tokens.tile_size} (tile_size)"
        )
    marked_P = (batch.input_ids_T == tokens.image_token_id).nonzero().flatten()
    if rows_P is None:
        rows_P = marked_P[:0]
    expected = num_tiles * tokens.tokens_per_tile
    if len(marked_P) == len(rows_P) == expected and bool((marked_P == rows_P).all()):
        return num_tiles
    if len(marked_P) == len(rows_P) == expected:
        raise DataError(
            f"{_places(batch)}: image_positions are not the rows where image tokens (id "
            f"{tokens.image_token_id}) stand; a fault of the collator"
        )
    place, found, made = _first_mismatch(batch, tokens, marked_P, num_tiles)
    raise DataError(
        f"{place}: {found} image tokens (id {tokens.image_token_id}), but its pictures give {made} rows "
        f"({made // tokens.tokens_per_tile} tiles of {tokens.tokens_per_tile})"
    )


def build_vision_language(component: VisionLanguageComponent) -> BuiltModel:
    """The whole model on the current device and what the core must know of it."""
    config, names = component.config, component.names
    tokens = component.image_tokens()
    text = config.text_config.build()
    module = VisionLanguageModel(config, tokens, text.module, text.hf_config["hidden_size"])
    own = (
        *module.vision_tower.weight_entries(_VISION, names.vision),
        *module.multi_modal_projector.weight_entries(_PROJECTOR, names.projector),
    )
    frozen = {
        _VISION: config.freeze_vision,
        _PROJECTOR: config.freeze_projector,
        _TEXT: config.freeze_language,
    }

    def under_text(prefixes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_TEXT + prefix for prefix in prefixes)

    def step_counts(batch: Batch) -> Mapping[str, float]:
        own_counts = {"tiles": float(check_pictures(batch, tokens))}
        return {**(text.step_counts(batch) if text.step_counts else {}), **own_counts}

    return replace(
        text,
        module=module,
        weight_map=WeightMap(own) + text.weight_map.prefixed(_TEXT, names.of_text),
        shard_units=(
            *(ShardUnit(_VISION + path) for path in module.vision_tower.layer_names),
            ShardUnit(_VISION.removesuffix(".")),
            ShardUnit(_PROJECTOR.removesuffix(".")),
            *(unit._replace(path=_TEXT + unit.path) for unit in text.shard_units),
        ),
        hf_config=component.hf_config(text.hf_config),
        # The tower recomputes by itself (vision_recompute_ratio).
        checkpoint_units=under_text(text.checkpoint_units),
        expert_axis={_TEXT + name: dim for name, dim in text.expert_axis.items()},
        freeze_groups={
            "vision": (_VISION,),
            "projector": (_PROJECTOR,),
            "language": (_TEXT,),
            **{group: under_text(prefixes) for group, prefixes in text.freeze_groups.items()},
        },
        frozen=(
            *under_text(text.frozen),
            *(prefix for prefix, is_frozen in frozen.items() if is_frozen),
        ),
        step_counts=step_counts,
    )


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _places(batch: Batch) -> str:
    return ", ".join(map(str, batch.keys)) or "a batch without keys"


def _first_mismatch(
    batch: Batch, tokens: ImageTokens, marked_P: Tensor, num_tiles: int
) -> tuple[str, int, int]:
    """(place of the first sample that doesn't fit, its image tokens, rows its pictures give)."""
    ends = batch.cu_seqlens[1:].to(marked_P.dtype)
    sample_P = torch.searchsorted(ends, marked_P, right=True)
    found_S = torch.bincount(sample_P, minlength=len(ends))[: len(ends)].tolist()
    made_S = [0] * len(found_S)
    of_samples, counts = batch.extras.get("tiles_of_samples"), batch.media.get("tile_counts")
    if of_samples is not None:
        made_S[: len(of_samples)] = [count * tokens.tokens_per_tile for count in of_samples]
    else:  # samples take pictures in order while their tokens last
        tiles = counts.tolist() if counts is not None else [num_tiles]
        left = [count * tokens.tokens_per_tile for count in tiles]
        for sample, found in enumerate(found_S):
            while left and made_S[sample] < found:
                made_S[sample] += left.pop(0)
        last = max((s for s, found in enumerate(found_S) if found), default=0)
        made_S[last] += sum(left)
    for sample, (found, made) in enumerate(zip(found_S, made_S, strict=True)):
        if found != made:
            known = sample < len(batch.keys)
            return (str(batch.keys[sample]) if known else _places(batch)), found, made
    return _places(batch), len(marked_P), num_tiles * tokens.tokens_per_tile
