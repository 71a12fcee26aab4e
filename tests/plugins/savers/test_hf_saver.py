"""Claim: an export holds the weight map's tensors under their published names and is split by
shapes alone; transformers reads its config; a full disk leaves the earlier export."""

from __future__ import annotations

import itertools
import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pegboard.errors import CheckpointError
from pegboard.savers import SaveRequest
from pegboard.tensor_file import TensorFile, TensorFileLayout, TensorSpec
from pegboard.weight_map import Piece, WeightMap
from pegboard_plugins.savers.component import CheckpointSaver, HFSaver

sys.path.insert(0, str(Path(__file__).parent))
tiny_run = import_module("tiny_run")


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond this (Python ignores the signal: a write fails like on a full disk)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def export(folder: Path, seed: int = 1, **config: Any) -> Path:
    module, optimizer = tiny_run.make(seed=seed)
    saver = HFSaver(HFSaver.Config(**config)).build()
    written = saver.save(tiny_run.request_for(folder, module, optimizer))
    assert written is not None
    return written


def test_one_file_holds_all_that_fits(tmp_path: Path) -> None:
    folder = export(tmp_path)
    module, _ = tiny_run.make(seed=1)
    tensors = load_file(folder / "model.safetensors")
    assert list(tiny_run.WEIGHT_MAP.published_shapes()) == [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.gate.weight",
        "model.up.weight",
        "model.scale",
    ]
    assert sorted(tensors) == sorted(tiny_run.WEIGHT_MAP.published_shapes())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert torch.equal(tensors["model.gate.weight"], module.up.weight[:3].bfloat16())
    assert torch.equal(tensors["model.up.weight"], module.up.weight[3:].bfloat16())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
    ]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_files_are_filled_in_the_order_of_the_map_up_to_the_limit(tmp_path: Path) -> None:
    folder = export(tmp_path, dtype="float32", max_shard_size_gb=2e-7)
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index["weight_map"] == {
        "model.embed_tokens.weight": one,
        "model.gate.weight": two,
        "model.norm.weight": two,
        "model.scale": two,
        "model.up.weight": two,
    }
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    assert index["metadata"]["total_size"] == 4 * (66 + 6 + 42 + 1)
    assert list(load_file(folder / one)) == ["model.embed_tokens.weight"]
    assert not (folder / "model.safetensors").exists()


def test_the_dtype_is_the_configs_else_the_loaded_else_bfloat16(tmp_path: Path) -> None:
    module, optimizer = tiny_run.make(seed=1)
    cases = (("float16", "float32"), (None, "float32"), (None, None))
    for (asked, loaded), expected in zip(cases, ("float16", "float32", "bfloat16"), strict=True):
        request = tiny_run.request_for(tmp_path, module, optimizer, loaded_dtype=loaded)
        folder = HFSaver(HFSaver.Config.model_validate({"dtype": asked})).build().save(request)
        assert folder is not None
        dtype = load_file(folder / "model.safetensors")["model.scale"].dtype
        assert dtype == getattr(torch, expected)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert config["torch_dtype"] == expected and "dtype" not in config
        assert config["vision_config"] == {"torch_dtype": expected}


