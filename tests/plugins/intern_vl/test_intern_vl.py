"""Claim: InternVL reads and writes what transformers' own save_pretrained writes, name by name and bit by bit,
and computes the same logits; its parts are those of Intern-S1, reached through the blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from safetensors.torch import load_file

from pegboard import ComponentConfig, ComponentOf, ModelComponent
from pegboard.config_rules import fill_in
from pegboard.contracts import Batch, Targets
from pegboard.initialization import init_module_weights
from pegboard.plugin_manager import load_plugins
from pegboard.published_config import export_config
from pegboard.weight_export import iter_published
from pegboard.weight_loading import load_published_weights

REGISTRY = load_plugins(third_party=False).registry
IMAGE_ID = 60


def saved(folder: Path, tied: bool, text_type: str) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.InternVLConfig(
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": (28, 28),
            "patch_size": (7, 7),
            "attention_bias": True,
        },
        text_config={
            "model_type": text_type,
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "tie_word_embeddings": tied,
            "initializer_range": 0.2,
        },
        image_token_id=IMAGE_ID,
        image_seq_length=4,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = transformers.InternVLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision_tower" in name or "projector" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model


class Holder(ComponentConfig):
    """A config with a model in it."""

    model: Annotated[ModelComponent, ComponentOf("model")]


def component(folder: Path, **model: Any) -> Any:
    """What a run with this `load_from` and these model fields builds."""
    data: dict[str, Any] = {"load_from": str(folder), "model": model}
    problems = [p for p in fill_in(data, REGISTRY) if p.path[0] in ("model", "load_from")]
    assert problems == []
    text = json.dumps({"model": data["model"]})
    return Holder.model_validate_json(text, context={"registry": REGISTRY}).model


@pytest.mark.parametrize(
    ("tied", "text_type", "fields"),
    [
        (False, "qwen3", {}),
        (True, "qwen3", {}),
        # InternVL3's text model, which has no native class here: any that is named reads it.
        (True, "qwen2", {"text_config": {"class_name": "AutoModelForCausalLM"}}),
    ],
)
def test_it_reads_writes_and_computes_what_transformers_does(
    tied: bool, text_type: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    theirs = saved(tmp_path, tied, text_type)
    model = component(tmp_path, **fields)
    assert type(model).__name__ == "InternVL"
    with torch.device("meta"):
        built = model.build()
    module: Any = built.module.to_empty(device="cpu")
    init_module_weights(module, seed=1)
    load_published_weights(module, built.weight_map, tmp_path)

    on_disk = load_file(tmp_path / "model.safetensors")
    named = {name: p.detach() for name, p in module.named_parameters()}
    exported = dict(iter_published(named, built.weight_map, lambda tensor: tensor))
    assert set(exported) == set(on_disk)
    assert all(torch.equal(exported[name], tensor) for name, tensor in on_disk.items())
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert export_config(model, built.hf_config, tmp_path) == config

    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, IMAGE_ID, (7,), generator=generator)
    ids = torch.cat([words[:3], torch.full((8,), IMAGE_ID), words[3:]])
    pixels = torch.randint(0, 256, (2, 3, 28, 28), generator=generator, dtype=torch.uint8)
    none = torch.zeros(0, dtype=torch.long)
    batch = Batch(
        input_ids_T=ids,
        position_ids_T=torch.arange(len(ids)),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        max_seqlen=len(ids),
        targets=Targets(none, none, torch.zeros(0), none, 1.0),
        num_tokens=len(ids),
        media={"pixel_values": pixels, "image_positions": (ids == IMAGE_ID).nonzero().flatten()},
    )
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    normed = (pixels.float() / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        want = theirs(input_ids=ids[None], pixel_values=normed).logits[0]
        torch.testing.assert_close(module.logits(batch), want, rtol=1e-5, atol=1e-5)
