"""A vision tower over square tiles, and the projector that makes rows of a text model of it.

Tiles are packed as (M, L, D): every tile is a segment of its own in attention, whatever sample it is from.
Everything also runs on no tiles at all, with a graph, so that a rank without pictures takes part in the
same collectives as the others at no cost.

Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"; layer scale: Touvron et al. 2021, "Going
    deeper with Image Transformers"; drop path: Huang et al. 2016, "Deep Networks with Stochastic Depth";
    pixel shuffle as in InternVL 1.5 (Chen et al. 2024), with transformers' internvl as the reference.

M tiles, C colours, S pixels of a side, G patches of a side, L rows of a tile (1 + G * G), D hidden, N heads,
H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pegboard.weight_map import Entry, fused, renamed
from pegboard_plugins.blocks.norm import RMSNorm
from pegboard_plugins.blocks.vision_config import VisionConfig

__all__ = ["TileProjector", "VisionLayer", "VisionTower", "drop_path", "pixel_shuffle"]

_PROJECTOR_EPS = 1e-5
_QK_NORM_EPS = 1e-6


class VisionTower(nn.Module):
    """Pixels of tiles to one row per patch.

    Args:
        config: sizes.
        recompute_ratio: share of the layers that recompute their activations in backward.
    """

    def __init__(self, config: VisionConfig, *, recompute_ratio: float = 0.0) -> None:
        super().__init__()
        self.initializer_range = config.initializer_range
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config, recompute_ratio)

    def forward(self, pixels_MCSS: Tensor) -> Tensor:
        """(M, 3, S, S) normalised pixels, S a multiple of the patch -> (M, L, D); row 0 is the class."""
        out_MLD: Tensor = self.encoder(self.embeddings(pixels_MCSS))
        return out_MLD

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Paths of the layers, in order."""
        return tuple(f"encoder.layer.{index}" for index in range(len(self.encoder.layer)))

    def weight_entries(self, ours: str, published: str) -> list[Entry]:
        """Entries of all parameters, q, k, v apart; both prefixes with their dot."""
        entries = []
        for name, parameter in self.named_parameters():
            if ".qkv_proj." in name:
                before, _, leaf = name.partition("qkv_proj.")
                rows = parameter.shape[0] // 3
                parts = [(f"{published}{before}{part}_proj.{leaf}", rows) for part in "qkv"]
                entries.append(fused(ours + name, parts, parameter.shape))
            else:
                entries.append(renamed(ours + name, published + name, parameter.shape))
        return entries


class VisionLayer(nn.Module):
    """One layer: attention inside each tile, then feed-forward, each normed before, scaled and added.

    Args:
        config: sizes.
        drop_path_rate: chance that a branch skips a tile, in training.
        recompute: recompute activations in backward.
    """

    def __init__(self, config: VisionConfig, drop_path_rate: float, *, recompute: bool) -> None:
        super().__init__()
        self.drop_path_rate, self.recompute = drop_path_rate, recompute
        self.layer_scale_init_value = config.layer_scale_init_value
        self.layernorm_before = _norm(config)
        self.attention = _TileAttention(config)
        self.layernorm_after = _norm(config)
        self.mlp = _FeedForward(config)
        self.lambda_1 = nn.Parameter(torch.empty(config.hidden_size))
        self.lambda_2 = nn.Parameter(torch.empty(config.hidden_size))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Both scales at their first value; draws nothing."""
        del generator
        nn.init.constant_(self.lambda_1, self.layer_scale_init_value)
        nn.init.constant_(self.lambda_2, self.layer_scale_init_value)

    def forward(self, hidden_MLD: Tensor) -> Tensor:
        """(M, L, D) -> (M, L, D)."""
        if self.recompute and torch.is_grad_enabled():
            # Inside forward, so that what is sharded is gathered around the recomputation too.
            out_MLD: Tensor = checkpoint(
                self._compute, hidden_MLD, use_reentrant=False, preserve_rng_state=True
            )
            return out_MLD
        return self._compute(hidden_MLD)

    def _compute(self, hidden_MLD: Tensor) -> Tensor:
        # Without gradients (a frozen tower) there is nothing to regularise.
        trains = self.training and torch.is_grad_enabled()
        rate = self.drop_path_rate if trains else 0.0
        branch_MLD = self.lambda_1 * self.attention(self.layernorm_before(hidden_MLD))
        hidden_MLD = hidden_MLD + drop_path(branch_MLD, rate)
        branch_MLD = self.lambda_2 * self.mlp(self.layernorm_after(hidden_MLD))
        return hidden_MLD + drop_path(branch_MLD, rate)


class TileProjector(nn.Module):
    """Joined patches to rows of the text model: norm, linear, GELU, linear.

    Args:
        joined_size: width of joined patches.
        text_hidden_size: width of the text model's rows.
    """

    def __init__(self, joined_size: int, text_hidden_size: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(joined_size, eps=_PROJECTOR_EPS)
        self.linear_1 = nn.Linear(joined_size, text_hidden_size)
        self.linear_2 = nn.Linear(text_hidden_size, text_hidden_size)

    def forward(self, joined: Tensor) -> Tensor:
        """(..., joined_size) -> (..., text_hidden_size)."""
        out: Tensor = self.linear_2(functional.gelu(self.linear_1(self.layer_norm(joined))))
        return out

    def weight_entries(self, ours: str, published: str) -> list[Entry]:
        """Entries of all parameters; both prefixes with their dot."""
        return [
            renamed(ours + name, published + name, parameter.shape)
            for name, parameter in self.named_parameters()
        ]


def pixel_shuffle(patches_MGGD: Tensor, join: int) -> Tensor:
    """Neighbouring patches become one: (M, G, G', D) -> (M, G / join, G' / join, D * join^2).

    The order inside a joined patch is InternVL's; weights depend on it.
    """
    tiles, rows, columns, width = patches_MGGD.shape
    half = patches_MGGD.reshape(tiles, rows, columns // join, width * join).permute(0, 2, 1, 3)
    both = half.reshape(tiles, columns // join, rows // join, width * join * join)
    return both.permute(0, 2, 1, 3)


def drop_path(branch_MLD: Tensor, rate: float) -> Tensor:
    """Each tile's branch is dropped with chance `rate`; the others are scaled to keep the mean."""
    if rate == 0.0:
        return branch_MLD
    kept_M = torch.rand(branch_MLD.shape[0], 1, 1, device=branch_MLD.device) >= rate
    return branch_MLD * (kept_M.to(branch_MLD.dtype) / (1.0 - rate))