def test_transformers_reads_the_configs(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = export(tmp_path, dtype="float16")
    assert transformers.AutoConfig.from_pretrained(folder).dtype == torch.float16
    generation = transformers.GenerationConfig.from_pretrained(folder)
    assert (generation.eos_token_id, generation.pad_token_id) == ([2, 5], 0)


def test_what_the_source_folder_says_of_generation_and_images_is_kept(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    said = '{"top_k": 7, "eos_token_id": [5, 2, 9]}'
    (source / "generation_config.json").write_text(said, encoding="utf-8")
    (source / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    (source / "model.py").write_text("", encoding="utf-8")
    module, optimizer = tiny_run.make(seed=1)
    request = tiny_run.request_for(tmp_path, module, optimizer, source_folder=source)
    folder = HFSaver(HFSaver.Config()).build().save(request)
    assert folder is not None
    assert (folder / "generation_config.json").read_text(encoding="utf-8") == said
    assert (folder / "preprocessor_config.json").exists()
    assert not (folder / "model.py").exists()


@pytest.mark.parametrize(
    ("said", "ends"),
    [
        ('{"top_k": 7, "eos_token_id": 2}', [2, 5]),
        ('{"top_k": 7, "eos_token_id": [9]}', [9, 2, 5]),
        ('{"top_k": 7}', [2, 5]),
        ("not JSON", None),
        ("[]", None),
    ],
)
def test_what_ends_a_turn_ends_generation_also_after_a_base_model(
    said: str, ends: list[int] | None, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "generation_config.json").write_text(said, encoding="utf-8")
    module, optimizer = tiny_run.make(seed=1)
    request = tiny_run.request_for(tmp_path, module, optimizer, source_folder=source)
    folder = HFSaver(HFSaver.Config()).build().save(request)
    assert folder is not None
    written = (folder / "generation_config.json").read_text(encoding="utf-8")
    if ends is None:
        assert written == said
    else:
        assert json.loads(written) == {"top_k": 7, "eos_token_id": ends}


def test_a_new_export_replaces_the_old_one_whole(tmp_path: Path) -> None:
    old = load_file(export(tmp_path, seed=1) / "model.safetensors")
    folder = export(tmp_path, seed=2, max_shard_size_gb=2e-7)
    assert not (folder / "model.safetensors").exists()
    new = load_file(folder / "model-00001-of-00002.safetensors")
    name = "model.embed_tokens.weight"
    assert not torch.equal(old[name], new[name])
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_exports_on_the_way_have_a_folder_each(tmp_path: Path) -> None:
    assert export(tmp_path, every_steps=3) == tmp_path / "export" / "step_00000003"


@pytest.mark.parametrize("limit", [20, 500])
@pytest.mark.parametrize("kind", [HFSaver, CheckpointSaver])
def test_a_full_disk_is_a_clear_error_and_keeps_what_stood(
    tmp_path: Path, kind: type[HFSaver | CheckpointSaver], limit: int
) -> None:
    saver = kind(kind.Config()).build()

    def request(step: int) -> SaveRequest:
        module, optimizer = tiny_run.make(seed=step)
        made: SaveRequest = tiny_run.request_for(tmp_path, module, optimizer, step=step)
        return made

    kept = saver.save(request(1))
    assert kept is not None
    before = {path: path.read_bytes() for path in kept.iterdir()}
    second = request(2)
    with pytest.raises(CheckpointError, match="File too large") as caught, largest_file(limit):
        saver.save(second)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in kept.iterdir()} == before
    assert list(kept.parent.iterdir()) == [kept]


def test_a_tensor_file_is_the_same_in_whatever_order_it_is_written(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(3, dtype=torch.uint8),
        "a": torch.randn(2, 3),
        "c": torch.tensor(True),
        "d": torch.randn(4, 3).t().to(torch.bfloat16),
        "e": torch.zeros(0, 2),
    }
    layout = TensorFileLayout(
        {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}, {}
    )
    for file, names in (("one", sorted(tensors)), ("two", sorted(tensors, reverse=True))):
        with TensorFile.create(tmp_path / file, layout) as made:
            for name in names:
                assert made.write(name, tensors[name]) == tensors[name].numel()
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    read = load_file(tmp_path / "one")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_boxes_of_a_tensor_make_the_file_that_the_whole_makes(tmp_path: Path) -> None:
    whole = torch.randn(3, 4, 5)
    layout = TensorFileLayout({"a": TensorSpec((3, 4, 5), torch.float32)}, {"format": "pt"})
    with TensorFile.create(tmp_path / "whole", layout) as file:
        file.write("a", whole)
    cuts = [(0, 1, 3), (0, 3, 4), (0, 2, 5)]
    boxes = [
        tuple(map(slice, starts, stops))
        for starts, stops in zip(
            itertools.product(*(cut[:-1] for cut in cuts)),
            itertools.product(*(cut[1:] for cut in cuts)),
            strict=True,
        )
    ]
    with TensorFile.create(tmp_path / "boxes", layout):
        pass
    for some in (boxes[::2], boxes[1::2]):  # two writers
        with TensorFile(tmp_path / "boxes", layout) as file:
            for box in some:
                file.write("a", whole[box], box)
    assert (tmp_path / "boxes").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_part_that_does_not_fit_its_place_is_refused(tmp_path: Path) -> None:
    layout = TensorFileLayout({"a": TensorSpec((3, 4), torch.float32)}, {})
    with TensorFile.create(tmp_path / "a", layout) as file:
        for name, part in (("b", torch.ones(3, 4)), ("a", torch.ones(4, 3))):
            with pytest.raises(ValueError, match="does not fit"):
                file.write(name, part)
        with pytest.raises(ValueError, match="does not fit"):
            file.write("a", torch.ones(3, 4).double())
        with pytest.raises(ValueError, match="does not fit"):
            file.write("a", torch.ones(2, 4), (slice(0, 3), slice(0, 4)))


def test_an_export_that_is_not_covered_by_its_map_is_refused(tmp_path: Path) -> None:
    module, optimizer = tiny_run.make(seed=1)
    request = tiny_run.request_for(tmp_path, module, optimizer)
    entries = list(request.model.weight_map.entries)
    rows = Piece("model.norm.weight", ours=((0, 3),), theirs=((3, 6),))
    entries[1] = replace(entries[1], pieces=(rows,))
    broken = replace(request.model, weight_map=WeightMap(tuple(entries)))
    with pytest.raises(CheckpointError, match="elements were written"):
        HFSaver(HFSaver.Config()).build().save(replace(request, model=broken))
    assert list(tmp_path.iterdir()) == []
