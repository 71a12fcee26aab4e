"""Claim: how many ranks share the experts changes only rounding (2e-6 in float32, 1e-12 in float64), wherever the
tokens go; checkpoints open under every other layout, bit by bit; exports are the same bytes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import tiny_config, torchrun, write_chats, write_config
from torch.distributed.device_mesh import init_device_mesh

from pegboard.errors import ConfigError, PluginError
from pegboard.parallel import Ranks, check_sizes, join_ranks, leave_ranks, shard_model
from pegboard.plugin_manager import load_plugins
from pegboard.run_config import load_run_config
from pegboard.train_state import load_train_state

SCRIPT = Path(__file__).with_name("expert_ranks.py")
sys.path.insert(0, str(SCRIPT.parent))
expert_ranks = import_module("expert_ranks")


def play(folder: Path, num_ranks: int, scene: str) -> dict[str, Any]:
    result = torchrun(num_ranks, str(SCRIPT), str(folder), scene, timeout_s=900)
    # By the results, not the exit code: gloo may abort while it is taken down.
    written = folder / "results.json"
    assert written.exists(), result.stdout[-3000:] + result.stderr[-6000:]
    return dict(json.loads(written.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder and results of the scene `some` on four ranks."""
    folder = tmp_path_factory.mktemp("four_ranks")
    return folder, play(folder, 4, "some")


def assert_invariant(results: dict[str, dict[str, float]]) -> None:
    for case, found in results.items():
        relative, weights = (2e-6, 5e-5) if "float32" in case else (1e-12, 1e-12)
        assert found["loss"] <= relative, (case, found)
        assert found["norm"] <= relative, (case, found)
        assert found["weights"] <= weights, (case, found)
        assert found["clipped"], case


def test_sharing_experts_changes_only_rounding(four_ranks: tuple[Path, dict[str, Any]]) -> None:
    _, results = four_ranks
    assert len(results["invariance"]) == len(expert_ranks.some_cases())
    assert_invariant(results["invariance"])


@pytest.mark.slow
def test_every_mesh_routing_and_accumulation_changes_only_rounding(tmp_path: Path) -> None:
    results = play(tmp_path, 4, "all")["invariance"]
    assert len(results) == 5 * 4 * 3 * 2
    assert_invariant(results)


def test_a_recompute_goes_the_ways_of_its_forward(
    four_ranks: tuple[Path, dict[str, Any]],
) -> None:
    _, results = four_ranks
    # Two steps of one micro-batch through two layers: counts are exchanged and read once for each.
    assert results["plans False"] == results["plans True"] == 4
    assert results["recomputed is the same"]


def test_the_same_run_twice_gives_the_same_bits(four_ranks: tuple[Path, dict[str, Any]]) -> None:
    assert four_ranks[1]["again is the same"]


def test_a_checkpoint_of_ep_4_resumes_under_every_mesh(
    four_ranks: tuple[Path, dict[str, Any]],
) -> None:
    _, results = four_ranks
    for mesh in expert_ranks.MESHES:
        assert results[f"{mesh} resumed the same"], mesh
        assert results[f"{mesh} went on"] <= 1e-12, mesh
        assert results[f"{mesh} and back"], mesh