class _Embeddings(nn.Module):
    """Patches, the class row in front, and positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        side, width = config.image_size // config.patch_size, config.hidden_size
        self.patch_size = config.patch_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.empty(1, 1 + side * side, width))
        self.patch_embeddings = _PatchEmbeddings(width, config.patch_size)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Zeros; draws nothing."""
        del generator
        nn.init.zeros_(self.cls_token)
        nn.init.zeros_(self.position_embeddings)

    def forward(self, pixels_MCSS: Tensor) -> Tensor:
        """(M, 3, S, S) -> (M, L, D)."""
        patches = self.patch_embeddings(pixels_MCSS)
        tiles, side = patches.shape[0], pixels_MCSS.shape[-1] // self.patch_size
        class_row = self.cls_token.expand(tiles, -1, -1)
        out: Tensor = torch.cat((class_row, patches), dim=1) + self._positions(side)
        return out

    def _positions(self, side: int) -> Tensor:
        """(1, 1 + side^2, D); another side than the native one is interpolated, the class row is not."""
        native = round((self.position_embeddings.shape[1] - 1) ** 0.5)
        if side == native:
            return self.position_embeddings
        grid = self.position_embeddings[:, 1:].unflatten(1, (native, native)).permute(0, 3, 1, 2)
        grid = functional.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
        patches = grid.permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat((self.position_embeddings[:, :1], patches), dim=1)


class _PatchEmbeddings(nn.Module):
    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.projection = _PatchProjection(width, patch_size)

    def forward(self, pixels_MCSS: Tensor) -> Tensor:
        out: Tensor = self.projection(pixels_MCSS)
        return out


class _PatchProjection(nn.Module):
    """The convolution whose stride is its kernel, as the matrix product it is: it runs on no tiles too."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 3, patch_size, patch_size))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, pixels_MCSS: Tensor) -> Tensor:
        """(M, 3, S, S) -> (M, G * G, D), in the weight's dtype."""
        tiles, colours, size, _ = pixels_MCSS.shape
        patch = self.weight.shape[-1]
        side = size // patch
        pixels = pixels_MCSS.to(self.weight.dtype)
        pixels = pixels.reshape(tiles, colours, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
        flat = pixels.reshape(tiles, side * side, colours * patch * patch)
        return functional.linear(flat, self.weight.flatten(1), self.bias)


class _Encoder(nn.Module):
    def __init__(self, config: VisionConfig, recompute_ratio: float) -> None:
        super().__init__()
        count = config.num_hidden_layers
        self.layer = nn.ModuleList(
            VisionLayer(
                config,
                config.drop_path_rate * index / max(1, count - 1),
                recompute=int((index + 1) * recompute_ratio) > int(index * recompute_ratio),
            )
            for index in range(count)
        )

    def forward(self, hidden_MLD: Tensor) -> Tensor:
        for layer in self.layer:
            hidden_MLD = layer(hidden_MLD)
        return hidden_MLD


class _TileAttention(nn.Module):
    """Full attention inside each tile; queries and keys may be normed over all heads together."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.qkv_proj = nn.Linear(width, 3 * width, bias=config.attention_bias)
        self.q_norm: nn.Module
        self.k_norm: nn.Module
        if config.use_qk_norm:
            self.q_norm, self.k_norm = RMSNorm(width, _QK_NORM_EPS), RMSNorm(width, _QK_NORM_EPS)
        else:
            self.q_norm = self.k_norm = nn.Identity()
        self.projection_layer = nn.Linear(width, width)

    def forward(self, hidden_MLD: Tensor) -> Tensor:
        """(M, L, D) -> (M, L, D)."""
        q_MLD, k_MLD, v_MLD = self.qkv_proj(hidden_MLD).chunk(3, dim=-1)
        q_MNLH, k_MNLH, v_MNLH = (
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for states in (self.q_norm(q_MLD), self.k_norm(k_MLD), v_MLD)
        )
        if hidden_MLD.shape[0] == 0:
            # No kernel is asked whether it takes nothing; the graph reaches all three.
            out_MNLH = q_MNLH + k_MNLH + v_MNLH
        else:
            # Tiles of a batch have one length, so the batch dim is what bounds a segment.
            out_MNLH = functional.scaled_dot_product_attention(q_MNLH, k_MNLH, v_MNLH)
        out: Tensor = self.projection_layer(out_MNLH.transpose(1, 2).flatten(2))
        return out


class _FeedForward(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_MLD: Tensor) -> Tensor:
        out: Tensor = self.fc2(functional.gelu(self.fc1(hidden_MLD)))
        return out


def _norm(config: VisionConfig) -> nn.Module:
    if config.norm_type == "rms_norm":
        return RMSNorm(config.hidden_size, config.layer_norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
