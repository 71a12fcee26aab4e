"""The claim: `pegboard new plugin NAME --kind KIND` writes a package that works as it is, for every kind that there
is; and a name, kind or folder that won't do is said in one line, with nothing written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pegboard.cli import main
from pegboard.errors import ConfigError
from pegboard.plugin_manager import load_plugins
from pegboard.registry import HOOKS
from pegboard.testing import checks_for
from pegboard_plugins.new.names import PackageNames, names_for
from pegboard_plugins.new.package import render_package, template_kinds, write_package

ROOT = Path(__file__).resolve().parents[3]
KINDS = sorted(HOOKS)


def generate(kind: str, parent: Path) -> tuple[Path, PackageNames]:
    """A package as if it were installed in place: its `src` also holds what an installer writes."""
    name = f"pegboard-try-{kind.replace('_', '-')}"
    write_package(name, kind, parent)
    names = names_for(name, kind)
    install(parent / name / "src", name, f"[pegboard]\n{names.package} = {names.package}\n")
    return parent / name, names


def install(folder: Path, name: str, entry_points: str) -> None:
    info = folder / f"{name.replace('-', '_')}-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(entry_points)


def test_every_kind_has_a_template_and_a_contract() -> None:
    assert template_kinds() == set(HOOKS), (
        "plugins/pegboard_plugins/new/templates/ has a folder for each kind"
    )
    for kind in HOOKS:
        assert checks_for(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_generated_part_is_found_and_its_example_is_valid(
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, names = generate(kind, tmp_path)
    monkeypatch.syspath_prepend(str(folder / "src"))
    plugins = load_plugins()
    [record] = [one for one in plugins.plugins if one.name == names.distribution]
    assert record.status == "loaded", record.reason
    [entry] = [one for one in plugins.registry.entries() if one.plugin == names.distribution]
    assert (entry.kind, entry.class_name) == (kind, names.part_name)
    monkeypatch.chdir(folder)
    assert main(["check", "example/run.json"]) == 0, capsys.readouterr().err
    for name in [name for name in sys.modules if name.split(".")[0] == names.package]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_template_is_left_and_every_file_says_what_it_is(
    kind: str, tmp_path: Path
) -> None:
    files = render_package(names_for("pegboard-rivers", kind))
    assert {"pyproject.toml", "README.md", ".gitignore", ".github/workflows/tests.yml"} <= set(
        files
    )
    left = re.compile(
        r"[A-Z]+_(NAME|CLASS|WORDS?)\b|\b(HOOK|KIND|ABOUT|EXAMPLE|COMMANDS)\b|\.template"
    )
    for place, text in files.items():
        assert not left.search(place + text), f"{place}: {left.search(place + text)}"
        assert text.isascii(), place
        if place.endswith(".py"):
            compile(text, place, "exec")
            assert text.startswith('"""'), f"{place} has no docstring"


