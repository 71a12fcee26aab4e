"""Claim: Intern-S1 computes what transformers' InternVLForConditionalGeneration computes from the same weights,
forward and backward, for both kinds of tower and of text model; its weights go to disk and back under the
published names without changing a bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pegboard import ComponentConfig, ComponentOf, ModelComponent
from pegboard.contracts import Batch, BuiltModel, Head, LossOutput, SampleKey, Targets
from pegboard.initialization import init_module_weights
from pegboard.plugin_manager import load_plugins
from pegboard.weight_export import iter_published
from pegboard.weight_loading import load_published_weights

IMAGE_ID, TILE, PER_TILE = 60, 28, 4
TOWERS: dict[str, dict[str, Any]] = {
    "layer-norm": {"norm_type": "layer_norm", "attention_bias": True, "use_qk_norm": False},
    "rms-norm": {"norm_type": "rms_norm", "attention_bias": False, "use_qk_norm": True},
}
TEXTS: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "qwen3", "intermediate_size": 48, "tie_word_embeddings": False},
    "tied": {"model_type": "qwen3", "intermediate_size": 48, "tie_word_embeddings": True},
    "moe": {
        "model_type": "qwen3_moe",
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
        "router_aux_loss_coef": 0.0,
    },
}
VARIANTS = [("layer-norm", "dense"), ("rms-norm", "tied"), ("rms-norm", "moe")]
REGISTRY = load_plugins(third_party=False).registry


def hf_config(tower: str, text: str, model_type: str = "interns1") -> dict[str, Any]:
    """config.json as Intern-S1 publishes it, of a tiny one."""
    return {
        "architectures": ["InternS1ForConditionalGeneration"],
        "model_type": model_type,
        "vision_config": {
            "model_type": f"{model_type}_vision",
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": [TILE, TILE],
            "patch_size": [7, 7],
            "layer_scale_init_value": 0.3,
            **TOWERS[tower],
        },
        "text_config": {
            "vocab_size": 61,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "initializer_range": 0.2,
            "rope_theta": 500.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            **TEXTS[text],
        },
        "image_token_id": IMAGE_ID,
        "image_seq_length": PER_TILE,
        "downsample_ratio": 0.5,
        "tie_word_embeddings": TEXTS[text]["tie_word_embeddings"],
    }


def theirs_from(config: Mapping[str, Any]) -> Any:
    """Their model, with weights that no two parts share by chance."""
    transformers = pytest.importorskip("transformers")
    config = {**config, "model_type": "internvl"}
    config["vision_config"] = {**config["vision_config"], "model_type": "internvl_vision"}
    model = transformers.InternVLForConditionalGeneration._from_config(
        transformers.InternVLConfig.from_dict(config), attn_implementation="eager"
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.5 if parameter.ndim == 1 else 0.2
            parameter.normal_(
                1.0 if "norm" in name and "weight" in name else 0.0, spread, generator=generator
            )
    return model.eval()


def save_as_published(model: Any, config: Mapping[str, Any], folder: Path) -> None:
    """Weights under Intern-S1's names, as found in reference checkpoints; experts one by one."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2)
                prefix = name.removesuffix("gate_up_proj") + f"{expert}."
                tensors[prefix + "gate_proj.weight"] = gate.clone()
                tensors[prefix + "up_proj.weight"] = up.clone()
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                tensors[name.removesuffix("down_proj") + f"{expert}.down_proj.weight"] = (
                    down.clone()
                )
        else:
            tensors[name] = tensor.clone().contiguous()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


class _Holder(ComponentConfig):
    model: Annotated[ModelComponent, ComponentOf("model")]


def component(name: str, config: Mapping[str, Any], **changes: Any) -> Any:
    """The component that this config.json means, through the registry as a run does it."""
    from pegboard.config_rules import fill_in

    data: dict[str, Any] = {"model": {"class_name": name, **changes}, "load_from": config["folder"]}
    problems = [
        p for p in fill_in(data, REGISTRY) if p.path[0] == "model" or p.path[0] == "load_from"
    ]
    assert problems == []
    held = _Holder.model_validate_json(
        json.dumps({"model": data["model"]}), context={"registry": REGISTRY}
    )
    return held.model


