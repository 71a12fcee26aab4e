"""Mistakes that people make in a config, each with where it is made and what stands there then.

`BASE` is right as it is, with all sections and two parts of a third-party package.
"""

from __future__ import annotations

import copy
from typing import Any

__all__ = ["BASE", "MISTAKES", "REMOVED", "with_mistake"]

REMOVED: Any = object()

BASE: dict[str, Any] = {
    "$schema": "run_config.schema.json",
    "$comment": "Everything at once.",
    "work_dir": "work_dirs",
    "run_name": "night_watch",
    "seed": 42,
    "tokenizer": {"class_name": "ByteTokenizer"},
    "model": {
        "class_name": "InternS1",
        "vision_config": {},
        "projector_config": {},
        "text_config": {"class_name": "Qwen3", "preset": "qwen3-8b", "vocab_size": 153216},
        "freeze_vision": True,
    },
    "transforms": [{"class_name": "LoRA", "rank": 16, "alpha": 32}],
    "datasets": [
        {
            "dataset": {
                "class_name": "VLMJsonlDataset",
                "name": "media",
                "anno_path": "data/media/",
                "media_root": "data/",
                "sample_ratio": 2.0,
            },
            "tokenize_fn": {"class_name": "InternS1TokenizeFn", "max_length": 8192},
        },
        {
            "dataset": {"class_name": "LanternDataset", "logbook": "data/log", "nights": 3},
            "tokenize_fn": {"class_name": "InternS1TokenizeFn", "max_length": 8192},
        },
    ],
    "dataloader": {
        "pack_max_length": 16384,
        "packer": {"class_name": "ExpandSoftPacker"},
        "collator": {"class_name": "SFTVLMCollator"},
        "num_workers": 4,
    },
    "loss": {"class_name": "GlowLoss", "dusk": 0.25},
    "optimizer": {"class_name": "AdamW", "lr": 1e-6, "betas": [0.9, 0.95]},
    "lr_schedule": {"class_name": "CosineSchedule", "warmup_ratio": 0.03, "min_lr": 0.0},
    "max_grad_norm": 1.0,
    "global_batch_size": 8,
    "epoch_num": 1,
    "precision": {"compute_dtype": "bfloat16", "reduce_dtype": "float32"},
    "activation_checkpointing": {"mode": "full"},
    "parallel": {"class_name": "FSDP2", "replicate_size": 1},
    "savers": [
        {"class_name": "CheckpointSaver", "every_steps": 500, "keep_last": 2},
        {"class_name": "HFSaver"},
    ],
    "trackers": [{"class_name": "TensorBoardTracker"}],
    "eval": {
        "datasets": [
            {
                "dataset": {"class_name": "JsonlDataset", "anno_path": "data/held_out.jsonl"},
                "tokenize_fn": {"class_name": "InternS1TokenizeFn", "max_length": 8192},
            }
        ],
        "every_steps": 100,
    },
    "log_every_steps": 1,
}

