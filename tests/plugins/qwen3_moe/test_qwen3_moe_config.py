"""Claim: Qwen3-MoE's fields, presets and config.json agree with transformers, the shipped configs
are valid, and what can't be honoured is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig

from pegboard.errors import ConfigError
from pegboard.plugin_manager import load_plugins
from pegboard.run_config import load_run_config
from pegboard_plugins.qwen3_moe.component import Qwen3MoE

ROOT = Path(__file__).resolve().parents[3]
# Published parameter counts.
PARAMETERS = {
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-30b-a3b-2507": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-235b-a22b-2507": 235_093_634_560,
}
TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 6,
    "num_experts_per_tok": 2,
}
# Named differently there, or ours alone.
OURS = {"rope_theta", "resize_embeddings", "router_z_loss_coef", "balancing", "freeze_router"}


def of(fields: dict[str, Any]) -> Qwen3MoE:
    return Qwen3MoE(Qwen3MoE.Config.model_validate_json(json.dumps(fields)))


@pytest.mark.parametrize("preset", sorted(Qwen3MoE.presets))
def test_a_preset_has_the_published_number_of_parameters(preset: str) -> None:
    with torch.device("meta"):
        built = of(dict(Qwen3MoE.presets[preset])).build()
    assert sum(p.numel() for p in built.module.parameters()) == PARAMETERS[preset]
    assert built.weight_map.unmapped(name for name, _ in built.module.named_parameters()) == []


def test_every_preset_is_listed_in_this_test() -> None:
    assert set(Qwen3MoE.presets) == set(PARAMETERS)


@pytest.mark.parametrize("preset", sorted(Qwen3MoE.presets))
def test_the_exported_config_means_the_same_to_transformers(preset: str) -> None:
    component = of(dict(Qwen3MoE.presets[preset]))
    theirs: Any = Qwen3MoeConfig.from_dict(component.hf_config())
    for name in Qwen3MoE.Config.model_fields.keys() - OURS - {"mlp_only_layers"}:
        assert getattr(theirs, name) == getattr(component.config, name), name
    assert theirs.mlp_only_layers == []
    assert theirs.rope_parameters["rope_theta"] == component.config.rope_theta


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mlp_only_layers": [0, 2], "norm_topk_prob": False},
        {"decoder_sparse_step": 2, "router_aux_loss_coef": 0.01, "router_z_loss_coef": 1e-4},
    ],
)
def test_config_json_there_and_back_gives_the_same_fields(changes: dict[str, Any]) -> None:
    ours = of({**TINY, **changes})
    assert of(Qwen3MoE.config_from_hf(ours.hf_config())).config == ours.config
    theirs = Qwen3MoeConfig.from_dict(ours.hf_config()).to_dict()
    assert of(Qwen3MoE.config_from_hf(theirs)).config == ours.config


def test_what_config_json_leaves_out_means_transformers_default() -> None:
    theirs = Qwen3MoeConfig()
    left = ("vocab_size", "hidden_size", "intermediate_size")
    said = {name: getattr(theirs, name) for name in left}
    fields = Qwen3MoE.config_from_hf(
        {"model_type": "qwen3_moe", "num_hidden_layers": 2, "num_attention_heads": 32, **said}
    )
    skipped = {"num_hidden_layers", "head_dim", *OURS}
    for name in fields.keys() - skipped:
        assert fields[name] == getattr(theirs, name), name
    assert fields["head_dim"] == theirs.hidden_size // theirs.num_attention_heads
    assert theirs.rope_parameters is not None
    assert fields["rope_theta"] == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    "changes",
    [{}, {"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}, {"decoder_sparse_step": 3}],
)
def test_the_same_layers_are_sparse_as_in_transformers(changes: dict[str, Any]) -> None:
    from transformers import Qwen3MoeForCausalLM

    ours = of({**TINY, **changes})
    with torch.device("meta"):
        theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig.from_dict(ours.hf_config()))
    found = [hasattr(layer.mlp, "experts") for layer in theirs.model.layers]
    assert found == [ours.config.is_sparse(index) for index in range(4)]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok"),
        ({"mlp_only_layers": [0, 9]}, "mlp_only_layers"),
    ],
)
def test_fields_that_do_not_fit_together_are_problems(changes: dict[str, Any], field: str) -> None:
    (problem,) = of({**TINY, **changes}).check(None, ("model",))  # type: ignore[arg-type]
    assert problem.path[:2] == ("model", field)


def test_a_key_that_cannot_be_honoured_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="yarn"):
        Qwen3MoE.config_from_hf({**TINY, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}})


@pytest.mark.parametrize("name", ["tiny/qwen3_moe.json", "qwen3_30b_a3b_sft.json"])
def test_the_shipped_configs_are_valid(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    registry = load_plugins(third_party=False).registry
    # The weights and the data of the large one are the user's.
    overrides = [f"work_dir={tmp_path}"]
    if "30b" in name:
        overrides += [
            "load_from=null",
            'tokenizer={"class_name": "ByteTokenizer"}',
            "datasets[0].dataset.anno_path=configs/data/quickstart_chat.jsonl",
        ]
    run = load_run_config(ROOT / "configs" / name, overrides, registry).run
    assert isinstance(run.model, registry.find("model", "Qwen3MoE"))
    assert type(run.trackers[0]).__name__ == "ExpertLoadTracker"


def test_units_lie_inside_layers_and_experts_name_their_axis() -> None:
    with torch.device("meta"):
        built = of({**TINY, "mlp_only_layers": [0], "num_hidden_layers": 2}).build()
    assert [(unit.path, unit.mesh) for unit in built.shard_units] == [
        ("model.layers.0", "dense"),
        ("model.layers.1.mlp.gate", "dense"),
        ("model.layers.1.mlp.experts", "expert"),
        ("model.layers.1", "dense"),
        ("lm_head", "dense"),
    ]
    prefix = "model.layers.1.mlp.experts."
    assert built.expert_axis == {prefix + "gate_up_proj": 0, prefix + "down_proj": 0}
    assert built.freeze_groups == {"router": ("model.layers.1.mlp.gate.",)}
    assert built.frozen == ()


def test_a_frozen_router_has_no_auxiliary_loss() -> None:
    with torch.device("meta"):
        built = of({**TINY, "freeze_router": True, "router_z_loss_coef": 0.1}).build()
    assert built.frozen == built.freeze_groups["router"]
    balance: Any = built.module.get_submodule("balance")
    assert balance.balancing_coef == balance.z_coef == 0.0