def ours_from(folder: Path, name: str = "InternS1", **changes: Any) -> tuple[BuiltModel, Any]:
    """Our model with the folder's weights."""
    with torch.device("meta"):
        built = component(name, {"folder": str(folder)}, **changes).build()
    module = built.module.to_empty(device="cpu")
    init_module_weights(module, seed=1)
    load_published_weights(module, built.weight_map, folder, hf_config=built.hf_config)
    return built, module.eval()


class ReferenceCrossEntropy:
    """The plainest loss that keeps the Loss protocol."""

    def __call__(self, hidden_TD: Tensor, head: Head, targets: Targets) -> LossOutput:
        logits = head.logits(hidden_TD[targets.positions_K])
        losses = torch.nn.functional.cross_entropy(logits, targets.labels_K, reduction="none")
        return LossOutput((losses * targets.weights_K).sum() * targets.scale, losses.detach())

    def step_counts(self, batch: Batch) -> Mapping[str, float]:
        return {"targets": float(batch.targets.weights_K.sum())}


def packed(tiles_of_samples: list[list[int]], tile: int = TILE, per_tile: int = PER_TILE) -> Batch:
    """One sample per list, with a picture of so many tiles per number, between a few words."""
    generator = torch.Generator().manual_seed(3)
    samples = []
    for pictures in tiles_of_samples:
        words = torch.randint(0, IMAGE_ID, (5,), generator=generator)
        parts = [words]
        for tiles in pictures:
            parts += [torch.full((tiles * per_tile,), IMAGE_ID), words[:2]]
        samples.append(torch.cat(parts))
    lengths = [len(sample) for sample in samples]
    ids = torch.cat(samples)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    inside = torch.cat([torch.arange(n) < n - 1 for n in lengths])
    wanted = inside & (ids.roll(-1) != IMAGE_ID)
    rows = wanted.nonzero().flatten()
    counts = [tiles for pictures in tiles_of_samples for tiles in pictures]
    media = {}
    if counts:
        media = {
            "pixel_values": torch.randint(
                0, 256, (sum(counts), 3, tile, tile), generator=generator, dtype=torch.uint8
            ),
            "image_positions": (ids == IMAGE_ID).nonzero().flatten(),
            "tile_counts": torch.tensor(counts, dtype=torch.int32),
        }
    return Batch(
        input_ids_T=ids,
        position_ids_T=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=starts.int(),
        max_seqlen=max(lengths),
        targets=Targets(
            rows, ids[rows + 1], torch.ones(len(rows)), torch.zeros_like(rows), 1 / len(rows)
        ),
        num_tokens=len(ids),
        keys=tuple(SampleKey("pictures", "a.jsonl", line + 1) for line in range(len(samples))),
        scales={"tokens": 1.0 / len(ids)},
        media=media,
    )


def normalised(pixels: Tensor) -> Tensor:
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    return (pixels.float() / 255 - mean[:, None, None]) / std[:, None, None]


def their_logits(model: Any, batch: Batch) -> Tensor:
    """(T, V): their model on every sample alone."""
    starts = batch.cu_seqlens.tolist()
    pixels = batch.media.get("pixel_values")
    used, logits = 0, []
    for start, stop in zip(starts, starts[1:], strict=False):
        ids = batch.input_ids_T[start:stop]
        tiles = int((ids == IMAGE_ID).sum()) // (batch_tile_rows(batch))
        picture = normalised(pixels[used : used + tiles]) if tiles and pixels is not None else None
        used += tiles
        logits.append(model(input_ids=ids[None], pixel_values=picture).logits[0])
    return torch.cat(logits)


def batch_tile_rows(batch: Batch) -> int:
    pixels = batch.media.get("pixel_values")
    return 1 if pixels is None else len(batch.media["image_positions"]) // pixels.shape[0]


def published(built: BuiltModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in iter_published(tensors, built.weight_map, lambda t: t)}


