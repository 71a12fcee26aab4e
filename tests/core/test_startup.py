"""With 500 distributions and 10 plugins installed, commands stay light and quick."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pegboard.plugin_sources import distributions_with

ROOT = Path(__file__).resolve().parents[2]
PROBE = """
import contextlib, io, json, sys
from pegboard.cli import main
output = io.StringIO()
with contextlib.redirect_stdout(output):
    code = main(sys.argv[1:])
heavy = sorted({"torch", "transformers", "numpy"} & sys.modules.keys())
print(json.dumps([code, heavy, "Loss499" in output.getvalue()]))
"""


def _bench() -> ModuleType:
    path = ROOT / "tests" / "benchmarks" / "bench_startup.py"
    spec = importlib.util.spec_from_file_location("bench_startup", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench() -> Any:
    return _bench()


@pytest.fixture(scope="module")
def full_site(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    site: Path = bench.make_site(tmp_path_factory.mktemp("full") / "site", 500, 10)
    return site


@pytest.mark.parametrize("command", ["--help", "plugins", "check", "schema"])
def test_no_command_imports_anything_heavy_and_all_see_the_plugins(
    command: str, bench: Any, full_site: Path
) -> None:
    words = bench.COMMANDS[command][2:]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *words],
        env=bench.environment(full_site),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    code, heavy, lists_the_last = json.loads(done.stdout)
    assert (code, heavy) == (0, [])
    assert lists_the_last == (command in ("plugins", "schema"))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["--help", "plugins", "check", "schema"])
def test_each_command_takes_less_than_0_6_s_of_cpu(
    command: str, bench: Any, full_site: Path
) -> None:
    # The least of a few: what other work on the machine adds is not ours.
    words = bench.COMMANDS[command]
    assert min(bench.cpu_seconds(words, full_site) for _ in range(4)) < bench.LIMIT_S


def test_the_scan_finds_what_importlib_finds(
    full_site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(full_site)])
    found = {
        (d.metadata["Name"], p.name, p.value)
        for d in distributions_with("pegboard")
        for p in d.entry_points.select(group="pegboard")
    }
    expected = {
        (p.dist.metadata["Name"], p.name, p.value)
        for p in metadata.entry_points(group="pegboard")
        if p.dist is not None
    }
    assert found == expected
    assert len(found) >= 10


def test_the_first_of_two_distributions_of_one_name_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, version, group in (("a", "2.0", "other"), ("b", "1.0", "pegboard")):
        info = tmp_path / folder / f"peg_twice-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: peg-twice\nVersion: {version}\n"
        )
        (info / "entry_points.txt").write_text(f"[{group}]\np = peg_twice\n")
    names = []
    for order in ("ab", "ba"):
        monkeypatch.setattr(sys, "path", [*(str(tmp_path / f) for f in order), *sys.path])
        names.append(
            [
                d.version
                for d in distributions_with("pegboard")
                if d.metadata["Name"] == "peg-twice" and d.entry_points.select(group="pegboard")
            ]
        )
    # The newer one, which is first on the path, has no plugin any more: none is found.
    assert names == [[], ["1.0"]]
