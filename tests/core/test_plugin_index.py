"""A missing name is told with the package that offers it, and no index is imported or obeyed blindly."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pegboard.cli import main
from pegboard.errors import ConfigError
from pegboard.plugin_index import PluginIndex, read_index
from pegboard.plugin_manager import load_plugins
from pegboard.registry import HOOKS

Install = Callable[..., Path]
OWN = Path(__file__).resolve().parents[2] / "core" / "pegboard" / "known_plugins.json"
INDEX = {
    "packages": [
        {
            "name": "peg-more",
            "install": "pip install peg-more",
            "parts": {"loss": ["PegMore"], "command": ["peg-more"]},
        }
    ]
}
POINTS = "[pegboard.index]\npeg = peg_index:index.json\n"
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


def _missing(kind: str, name: str, **options: object) -> str:
    with pytest.raises(ConfigError) as raised:
        load_plugins(**options).registry.find(kind, name)  # type: ignore[arg-type]
    return str(raised.value)


def test_a_missing_name_is_told_with_the_package_that_offers_it() -> None:
    assert _missing("model", "Llama", third_party=False).startswith(
        "no model named 'Llama'. pegboard-llama offers it: pip install"
    )


def test_the_projects_index_is_whole_and_names_kinds_that_there_are() -> None:
    packages = read_index(OWN)
    assert len(packages) == len(json.loads(OWN.read_text())["packages"]) > 0
    for package in packages:
        assert package.parts
        assert set(package.parts) <= {*HOOKS, "model_type", "preset"}
        assert all(package.parts.values())


def test_a_missing_preset_or_model_type_is_told_with_its_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(Path(__file__).resolve().parents[2] / "configs" / "quickstart.json")
    published = tmp_path / "published"
    published.mkdir()
    (published / "config.json").write_text('{"model_type": "llama"}')
    for name, fields, words in (
        ("preset", {"model": {"preset": "smollm2-135m"}}, "no model preset named 'smollm2-135m'."),
        ("type", {"load_from": str(published)}, "no installed model reads model_type"),
    ):
        config = tmp_path / f"{name}.json"
        data = json.loads(Path(base).read_text())
        del data["model"]
        config.write_text(json.dumps({**data, **fields}))
        assert main(["check", str(config), "--no-third-party"]) == 2
        [line] = [row for row in capsys.readouterr().err.splitlines() if words in row]
        assert ". pegboard-llama offers it: pip install" in line


def test_a_name_that_no_index_has_gets_no_package() -> None:
    assert "offers it" not in _missing("model", "Lama", third_party=False)
    assert "offers it" not in _missing("loss", "Llama", third_party=False)


def test_an_installed_package_adds_an_index_that_is_read_without_importing_it(
    install: Install,
) -> None:
    install("peg-index", "1 / 0", points=POINTS, index__json=json.dumps(INDEX))
    assert _missing("loss", "PegMore") == (
        "no loss named 'PegMore'. peg-more offers it (says the index of 'peg-index'): "
        "pip install peg-more."
    )
    assert "peg_index" not in sys.modules
    assert "offers it" not in _missing("loss", "PegMore", third_party=False)


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("no json", POINTS),
        ("[]", POINTS),
        (json.dumps({"packages": [7, {"name": "x"}, {"name": 3, "parts": {}}]}), POINTS),
        (json.dumps(INDEX).replace("pip install", "\\u001b[2Jpip install"), POINTS),
        (json.dumps(INDEX), POINTS.replace("index.json", "other.json")),
        (json.dumps(INDEX), POINTS.replace("peg_index:", "peg_index.inner:")),
        (json.dumps(INDEX), POINTS.replace("peg_index:", "no_such_package_x:")),
        (json.dumps(INDEX), "[pegboard.index]\nno equals sign\n"),
    ],
)
def test_an_index_that_cannot_be_read_or_is_junk_says_nothing(
    text: str, points: str, install: Install
) -> None:
    install("peg-index", "", points=points, index__json=text)
    assert "offers it" not in _missing("loss", "PegMore")


def test_a_package_that_is_installed_and_left_out_is_not_to_be_installed_again(
    install: Install,
) -> None:
    install("peg-index", "", points=POINTS, index__json=json.dumps(INDEX))
    install("peg-more", SOUND.replace("PegLoss", "PegMore"))
    assert load_plugins().registry.find("loss", "PegMore")
    assert "'peg-more' offers it, and is blocked." in _missing(
        "loss", "PegMore", block=["peg-more"]
    )
    assert "'peg-more' offers it, and is not allowed." in _missing("loss", "PegMore", allow=[])


def test_a_broken_package_is_told_as_broken_not_as_missing(install: Install) -> None:
    install("peg-index", "", points=POINTS, index__json=json.dumps(INDEX))
    file = install("peg-more", "1 / 0")
    message = _missing("loss", "PegMore")
    assert f"could not be loaded: {file}:1: ZeroDivisionError" in message
    assert "pip install" not in message


def test_no_third_party_is_named_as_the_cause_where_the_package_is_installed(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("pegboard-llama", "", points="[other]\na = b\n")
    index = PluginIndex(third_party=False)
    hint = "'pegboard-llama' offers it, and --no-third-party leaves it out."
    assert index.hint("model", "Llama", {}) == hint


def test_a_missing_command_is_told_with_its_package(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("peg-index", "", points=POINTS, index__json=json.dumps(INDEX))
    assert main(["peg-more"]) == 2
    assert "there is no command 'peg-more'. peg-more offers it" in capsys.readouterr().err
    assert main(["peg-less"]) == 2
    assert "usage: pegboard" in capsys.readouterr().err
    assert main(["prepare", "x.json", "--block", "prepare"]) == 2
    assert "no command 'prepare'. It may be in plugin 'prepare', which is blocked." in (
        capsys.readouterr().err
    )