@pytest.fixture(params=VARIANTS, ids="-".join)
def variant(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path, str]:
    tower, text = request.param
    if text == "moe" and REGISTRY.for_hf_model_type("qwen3_moe") is None:
        pytest.skip("no installed model reads qwen3_moe")
    config = hf_config(tower, text)
    theirs = theirs_from(config)
    save_as_published(theirs, config, tmp_path)
    return theirs, tmp_path, text


@pytest.mark.parametrize("tiles", [1, 2, 13])
def test_features_logits_and_gradients_equal_transformers(
    variant: tuple[Any, Path, str], tiles: int
) -> None:
    theirs, folder, _ = variant
    built, ours = ours_from(folder)
    batch = packed([[tiles], [], [1, 1]])

    pixels = batch.media["pixel_values"]
    want = theirs.model.get_image_features(pixel_values=normalised(pixels)).pooler_output
    got = ours.image_features(pixels)
    torch.testing.assert_close(got, want.flatten(0, 1), rtol=1e-5, atol=1e-5)

    expected = their_logits(theirs, batch)
    torch.testing.assert_close(ours.logits(batch), expected, rtol=1e-5, atol=1e-5)

    loss = torch.nn.functional.cross_entropy(
        expected[batch.targets.positions_K], batch.targets.labels_K
    )
    torch.autograd.backward(loss)
    output = ours(batch, ReferenceCrossEntropy())
    torch.autograd.backward(output.loss)
    torch.testing.assert_close(output.loss, loss, rtol=1e-5, atol=1e-6)
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(ours.parameters()))
    named = their_gradients(theirs)
    # A key's bias moves no attention weight: its gradient is rounding, in both.
    rounding = 1e-7 * max(float(gradient.norm()) for gradient in named.values())
    for name, gradient in published(built, gradients).items():
        error = float((gradient - named[name]).norm())
        assert error <= 1e-4 * float(named[name].norm()) + rounding, name


def their_gradients(model: Any) -> dict[str, Tensor]:
    """Their gradients under published names."""
    gradients: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(gradient):
                prefix = name.removesuffix("gate_up_proj") + f"{expert}."
                gradients[prefix + "gate_proj.weight"], gradients[prefix + "up_proj.weight"] = (
                    both.chunk(2)
                )
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(gradient):
                gradients[name.removesuffix("down_proj") + f"{expert}.down_proj.weight"] = down
        else:
            gradients[name] = gradient
    return gradients


def test_a_round_trip_keeps_every_name_and_bit(variant: tuple[Any, Path, str]) -> None:
    _, folder, _ = variant
    built, ours = ours_from(folder)
    on_disk = load_file(folder / "model.safetensors")
    exported = published(built, dict(ours.named_parameters()))
    assert set(exported) == set(on_disk)
    assert all(torch.equal(exported[name], tensor) for name, tensor in on_disk.items())


