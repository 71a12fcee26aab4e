"""The claim: an author of an outside package writes one line and gets a readable result for each promise; and
a pytest that has no contract to test pays nothing for the plugin."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pegboard.testing import checks_for

NUM_CHECKS = len(checks_for("dataset"))
NUM_NOT_TRIED = 5
"""Checks that want an option, and the one that the test below leaves out."""
ROOT = Path(__file__).resolve().parents[3]
DATASET = '''
import pegboard


class Greetings(pegboard.DatasetComponent):
    """Two greetings."""

    config: pegboard.DatasetComponent.Config

    def build(self, name):
        return Lines(name)


class Lines:
    def __init__(self, name):
        self.name = name

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"text": ("hello", "good morning")[index]}

    def key(self, index):
        return pegboard.SampleKey(self.name, "memory", index + FIRST)

    def fingerprint(self):
        return "greetings"


@pegboard.hookimpl
def register_datasets(register):
    register(Greetings)
'''
TEST = """
from greetings import Greetings
from pegboard.testing import contract_for

test_contract = contract_for(Greetings, skip={"pickles_into_a_new_process": "tried elsewhere"})
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of installed packages: Pegboard's entry points, and an outside package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    points = project["entry-points"]["pytest11"]
    folder = tmp_path / "site"
    _install(folder, "pegboard", {"pytest11": points})
    _install(folder, "peg-greetings", {"pegboard": {"greetings": "greetings"}})
    return folder


def _install(folder: Path, name: str, groups: dict[str, dict[str, str]]) -> None:
    info = folder / f"{name.replace('-', '_')}-0.0.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0.0\n")
    lines = [
        line
        for group, points in groups.items()
        for line in (f"[{group}]", *(f"{key} = {value}" for key, value in points.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def _pytest(site: Path, tests: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (site, ROOT / "core", ROOT / "plugins")))
    command = [sys.executable, "-m", "pytest", "--strict-markers", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, "--rootdir", str(tests), *words, str(tests)],
        env={**os.environ, "PYTHONPATH": path, "PYTEST_ADDOPTS": ""},
        cwd=tests,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_sound_part_of_an_outside_package_keeps_every_promise(site: Path, tmp_path: Path) -> None:
    (site / "greetings.py").write_text(DATASET.replace("FIRST", "1"))
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_greetings.py").write_text(TEST)
    done = _pytest(site, tests, "-v")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_greetings.py::test_contract[keys_say_where] PASSED" in done.stdout
    summary = done.stdout.partition(" contracts of parts ")[2]
    assert (
        f"Greetings (dataset): {NUM_CHECKS - NUM_NOT_TRIED} kept, {NUM_NOT_TRIED} not tried"
    ) in summary
    assert "not tried: pickles_into_a_new_process: tried elsewhere" in summary
    assert "not tried: a_bad_record_is_named: no option `bad_config`" in summary


def test_a_broken_promise_is_named_with_the_values_that_broke_it(
    site: Path, tmp_path: Path
) -> None:
    (site / "greetings.py").write_text(DATASET.replace("FIRST", "0"))
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_greetings.py").write_text(TEST)
    done = _pytest(site, tests)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "E   " in done.stdout and "key().line is 0; lines count from 1" in done.stdout
    # What pytest's rewriting of the check adds:
    assert "where 0 = SampleKey(source='some name', file='memory', line=0, part=0).line" in (
        done.stdout
    )
    assert "check.run(Case(" not in done.stdout, "the kit's own frame is shown"
    assert (
        f"Greetings (dataset): {NUM_CHECKS - NUM_NOT_TRIED - 1} kept, 1 broken, {NUM_NOT_TRIED} not"
    ) in done.stdout
    assert "broken: keys_say_where" in done.stdout


def test_contract_tests_can_be_picked_and_left_out_by_their_mark(
    site: Path, tmp_path: Path
) -> None:
    (site / "greetings.py").write_text(DATASET.replace("FIRST", "1"))
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_greetings.py").write_text(TEST + "\ndef test_other():\n    pass\n")
    assert f"1 passed, {NUM_CHECKS} deselected" in _pytest(site, tests, "-m", "not contract").stdout
    assert "1 deselected" in _pytest(site, tests, "-m", "contract").stdout


def test_a_pytest_without_contracts_imports_neither_pegboard_nor_torch(
    site: Path, tmp_path: Path
) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_light.py").write_text(
        "import sys\n\n"
        "def test_light(pytestconfig):\n"
        "    assert pytestconfig.pluginmanager.hasplugin('pegboard')\n"
        "    heavy = {'pegboard', 'pydantic', 'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
        "    assert not heavy, heavy\n"
    )
    done = _pytest(site, tests)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "contracts of parts" not in done.stdout


def test_contract_tests_of_another_project_are_its_own(site: Path, tmp_path: Path) -> None:
    """Pegboard is only installed there: neither the mark's arguments nor `check` are what ours are."""
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_pact.py").write_text(
        "import enum\nimport pytest\n\n"
        "Broker = enum.Enum('Broker', ['LOCAL'])\n\n"
        "@pytest.mark.contract\n"
        "@pytest.mark.parametrize('check', ['status', Broker.LOCAL])\n"
        "def test_pact(check):\n    pass\n\n"
        "@pytest.mark.contract('provider', 'consumer')\n"
        "@pytest.mark.parametrize('check', ['status', Broker.LOCAL])\n"
        "def test_pair(check):\n    pass\n"
    )
    done = _pytest(site, tests)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout and "contracts of parts" not in done.stdout
