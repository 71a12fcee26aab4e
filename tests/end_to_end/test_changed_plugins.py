"""A checkpoint holds what made it, and --resume compares it before any tensor is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import run_alone, torchrun

TRACKER = '''
import pegboard

class PegTracker(pegboard.TrackerComponent):
    """Counts the steps."""
    def build(self, run_dir):
        return Steps()

class Steps:
    def log(self, step, metrics):
        pass
    def close(self):
        pass

@pegboard.hookimpl
def register_trackers(register):
    register(PegTracker)
'''


@pytest.mark.slow
def test_other_code_under_one_version_is_refused_until_told_to_go_on(
    make_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    info = site / "peg_pinned-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: peg-pinned\nVersion: 1.2\n")
    (info / "RECORD").write_text("")
    (info / "entry_points.txt").write_text("[pegboard]\np = peg_pinned\n")
    code = site / "peg_pinned.py"
    code.write_text(TRACKER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
    config = str(
        make_config(
            epoch_num=None,
            total_steps=2,
            trackers=[{"class_name": "PegTracker"}],
            savers=[{"class_name": "CheckpointSaver"}],
        )
    )

    first = run_alone(config)
    assert first.returncode == 0, first.stderr[-3000:]
    [state] = (tmp_path / "a" / "run" / "checkpoints").glob("*/state.json")
    made_by = json.loads(state.read_text())["train_state"]["plugins"]
    assert made_by["peg-pinned"]["parts"] == ["tracker PegTracker"]
    assert (made_by["peg-pinned"]["version"], made_by["peg-pinned"]["released"]) == ("1.2", True)
    assert made_by["qwen3"]["package"] == "pegboard"

    code.write_text(TRACKER + "# patched in place\n")
    words = [config, "--resume", "--set", "total_steps=4"]
    refused = torchrun(2, "core/run.py", *words, timeout_s=120)
    assert refused.returncode == 1, refused.stderr[-3000:]  # torchrun's for our 2
    assert "was made with other plugins: the code of plugin 'peg-pinned' changed" in refused.stderr
    assert "check_made_by" not in refused.stderr  # torchrun has a traceback, we have none

    told = run_alone(*words, "--set", "on_changed_plugins=continue")
    assert told.returncode == 0, told.stderr[-3000:]
    assert "plugins changed since" in told.stderr
    assert "resumed from" in told.stderr

    # The new checkpoint was made by the new code: nothing is left to be told.
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: peg-pinned\nVersion: 1.3\n")
    upgraded = run_alone(config, "--resume", "--set", "total_steps=5")
    assert upgraded.returncode == 0, upgraded.stderr[-3000:]
    changes = [line for line in upgraded.stderr.splitlines() if "plugins changed since" in line]
    assert len(changes) == 1 and changes[0].endswith("peg-pinned 1.2 -> 1.3")
