"""Wheel and sdist of a clean clone are whole: with only the wheel, in an environment of its own, everything works.

The environment sees the third-party packages of the one that runs the tests, and nothing of the checkout.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from pegboard.component import COMPONENT_KINDS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path.parent.name for path in ROOT.glob("docs/examples/pegboard-*/pyproject.toml"))


class Installed:
    """A fresh environment with the wheel, and a working folder outside the checkout."""

    def __init__(self, clone: Path, wheel: Path, folder: Path) -> None:
        self.clone, self.folder, self.python = clone, folder, folder / "venv" / "bin" / "python"
        call(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
        self.add(wheel)
        heavy = [entry for entry in sys.path if Path(entry).name == "site-packages"]
        (self.site / "heavy.pth").write_text("".join(f"{entry}\n" for entry in heavy))

    @property
    def site(self) -> Path:
        (site,) = (self.folder / "venv" / "lib").glob("python3*/site-packages")
        return site

    def add(self, wheel: Path) -> None:
        pip = (sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet")
        call(*pip, "--no-deps", "--no-index", "--force-reinstall", wheel)

    def pegboard(self, *words: str | Path) -> str:
        return call(self.folder / "venv" / "bin" / "pegboard", *words, folder=self.folder)

    def tests_of(self, package: Path) -> None:
        """The package's own tests, as its author runs them."""
        call(self.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", folder=package)


def call(*words: str | Path, folder: Path | None = None) -> str:
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        env={**kept, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{words}: {done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def built(source: Path, target: str, folder: Path) -> Path:
    """The sdist or wheel that hatchling makes of a folder."""
    pytest.importorskip("hatchling", reason="hatchling is in the extra `dev`")
    call(sys.executable, "-m", "hatchling", "build", "-t", target, "-d", folder, folder=source)
    (found,) = folder.iterdir()
    return found


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout: nothing to clone")
    folder = tmp_path_factory.mktemp("clone") / "source"
    call("git", "clone", "--quiet", ROOT, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(clone, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(clone: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(clone, wheel, tmp_path_factory.mktemp("installed"))


def test_the_wheel_holds_every_module_and_config_and_nothing_else(clone: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    tracked = call("git", "ls-files", folder=clone).splitlines()
    roots = {"core/pegboard/": "pegboard/", "plugins/pegboard_plugins/": "pegboard_plugins/"}
    roots["configs/"] = "pegboard/configs/"
    expected = {
        target + path.removeprefix(source)
        for path in tracked
        for source, target in roots.items()
        if path.startswith(source)
    }
    assert names == expected


def test_the_sdist_makes_the_same_wheel(clone: Path, wheel: Path, tmp_path: Path) -> None:
    sdist = built(clone, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    again = built(source, "wheel", tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert {i.filename: i.CRC for i in one.infolist()} == {
            i.filename: i.CRC for i in other.infolist()
        }
    for name in ("README.md", "LICENSE", "CHANGELOG.md", "docs/index.md", "tests/end_to_end"):
        assert (source / name).exists(), name


def test_the_code_is_the_wheels(installed: Installed) -> None:
    where = "import pegboard, pegboard_plugins; print(pegboard.__file__, pegboard_plugins.__file__)"
    files = call(installed.python, "-c", where, folder=installed.folder).split()
    assert [Path(file).parent for file in files] == [
        installed.site / "pegboard",
        installed.site / "pegboard_plugins",
    ]


def test_plugins_and_schema_are_those_of_the_checkout(installed: Installed) -> None:
    schema = json.loads(installed.pegboard("schema", "--no-third-party"))
    written = installed.clone / "configs" / "run_config.schema.json"
    assert schema == json.loads(written.read_text(encoding="utf-8"))
    listed = installed.pegboard("plugins", "--no-third-party")
    for name in ("Qwen3", "InternS1", "JsonlDataset", "ChunkedCrossEntropy", "HFSaver"):
        assert name in listed


def test_shipped_configs_are_checked_and_train(installed: Installed) -> None:
    shutil.copytree(installed.site / "pegboard" / "configs", installed.folder / "configs")
    for config in ("quickstart", "tiny/qwen3", "tiny/qwen3_moe"):
        installed.pegboard("check", f"configs/{config}.json")
    tiny = ("total_steps=3", "run_name=wheel", "model.num_hidden_layers=1", "log_every_steps=1")
    words = [word for item in tiny for word in ("--set", item)]
    installed.pegboard("train", "configs/quickstart.json", *words)
    run = installed.folder / "work_dirs" / "wheel"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert list(run.rglob("*.safetensors"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_package_works_with_the_wheel(
    name: str, installed: Installed, tmp_path: Path
) -> None:
    package = tmp_path / name
    shutil.copytree(installed.clone / "docs" / "examples" / name, package)
    installed.add(built(package, "wheel", tmp_path / "wheel"))
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pegboard"]
    assert project["name"] in installed.pegboard("plugins")
    installed.tests_of(package)


@pytest.mark.parametrize("kind", [*COMPONENT_KINDS, "command"])
def test_a_generated_plugin_works_with_the_wheel(
    kind: str, installed: Installed, tmp_path: Path
) -> None:
    if not (ROOT / "plugins" / "pegboard_plugins" / "new").is_dir():
        pytest.skip("there is no command `new` yet")
    name = f"my-{kind.replace('_', '-')}"
    new = (installed.folder / "venv" / "bin" / "pegboard", "new", "plugin", name, "--kind", kind)
    call(*new, folder=tmp_path)
    installed.add(built(tmp_path / name, "wheel", tmp_path / "wheel"))
    assert name in installed.pegboard("plugins")
    installed.tests_of(tmp_path / name)
