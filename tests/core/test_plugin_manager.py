"""Plugins load in a fixed order, all or nothing, and a broken one never stops the rest."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pegboard import plugin_sources
from pegboard.errors import PluginError
from pegboard.plugin_manager import LoadedPlugins, PluginRecord, load_plugins

ROOT = Path(__file__).resolve().parents[2]

SOUND = '''
import pegboard

class {name}(pegboard.LossComponent):
    """A loss of {name}."""
    def build(self):
        return None

@pegboard.hookimpl
def register_losses(register):
    register({name})
'''


@pytest.fixture(autouse=True)
def _clean_imports(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a plugin file adds to the process goes with its test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("peg_"):
            del sys.modules[name]


def _write(folder: Path, stem: str, text: str) -> Path:
    path = folder / f"{stem}.py"
    path.write_text(text)
    return path


def _load_files(*files: Path, block: tuple[str, ...] = ()) -> LoadedPlugins:
    return load_plugins(files, block, third_party=False)


def _record(loaded: LoadedPlugins, name: str) -> PluginRecord:
    [record] = [record for record in loaded.plugins if record.name == name]
    return record


def test_a_plugin_file_offers_its_parts_under_its_stem(tmp_path: Path) -> None:
    file = _write(tmp_path, "peg_sound", SOUND.format(name="PegLoss"))
    loaded = _load_files(file)
    assert _record(loaded, "peg_sound") == PluginRecord(
        "peg_sound", f"file {file}", "", "loaded", "", str(file.resolve())
    )
    assert loaded.registry.plugin_of("loss", "PegLoss") == "peg_sound"
    assert loaded.warnings == ()


def test_built_ins_come_first_by_name_then_files_as_given(tmp_path: Path) -> None:
    late = _write(tmp_path, "peg_a", SOUND.format(name="PegA"))
    early = _write(tmp_path, "peg_z", SOUND.format(name="PegZ"))
    records = _load_files(early, late).plugins
    built_ins = [record.name for record in records if record.origin == "built-in"]
    assert built_ins == sorted(built_ins)
    assert [record.name for record in records] == [*built_ins, "peg_z", "peg_a"]


def test_a_library_without_hookimpls_is_no_plugin_and_is_not_imported() -> None:
    code = (
        "import json, sys; from pegboard.plugin_manager import load_plugins;"
        "names = [r.name for r in load_plugins(third_party=False).plugins];"
        "print(json.dumps([names, 'pegboard_plugins.blocks.attention' in sys.modules]))"
    )
    names, imported = json.loads(_python(code))
    assert not {"blocks", "texts", "media", "records"}.intersection(names)
    assert not imported


BROKEN = {
    "import_error": ("\nimport no_such_module_x\n", "peg_bad.py:2: ModuleNotFoundError: No module"),
    "syntax_error": ("\n\ndef (:\n", "peg_bad.py:3: SyntaxError"),
    "exit_at_import": ("raise SystemExit(3)", "peg_bad.py:1: SystemExit: 3"),
    "no_hooks": ("x = 1", "it has no hooks; mark its register functions with @pegboard.hookimpl"),
    "misspelt_hook": (
        SOUND.format(name="PegBad").replace("register_losses", "register_loss"),
        "peg_bad.py:9: there is no hook 'register_loss'. Did you mean 'register_losses'?",
    ),
    "wrong_argument": (
        SOUND.format(name="PegBad").replace("(register)", "(registry)"),
        "peg_bad.py:9: register_losses(registry) does not fit the hook; write def register_losses",
    ),
    "wrong_kind": (
        SOUND.format(name="PegBad").replace("register_losses", "register_packers"),
        "peg_bad.py:11: packer 'PegBad' is a LossComponent, not a PackerComponent; offer it in",
    ),
    "no_docstring": (
        SOUND.format(name="PegBad").replace('    """A loss of PegBad."""\n', ""),
        "peg_bad.py:10: loss 'PegBad' has no docstring",
    ),
    "duplicate_name": (
        SOUND.format(name="PegBad") + "    register(PegBad)\n",
        "peg_bad.py:12: loss 'PegBad' is registered twice",
    ),
    "exit_of_its_own_kind": (
        "class Stop(BaseException): pass\nraise Stop('no more')",
        "peg_bad.py:2: Stop: no more",
    ),
    "error_without_words": (
        "class Mute(Exception):\n    def __str__(self): raise ValueError\nraise Mute",
        "peg_bad.py:3: Mute: its message can't be shown",
    ),
    "exit_in_its_words": (
        "class Mute(Exception):\n    def __str__(self): raise SystemExit(0)\nraise Mute",
        "peg_bad.py:3: Mute: its message can't be shown",
    ),
    "exit_in_hook": (
        SOUND.format(name="PegBad") + "    raise SystemExit\n",
        "peg_bad.py:12: SystemExit",
    ),
    "wrapper_that_never_yields": (
        SOUND.format(name="PegBad").replace("hookimpl", "hookimpl(wrapper=True)"),
        "generator function",
    ),
    "hook_that_yields": (
        SOUND.format(name="PegBad").replace("    register(", "    yield register("),
        "peg_bad.py:9: register_losses is a generator or an async function, of which a call runs",
    ),
    "hook_that_is_awaited": (
        SOUND.format(name="PegBad").replace("def register_losses", "async def register_losses"),
        "peg_bad.py:9: register_losses is a generator or an async function, of which a call runs",
    ),
    "junk": (
        SOUND.format(name="PegBad") + "    register(42)\n",
        "peg_bad.py:12: register takes a class, not 42",
    ),
    "docstring_of_no_text": (
        SOUND.format(name="PegBad").replace("    register(", "    PegBad.__doc__ = 7; register("),
        "peg_bad.py:11: loss 'PegBad' has no docstring",
    ),
    "names_that_no_lookup_can_read": (
        SOUND.format(name="PegBad").replace("    def build", "    known_as = 7\n    def build"),
        "loss 'PegBad': known_as is 7, expected a tuple of strings",
    ),
    "crash_in_hook": (
        SOUND.format(name="PegBad") + "    1 / 0\n",
        "peg_bad.py:12: ZeroDivisionError",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_named_with_place_reason_and_remedy_and_the_rest_go_on(
    case: str, tmp_path: Path
) -> None:
    text, reason = BROKEN[case]
    bad = _write(tmp_path, "peg_bad", text)
    good = _write(tmp_path, "peg_good", SOUND.format(name="PegGood"))
    loaded = _load_files(bad, good)

    record = _record(loaded, "peg_bad")
    assert record.status == "broken"
    assert reason in record.reason
    assert "\n" not in record.reason
    [warning] = loaded.warnings
    assert warning.startswith(f"plugin 'peg_bad' (file {bad}) is left out: {record.reason}")
    assert f"--plugin {bad}" in warning
    # All or nothing: what it registered before it broke is not there either.
    assert "PegBad" not in loaded.registry.names("loss")
    assert loaded.registry.plugin_of("loss", "PegGood") == "peg_good"


def test_a_hook_of_another_version_may_be_optional(tmp_path: Path) -> None:
    later = "\n@pegboard.hookimpl(optionalhook=True)\ndef register_of_another_version(register):\n    1 / 0\n"
    file = _write(tmp_path, "peg_later", SOUND.format(name="PegLater") + later)
    loaded = _load_files(file)
    assert _record(loaded, "peg_later").status == "loaded"
    assert loaded.warnings == ()


def test_a_wrapper_of_a_hook_may_yield(tmp_path: Path) -> None:
    text = SOUND.format(name="PegWrap").replace("hookimpl", "hookimpl(wrapper=True)")
    file = _write(tmp_path, "peg_wrap", text + "    return (yield)\n")
    loaded = _load_files(file)
    assert _record(loaded, "peg_wrap").status == "loaded", loaded.warnings
    assert "PegWrap" in loaded.registry.names("loss")


def test_two_plugins_may_offer_one_name(tmp_path: Path) -> None:
    one = _write(tmp_path, "peg_one", SOUND.format(name="PegLoss"))
    two = _write(tmp_path, "peg_two", SOUND.format(name="PegLoss"))
    loaded = _load_files(one, two)
    assert [record.status for record in loaded.plugins[-2:]] == ["loaded", "loaded"]
    first = loaded.registry.find("loss", "PegLoss", plugin="peg_one")
    assert first is not loaded.registry.find("loss", "PegLoss", plugin="peg_two")


def test_a_blocked_plugin_is_listed_but_not_imported(tmp_path: Path) -> None:
    file = _write(tmp_path, "peg_blocked", "raise RuntimeError('imported')")
    loaded = _load_files(file, block=("peg_blocked",))
    assert _record(loaded, "peg_blocked").status == "blocked"
    assert loaded.warnings == ()
    assert "peg_blocked" not in sys.modules


def test_blocking_what_is_not_there_is_said_with_the_near_miss(tmp_path: Path) -> None:
    file = _write(tmp_path, "peg_sound", SOUND.format(name="PegLoss"))
    [warning] = _load_files(file, block=("peg-sound",)).warnings
    assert warning == (
        "--block peg-sound: no plugin of that name is installed. Did you mean 'peg_sound'?"
    )


def test_a_file_that_is_not_there_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="no such Python file"):
        _load_files(tmp_path / "peg_missing.py")


def test_a_file_named_like_another_module_is_refused(tmp_path: Path) -> None:
    file = _write(tmp_path, "json", SOUND.format(name="PegLoss"))
    record = _record(_load_files(file), "json")
    assert record.status == "broken"
    assert "the module name 'json' is taken by" in record.reason


def test_the_same_file_twice_offers_its_parts_once(tmp_path: Path) -> None:
    file = _write(tmp_path, "peg_sound", SOUND.format(name="PegLoss"))
    loaded = _load_files(file, file)
    assert loaded.registry.plugin_of("loss", "PegLoss") == "peg_sound"
    assert "it is the same module as plugin 'peg_sound'" in loaded.plugins[-1].reason


def _distribution(site: Path, name: str, points: dict[str, str]) -> None:
    info = site / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    lines = [f"{point} = {module}" for point, module in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[pegboard]", *lines, ""]))


def _python(code: str, *paths: Path) -> str:
    path = os.pathsep.join(map(str, (ROOT / "core", ROOT / "plugins", *paths)))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_entry_points_load_after_built_ins_and_a_broken_distribution_is_named(
    tmp_path: Path,
) -> None:
    site = tmp_path / "site"
    _distribution(site, "peg-broken", {"a": "peg_broken"})
    _distribution(site, "peg-pair", {"c": "peg_pair_c", "b": "peg_pair_b"})
    _distribution(site, "peg-single", {"d": "peg_single"})
    _write(site, "peg_broken", "import no_such_module_x")
    for stem in ("peg_pair_c", "peg_pair_b", "peg_single"):
        _write(site, stem, SOUND.format(name=stem.title().replace("_", "")))
    code = (
        "import json; from pegboard.plugin_manager import load_plugins;"
        "loaded = load_plugins(block=['peg-pair:c']);"
        "print(json.dumps([loaded.plugins, loaded.warnings, loaded.registry.names('loss')]))"
    )
    records, warnings, losses = json.loads(_python(code, site))
    ours = [record for record in records if record[0].startswith("peg-")]
    assert records[: len(records) - 4] == [r for r in records if r[1] == "built-in"]
    assert [record[:4] for record in ours] == [
        ["peg-broken", "distribution peg-broken", "1.2", "broken"],
        ["peg-pair:b", "distribution peg-pair", "1.2", "loaded"],
        ["peg-pair:c", "distribution peg-pair", "1.2", "blocked"],
        ["peg-single", "distribution peg-single", "1.2", "loaded"],
    ]
    [warning] = [line for line in warnings if "peg-broken" in line]
    assert "(distribution peg-broken 1.2)" in warning
    assert "No module named 'no_such_module_x'. Run without it: --block peg-broken" in warning
    assert {"PegPairB", "PegSingle"} <= set(losses)
    assert "PegPairC" not in losses


def test_an_entry_point_whose_name_stands_twice_is_refused_and_every_list_is_still_given(
    tmp_path: Path,
) -> None:
    _distribution(tmp_path, "peg-pair", {"a": "peg_one", "a ": "peg_two"})
    _write(tmp_path, "peg_one", SOUND.format(name="PegOne"))
    _write(tmp_path, "peg_two", SOUND.format(name="PegTwo"))
    code = (
        "import json; from pegboard.plugin_manager import load_plugins\n"
        "from pegboard.plugin_listing import list_hook\n"
        "loaded = load_plugins(); list_hook(loaded, 'register_losses')\n"
        "print(json.dumps([loaded.plugins, loaded.warnings, loaded.registry.names('loss')]))"
    )
    records, warnings, losses = json.loads(_python(code, tmp_path))
    ours = [record for record in records if record[0].startswith("peg-")]
    assert [(name, status) for name, _, _, status, *_ in ours] == [
        ("peg-pair:a", "loaded"),
        ("peg-pair:a#2", "broken"),
    ]
    [warning] = [line for line in warnings if "peg-pair:a#2" in line]
    assert "there is a plugin 'peg-pair:a' before it; its entry points need names" in warning
    assert "PegOne" in losses and "PegTwo" not in losses


def test_each_distribution_whose_metadata_cannot_be_read_is_listed(tmp_path: Path) -> None:
    for name, point in (("peg-one", "a"), ("peg-two", "a"), ("peg-three", "b")):
        _distribution(tmp_path, name, {point: name.replace("-", "_")})
        (tmp_path / f"{name.replace('-', '_')}-1.2.dist-info" / "METADATA").write_bytes(b"\xff")
        _write(tmp_path, name.replace("-", "_"), SOUND.format(name=f"P{name[4:]}"))
    code = (
        "import json; from pegboard.plugin_manager import load_plugins\n"
        "print(json.dumps(load_plugins().plugins))"
    )
    records = [record for record in json.loads(_python(code, tmp_path)) if record[1] != "built-in"]
    ours = [(name, status) for name, _, _, status, *_ in records if name[0] in "ab"]
    assert ours == [("a:a", "loaded"), ("a:a#2", "broken"), ("b", "loaded")]


def test_without_third_parties_entry_points_are_not_even_looked_at(tmp_path: Path) -> None:
    _distribution(tmp_path, "peg-single", {"d": "peg_single"})
    _write(tmp_path, "peg_single", "raise RuntimeError")
    code = (
        "import json; from pegboard.plugin_manager import load_plugins;"
        "print(json.dumps(load_plugins(third_party=False).plugins))"
    )
    assert "peg-single" not in _python(code, tmp_path)


def test_without_the_built_in_package_the_core_still_loads_a_file(tmp_path: Path) -> None:
    file = _write(tmp_path, "peg_sound", SOUND.format(name="PegLoss"))
    code = (
        "import sys; sys.modules['pegboard_plugins'] = None\n"
        "from pegboard.plugin_manager import load_plugins\n"
        f"print([r.name for r in load_plugins([{str(file)!r}], third_party=False).plugins])"
    )
    assert _python(code).strip() == "['peg_sound']"


def test_the_description_lists_each_part_under_its_plugin(tmp_path: Path) -> None:
    file = _write(tmp_path, "peg_sound", SOUND.format(name="PegLoss"))
    [described] = [d for d in _load_files(file).describe() if d["name"] == "peg_sound"]
    assert described["parts"] == [
        {"kind": "loss", "class_name": "PegLoss", "summary": "A loss of PegLoss."}
    ]
    json.dumps(described)


def test_a_library_is_told_apart_whatever_loads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest's loader, for one, has no `get_source`."""
    found = importlib.util.find_spec

    def find(name: str) -> object:
        spec = found(name)
        assert spec is not None
        return SimpleNamespace(loader=object(), origin=spec.origin)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    names = {source.name for source in plugin_sources._built_ins()}
    assert "qwen3" in names
    assert not names & {"blocks", "media", "records", "texts"}