MISTAKES: list[tuple[str, str, Any]] = [
    # A key that is misspelt, or stands in another project's words.
    ("letters swapped in a key", "dataste", []),
    ("a section in the singular", "dataset", {}),
    ("another project's name of the step count", "max_steps", 1000),
    ("another project's name of the batch size", "per_device_train_batch_size", 1),
    ("a learning rate at the top", "lr", 1e-5),
    ("a section one level too high", "pack_max_length", 4096),
    ("camel case in a key", "globalBatchSize", 8),
    ("a hyphen in a key", "run-name", "x"),
    ("a misspelt field of a built-in part", "optimizer.learning_rate", 1e-6),
    ("a misspelt field of a nested part", "model.text_config.hidden_sise", 64),
    ("a misspelt field of a dataset", "datasets.0.dataset.anno_paths", "data/"),
    ("an option of the dataset beside it", "datasets.0.sample_ratio", 2.0),
    ("a field of the dataset at its tokenize function", "datasets.0.tokenize_fn.media_root", "d/"),
    ("a field of the packer beside it", "dataloader.max_tiles_per_pack", 8),
    ("a misspelt field of a third-party part", "datasets.1.dataset.night", 3),
    ("a field that only another saver has", "savers.1.keep_last", 2),
    ("a comment that is not `$comment`", "comment", "half precision"),
    # A class that isn't there.
    ("a misspelt class", "datasets.0.dataset.class_name", "VLMJsonDataset"),
    ("a class in lower case", "optimizer.class_name", "adamw"),
    ("another project's class", "loss.class_name", "CELoss"),
    ("a dotted path", "loss.class_name", "torch.nn.CrossEntropyLoss"),
    ("a class of another kind", "datasets.0.tokenize_fn.class_name", "JsonlDataset"),
    ("a text model's class as the whole of the savers", "savers.0.class_name", "Qwen3"),
    ("a published class name", "model.text_config.class_name", "Qwen3ForCausalLM"),
    ("a class name without its key", "loss", "ChunkedCrossEntropy"),
    ("`type` for `class_name`", "optimizer", {"type": "AdamW", "lr": 1e-6}),
    ("no class name", "lr_schedule", {"warmup_ratio": 0.1}),
    ("a misspelt third-party class", "datasets.1.dataset.class_name", "LanternsDataset"),
    ("a preset that does not exist", "model.text_config.preset", "qwen3-9b"),
    ("another kind of sharding", "parallel.class_name", "FSDP"),
    # A value of another type.
    ("a number in quotes", "seed", "42"),
    ("a learning rate in quotes", "optimizer.lr", "1e-6"),
    ("a boolean in quotes", "model.freeze_vision", "true"),
    ("a boolean as a number", "model.freeze_vision", 1),
    ("a fraction of a count", "global_batch_size", 8.5),
    ("a count as a word", "dataloader.num_workers", "auto"),
    ("one dataset without its list", "datasets", BASE["datasets"][0]),
    ("one saver without its list", "savers", {"class_name": "HFSaver"}),
    ("a list of paths where one stands", "datasets.0.dataset.anno_path", ["a", "b"]),
    ("an object of savers", "savers", {"hf": {"class_name": "HFSaver"}}),
    ("null for a length", "dataloader.pack_max_length", None),
    ("a path that is null", "work_dir", None),
    ("names instead of objects in a list", "trackers", ["TensorBoardTracker"]),
    ("one beta", "optimizer.betas", 0.9),
    ("a folder of a third-party part as a list", "datasets.1.dataset.logbook", ["data/log"]),
    ("a mode as a boolean", "activation_checkpointing.mode", True),
    ("a mode as the whole section", "activation_checkpointing", "full"),
    # A value out of bounds.
    ("no step between log lines", "log_every_steps", 0),
    ("a negative learning rate", "optimizer.lr", -1e-5),
    ("warm-up in percent", "lr_schedule.warmup_ratio", 3),
    ("one beta too many", "optimizer.betas", [0.9, 0.95, 0.99]),
    ("an empty list of datasets", "datasets", []),
    ("a negative share of a dataset", "datasets.0.dataset.sample_ratio", -1.0),
    ("a batch of none", "global_batch_size", 0),
    ("no epoch", "epoch_num", 0),
    ("a number format that is shortened", "precision.compute_dtype", "bf16"),
    ("a mode that does not exist", "activation_checkpointing.mode", "selective"),
    ("a rank of zero", "transforms.0.rank", 0),
    ("a run name with a slash", "run_name", "runs/one"),
    ("an empty path", "work_dir", ""),
    ("a fate of bad records that does not exist", "datasets.0.dataset.on_bad_record", "ignore"),
    ("a colour that a third-party part does not know", "datasets.1.dataset.colour", "blue"),
    ("a third-party number out of bounds", "loss.dusk", 1.5),
    # Something that is left out.
    ("no length", "epoch_num", REMOVED),
    ("no datasets", "datasets", REMOVED),
    ("no model, and no weights to read one from", "model", REMOVED),
    ("no tokenizer, and no folder to find one in", "tokenizer", REMOVED),
    ("a dataset without its tokenize function", "datasets.0.tokenize_fn", REMOVED),
    ("a dataset without its file", "datasets.0.dataset.anno_path", REMOVED),
    ("a third-party dataset without its folder", "datasets.1.dataset.logbook", REMOVED),
    ("a model without its text part", "model.text_config", REMOVED),
    ("an evaluation without its rhythm", "eval.every_steps", REMOVED),
]


def with_mistake(place: str, value: Any) -> dict[str, Any]:
    """`BASE` with `value` at the dotted `place`, or without what stands there."""
    config = copy.deepcopy(BASE)
    *steps, last = place.split(".")
    inside: Any = config
    for step in steps:
        inside = inside[int(step) if step.isdigit() else step]
    if value is REMOVED:
        del inside[last]
    else:
        inside[last] = copy.deepcopy(value)
    return config
