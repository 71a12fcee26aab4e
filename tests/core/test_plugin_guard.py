"""A careless or hostile package is named, its side effects are undone, and the rest go on."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pluggy
import pytest

from pegboard import hookspecs, plugin_guard
from pegboard.cli import main
from pegboard.plugin_faults import describe_fault
from pegboard.plugin_manager import LoadedPlugins, load_plugins

Install = Callable[..., Path]

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
QUICKSTART = str(Path(__file__).resolve().parents[2] / "configs" / "quickstart.json")


def _status(loaded: LoadedPlugins, name: str) -> str:
    [record] = [record for record in loaded.plugins if record.name == name]
    return record.status


def _said_of(loaded: LoadedPlugins, name: str) -> list[str]:
    return [line for line in loaded.warnings if f"plugin '{name}'" in line]


HOSTILE = {
    "import error": "import no_such_module_x",
    "syntax error": "def (:",
    "exit": "raise SystemExit(3)",
    "wrong signature": SOUND.replace("(register)", "(registry, more)"),
    "raises in a hook": SOUND + "    raise RuntimeError('no')\n",
    "unknown hook": SOUND.replace("register_losses", "on_everything"),
    "junk": SOUND + "    register('PegLoss')\n",
    "twice": SOUND + "    register(PegLoss)\n",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_no_broken_package_stops_check_and_each_is_named_with_place_and_remedy(
    case: str, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    file = install("peg-hostile", HOSTILE[case])
    assert main(["check", QUICKSTART]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("ok: ")
    [line] = [row for row in captured.err.splitlines() if "peg-hostile" in row]
    assert line.startswith(
        "warning: plugin 'peg-hostile' (distribution peg-hostile 1.2) is left out"
    )
    assert f"{file}:" in line
    assert line.endswith("Run without it: --block peg-hostile")

    assert main(["check", QUICKSTART, "--block", "peg-hostile"]) == 0
    assert "peg-hostile" not in capsys.readouterr().err


@pytest.mark.parametrize("neighbour", ["pegboard_rivers", "pluggy_rivers", "importlib_rivers"])
def test_a_package_whose_name_begins_with_ours_is_named_with_its_line(neighbour: str) -> None:
    """An installed `pegboard_rivers` lies beside `pegboard`: one path begins with the other."""
    beside = sys.modules[neighbour.removesuffix("_rivers")].__file__
    assert beside is not None
    file = str(Path(beside).parent.with_name(neighbour) / "__init__.py")
    try:
        exec(compile("\nimport no_such_module_x\n", file, "exec"))
    except ModuleNotFoundError as error:
        assert describe_fault(error).startswith(f"{file}:2: ModuleNotFoundError: ")
    else:
        pytest.fail("no_such_module_x is there")


def test_what_a_plugin_prints_spoils_no_output_and_is_told(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "import sys\nprint('hello', 'world')\nprint('again')\n"
        "sys.stdout.writelines(['one\\n', 'two\\n'])\n"
        "assert sys.stdout.encoding and not sys.stdout.isatty()\n"
    )
    install("peg-loud", code + SOUND + "    print('hook')\n")
    assert main(["plugins", "--json"]) == 0
    captured = capsys.readouterr()
    assert "PegLoss" in [
        part["class_name"] for p in json.loads(captured.out) for part in p["parts"]
    ]
    assert "hello world\nagain\none\ntwo\nhook\n" in captured.err
    assert "it prints while it is loaded: 'hello world'. Run without it: --block peg-loud" in (
        captured.err
    )


CHANGES = {
    "the current folder": ("import os; os.chdir('/')", os.getcwd),
    "the root logger": (
        "import logging; logging.getLogger().setLevel(1); logging.disable(50)",
        lambda: (logging.getLogger().level, logging.getLogger().manager.disable),
    ),
    "the root logger's handlers": (
        "import logging; logging.getLogger().addHandler(logging.NullHandler())",
        lambda: list(logging.getLogger().handlers),
    ),
    "the handlers of SIGINT or SIGTERM": (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        lambda: signal.getsignal(signal.SIGTERM),
    ),
    "sys.excepthook": ("import sys; sys.excepthook = print", lambda: sys.excepthook),
    "sys.stderr": ("import sys, io; sys.stderr = io.StringIO()", lambda: sys.stderr),
    "the state of random": ("import random; random.seed(0)", random.getstate),
    "the environment (PATH)": (
        "import os; os.environ['PATH'] = ''; os.environ['PEG_NEW'] = 'kept'",
        lambda: os.environ["PATH"],
    ),
    "the order of sys.path": ("import sys; sys.path.insert(0, '/nowhere')", lambda: sys.path[0]),
    "the warnings filters for all code": (
        "import warnings; warnings.simplefilter('ignore')",
        lambda: list(warnings.filters),
    ),
    "the warnings filters, cleared": (
        "import warnings; warnings.resetwarnings()",
        lambda: list(warnings.filters),
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_a_plugin_changes_for_all_code_is_named_and_undone(
    what: str, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEG_NEW", "")
    monkeypatch.delenv("PEG_NEW")
    code, read = CHANGES[what]
    before = read()
    install("peg-careless", code + SOUND)
    loaded = load_plugins()
    assert read() == before
    assert _status(loaded, "peg-careless") == "loaded"
    [line] = _said_of(loaded, "peg-careless")
    words = what.split("'")[0].split(",")[0]
    assert line.startswith(
        "plugin 'peg-careless' (distribution peg-careless 1.2): it changes " + words
    )
    assert line.endswith("(undone). Run without it: --block peg-careless")


def test_a_plugin_that_replaces_stdout_is_named(install: Install) -> None:
    install("peg-pipe", "import sys, io; sys.stdout = io.StringIO()" + SOUND)
    before = sys.stdout
    [line] = _said_of(load_plugins(), "peg-pipe")
    assert sys.stdout is before
    assert "it replaces sys.stdout (undone)" in line


@pytest.mark.parametrize(
    "change",
    [
        "set_default_dtype(torch.float64)",
        "set_grad_enabled(False)",
        "set_float32_matmul_precision('medium')",
    ],
)
def test_modes_of_torch_that_change_all_numbers_are_undone(change: str, install: Install) -> None:
    import torch

    def modes() -> tuple[Any, ...]:
        precision = torch.get_float32_matmul_precision()
        return torch.get_default_dtype(), torch.is_grad_enabled(), precision

    before = modes()
    install("peg-modes", f"import torch; torch.{change}" + SOUND)
    [line] = _said_of(load_plugins(), "peg-modes")
    assert "it changes torch's default dtype, gradient mode or precision (undone)" in line
    assert modes() == before


def test_what_cannot_be_undone_is_told_and_stops_nothing(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    install("peg-mover", f"import os; os.chdir('/'); os.rmdir({str(folder)!r})" + SOUND)
    loaded = load_plugins()
    assert _status(loaded, "peg-mover") == "loaded"
    [line] = _said_of(loaded, "peg-mover")
    assert "it changes the current folder, which can't be undone: " in line


@pytest.mark.parametrize(
    "code",
    [
        "sys.stdout.close()",
        # For UTF-8 on any terminal, as many scripts do: the wrapper dies with its replacement.
        "sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='utf-8')",
        "sys.stdout = io.TextIOWrapper(sys.stdout.detach(), encoding='utf-8')",
        "sys.stdout = codecs.getwriter('utf-8')(sys.stdout.detach())",
        "sys.stderr = io.TextIOWrapper(sys.stderr.buffer, encoding='utf-8')",
    ],
)
def test_a_plugin_that_closes_stdout_closes_nothing(
    code: str, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("peg-closer", "import codecs, io, sys; " + code + SOUND)
    assert main(["check", QUICKSTART]) == 0
    assert capsys.readouterr().out.startswith("ok: ")


def test_narrow_changes_that_libraries_make_are_not_told(install: Install) -> None:
    code = (
        "import os, sys, warnings, logging\n"
        "warnings.filterwarnings('ignore', message='numpy.dtype size changed')\n"
        "warnings.filterwarnings('ignore', category=UserWarning, module='peg_tame')\n"
        "os.environ.setdefault('PEG_TAME', '1'); sys.path.append('/nowhere')\n"
        "logging.getLogger('peg_tame').setLevel(10)\n"
    )
    install("peg-tame", code + SOUND)
    with warnings.catch_warnings():
        assert _said_of(load_plugins(), "peg-tame") == []
    del os.environ["PEG_TAME"]


def test_the_built_in_plugins_change_nothing_and_print_nothing() -> None:
    assert load_plugins(third_party=False).warnings == ()


def test_a_slow_plugin_is_named_while_it_is_still_loading(
    install: Install, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin_guard, "SLOW_AFTER_S", 0.2)
    code = "import sys, time; time.sleep(1); sys.stderr.write('imported at last\\n')"
    install("peg-slow", code + SOUND)
    assert _status(load_plugins(), "peg-slow") == "loaded"
    error = capfd.readouterr().err
    line, _, rest = error.partition("\n")
    assert line.startswith("plugin 'peg-slow' (distribution peg-slow 1.2) has been loading for")
    assert line.endswith("Run without it: --block peg-slow")
    assert rest == "imported at last\n"


def test_five_seconds_are_what_a_plugin_has() -> None:
    assert plugin_guard.SLOW_AFTER_S == 5.0


@pytest.mark.parametrize("arguments", [False, True], ids=["hook", "argument"])
def test_a_deprecated_hook_is_told_with_plugin_and_line_and_is_no_error(
    arguments: bool, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = DeprecationWarning("register_losses goes in 0.9; write register_objectives")
    mark = pluggy.HookspecMarker("pegboard")
    decorate: Any = (
        mark(warn_on_impl_args={"register": told}) if arguments else mark(warn_on_impl=told)
    )

    def register_losses(register: Any) -> None:
        """Offer losses."""

    monkeypatch.setattr(hookspecs, "register_losses", decorate(register_losses))
    file = install("peg-dated", SOUND)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_plugins()
    assert _status(loaded, "peg-dated") == "loaded"
    assert "PegLoss" in loaded.registry.names("loss")
    assert _said_of(loaded, "peg-dated") == [
        f"plugin 'peg-dated' (distribution peg-dated 1.2): {file}:9: {told}. "
        "Run without it: --block peg-dated"
    ]


def test_metadata_that_cannot_be_read_is_a_broken_plugin_and_stops_nobody(
    install: Install, site: Path
) -> None:
    install("peg-garbled", SOUND, points="[pegboard]\nno equals sign\n")
    install("peg-sound", SOUND)
    nameless = site / "peg_nameless-1.dist-info"
    nameless.mkdir()
    (nameless / "entry_points.txt").write_text("[pegboard]\npeg = no_such_module_x\n")
    binary = site / "peg_binary-1.dist-info"
    binary.mkdir()
    (binary / "entry_points.txt").write_bytes(b"[pegboard]\n\xff\xfe")
    loaded = load_plugins()
    assert _status(loaded, "peg-garbled") == "broken"
    assert _status(loaded, "peg-sound") == "loaded"
    [line] = _said_of(loaded, "peg-garbled:?") or _said_of(loaded, "peg-garbled")
    assert "its entry_points.txt can't be read" in line


ODD_SCHEMAS = {
    "a type without a schema": '        odd: Callable[[int], int] = Field(default=abs, description="x")',
    "a type whose schema raises": '        odd: Odd = Field(default=Odd(), description="x")',
}


@pytest.mark.parametrize("case", ODD_SCHEMAS)
def test_a_config_that_has_no_schema_leaves_the_other_parts_theirs(
    case: str, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    code = f'''
from collections.abc import Callable
from pydantic import Field
from pydantic_core import core_schema
import pegboard

class Odd:
    @classmethod
    def __get_pydantic_core_schema__(cls, source, handler):
        return core_schema.any_schema()
    @classmethod
    def __get_pydantic_json_schema__(cls, schema, handler):
        raise RuntimeError("no")

class PegOdd(pegboard.LossComponent):
    """Odd."""
    class Config(pegboard.ComponentConfig):
{ODD_SCHEMAS[case]}
    config: Config
    def build(self):
        return None

@pegboard.hookimpl
def register_losses(register):
    register(PegOdd)
'''
    install("peg-odd", code)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydantic's, of a default that is no JSON
        assert main(["schema"]) == 0
    definitions = json.loads(capsys.readouterr().out)["definitions"]
    assert "no schema: " in json.dumps(definitions["loss.PegOdd"])
    assert definitions["loss.ChunkedCrossEntropy"]["properties"]
