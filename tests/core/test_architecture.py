"""Rules that no single file shows: who imports whom, what things are named, what stays light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "core" / "pegboard"
PLUGINS = ROOT / "plugins" / "pegboard_plugins"
LIBRARIES = {"blocks", "media", "records", "texts"}
"""Sub-packages of pegboard_plugins that any plugin may import: no hooks, public, documented."""
LIGHT = (
    "callbacks",
    "cli",
    "command",
    "component",
    "component_field",
    "config_rules",
    "config_schema",
    "contracts",
    "errors",
    "hookspecs",
    "json_schema",
    "json_source",
    "launch_errors",
    "plugin_faults",
    "plugin_guard",
    "plugin_identity",
    "plugin_index",
    "plugin_listing",
    "plugin_manager",
    "plugin_policy",
    "plugin_sources",
    "plugin_trace",
    "registry",
    "run_config",
    "savers",
    "schema_config",
    "tracking",
    "weight_map",
)
"""Modules of the core that a plugin author imports, or a command before a config is valid."""


def _python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def _imports(nodes: Iterator[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _everywhere(path: Path) -> set[str]:
    return set(_imports(ast.walk(ast.parse(path.read_text(encoding="utf-8")))))


def _at_top(path: Path) -> set[str]:
    """What importing the file imports: no function bodies, no TYPE_CHECKING blocks."""

    def walk(nodes: list[ast.stmt]) -> Iterator[ast.AST]:
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                yield from walk(node.orelse)
                continue
            yield node
            for name in ("body", "orelse", "finalbody"):
                yield from walk(getattr(node, name, []))
            for handler in getattr(node, "handlers", []):
                yield from walk(handler.body)

    tree = ast.parse(path.read_text(encoding="utf-8"))
    return set(_imports(walk(tree.body)))


def _plugin_of(path: Path) -> str:
    return path.relative_to(PLUGINS).parts[0]


def _inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_the_core_never_imports_a_plugin() -> None:
    guilty = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in _python_files(CORE)
        for name in _everywhere(path)
        if _inside(name, "pegboard_plugins")
    ]
    assert guilty == []


def test_the_core_never_imports_transformers_at_module_top() -> None:
    guilty = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in _python_files(CORE)
        for name in _at_top(path)
        if _inside(name, "transformers")
    ]
    assert guilty == []


def test_plugins_import_no_other_plugin_only_the_libraries() -> None:
    guilty = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in _python_files(PLUGINS)
        for name in _everywhere(path)
        if name.startswith("pegboard_plugins.")
        and name.split(".")[1] not in LIBRARIES | {_plugin_of(path)}
    ]
    assert guilty == []


def test_libraries_have_no_hooks() -> None:
    guilty = [
        str(path.relative_to(ROOT))
        for library in LIBRARIES
        for path in _python_files(PLUGINS / library)
        if "hookimpl" in path.read_text(encoding="utf-8")
    ]
    assert guilty == []


def test_source_roots_are_never_imported_as_packages() -> None:
    guilty = [
        f"{path.relative_to(ROOT)}: {name}"
        for folder in ("core", "plugins", "tests")
        for path in _python_files(ROOT / folder)
        for name in _everywhere(path)
        if _inside(name, "core") or _inside(name, "plugins")
    ]
    assert guilty == []


def test_only_run_py_and_the_package_live_in_the_core_source_root() -> None:
    # torchrun puts core/ first on sys.path: a core/types.py would break torch far away.
    assert {path.name for path in (ROOT / "core").iterdir()} - {"__pycache__"} == {
        "pegboard",
        "run.py",
    }


def test_only_the_device_room_of_the_core_asks_torch_about_cuda() -> None:
    guilty = [
        str(path.relative_to(ROOT))
        for path in _python_files(CORE)
        if path.name != "device.py" and "torch.cuda" in path.read_text(encoding="utf-8")
    ]
    assert guilty == []


def test_no_file_is_named_after_nothing() -> None:
    banned = {"utils", "util", "common", "misc", "helpers", "helper"}
    guilty = [
        str(path.relative_to(ROOT))
        for folder in ("core", "plugins", "tests")
        for path in _python_files(ROOT / folder)
        if banned & {path.stem.lstrip("_"), *path.relative_to(ROOT).parts[:-1]}
    ]
    assert guilty == []


def test_no_init_file_under_tests() -> None:
    # tests/x/__init__.py without tests/__init__.py makes `import x` mean tests/x.
    assert list((ROOT / "tests").rglob("__init__.py")) == []


@pytest.mark.parametrize("folder", [CORE, PLUGINS], ids=["core", "plugins"])
def test_every_module_says_what_it_is(folder: Path) -> None:
    guilty = [
        str(path.relative_to(ROOT))
        for path in _python_files(folder)
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert guilty == []


def _light_modules() -> list[str]:
    modules = ["pegboard", *(f"pegboard.{name}" for name in LIGHT)]
    for folder in PLUGINS.iterdir():
        if folder.name not in LIBRARIES and (folder / "__init__.py").is_file():
            name = f"pegboard_plugins.{folder.name}"
            modules.append(name)
            if (folder / "component.py").is_file():
                modules.append(f"{name}.component")
    return sorted(modules)


def test_importing_every_light_module_imports_nothing_heavy() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {_light_modules()!r}:\n"
        "    importlib.import_module(name)\n"
        "    for heavy in ('torch', 'transformers', 'numpy', 'jsonschema', 'loguru'):\n"
        "        if heavy in sys.modules:\n"
        "            sys.exit(f'{name} imports {heavy}')\n"
    )
    path = os.pathsep.join(map(str, (ROOT / "core", ROOT / "plugins")))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
