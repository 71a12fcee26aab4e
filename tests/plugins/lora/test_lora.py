"""Claim: LoRA leaves names and the untrained model as they were, trains nothing else, its merged export and its
adapter (opened by peft) give the adapted model's own logits, and a target that isn't there is an error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import pegboard
from pegboard import Batch, BuiltModel, Targets
from pegboard.initialization import init_module_weights
from pegboard.savers import SaveRequest
from pegboard.weight_export import iter_published
from pegboard.weight_loading import load_published_weights
from pegboard_plugins.lora.component import AdapterSaver, LoRA
from pegboard_plugins.qwen3.component import Qwen3

MODEL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
}


def built_model(*, change: LoRA | None, seed: int = 1, draw_factors: bool = True) -> BuiltModel:
    with torch.device("meta"):
        built = Qwen3(Qwen3.Config(**MODEL)).build()
        if change is not None:
            built = change.build()(built)
    module = built.module.to_empty(device="cpu")
    init_module_weights(module, seed=seed)
    if draw_factors:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name.endswith("lora.B"):
                    parameter.normal_(0, 0.1, generator=generator)
    return built


def lora(**fields: Any) -> LoRA:
    return LoRA(LoRA.Config.model_validate_json(json.dumps(fields)))


def logits(built: BuiltModel, ids: torch.Tensor) -> torch.Tensor:
    empty = torch.zeros(0, dtype=torch.long)
    batch = Batch(
        input_ids_T=ids,
        position_ids_T=torch.arange(len(ids)),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        max_seqlen=len(ids),
        targets=Targets(empty, empty, torch.zeros(0), empty, 1.0),
        num_tokens=len(ids),
    )
    module: Any = built.module.eval()
    with torch.no_grad():
        out: torch.Tensor = module.logits(batch)
    return out


IDS = torch.arange(3, 40)
VARIANTS = [
    {"rank": 4},
    {"rank": 3, "alpha": 7.0, "use_rslora": True},
    {"rank": 2, "target_modules": ["q_proj", "v_proj", "up_proj"]},
    {"rank": 2, "target_modules": ["k_proj"], "exclude": ["model.layers.0.*"]},
]


def test_base_weights_keep_names_and_values_and_an_untrained_change_changes_nothing() -> None:
    plain = built_model(change=None)
    adapted = built_model(change=lora(), draw_factors=False)
    theirs = dict(adapted.module.named_parameters())
    for name, parameter in plain.module.named_parameters():
        assert torch.equal(parameter, theirs.pop(name))
        assert name.startswith(adapted.frozen)
    assert theirs and all(name.endswith(("lora.A", "lora.B")) for name in theirs)
    assert not any(name.startswith(adapted.frozen) for name in theirs)
    assert not adapted.weight_map.unmapped(name for name, _ in adapted.module.named_parameters())
    assert torch.equal(logits(plain, IDS), logits(adapted, IDS))


@pytest.mark.parametrize("fields", VARIANTS)
def test_the_merged_export_is_the_adapted_model(fields: dict[str, Any], tmp_path: Path) -> None:
    adapted = built_model(change=lora(**fields))
    plain = built_model(change=None)
    tensors = dict(adapted.module.named_parameters())
    merged = dict(iter_published(tensors, adapted.weight_map, lambda tensor: tensor))
    assert merged.keys() == plain.weight_map.published_shapes().keys()
    save_file({n: t.contiguous() for n, t in merged.items()}, tmp_path / "model.safetensors")
    before = logits(plain, IDS)
    load_published_weights(plain.module, plain.weight_map, tmp_path)
    after = logits(adapted, IDS)
    torch.testing.assert_close(logits(plain, IDS), after, rtol=1e-5, atol=1e-5)
    assert (before - after).abs().max() > 1e-3


class NoTokenizer:
    """Nothing of the tokenizer belongs to an adapter."""


def save_adapter(adapted: BuiltModel, run_dir: Path, source: Path | None) -> Path:
    written = (
        AdapterSaver(AdapterSaver.Config())
        .build()
        .save(
            SaveRequest(
                step=1,
                is_last=True,
                run_dir=run_dir,
                model=adapted,
                module=adapted.module,
                optimizer=torch.optim.SGD(adapted.module.parameters()),
                tokenizer=NoTokenizer(),  # type: ignore[arg-type]
                loaded_dtype=None,
                source_folder=source,
                train_state={},
            )
        )
    )
    assert written is not None
    return written


@pytest.mark.parametrize("fields", VARIANTS)
def test_peft_opens_the_adapter_and_gives_the_same_logits(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers")
    plain = built_model(change=None)
    base = tmp_path / "base"
    base.mkdir()
    tensors = dict(plain.module.named_parameters())
    published = dict(iter_published(tensors, plain.weight_map, lambda tensor: tensor))
    save_file(
        {n: t.contiguous() for n, t in published.items()},
        base / "model.safetensors",
        {"format": "pt"},
    )
    (base / "config.json").write_text(json.dumps(plain.hf_config), encoding="utf-8")
    adapted = built_model(change=lora(**fields))
    folder = save_adapter(adapted, tmp_path, base)
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder
    ).eval()
    with torch.no_grad():
        expected = theirs(input_ids=IDS[None]).logits[0]
    torch.testing.assert_close(logits(adapted, IDS), expected, rtol=1e-4, atol=1e-4)


def test_a_run_starts_from_an_adapter_of_the_same_scale_only(tmp_path: Path) -> None:
    adapted = built_model(change=lora(rank=4))
    folder = save_adapter(adapted, tmp_path, None)
    again = built_model(change=lora(rank=4, load_adapter=str(folder)), draw_factors=False)
    assert again.adapter is not None and again.adapter.load_from == str(folder)
    load_published_weights(
        again.module, again.adapter.weight_map, folder, file_name="adapter_model.safetensors"
    )
    assert torch.equal(logits(again, IDS), logits(adapted, IDS))
    with pytest.raises(pegboard.ConfigError, match="rank: 8 differs from r 4"):
        built_model(change=lora(rank=8, load_adapter=str(folder)))
    with pytest.raises(pegboard.ConfigError, match="adapter_config.json"):
        built_model(change=lora(load_adapter=str(tmp_path / "nothing")))


def test_an_adapter_names_its_base_model_as_other_machines_find_it(tmp_path: Path) -> None:
    adapted = built_model(change=lora(rank=4))
    for folder, name in (
        (tmp_path / "models--Qwen--Qwen3-8B" / "snapshots" / "0a1b", "Qwen/Qwen3-8B"),
        (tmp_path / "models--gpt2" / "snapshots" / "0a1b", "gpt2"),
        (tmp_path / "models" / "mine", str(tmp_path / "models" / "mine")),
    ):
        folder.mkdir(parents=True)
        written = save_adapter(adapted, tmp_path, folder)
        config = json.loads((written / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == name


@pytest.mark.parametrize(
    "name, value", [("alpha_pattern", {"q_proj": 4}), ("use_dora", True), ("bias", "all")]
)
def test_an_adapter_that_means_more_than_the_config_can_say_is_refused(
    name: str, value: Any, tmp_path: Path
) -> None:
    folder = save_adapter(built_model(change=lora(rank=4)), tmp_path, None)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    with pytest.raises(pegboard.ConfigError, match=f"{name} is .*merge it into the base model"):
        built_model(change=lora(rank=4, load_adapter=str(folder)))


def test_a_target_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(pegboard.ConfigError, match="named query_key_value; .*q_proj"):
        built_model(change=lora(target_modules=["q_proj", "query_key_value"]))


def test_a_layer_that_is_no_plain_linear_one_is_refused() -> None:
    with pytest.raises(pegboard.ConfigError, match="lm_head is LMHead here"):
        built_model(change=lora(target_modules=["lm_head"]))


def test_a_part_that_is_frozen_gets_no_change() -> None:
    with torch.device("meta"):
        built = Qwen3(Qwen3.Config(**MODEL)).build()
    adapted = lora(rank=2).build()(replace(built, frozen=("model.layers.0.",)))
    added = [name for name, _ in adapted.module.named_parameters() if "lora" in name]
    assert added and all(name.startswith("model.layers.1.") for name in added)


def test_an_adapter_saver_without_an_adapter_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(pegboard.CheckpointError, match="no adapter; add a transform"):
        save_adapter(built_model(change=None), tmp_path, None)


def test_an_adapter_saver_beside_no_transform_is_refused_before_the_run() -> None:
    saver = AdapterSaver(AdapterSaver.Config())
    run: Any = SimpleNamespace(transforms=())
    (problem,) = saver.check(run, ("savers", 1))
    assert problem.path == ("savers", 1, "class_name")
    assert "no transform makes an adapter" in problem.message
    run.transforms = (lora(rank=2),)
    assert not list(saver.check(run, ("savers", 1)))
