"""What a config allows and requires holds before any third-party plugin is imported."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pegboard.cli import main
from pegboard.plugin_manager import load_plugins
from pegboard.plugin_policy import read_allowed, read_allowed_of_words

Install = Callable[..., Path]
QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.json"
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


def _config(folder: Path, name: str = "config.json", **sections: Any) -> str:
    path = folder / name
    path.write_text(json.dumps({"extends": str(QUICKSTART), **sections}, indent=1))
    return str(path)


@pytest.mark.parametrize("allow", [[], ["other"], "peg-one", [7], {"peg-one": True}])
def test_what_is_not_allowed_is_never_imported(
    allow: Any, install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install("peg-one", SOUND)
    config = _config(tmp_path, plugins={"allow": allow})
    sound = isinstance(allow, list) and 7 not in allow
    assert main(["check", config]) == (0 if sound else 2)
    assert "peg_one" not in sys.modules
    if not sound:  # none is allowed, and validation says what is wrong with it
        assert f": plugins.allow{'[0]' if allow == [7] else ''}: expected a" in (
            capsys.readouterr().err
        )


@pytest.mark.parametrize("plugins", [{"allow": ["Peg_One"]}, {"allow": None}, {}])
def test_what_is_allowed_is_loaded(plugins: Any, install: Install, tmp_path: Path) -> None:
    install("peg-one", SOUND)
    config = _config(tmp_path, plugins=plugins, loss={"class_name": "PegLoss"})
    assert main(["check", config]) == 0


def test_an_override_and_a_base_config_may_say_what_is_allowed(
    install: Install, tmp_path: Path
) -> None:
    install("peg-one", SOUND)
    base = _config(tmp_path, "base.json", plugins={"allow": []})
    config = tmp_path / "top.json"
    config.write_text(json.dumps({"extends": base}))
    assert main(["check", str(config)]) == 0
    assert main(["check", str(QUICKSTART), "--set", "plugins.allow=[]"]) == 0
    assert "peg_one" not in sys.modules
    assert main(["check", str(config), "--set", 'plugins.allow=["peg-one"]']) == 0
    assert "peg_one" in sys.modules


def test_a_part_that_is_not_allowed_is_told_so_where_it_is_named(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install("peg-one", SOUND)
    config = _config(tmp_path, plugins={"allow": ["peg-won"]}, loss={"class_name": "PegLoss"})
    assert main(["check", config]) == 2
    error = capsys.readouterr().err
    assert "It may be in plugin 'peg-one', which is not allowed." in error
    assert (
        "plugins.allow: no distribution 'peg-won' offers a plugin here. Did you mean 'peg-one'?"
        in (error)
    )


def test_files_and_built_ins_need_no_leave(tmp_path: Path, site: Path) -> None:
    file = site / "peg_file.py"
    file.write_text(SOUND)
    config = _config(tmp_path, plugins={"allow": []}, loss={"class_name": "PegLoss"})
    assert main(["check", config, "--plugin", str(file)]) == 0


def test_commands_of_plugins_keep_to_the_config_too(install: Install, tmp_path: Path) -> None:
    install("peg-one", SOUND)
    config = _config(tmp_path, plugins={"allow": []}, datasets=[])
    assert main(["prepare", config]) == 2
    assert "peg_one" not in sys.modules


def test_a_config_that_the_command_line_does_not_show_is_refused_after_the_fact(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install("peg-one", SOUND)
    config = _config(tmp_path, "config.jsonc", plugins={"allow": []})
    assert main(["prepare", config]) == 2
    assert "plugins.allow does not name 'peg-one', which was imported before" in (
        capsys.readouterr().err
    )


def test_several_configs_on_a_command_line_allow_what_all_of_them_do(tmp_path: Path) -> None:
    one = _config(tmp_path, "one.json", plugins={"allow": ["a", "B_b"]})
    two = _config(tmp_path, "two.json", plugins={"allow": ["b.b", "c"]})
    free = _config(tmp_path, "free.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert read_allowed_of_words(["x", one, two, free, str(broken)], ()) == ("B_b",)
    assert read_allowed_of_words([free, "no.json"], ()) is None
    assert read_allowed(free) is None


def test_a_config_that_is_no_json_imports_no_third_party(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install("peg-one", SOUND)
    config = tmp_path / "config.json"
    config.write_text('{"plugins": {"allow": [],}}')
    assert main(["check", str(config)]) == 2
    assert f"{config}:1:" in capsys.readouterr().err
    assert "peg_one" not in sys.modules


NO_CONFIGS = {
    "a comma too many": b'{"plugins": {"allow": []},}',
    "a base that is not there": b'{"extends": "gone.json"}',
    "an escaped key": b'{"plug\\u0069ns": {"allow": []},}',
    "no quotes": b"{plugins: {allow: []}}",
    "an open quote": b'{"plugins: {"allow": []}}',
    "not UTF-8": '{"plugins": {"allow": []}}'.encode("utf-16"),
}


@pytest.mark.parametrize("case", NO_CONFIGS)
def test_a_plugins_command_imports_no_third_party_for_a_config_that_cannot_be_read(
    case: str, install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install("peg-one", SOUND)
    config = tmp_path / "config.json"
    config.write_bytes(NO_CONFIGS[case])
    assert main(["preview", str(config)]) == 2
    assert str(config) in capsys.readouterr().err
    assert "peg_one" not in sys.modules


def test_a_wrong_override_of_what_is_allowed_allows_none(install: Install, tmp_path: Path) -> None:
    install("peg-one", SOUND)
    config = tmp_path / "config.json"
    config.write_text("{}")
    assert main(["preview", str(config), "--set", "plugins.allow=["]) == 2
    assert "peg_one" not in sys.modules


def test_a_json_file_that_is_no_config_says_nothing_of_plugins(tmp_path: Path) -> None:
    records = tmp_path / "records.json"
    records.write_text('[{"text": "it extends what the plugins do, \\u00e9"}]')
    assert read_allowed_of_words([str(records)], ()) is None


UNMET = {
    "peg-none>=1": "'peg-none>=1' is not installed; install it if you trust who publishes that name",
    "pegboard-sqlite>=99": "'pegboard-sqlite>=99' is not installed; pip install ./docs/examples",
    "peg_one>=1.3": "'peg_one>=1.3', but peg_one 1.2 is installed; install a version that fits",
    "peg-one !": "'peg-one !' is no requirement",
    "peg-one @ https://example.org/x.whl": "write a name and versions only, such as",
    "peg-one; python_version > '3'": "write a name and versions only, such as",
    "peg-one[extra]": "write a name and versions only, such as",
    "peg-odd>1": "'peg-odd>1', but peg-odd one is installed; install a version that fits",
    "peg-broken": "'peg-broken' is installed, but plugin 'peg-broken' could not be loaded",
}


@pytest.mark.parametrize("requirement", UNMET)
def test_a_requirement_that_is_not_met_is_an_error_with_its_line(
    requirement: str, install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install("peg-one", SOUND)
    install("peg-odd", SOUND, version="one")
    install("peg-broken", "1 / 0")
    config = tmp_path / "config.json"
    config.write_text(
        f'{{"extends": "{QUICKSTART}",\n"requires": ["torch",\n  {json.dumps(requirement)}]}}'
    )
    assert main(["check", str(config)]) == 2
    [line] = [row for row in capsys.readouterr().err.splitlines() if "requires" in row]
    assert line.startswith(f"{config}:3:3: requires[1]: ")
    assert UNMET[requirement] in line


@pytest.mark.parametrize("metadata", ["Name: peg-one\n", "Name: peg-one\nAuthor: J\xf6rg\n"])
@pytest.mark.parametrize("requirement", ["peg-one", "peg-one>=1"])
def test_an_installed_version_that_cannot_be_read_is_said(
    requirement: str,
    metadata: str,
    install: Install,
    site: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install("peg-one", SOUND)
    (site / "peg_one-1.2.dist-info" / "METADATA").write_text(metadata, encoding="latin-1")
    assert main(["check", _config(tmp_path, requires=[requirement])]) == 2
    said = f"'{requirement}': the version of the installed peg-one can't be read; install it anew"
    assert said in capsys.readouterr().err


def test_a_requirement_that_is_met_is_no_problem(install: Install, tmp_path: Path) -> None:
    install("peg-one", SOUND, version="1.2rc1")
    config = _config(tmp_path, requires=["peg-one>=1.1", "Peg.One==1.2rc1", "torch"])
    assert main(["check", config]) == 0


def test_a_plugin_that_is_blocked_does_not_meet_a_requirement(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install("peg-one", SOUND)
    config = _config(tmp_path, requires=["peg-one"])
    assert main(["check", config, "--block", "peg-one"]) == 2
    assert "'peg-one' is installed, but plugin 'peg-one' is blocked" in capsys.readouterr().err


def test_blocked_and_not_allowed_plugins_are_listed_unimported(install: Install) -> None:
    install("peg-one", SOUND)
    [record] = [r for r in load_plugins(allow=["x"]).plugins if r.name == "peg-one"]
    assert (record.status, record.home) == ("not allowed", "")
    assert '"plugins.allow"' in record.reason


@pytest.mark.parametrize(
    "name", ["peg_evil.Evil", "peg_evil:Evil", "peg_evil", "../site/peg_evil.py"]
)
@pytest.mark.parametrize("key", ["class_name", "plugin", "preset", "_target_", "extends"])
def test_json_imports_nothing_whatever_it_names(
    key: str, name: str, site: Path, tmp_path: Path
) -> None:
    (site / "peg_evil.py").write_text("raise SystemExit('imported')")
    config = _config(tmp_path, model={"class_name": "Qwen3", key: name}, requires=[name])
    assert main(["check", config]) == 2
    assert "peg_evil" not in sys.modules
