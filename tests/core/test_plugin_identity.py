"""A checkpoint knows what made it: what was announced since is told, what was not is refused."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from pegboard.cli import main
from pegboard.errors import CheckpointError
from pegboard.plugin_identity import check_made_by, compare_plugins, identify_plugins
from pegboard.plugin_manager import load_plugins
from pegboard.run_config import load_run_config

Install = Callable[..., Path]
QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.json"
FOLDER = Path("step_00000003")
SOUND = '''
import pegboard

class PegLoss(pegboard.LossComponent):
    """A loss."""
    def build(self):
        return None

@pegboard.hookimpl
def register_losses(register):
    register(PegLoss)
'''


@pytest.fixture
def told() -> Iterator[list[str]]:
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(str(message)), format="{message}")
    yield lines
    logger.remove(sink)


def _made_by(*files: Path, loss: str = "PegLoss", **options: Any) -> Any:
    plugins = load_plugins(files, **options)
    overrides = [f"loss.class_name={loss}"]
    run = load_run_config(QUICKSTART, overrides, plugins.registry).run
    return json.loads(json.dumps(identify_plugins(run, plugins)))


def _one(**changes: Any) -> Any:
    """What a run with one released plugin is made by."""
    one = {
        "package": "peg-data",
        "version": "1.0",
        "content": "a1",
        "released": True,
        "parts": ["dataset PegData"],
    }
    return {"peg-data": {**one, **changes}}


def test_only_plugins_that_the_run_uses_are_in_it(install: Install) -> None:
    install("peg-used", SOUND)
    install("peg-unused", SOUND.replace("PegLoss", "PegOther"))
    made_by = _made_by()
    assert made_by["peg-used"]["parts"] == ["loss PegLoss"]
    assert made_by["peg-used"]["package"] == "peg-used"
    assert made_by["peg-used"]["version"] == "1.2"
    assert made_by["qwen3"]["package"] == "pegboard"
    assert made_by["jsonl"]["parts"] == ["dataset JsonlDataset"]
    assert not {"peg-unused", "losses", "lora"} & made_by.keys()


def test_the_hash_is_of_every_code_file_of_the_package_and_of_nothing_else(
    install: Install,
) -> None:
    package = install("peg-hashed", SOUND, more__py="x = 1\n", data__bin="x").parent
    before = _made_by()["peg-hashed"]["content"]
    (package / "data.bin").write_text("y")
    (package / "__pycache__").mkdir(exist_ok=True)
    (package / "__pycache__" / "more.pyc").write_text("y")
    assert _made_by()["peg-hashed"]["content"] == before
    (package / "more.py").write_text("x = 2\n")
    changed = _made_by()["peg-hashed"]["content"]
    (package / "more.py").rename(package / "less.py")
    renamed = _made_by()["peg-hashed"]["content"]
    assert len({before, changed, renamed}) == 3


def test_a_file_is_known_by_its_name_and_content_wherever_it_lies(site: Path) -> None:
    file = site / "peg_file.py"
    file.write_text(SOUND)
    [one] = [one for name, one in _made_by(file).items() if name == "peg_file"]
    assert (one["package"], one["version"], one["released"]) == ("file peg_file.py", "", False)


def test_what_a_wheel_installed_is_released_and_an_editable_install_is_not(
    install: Install, site: Path, tmp_path: Path
) -> None:
    install("peg-wheel", SOUND)
    info = site / "peg_wheel-1.2.dist-info"
    assert not _made_by()["peg-wheel"]["released"]
    (info / "RECORD").write_text("")
    assert _made_by()["peg-wheel"]["released"]
    elsewhere = tmp_path / "checkout"
    elsewhere.mkdir()
    sys.path.append(str(elsewhere))  # the fixture's own list
    code = elsewhere / "peg_editable.py"
    code.write_text(SOUND.replace("PegLoss", "PegEdited"))
    edited = site / "peg_editable-1.0.dist-info"
    edited.mkdir()
    (edited / "METADATA").write_text("Metadata-Version: 2.1\nName: peg-editable\nVersion: 1.0\n")
    (edited / "RECORD").write_text("")
    (edited / "entry_points.txt").write_text("[pegboard]\np = peg_editable\n")
    made_by = _made_by(loss="PegEdited")
    assert not made_by["peg-editable"]["released"]
    assert made_by["peg-editable"]["content"]


def test_the_same_plugins_are_no_change(install: Install) -> None:
    install("peg-same", SOUND)
    assert compare_plugins(_made_by(), _made_by()) == ((), ())


REFUSED = {
    "another package": (
        {"acme": {**_one()["peg-data"], "package": "acme-data", "version": "2.0"}},
        "dataset PegData came from peg-data 1.0 and now comes from acme-data 2.0",
    ),
    "a file instead": (
        {"mine": {**_one()["peg-data"], "package": "file mine.py", "version": ""}},
        "dataset PegData came from peg-data 1.0 and now comes from file mine.py",
    ),
    "other code under one version": (
        _one(content="b2"),
        "the code of plugin 'peg-data' changed and its version is peg-data 1.0 as before",
    ),
}
TOLD = {
    "another version": (_one(version="1.1", content="b2"), "peg-data 1.0 -> 1.1"),
    "an editable install": (
        _one(content="b2", released=False),
        "the code of plugin 'peg-data' changed (peg-data 1.0)",
    ),
    "no longer used": ({}, "dataset PegData of peg-data 1.0 is no longer used"),
    "a part more": (
        _one(parts=["dataset PegData", "loss PegLoss"]),
        "loss PegLoss of peg-data 1.0 is new",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_nobody_announced_is_refused_unless_told_to_go_on(case: str, told: list[str]) -> None:
    now, words = REFUSED[case]
    assert compare_plugins(_one(), now).refused == (words,)
    with pytest.raises(CheckpointError) as raised:
        check_made_by(_one(), now, FOLDER, go_on=False)
    assert str(raised.value) == (
        f"{FOLDER}: was made with other plugins: {words}; bring back what made it, or set "
        'on_changed_plugins to "continue" if you trust the change'
    )
    check_made_by(_one(), now, FOLDER, go_on=True)
    assert [line.strip() for line in told] == [f"plugins changed since {FOLDER}: {words}"]


@pytest.mark.parametrize("case", TOLD)
def test_what_was_announced_is_told_and_goes_on(case: str, told: list[str]) -> None:
    now, words = TOLD[case]
    check_made_by(_one(), now, FOLDER, go_on=False)
    assert [line.strip() for line in told] == [f"plugins changed since {FOLDER}: {words}"]


def test_one_package_under_another_plugin_name_is_the_same_package() -> None:
    renamed = {"peg-data:p": {**_one()["peg-data"], "package": "Peg_Data", "version": "1.1"}}
    assert compare_plugins(_one(), renamed) == ((), ("Peg_Data 1.0 -> 1.1",))


def test_a_checkpoint_of_before_says_so_and_goes_on(told: list[str]) -> None:
    check_made_by(None, _one(), FOLDER, go_on=False)
    assert "does not say which plugins made it" in told[0]


@pytest.mark.parametrize("junk", [[], {"x": 1}, {"x": {}}, _one(parts=[1]), _one(version=None)])
def test_what_a_checkpoint_says_is_checked_before_it_is_used(junk: Any) -> None:
    with pytest.raises(CheckpointError, match="can't be read"):
        check_made_by(copy.deepcopy(junk), _one(), FOLDER, go_on=True)


@pytest.mark.parametrize("named", [True, False])
def test_a_plugin_that_is_gone_since_the_run_began_is_named_when_it_is_to_go_on(
    named: bool, install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install("peg-gone", SOUND)
    run_dir = tmp_path / "work" / "mine"
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "plugins.json").write_text(json.dumps(load_plugins().describe()))
    config = tmp_path / "config.json"
    fields: dict[str, Any] = {"extends": str(QUICKSTART), "work_dir": str(tmp_path / "work")}
    fields |= {"loss": {"class_name": "PegLoss"}, "run_name": "mine" if named else None}
    config.write_text(json.dumps(fields))
    words = ["train", str(config), "--no-third-party"]
    told = (
        f"{run_dir}/plugins.json: loss 'PegLoss' came from plugin 'peg-gone' "
        "(distribution peg-gone 1.2) when this run began"
    )
    assert main([*words, "--resume"]) == 2
    error = capsys.readouterr().err
    assert "no loss named 'PegLoss'" in error
    assert error.splitlines()[-1] == told
    assert main(words) == 2
    assert told not in capsys.readouterr().err
    (run_dir / "plugins.json").write_text("[7]")
    assert main([*words, "--resume"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