def test_one_process_resumes_and_exports_what_four_sharing_ranks_saved(
    four_ranks: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = four_ranks
    run = expert_ranks.Run.start(expert_ranks.alone(), sharded=False, seed=20)
    assert load_train_state(folder / "ep4", run.built.module, run.optimizer) == {"step": 3}
    assert expert_ranks.same(run.whole(), torch.load(folder / "state.pt", weights_only=True))
    for computed, shared in ((False, "export_of"), (True, "computed_by")):
        exported = run.export(tmp_path / shared, computed=computed)
        alone = {path.name: path.read_bytes() for path in exported.iterdir()}
        assert sum(name.endswith(".safetensors") for name in alone) > 2
        for mesh in expert_ranks.MESHES:
            written = folder / f"{shared}_{mesh}" / "export"
            assert {path.name: path.read_bytes() for path in written.iterdir()} == alone, mesh


def test_a_rank_reads_only_the_experts_that_it_keeps(
    four_ranks: tuple[Path, dict[str, Any]],
) -> None:
    _, results = four_ranks
    for mesh, per_rank, copies in (("ep1", 2, 1), ("ep2", 2, 1), ("ep2_x2", 4, 2)):
        sets = [
            {int(name.split(".experts.")[1].split(".")[0]) for name in read if ".experts." in name}
            for read in results[f"{mesh} read"]
        ]
        assert [len(experts) for experts in sets] == [per_rank] * 4, mesh
        every = sorted(expert for experts in sets for expert in experts)
        assert every == sorted(list(range(8)) * copies), mesh
    assert results["loaded the same"]


def test_ranks_may_keep_no_expert_or_another_number_each(
    four_ranks: tuple[Path, dict[str, Any]],
) -> None:
    _, results = four_ranks
    for experts in (2, 6):
        found = results[f"{experts} experts"]
        assert found["norm"] <= 1e-12 and found["weights"] <= 1e-12, (experts, found)
        assert results[f"{experts} experts resumed the same"], experts


def test_with_two_ranks_each_holds_half_of_what_is_not_an_expert(tmp_path: Path) -> None:
    results = play(tmp_path, 2, "memory")
    for mesh in ("ep1", "ep2"):
        for held in results[mesh]:
            assert held["dense"] * 2 == held["dense whole"] > 0, (mesh, held)
            assert held["expert"] * 2 == held["expert whole"] > 0, (mesh, held)
    for name, share in results["ep2 gathered"].items():
        assert share == (0.5 if ".experts." in name else 1.0), name


def test_sizes_that_do_not_fit_the_ranks_name_those_that_do() -> None:
    check_sizes(8, 2, 4)
    with pytest.raises(
        ConfigError, match="expert_parallel_size: 3 does not divide the 8 .*1, 2, 4, 8"
    ):
        check_sizes(8, 1, 3)
    with pytest.raises(
        ConfigError, match="8 does not divide the 4 ranks that each of 2 replicas has"
    ):
        check_sizes(8, 2, 8)
    with pytest.raises(ConfigError, match="replicate_size: 3 does not divide the 8"):
        check_sizes(8, 3, 1)


MIXTURE = {
    "class_name": "Qwen3MoE",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}


@pytest.mark.parametrize(
    ("size", "model", "message"),
    [
        (2, {}, "2, but Qwen3 has no experts"),
        (2, {**MIXTURE, "mlp_only_layers": [0, 1]}, "2, but Qwen3MoE has no experts"),
        (4, MIXTURE, "4 does not divide the 6 experts of Qwen3MoE"),
        (3, MIXTURE, None),
    ],
)
def test_experts_that_can_not_be_shared_are_found_before_anything_runs(
    tmp_path: Path, size: int, model: dict[str, Any], message: str | None
) -> None:
    chats = write_chats(tmp_path / "chats.jsonl", 2)
    parallel = {"class_name": "FSDP2", "expert_parallel_size": size}
    path = tmp_path / "a.json"
    write_config(path, tiny_config(tmp_path, chats, model=model, parallel=parallel))
    registry = load_plugins(third_party=False).registry
    if message is None:
        assert load_run_config(path, (), registry).run.model.num_experts() == 6
        return
    with pytest.raises(ConfigError, match=rf"a\.json:\d+:\d+: parallel\.expert_par.*: {message}"):
        load_run_config(path, (), registry)


def test_a_unit_that_would_be_shared_wrongly_is_refused() -> None:
    join_ranks(torch.device("cpu"))
    try:
        one = init_device_mesh("cpu", (1, 1), mesh_dim_names=("expert_shard", "expert"))
        ranks = Ranks(0, 1, torch.device("cpu"), init_device_mesh("cpu", (1,)), one)
        built = expert_ranks.build()
        names = dict(built.expert_axis)
        del names["layers.1.experts.down_EDF"]
        with pytest.raises(PluginError, match="layers.1.experts.down_EDF: lies in a shard unit"):
            shard_model(replace(built, expert_axis=names), ranks, torch.float64, torch.float64)
        built = expert_ranks.build()
        units = tuple(u for u in built.shard_units if u.path != "layers.1.experts")
        with pytest.raises(PluginError, match="expert_axis: layers.1.experts.down_EDF lies in no"):
            shard_model(replace(built, shard_units=units), ranks, torch.float64, torch.float64)
        built = expert_ranks.build()
        del built.module.get_submodule("layers.0.experts").dispatcher
        with pytest.raises(PluginError, match="needs an attribute 'dispatcher'"):
            shard_model(built, ranks, torch.float64, torch.float64)
    finally:
        leave_ranks()