def test_what_we_publish_opens_in_transformers_with_nothing_left_over(
    variant: tuple[Any, Path, str], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs, folder, _ = variant
    built, ours = ours_from(folder)
    export = tmp_path / "export"
    export.mkdir()
    save_file(published(built, dict(ours.named_parameters())), export / "model.safetensors")
    (export / "generation_config.json").write_text("{}", encoding="utf-8")
    config = {**built.hf_config, "model_type": "internvl"}
    config["vision_config"] = {**config["vision_config"], "model_type": "internvl_vision"}
    reopened, report = transformers.InternVLForConditionalGeneration.from_pretrained(
        export,
        config=transformers.InternVLConfig.from_dict(config),
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    batch = packed([[2], [1]])
    with torch.no_grad():
        torch.testing.assert_close(
            their_logits(reopened.eval(), batch), their_logits(theirs, batch), rtol=0, atol=0
        )


def test_tiles_of_another_size_equal_transformers_too(tmp_path: Path) -> None:
    config = hf_config("layer-norm", "dense")
    theirs = theirs_from(config)
    save_as_published(theirs, config, tmp_path)
    _, ours = ours_from(tmp_path, tile_size=56)
    batch = packed([[2], [1]], tile=56, per_tile=16)
    want = theirs.model.get_image_features(pixel_values=normalised(batch.media["pixel_values"]))
    got = ours.image_features(batch.media["pixel_values"])
    torch.testing.assert_close(got, want.pooler_output.flatten(0, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        ours.logits(batch), their_logits(theirs, batch), rtol=1e-5, atol=1e-5
    )


def test_a_batch_without_pictures_is_the_text_model_alone(tmp_path: Path) -> None:
    config = hf_config("layer-norm", "dense")
    theirs = theirs_from(config)
    save_as_published(theirs, config, tmp_path)
    built, ours = ours_from(tmp_path)
    batch = packed([[], []])
    torch.testing.assert_close(
        ours.logits(batch), their_logits(theirs, batch), rtol=1e-5, atol=1e-5
    )
    output = ours(batch, ReferenceCrossEntropy())
    torch.autograd.backward(output.loss)
    # On no tiles: zero, and there, so that all ranks reduce the same tensors.
    tower = [p for n, p in ours.named_parameters() if not n.startswith("language_model.")]
    assert all(p.grad is not None and not p.grad.any() for p in tower)
    ours.zero_grad()
    torch.autograd.backward(
        ours(batch.with_scales({"targets": 1.0, "tiles": 0.0}), ReferenceCrossEntropy()).loss
    )
    # No picture in the whole step: nothing to decay or to remember.
    assert all(p.grad is None for p in tower)
    assert built.step_counts is not None and built.step_counts(batch)["tiles"] == 0.0


def test_bfloat16_weights_keep_the_rows_in_bfloat16(tmp_path: Path) -> None:
    config = hf_config("rms-norm", "dense")
    save_as_published(theirs_from(config), config, tmp_path)
    _, ours = ours_from(tmp_path)
    ours.bfloat16()
    batch = packed([[1]])
    assert ours.image_features(batch.media["pixel_values"]).dtype == torch.bfloat16
    assert ours.embed(batch).dtype == torch.bfloat16


def test_float64_weights_make_it_all_float64(tmp_path: Path) -> None:
    config = hf_config("layer-norm", "dense")
    save_as_published(theirs_from(config), config, tmp_path)
    _, ours = ours_from(tmp_path)
    ours.double()
    together = ours.logits(packed([[2], [1]]))
    batch = packed([[2], [1]])
    pixels = batch.media["pixel_values"]
    swapped = replace(batch, media={**batch.media, "pixel_values": pixels.flip(0)})
    assert together.dtype == torch.float64
    assert not torch.equal(ours.logits(swapped), together)
    # A tile sees itself alone: each gives what it gives without the others.
    features = ours.image_features(pixels)
    alone = torch.cat([ours.image_features(tile[None]) for tile in pixels])
    torch.testing.assert_close(features, alone, rtol=0, atol=1e-12)


def bytes_kept(module: Any, batch: Batch) -> int:
    """Bytes of activations that forward keeps for backward; parameters and the batch are not counted."""
    known = {p.untyped_storage().data_ptr() for p in module.parameters()}
    known |= {t.untyped_storage().data_ptr() for t in batch.media.values()}
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        if tensor.untyped_storage().data_ptr() not in known:
            kept += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(batch, ReferenceCrossEntropy())
    return kept


def test_with_tower_and_projector_frozen_pictures_keep_nothing_for_backward(tmp_path: Path) -> None:
    config = hf_config("layer-norm", "dense")
    save_as_published(theirs_from(config), config, tmp_path)
    _, ours = ours_from(tmp_path, vision_recompute_ratio=0.0)
    pictures = packed([[6], [5, 2]])
    # The same rows as text alone: no tiles, and ids that stand for words.
    words = replace(pictures, input_ids_T=pictures.input_ids_T % IMAGE_ID, media={})
    training = bytes_kept(ours, pictures)
    for part in (ours.vision_tower, ours.multi_modal_projector):
        part.requires_grad_(False)
    assert bytes_kept(ours, pictures) == bytes_kept(ours, words)
    assert training > 2 * bytes_kept(ours, words)
