"""Claim: Intern-S1's config reads what is published and says what it can't honour; a field that the weights
don't fit is named, with the tensors; a sample whose image tokens and pictures disagree is named with both counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pegboard.contracts import Batch, ImageTokens, SampleKey, Targets
from pegboard.errors import ConfigError, DataError, WeightsError
from pegboard.initialization import init_module_weights
from pegboard.plugin_manager import load_plugins
from pegboard.run_config import LoadedConfig, load_run_config
from pegboard.weight_export import iter_published
from pegboard.weight_loading import load_published_weights

PARTS = Path(__file__).with_name("picture_parts.py")
REGISTRY = load_plugins((PARTS,), third_party=False).registry

VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": [28, 28],
    "patch_size": [7, 7],
    "attention_bias": True,
    "model_type": "interns1_vision",
    "hidden_act": "gelu",
}
TEXT = {
    "model_type": "qwen3",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
PUBLISHED = {
    "architectures": ["InternS1ForConditionalGeneration"],
    "auto_map": {"AutoConfig": "configuration_interns1.InternS1Config"},
    "model_type": "interns1",
    "vision_config": VISION,
    "text_config": TEXT,
    "image_token_id": 300,
    "downsample_ratio": 0.5,
}
Loader = Callable[..., LoadedConfig]


@pytest.fixture
def load(tmp_path: Path) -> Loader:
    def load_model(published: dict[str, Any] | None = None, **model: Any) -> LoadedConfig:
        config: dict[str, Any] = {
            "tokenizer": {"class_name": "ByteTokenizer"},
            "model": model,
            "datasets": [
                {
                    "dataset": {"class_name": "TileSamples", "tiles": [1]},
                    "tokenize_fn": {"class_name": "TileTokenize"},
                }
            ],
            "total_steps": 1,
        }
        if published is not None:
            folder = tmp_path / "weights"
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text(json.dumps(published), encoding="utf-8")
            config["load_from"] = str(folder)
        path = tmp_path / "run.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        return load_run_config(path, (), REGISTRY)

    return load_model


def test_a_published_config_says_the_whole_model(load: Loader) -> None:
    model: Any = load(PUBLISHED).run.model
    assert type(model).__name__ == "InternS1"
    assert model.config.vision_config.hidden_size == 24
    assert type(model.config.text_config).__name__ == "Qwen3"
    assert model.config.text_config.config.vocab_size == 320
    assert model.image_tokens() == ImageTokens(28, 4, 300)
    with torch.device("meta"):
        ours = model.build().hf_config
    for name, value in VISION.items():
        assert ours["vision_config"][name] == value
    for name, value in TEXT.items():
        assert ours["text_config"][name] == value


@pytest.mark.parametrize(
    ("preset", "tokens", "vision"),
    [
        ("intern-s1-mini", ImageTokens(448, 256, 152957), (1024, 24, 16, 4096)),
        ("intern-s1", ImageTokens(448, 256, 152957), (3200, 45, 25, 12800)),
    ],
)
def test_presets_are_the_published_sizes(
    load: Loader, preset: str, tokens: ImageTokens, vision: tuple[int, ...]
) -> None:
    if preset == "intern-s1" and "Qwen3MoE" not in REGISTRY.names("model"):
        pytest.skip("Qwen3MoE is not installed")
    model: Any = load(preset=preset).run.model
    config = model.config.vision_config
    assert model.image_tokens() == tokens
    found = (
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.intermediate_size,
    )
    assert found == vision
    assert model.config.text_config.config.vocab_size == 153216


def test_a_preset_builds_on_meta_with_every_parameter_mapped(load: Loader) -> None:
    with torch.device("meta"):
        built = load(preset="intern-s1-mini").run.model.build()
    assert not built.weight_map.unmapped(name for name, _ in built.module.named_parameters())
    shapes = built.weight_map.published_shapes()
    assert shapes["model.vision_tower.encoder.layer.23.attention.k_proj.bias"] == (1024,)
    assert shapes["model.vision_tower.embeddings.position_embeddings"] == (1, 1025, 1024)
    assert shapes["model.multi_modal_projector.linear_1.weight"] == (4096, 4096)
    assert shapes["model.language_model.layers.35.mlp.up_proj.weight"] == (12288, 4096)
    assert shapes["lm_head.weight"] == (153216, 4096)
    tower = sum(p.numel() for n, p in built.module.named_parameters() if "vision_tower" in n)
    assert 3.0e8 < tower < 3.1e8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": -2}, "vision_feature_layer -2 is not supported, only -1"),
        ({"vision_config": {**VISION, "use_mask_token": True}}, "vision_config.use_mask_token"),
        ({"vision_config": {**VISION, "hidden_act": "quick_gelu"}}, "vision_config.hidden_act"),
        ({"vision_config": {**VISION, "image_size": [28, 56]}}, "is not square"),
        ({"text_config": {"model_type": "gpt2"}}, 'no installed model reads model_type "gpt2"'),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_a_key_that_cannot_be_honoured_is_refused(
    load: Loader, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load({**PUBLISHED, **changes})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("model", "path", "message"),
    [
        ({"vision_config": {"hidden_size": 48}}, "model.vision_config.hidden_size", "48 does not"),
        ({"text_config": {"vocab_size": 500}}, "model.text_config.vocab_size", "500 does not fit"),
        ({"text_config": {"class_name": "Qwen4"}}, "model.text_config.class_name", "Qwen4"),
        ({"text_config": {"class_name": "Qwen3MoE"}}, "load_from", "is not read by Qwen3MoE"),
        ({"tile_size": 30}, "model.tile_size", "30 is not a multiple of 14"),
        ({"image_token_id": 320}, "model.image_token_id", "320 is no id of text_config.vocab_size"),
        ({"image_std": [0.1, 0.0, 0.1]}, "model.image_std", "is not above 0"),
        (
            {"projector_config": {"downsample_ratio": 0.3}},
            "model.projector_config.downsample_ratio",
            "0.3",
        ),
    ],
)
def test_a_field_that_does_not_fit_is_named(
    load: Loader, model: dict[str, Any], path: str, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load(PUBLISHED, **model)
    assert path in str(error.value) and message in str(error.value)


def test_a_text_model_that_takes_pictures_itself_is_refused(load: Loader) -> None:
    text = {name: value for name, value in TEXT.items() if name != "model_type"}
    model: dict[str, Any] = {
        "class_name": "InternS1",
        "image_token_id": 300,
        "text_config": {"class_name": "Qwen3", **text},
    }
    load(**model)
    with pytest.raises(ConfigError) as error:
        load(**{**model, "text_config": model})
    assert "text_config.class_name: InternS1 takes pictures itself" in str(error.value)


def test_only_the_side_that_was_given_is_named(load: Loader) -> None:
    with pytest.raises(ConfigError) as error:
        load({**PUBLISHED, "vision_config": {**VISION, "image_size": [30, 30]}})
    assert "vision_config.image_size: 30 is not" in str(error.value)
    assert "tile_size:" not in str(error.value)


def test_weights_that_do_not_fit_name_the_tensors_and_the_field(
    load: Loader, tmp_path: Path
) -> None:
    model: Any = load(PUBLISHED).run.model
    with torch.device("meta"):
        built = model.build()
    module = built.module.to_empty(device="cpu")
    init_module_weights(module, 1)
    named = {name: p.detach() for name, p in module.named_parameters()}
    tensors = {n: t.clone() for n, t in iter_published(named, built.weight_map, lambda t: t)}
    save_file(tensors, tmp_path / "weights" / "model.safetensors")
    for vision, tensor, field in (
        ({"norm_type": "rms_norm"}, "layernorm_before.bias", "vision_config.norm_type"),
        ({"image_size": [56, 56]}, "position_embeddings", "vision_config.image_size"),
        ({"use_qk_norm": True}, "attention.q_norm.weight", "vision_config.use_qk_norm"),
    ):
        other = load({**PUBLISHED, "vision_config": {**VISION, **vision}}).run.model
        (tmp_path / "weights" / "config.json").write_text(
            json.dumps(
                {
                    **PUBLISHED,
                    "vision_config": {"norm_type": "layer_norm", "use_qk_norm": False, **VISION},
                }
            ),
            encoding="utf-8",
        )
        with torch.device("meta"):
            changed = other.build()
        changed.module.to_empty(device="cpu")
        with pytest.raises(WeightsError) as error:
            load_published_weights(
                changed.module,
                changed.weight_map,
                tmp_path / "weights",
                hf_config=changed.hf_config,
            )
        assert tensor in str(error.value) and field in str(error.value)


def row(samples: list[list[int]], tiles: list[int], *, of_samples: bool = True) -> Batch:
    """Samples as ids, and tiles of each sample, or (knowing less) of each picture."""
    ids = torch.tensor([i for sample in samples for i in sample])
    none = torch.zeros(0, dtype=torch.long)
    media: dict[str, Tensor] = {
        "pixel_values": torch.zeros(sum(tiles), 3, 28, 28, dtype=torch.uint8),
        "image_positions": (ids == 300).nonzero().flatten(),
        "tile_counts": torch.tensor(tiles, dtype=torch.int32),
    }
    return Batch(
        input_ids_T=ids,
        position_ids_T=torch.cat([torch.arange(len(sample)) for sample in samples]),
        cu_seqlens=torch.tensor([0, *map(len, samples)]).cumsum(0).int(),
        max_seqlen=max(map(len, samples)),
        targets=Targets(none, none, torch.zeros(0), none, 1.0),
        num_tokens=len(ids),
        keys=tuple(SampleKey("s", "pics.jsonl", 10 + i) for i in range(len(samples))),
        media=media,
        extras={"tiles_of_samples": tuple(tiles)} if of_samples else {},
    )


TWO_TILES = [1, *[300] * 8, 2]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (row([[1, 2], TWO_TILES, [3]], [0, 1, 0]), "pics.jsonl:11: 8 image tokens (id 300), but "),
        (row([[1, 2], TWO_TILES, [3]], [0, 1, 0]), "its pictures give 4 rows (1 tiles of 4)"),
        (row([[1, 300], TWO_TILES], [0, 2]), "pics.jsonl:10: 1 image tokens"),
        (row([TWO_TILES, TWO_TILES], [3, 2]), "pics.jsonl:10: 8 image tokens"),
        (row([TWO_TILES, TWO_TILES], [1, 1, 2, 1], of_samples=False), "pics.jsonl:11: 8 image"),
        (row([[1], TWO_TILES[:-2]], [3], of_samples=False), "pics.jsonl:11: 7 image tokens"),
    ],
)
def test_a_mismatch_names_the_sample_its_place_and_both_counts(
    load: Loader, batch: Batch, message: str
) -> None:
    with torch.device("meta"):
        built = load(PUBLISHED).run.model.build()
    assert built.step_counts is not None
    with pytest.raises(DataError) as error:
        built.step_counts(batch)
    assert message in str(error.value)


def test_tiles_are_counted_and_their_size_and_rows_are_checked(load: Loader) -> None:
    with torch.device("meta"):
        built = load(PUBLISHED).run.model.build()
    assert built.step_counts is not None
    batch = row([[1, 2], TWO_TILES, [3]], [0, 2, 0])
    assert built.step_counts(batch) == {"tiles": 2.0}
    large = {**batch.media, "pixel_values": torch.zeros(2, 3, 56, 56, dtype=torch.uint8)}
    with pytest.raises(DataError, match=r"tiles of 56 pixels, but the model takes 28"):
        built.step_counts(replace(batch, media=large))
    shifted = {**batch.media, "image_positions": batch.media["image_positions"] + 1}
    with pytest.raises(DataError, match=r"pics.jsonl:11.*not the rows where image tokens"):
        built.step_counts(replace(batch, media=shifted))


def test_each_part_freezes_by_its_flag(load: Loader) -> None:
    for flag, prefix in (
        ("freeze_vision", "vision_tower."),
        ("freeze_projector", "multi_modal_projector."),
        ("freeze_language", "language_model."),
    ):
        with torch.device("meta"):
            built = load(PUBLISHED, **{flag: True}).run.model.build()
        assert built.frozen == (prefix,)
        assert any(name.startswith(prefix) for name, _ in built.module.named_parameters())


def test_a_larger_vocabulary_is_asked_for_inside_the_text_model(load: Loader) -> None:
    larger = {"vocab_size": 400, "resize_embeddings": True}
    model: Any = load(PUBLISHED, text_config=larger).run.model
    assert model.config.text_config.config.vocab_size == 400


def test_the_freeze_transform_knows_the_parts_by_the_same_names(load: Loader) -> None:
    freeze: Any = REGISTRY.find("transform", "Freeze")
    with torch.device("meta"):
        built = load(PUBLISHED).run.model.build()
    built = freeze(freeze.Config(groups=("vision", "projector"))).build()(built)
    assert built.frozen == ("vision_tower.", "multi_modal_projector.")
