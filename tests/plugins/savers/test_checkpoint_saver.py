"""Claim: a checkpoint holds the whole run bit by bit, opens under any number of ranks without
running code, and a disk that fails on any rank leaves what stood before and a clear error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from pegboard.commit import commit_folder
from pegboard.errors import CheckpointError
from pegboard.train_state import load_train_state, newest_checkpoint, save_train_state
from pegboard_plugins.savers.component import CheckpointSaver, HFSaver

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
tiny_run = import_module("tiny_run")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint `one` of one process, and all that the two-rank scene made of it."""
    folder = tmp_path_factory.mktemp("two_ranks")
    module, optimizer = tiny_run.make(seed=1)
    tiny_run.train(module, optimizer)
    save_train_state(folder / "one", module, optimizer, {"step": 3, "cursor": [1, 2]})
    command = [sys.executable, str(HERE / "tiny_run.py"), str(folder)]
    roots = HERE.parents[2]
    path = os.pathsep.join([str(roots / "core"), str(roots / "plugins")])
    base = os.environ | {"WORLD_SIZE": "2", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            command,
            env=base | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    output = [rank.communicate(timeout=180)[0] for rank in ranks]
    # By the results, not the exit code: gloo may abort while it is taken down.
    assert all((folder / f"results_{rank}.json").exists() for rank in range(2)), "\n".join(output)
    return folder


def results(folder: Path, rank: int) -> dict[str, object]:
    text = (folder / f"results_{rank}.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.equal(tensor, right[name]), name


def test_two_ranks_resume_what_one_saved_bit_by_bit(two_ranks: Path) -> None:
    module, optimizer = tiny_run.make(seed=1)
    tiny_run.train(module, optimizer)
    expected = tiny_run.whole_state(module, optimizer)
    assert "exp_avg_sq.up.weight" in expected and "model.loads" in expected
    assert_same(load_file(two_ranks / "resumed.safetensors"), expected)
    assert results(two_ranks, 1)["train_state"] == {"step": 3, "cursor": [1, 2]}


def test_one_process_resumes_what_two_ranks_saved_bit_by_bit(two_ranks: Path) -> None:
    module, optimizer = tiny_run.make(seed=9)
    assert load_train_state(two_ranks / "two", module, optimizer) == {"step": 3}
    state = tiny_run.whole_state(module, optimizer)
    assert_same(state, load_file(two_ranks / "saved.safetensors"))


def test_each_rank_gets_its_own_random_state_back(two_ranks: Path) -> None:
    assert results(two_ranks, 0)["same_draw"] and results(two_ranks, 1)["same_draw"]
    files = sorted((two_ranks / "two").glob("*.safetensors"))
    first, second = (load_file(file)[f"random.{rank}.cpu"] for rank, file in enumerate(files))
    assert not torch.equal(first, second)


def test_a_replicated_tensor_is_written_once(two_ranks: Path) -> None:
    held = [load_file(file) for file in (two_ranks / "two").glob("*.safetensors")]
    assert sum("model.scale" in names for names in held) == 1
    assert sum("model.embed.weight" in names for names in held) == 2


def test_a_full_disk_on_one_rank_is_an_error_on_all_and_keeps_the_last(two_ranks: Path) -> None:
    for rank in range(2):
        said = str(results(two_ranks, rank)["full_on_rank_1"])
        assert "rank 1" in said and "too large" in said
    kept = [path.name for path in (two_ranks / "run" / "checkpoints").iterdir()]
    assert kept == ["step_00000003"]


def test_an_export_of_two_ranks_is_that_of_one_process(two_ranks: Path, tmp_path: Path) -> None:
    module, optimizer = tiny_run.make(seed=9)
    load_train_state(two_ranks / "run" / "checkpoints" / "step_00000003", module, optimizer)
    saver = HFSaver(HFSaver.Config(dtype="float32", max_shard_size_gb=2e-7)).build()
    folder = saver.save(tiny_run.request_for(tmp_path, module, optimizer))
    assert folder is not None
    one = {path.name: path.read_bytes() for path in folder.iterdir()}
    two = {path.name: path.read_bytes() for path in (two_ranks / "run" / "export").iterdir()}
    assert one == two and "model-00002-of-00002.safetensors" in one


def test_a_full_disk_while_exporting_is_an_error_on_all_ranks(two_ranks: Path) -> None:
    for rank in range(2):
        for full in (0, 1):  # rank 0 makes the files, both write into them
            key = "export_full_on_rank_1" if full else "full_on_rank_0"
            said = str(results(two_ranks, rank)[key])
            assert f"rank {full}" in said and "too large" in said
    assert sorted(path.name for path in (two_ranks / "run").iterdir()) == ["checkpoints", "export"]


def test_a_checkpoint_holds_safetensors_and_json_only(two_ranks: Path) -> None:
    names = sorted(path.name for path in (two_ranks / "two").iterdir())
    assert names == [
        "shard-00001-model-00001-of-00001.safetensors",
        "shard-00002-model-00001-of-00001.safetensors",
        "state.json",
    ]


def test_training_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    module, optimizer = tiny_run.make(seed=1)
    tiny_run.train(module, optimizer)
    save_train_state(tmp_path / "a", module, optimizer, {})
    other, other_optimizer = tiny_run.make(seed=2)
    load_train_state(tmp_path / "a", other, other_optimizer)
    tiny_run.train(module, optimizer)
    tiny_run.train(other, other_optimizer)
    left = tiny_run.whole_state(module, optimizer)
    assert_same(left, tiny_run.whole_state(other, other_optimizer))


def test_a_transposed_weight_comes_back(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 4)
    module.weight = torch.nn.Parameter(torch.arange(12.0).view(3, 4).t())
    optimizer = torch.optim.SGD(module.parameters(), momentum=0.9)
    save_train_state(tmp_path / "a", module, optimizer, {})
    expected = module.weight.detach().clone()
    torch.nn.init.zeros_(module.weight)
    load_train_state(tmp_path / "a", module, optimizer)
    assert torch.equal(module.weight, expected) and not module.weight.is_contiguous()


def test_an_optimizer_that_never_stepped_comes_back_without_state(tmp_path: Path) -> None:
    module, optimizer = tiny_run.make(seed=1)
    save_train_state(tmp_path / "a", module, optimizer, {})
    other, other_optimizer = tiny_run.make(seed=2)
    load_train_state(tmp_path / "a", other, other_optimizer)
    assert not other_optimizer.state
    assert other_optimizer.param_groups[0]["lr"] == 1e-2
    assert all(parameter.grad is None for parameter in other.parameters())


def test_a_run_killed_between_two_renames_gets_its_folder_back(tmp_path: Path) -> None:
    module, optimizer = tiny_run.make(seed=1)
    save_train_state(tmp_path / "a", module, optimizer, {"which": "old"})
    (tmp_path / "a").rename(tmp_path / "a.old-ffff")
    (tmp_path / "a.tmp-ffff").mkdir()

    def fail(folder: Path) -> None:
        raise OSError("no")

    with pytest.raises(CheckpointError, match="rank 0: OSError: no"):
        commit_folder(tmp_path / "a", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert load_train_state(tmp_path / "a", module, optimizer) == {"which": "old"}


def test_only_the_last_few_checkpoints_stay(tmp_path: Path) -> None:
    module, optimizer = tiny_run.make(seed=1)
    saver = CheckpointSaver(CheckpointSaver.Config(every_steps=2, keep_last=2)).build()
    assert [step for step in range(1, 6) if saver.due(step, is_last=step == 5)] == [2, 4, 5]
    assert newest_checkpoint(tmp_path) is None
    for step in (8, 9, 10):
        saver.save(tiny_run.request_for(tmp_path, module, optimizer, step=step))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000009", "step_00000010"]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_00000010"


def test_a_folder_without_its_state_is_not_the_newest(tmp_path: Path) -> None:
    module, optimizer = tiny_run.make(seed=1)
    saver = CheckpointSaver(CheckpointSaver.Config()).build()
    saver.save(tiny_run.request_for(tmp_path, module, optimizer, step=8))
    (tmp_path / "checkpoints" / "step_00000010").mkdir()
    (tmp_path / "checkpoints" / "step_00000012.tmp-aa").mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_00000008"


def test_another_model_is_refused_by_name_and_shape(tmp_path: Path) -> None:
    module, optimizer = tiny_run.make(seed=1)
    save_train_state(tmp_path / "a", module, optimizer, {})
    module.up = torch.nn.Linear(6, 8, bias=False)
    optimizer = torch.optim.AdamW(module.up.parameters())
    with pytest.raises(CheckpointError, match=r"up\.weight is float32 \[7, 6\].*\[8, 6\]"):
        load_train_state(tmp_path / "a", module, optimizer)
    module.extra = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="lacks extra.bias, extra.weight"):
        load_train_state(tmp_path / "a", module, optimizer)


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    module, optimizer = tiny_run.make(seed=1)
    tiny_run.train(module, optimizer)
    save_train_state(tmp_path / "a", module, optimizer, {})
    other = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], momentum=0.9)
    with pytest.raises(CheckpointError, match=r"optimizer: the checkpoint has exp_avg\.embed"):
        load_train_state(tmp_path / "a", module, other)


