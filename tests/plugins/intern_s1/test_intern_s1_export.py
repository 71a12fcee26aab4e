"""Claim: a folder published with Python code trains only where the launcher allows that code; its export carries
the processor configs, code, vocabularies and chat template along unchanged, and edits only changed config fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_alone, write_config
from safetensors.torch import load_file, save_file

from pegboard.initialization import init_module_weights
from pegboard.plugin_manager import load_plugins
from pegboard.weight_export import iter_published

PARTS = Path(__file__).with_name("picture_parts.py")
CODE = '''
from transformers import PreTrainedTokenizerFast

print("remote code ran")


class FakeTokenizer(PreTrainedTokenizerFast):
    """A tokenizer of the folder's own."""
'''
CONFIGURATION = """
from transformers import PretrainedConfig


class FakeConfig(PretrainedConfig):
    model_type = "interns1"
"""
CONFIG: dict[str, Any] = {
    "architectures": ["InternS1ForConditionalGeneration"],
    "auto_map": {"AutoConfig": "configuration_fake.FakeConfig"},
    "model_type": "interns1",
    "torch_dtype": "float32",
    "transformers_version": "4.55.0",
    "somebodys_note": {"a": [1]},
    "vision_config": {
        "model_type": "interns1_vision",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": [28, 28],
        "patch_size": [7, 7],
        "attention_bias": True,
        "dropout": 0.0,
    },
    "text_config": {
        "model_type": "qwen3",
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_theta": 5000.0,
        "unknown": None,
    },
    "image_token_id": 300,
    "image_seq_length": 4,
    "downsample_ratio": 0.5,
}
CARRIED = {
    "preprocessor_config.json": '{"crop_to_patches": true, "size": {"height": 28, "width": 28}}',
    "processor_config.json": '{"auto_map": {"AutoProcessor": "processing_fake.FakeProcessor"}}',
    "video_preprocessor_config.json": '{"size": 28 }\n',
    "tokenization_fake.py": CODE,
    "processing_fake.py": "raise RuntimeError('never to be run')\n",
    "configuration_fake.py": CONFIGURATION,
    "tokenizer_SMILES.model": "not really a vocabulary\n",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Intern-S1 as it would be published."""
    registry = load_plugins(third_party=False).registry
    folder = tmp_path_factory.mktemp("published")
    tokenizer_cls: Any = registry.find("tokenizer", "ByteTokenizer")
    tokenizer_cls(tokenizer_cls.Config()).build().save(str(folder))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "FakeTokenizer"
    settings["auto_map"] = {"AutoTokenizer": [None, "tokenization_fake.FakeTokenizer"]}
    path.write_text(json.dumps(settings), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    for name, text in CARRIED.items():
        (folder / name).write_text(text, encoding="utf-8")

    model_cls: Any = registry.find("model", "InternS1")
    text_cls: Any = registry.find("model", "Qwen3")
    fields = model_cls.config_from_hf(CONFIG)
    fields["text_config"] = text_cls(
        text_cls.Config(**text_cls.config_from_hf(fields["text_config"]))
    )
    with torch.device("meta"):
        built = model_cls(model_cls.Config(**fields)).build()
    module = built.module.to_empty(device="cpu")
    init_module_weights(module, 1)
    named = {name: p.detach() for name, p in module.named_parameters()}
    tensors = {n: t.clone() for n, t in iter_published(named, built.weight_map, lambda t: t)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def run(source: Path, folder: Path, *arguments: str, **changes: Any) -> Any:
    config = write_config(
        folder / "run.json",
        {
            "work_dir": str(folder),
            "run_name": "run",
            "load_from": str(source),
            "model": {"freeze_vision": True, "freeze_projector": True, **changes},
            "datasets": [
                {
                    "dataset": {"class_name": "TileSamples", "name": "tiles", "tiles": [1, 0, 2]},
                    "tokenize_fn": {"class_name": "TileTokenize"},
                }
            ],
            "dataloader": {"pack_max_length": 512, "collator": {"class_name": "TileCollator"}},
            "total_steps": 1,
            "savers": [{"class_name": "HFSaver"}],
        },
    )
    return run_alone(str(config), "--plugin", str(PARTS), *arguments)


def test_code_in_the_folder_runs_only_where_the_launcher_says_so(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    refused = run(source, tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert "start the run with --trust-remote-code" in refused.stderr
    assert "remote code ran" not in refused.stdout
    assert not (tmp_path / "run" / "export").exists()


def test_an_export_carries_what_it_was_given_and_edits_what_changed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    result = run(source, tmp_path, "--trust-remote-code", text_config={"rms_norm_eps": 1e-5})
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "remote code ran" in result.stdout
    export = tmp_path / "run" / "export"
    for name, text in CARRIED.items():
        assert (export / name).read_text(encoding="utf-8") == text, name
    template = "chat_template.jinja"
    assert (export / template).read_bytes() == (source / template).read_bytes()
    expected = json.loads(json.dumps(CONFIG))
    expected["text_config"]["rms_norm_eps"] = 1e-5
    assert json.loads((export / "config.json").read_text(encoding="utf-8")) == expected
    before = load_file(source / "model.safetensors")
    after = load_file(export / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        frozen = "vision_tower" in name or "projector" in name
        assert tensor.dtype == torch.float32
        assert not frozen or torch.equal(tensor, before[name]), name
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])


def test_a_vocabulary_inside_the_text_model_grows_on_loading(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    larger = {"vocab_size": 400, "resize_embeddings": True}
    result = run(
        source,
        tmp_path,
        "--trust-remote-code",
        text_config=larger,
        freeze_language=True,
        freeze_projector=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    export = tmp_path / "run" / "export"
    config = json.loads((export / "config.json").read_text(encoding="utf-8"))
    assert config["text_config"]["vocab_size"] == 400
    before = load_file(source / "model.safetensors")
    after = load_file(export / "model.safetensors")
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        assert after[name].shape == (400, 32)
        assert torch.equal(after[name][:320], before[name])
        assert float(after[name][320:].std()) > 0
