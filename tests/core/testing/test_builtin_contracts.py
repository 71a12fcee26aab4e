"""The claim: every built-in part keeps every promise of its kind; none is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pegboard.component import COMPONENT_KINDS
from pegboard.plugin_manager import load_plugins
from pegboard.testing import Case, Check, checks_for
from pegboard.testing.case import TINY_MODEL

REGISTRY = load_plugins(third_party=False).registry
QWEN3 = dict(TINY_MODEL)
MOE = {
    **QWEN3,
    "moe_intermediate_size": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0],
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 288,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
TEXT = {"class_name": "Qwen3", **QWEN3}
CHAT = {
    "messages": [
        {"role": "user", "content": "What is two and two?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "And three?"},
        {"role": "assistant", "content": "Five."},
    ]
}
FORMS: dict[str, list[Any]] = {
    "OpenAIFormat": [CHAT, CHAT["messages"]],
    "ShareGPTFormat": [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    ],
    "AlpacaFormat": [{"instruction": "Add.", "input": "1 1", "output": "2"}],
    "PromptCompletionFormat": [{"prompt": "a", "completion": "b"}],
    "PlainTextFormat": [{"text": "a text"}],
    "PretokenizedFormat": [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}],
}
"""Records of each form; those of the others are foreign to it."""

CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Qwen3": (QWEN3, {}),
    "Qwen3MoE": (MOE, {}),
    "AutoModelForCausalLM": ({"hf_config": LLAMA}, {}),
    "InternS1": (
        {
            "vision_config": VISION,
            "projector_config": {},
            "text_config": TEXT,
            "image_token_id": 265,
        },
        {},
    ),
    "InternVL": (
        {
            "vision_config": VISION,
            "projector_config": {},
            "text_config": TEXT,
            "image_token_id": 265,
        },
        {},
    ),
    "InternS1TokenizeFn": ({"max_length": 512}, {"records": [CHAT]}),
    "ChatTokenizeFn": ({"max_length": 512}, {"records": [CHAT]}),
    "TextTokenizeFn": ({"max_length": 512}, {"records": [{"text": "some words"}]}),
    "AdapterSaver": ({}, {"adapter": True}),
    "LoRA": ({"rank": 2}, {}),
    "Freeze": ({"prefixes": ["model.layers.0."]}, {}),
    "AdamW": ({"lr": 1e-3}, {}),
    "SequentialPacker": ({}, {"keeps_order": True}),
    "EarlyStopping": ({"patience": 2}, {"metrics": {"eval_loss": 2.0}}),
}
WITHOUT_PICTURES = "a row of text passes no tower; its own tests have pictures"
SKIPPED = {
    ("CheckpointSaver", "the_same_state_gives_the_same_bytes"): (
        "torch's checkpoint storage orders the tensors of a file by itself"
    ),
    ("InternS1", "every_weight_gets_a_gradient"): WITHOUT_PICTURES,
    ("InternVL", "every_weight_gets_a_gradient"): WITHOUT_PICTURES,
    ("AutoModelForCausalLM", "config_goes_both_ways"): "transformers adds keys with every release",
}


def cases() -> list[Any]:
    found = []
    for kind in COMPONENT_KINDS:
        for entry in REGISTRY.entries():
            if entry.kind != kind:
                continue
            for check in checks_for(kind):
                marks = [pytest.mark.slow] if check.name == "two_ranks_are_one" else []
                name = f"{entry.class_name}-{check.name}"
                found.append(pytest.param(entry.cls, check, id=name, marks=marks))
    return found


def options_of(kind: str, class_name: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """JSON fields and options for one part."""
    config, options = CONFIGS.get(class_name, ({}, {}))
    config, options = dict(config), dict(options)
    if kind == "dataset":
        good, bad = folder / "good.jsonl", folder / "bad.jsonl"
        lines = [json.dumps({"text": f"record {i}"}) for i in range(5)]
        good.write_text("\n".join(lines) + "\n", encoding="utf-8")
        bad.write_text("\n".join([*lines[:2], '{"text": "cut', *lines[2:]]), encoding="utf-8")
        config["anno_path"] = str(good)
        options["bad_config"] = {"anno_path": str(bad)}
        options["change"] = lambda: good.write_text("\n".join(["{}", *lines]), encoding="utf-8")
    if kind == "record_format":
        own = FORMS.get(class_name)
        options["records"] = own or [form[0] for form in FORMS.values()]
        if own is not None:
            others = [
                record for name, form in FORMS.items() if name != class_name for record in form
            ]
            options["foreign"] = others
    if class_name == "HFTokenizer":
        source: Any = REGISTRY.find("tokenizer", "ByteTokenizer")
        source(source.Config()).build().save(str(folder / "tokenizer"))
        config["path"] = str(folder / "tokenizer")
    if class_name == "InternS1TokenizeFn":
        fields = json.dumps({**CONFIGS["InternS1"][0]})
        model: Any = REGISTRY.find("model", "InternS1")
        built = model.Config.model_validate_json(fields, context={"registry": REGISTRY})
        tokenizer: Any = REGISTRY.find("tokenizer", "ByteTokenizer")
        options["model"] = model(built)
        options["tokenizer"] = tokenizer(tokenizer.Config(image_tokens=True)).build()
    if options.pop("adapter", False):
        adapter: Any = REGISTRY.find("transform", "LoRA")
        options["transforms"] = [adapter(adapter.Config(rank=2))]
    return config, options


@pytest.mark.parametrize(("component", "check"), cases())
def test_a_built_in_part_keeps_its_promise(component: Any, check: Check, tmp_path: Path) -> None:
    kind, name = component.kind, component.__name__
    if reason := SKIPPED.get((name, check.name)):
        pytest.skip(reason)
    config, options = options_of(kind, name, tmp_path)
    folder = tmp_path / "work"
    folder.mkdir()
    check.run(Case(component, config, folder, options))