def test_more_than_a_file_takes_goes_into_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, optimizer = tiny_run.make(seed=1)
    tiny_run.train(module, optimizer)
    monkeypatch.setattr("pegboard.train_state._FILE_BYTES", 500)
    save_train_state(tmp_path / "a", module, optimizer, {})
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    other, other_optimizer = tiny_run.make(seed=2)
    load_train_state(tmp_path / "a", other, other_optimizer)
    left = tiny_run.whole_state(module, optimizer)
    assert_same(left, tiny_run.whole_state(other, other_optimizer))


def test_a_checkpoint_without_one_ranks_file_is_refused(two_ranks: Path, tmp_path: Path) -> None:
    copytree(two_ranks / "two", tmp_path / "two")
    (tmp_path / "two" / "shard-00002-model-00001-of-00001.safetensors").unlink()
    module, optimizer = tiny_run.make(seed=9)
    with pytest.raises(
        CheckpointError, match="shard-00002-model-00001-of-00001.safetensors: missing or dam"
    ):
        load_train_state(tmp_path / "two", module, optimizer)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    module, optimizer = tiny_run.make(seed=1)
    save_train_state(tmp_path / "a", module, optimizer, {})
    shard = tmp_path / "a" / "shard-00001-model-00001-of-00001.safetensors"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(
        CheckpointError, match="shard-00001-model-00001-of-00001.safetensors: missing or dam"
    ):
        load_train_state(tmp_path / "a", module, optimizer)
    shard.write_bytes(b"\xff" * size)
    with pytest.raises(CheckpointError, match="can't be resumed: rank 0: SafetensorError"):
        load_train_state(tmp_path / "a", module, optimizer)
    shard.unlink()
    with pytest.raises(
        CheckpointError, match="shard-00001-model-00001-of-00001.safetensors: missing or dam"
    ):
        load_train_state(tmp_path / "a", module, optimizer)
    (tmp_path / "a" / "state.json").write_text("{", encoding="utf-8")
    with pytest.raises(
        CheckpointError, match="state.json: not a readable checkpoint: .*delete its folder"
    ):
        load_train_state(tmp_path / "a", module, optimizer)


def test_a_second_checkpoint_saver_would_delete_the_checkpoints_of_the_first() -> None:
    often, seldom = (CheckpointSaver(CheckpointSaver.Config(every_steps=n)) for n in (1, 100))
    run: Any = SimpleNamespace(savers=(HFSaver(HFSaver.Config()), often, seldom))
    assert not list(often.check(run, ("savers", 1)))
    (problem,) = seldom.check(run, ("savers", 2))
    assert problem.path == ("savers", 2) and "savers[1] is a CheckpointSaver too" in problem.message


def test_the_largest_file_has_a_size_that_can_be_counted() -> None:
    with pytest.raises(ValidationError, match="less than or equal"):
        HFSaver.Config(max_shard_size_gb=1e300)
    HFSaver(HFSaver.Config(max_shard_size_gb=1e9)).build()