def test_generated_code_keeps_to_its_own_lint(tmp_path: Path) -> None:
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.exists():
        pytest.skip("ruff is not installed")
    for kind in KINDS:
        for stem in ("pegboard-rivers", "r"):
            write_package(f"{stem}-{kind.replace('_', '-')}", kind, tmp_path)
    for words in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [ruff, *words, "--no-cache", "."],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "kind", "package", "part"),
    [
        ("pegboard-rivers", "dataset", "pegboard_rivers", "RiversDataset"),
        ("pegboard-rivers-dataset", "dataset", "pegboard_rivers_dataset", "RiversDataset"),
        ("Rivers.of_Europe", "loss", "rivers_of_europe", "RiversOfEuropeLoss"),
        ("pegboard-warm", "lr_schedule", "pegboard_warm", "WarmLRSchedule"),
        ("dataset", "dataset", "dataset", "DatasetDataset"),
        ("pegboard-count", "command", "pegboard_count", "CountCommand"),
        ("pegboard-3d", "model", "pegboard_3d", "_3dModel"),
    ],
)
def test_names_follow_from_the_name_and_the_kind(
    name: str, kind: str, package: str, part: str
) -> None:
    names = names_for(name, kind)
    assert (names.package, names.part_class) == (package, part)
    assert names.part_class.isidentifier()


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("pegboard rivers", "dataset", "'pegboard rivers' can't be the name of a distribution"),
        ("-rivers", "dataset", "'-rivers' can't be the name of a distribution"),
        ("../rivers", "dataset", "'../rivers' can't be the name of a distribution"),
        ("", "dataset", "'' can't be the name of a distribution"),
        ("7rivers", "dataset", "imported as '7rivers', which Python can't"),
        ("class", "dataset", "imported as 'class', which Python can't"),
        ("json", "dataset", "imported as 'json', which is taken by Python itself"),
        ("Torch", "dataset", "imported as 'torch', which is taken by .*torch"),
        ("pegboard", "dataset", "imported as 'pegboard', which is taken by"),
        ("pegboard-train", "command", "command called 'train', which is one of the core's"),
        ("pegboard-3d", "command", "command called '3d'; take a name that begins with a letter"),
        ("pegboard-jsonl", "dataset", "its dataset 'JsonlDataset', which plugin 'jsonl' offers"),
        ("checkpoint", "saver", "its saver 'CheckpointSaver', which plugin 'savers' offers"),
        ("pegboard-byte", "tokenizer", "'ByteTokenizer', which plugin 'tokenizers' offers"),
        ("pegboard-preview", "command", "its command 'preview', which plugin 'preview' offers"),
        ("rivers", "datasets", "no kind named 'datasets'. Did you mean 'dataset'"),
        ("rivers", "tokenise-fn", "no kind named 'tokenise-fn'. Did you mean 'tokenize_fn'"),
        ("rivers", "zebra", "no kind named 'zebra'. Kinds: model, dataset"),
    ],
)
def test_a_name_or_kind_that_won_t_do_is_one_line_and_nothing_is_written(
    name: str, kind: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["new", "plugin", f"--kind={kind}", f"--folder={tmp_path}", "--no-third-party"]
    assert main([*words, "--", name]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1, said
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "rivers").mkdir()
    (tmp_path / "rivers" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="rivers: is there already, and nothing in it is touched"):
        write_package("rivers", "dataset", tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["rivers", "mine.txt"]
    with pytest.raises(ConfigError, match="--folder: no folder '.*nowhere'"):
        write_package("rivers", "dataset", tmp_path / "nowhere")


def test_a_failure_half_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text, written = Path.write_text, list[Path]()

    def full(self: Path, *words: str, **more: str) -> int:
        written.append(self)
        if len(written) > 3:
            raise OSError(28, "No space left on device", str(self))
        return write_text(self, *words, **more)

    monkeypatch.setattr(Path, "write_text", full)
    words = ["new", "plugin", "rivers", "--kind", "loss", "--folder", str(tmp_path)]
    assert main([*words, "--no-third-party"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_it_says_what_to_do_next_and_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pegboard.cli import main\n"
        "words = ['new', 'plugin', 'pegboard-rivers', '--kind', 'dataset', '--no-third-party']\n"
        "assert main(words) == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    path = os.pathsep.join(map(str, (ROOT / "core", ROOT / "plugins")))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, *steps = done.stdout.splitlines()
    count = len([path for path in (tmp_path / "pegboard-rivers").rglob("*") if path.is_file()])
    assert first == f"wrote pegboard-rivers: a dataset, RiversDataset, in {count} files. Next:"
    assert [step.strip() for step in steps] == [
        "cd pegboard-rivers",
        'pip install -e ".[dev]"',
        "pytest",
        "pegboard check example/run.json",
        "pegboard train example/run.json",
    ]


@pytest.mark.slow
def test_the_generated_tests_of_every_kind_pass(tmp_path: Path) -> None:
    made = [generate(kind, tmp_path)[0] for kind in KINDS]
    site = tmp_path / "site"
    install(site, "pegboard", "[pytest11]\npegboard = pegboard_plugins.pytest_contracts\n")
    path = [*(folder / "src" for folder in made), site, ROOT / "core", ROOT / "plugins"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--strict-markers"),
            *("--import-mode=importlib", f"--rootdir={tmp_path}"),
            # That the examples train is tried where the wheel is.
            *("-k", "not trains", *(str(folder / "tests") for folder in made)),
        ],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "OMP_NUM_THREADS": "1",
            "PYTEST_ADDOPTS": "",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    summary = done.stdout.partition(" contracts of parts ")[2]
    for kind in KINDS:
        part = names_for(f"pegboard-try-{kind.replace('_', '-')}", kind).part_class
        [line] = re.findall(rf"^{part} \(.*", summary, re.MULTILINE)
        assert "broken" not in line, line
    wanting = {found for found in re.findall(r"no option `(\w+)`", summary)}
    assert wanting <= {"make_batch", "publish", "reference_gradients"}, summary


@pytest.mark.slow
def test_the_generated_code_of_every_kind_is_typed(tmp_path: Path) -> None:
    mypy = Path(sys.executable).with_name("mypy")
    if not mypy.exists():
        pytest.skip("mypy is not installed")
    made = [generate(kind, tmp_path) for kind in KINDS]
    path = [*(folder / "src" for folder, _ in made), ROOT / "core", ROOT / "plugins"]
    done = subprocess.run(
        [mypy, "--strict", *(word for _, names in made for word in ("-p", names.package))],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": os.pathsep.join(map(str, path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
