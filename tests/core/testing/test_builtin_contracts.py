"""The claim: every built-in part keeps every promise of its kind; none is left out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pegboard import Batch
from pegboard.component import COMPONENT_KINDS
from pegboard.plugin_manager import load_plugins
from pegboard.testing import Case, Check, checks_for
from pegboard.testing.case import TINY_MODEL
from pegboard.testing.rows import make_row

ON_RANKS = ("two_ranks_are_one", "a_rank_of_text_alone_is_no_trouble")
IMAGE_ID, TILE_TOKENS = 265, 4
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
QUESTION: dict[str, Any] = {"messages": CHAT["messages"][:2]}
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


def chat_segments(record: Any, tokenizer: Any) -> list[list[tuple[str, bool]]] | None:
    """What the template shows of one question and its answer; the answer and its end get loss."""
    if record != QUESTION:
        return None  # which turns share an example is the history's choice, which has its own tests
    whole = tokenizer.render(record["messages"]).removesuffix("\n")
    start = whole.rindex(record["messages"][-1]["content"])
    return [[(whole[:start], False), (whole[start:], True), ("\n", False)]]


def text_segments(record: Any, tokenizer: Any) -> list[list[tuple[str, bool]]]:
    text, end = record["text"], tokenizer.decode(tokenizer.eos_token_ids[:1])
    return [[(text[0], False), (text[1:] + end, True)]]


def row_with_pictures(examples: Any, scale: float) -> Batch:
    """A picture of one tile in each example that has room for it."""
    shown = []
    for example in examples:
        ids = example.input_ids.copy()
        if len(ids) > TILE_TOKENS:
            ids[1 : 1 + TILE_TOKENS] = IMAGE_ID
        shown.append(dataclasses.replace(example, input_ids=ids))
    tiles = [int((example.input_ids == IMAGE_ID).sum()) // TILE_TOKENS for example in shown]
    batch = make_row(shown, scale)
    if not sum(tiles):
        return batch
    size = VISION["image_size"]
    draw = torch.Generator()
    # One picture in each sample that has one, the same wherever it stands in a row.
    pixels = [
        torch.randint(256, (3, size, size), generator=draw.manual_seed(len(e.input_ids)))
        for e, count in zip(shown, tiles, strict=True)
        if count
    ]
    media = {
        "pixel_values": torch.stack(pixels).to(torch.uint8),
        "image_positions": (batch.input_ids_T == IMAGE_ID).nonzero().flatten(),
        "tile_counts": torch.tensor([count for count in tiles if count], dtype=torch.int32),
    }
    extras = {"num_tiles": sum(tiles), "tiles_of_samples": tuple(tiles)}
    return dataclasses.replace(batch, media=media, extras=extras)


CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Qwen3": (QWEN3, {}),
    "Qwen3MoE": (MOE, {}),
    "AutoModelForCausalLM": ({"hf_config": LLAMA}, {}),
    "InternS1": (
        {
            "vision_config": VISION,
            "projector_config": {},
            "text_config": TEXT,
            "image_token_id": IMAGE_ID,
        },
        {"make_batch": row_with_pictures},
    ),
    "InternVL": (
        {
            "vision_config": VISION,
            "projector_config": {},
            "text_config": TEXT,
            "image_token_id": IMAGE_ID,
        },
        {"make_batch": row_with_pictures},
    ),
    "InternS1TokenizeFn": (
        {"max_length": 512},
        {"records": [CHAT, QUESTION], "segments": chat_segments},
    ),
    "ChatTokenizeFn": (
        {"max_length": 512},
        {"records": [CHAT, QUESTION], "segments": chat_segments},
    ),
    "TextTokenizeFn": (
        {"max_length": 512},
        {"records": [{"text": "some words"}], "segments": text_segments},
    ),
    "AdapterSaver": ({}, {"adapter": True}),
    "LoRA": ({"rank": 2}, {}),
    "Freeze": ({"prefixes": ["model.layers.0."]}, {}),
    "AdamW": ({"lr": 1e-3}, {}),
    "SequentialPacker": ({}, {"keeps_order": True}),
    "EarlyStopping": ({"patience": 2}, {"metrics": {"eval_loss": 2.0}}),
}
SAME_TOWER = "the tower of InternS1, which is tried"
SKIPPED = {
    ("CheckpointSaver", "the_same_state_gives_the_same_bytes"): (
        "torch's checkpoint storage orders the tensors of a file by itself"
    ),
    ("InternVL", "a_rank_of_text_alone_is_no_trouble"): SAME_TOWER,
    ("AutoModelForCausalLM", "config_goes_both_ways"): "transformers adds keys with every release",
}


def cases() -> list[Any]:
    found = []
    for kind in COMPONENT_KINDS:
        for entry in REGISTRY.entries():
            if entry.kind != kind:
                continue
            for check in checks_for(kind):
                marks = [pytest.mark.slow] if check.name in ON_RANKS else []
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
