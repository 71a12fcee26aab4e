"""Every public name is documented and shown at work, and none changes without a line in the changelog.

`docs/public_api_released.txt` is the surface of the last release; the changelog's Unreleased section must name
what differs from it today.
"""

from __future__ import annotations

import doctest
import importlib
import re

import pytest
from fenced_blocks import ROOT
from public_api import PublicName, public_names, surface

NAMES = list(public_names())
PROMISED = [name for name in NAMES if name.module in ("pegboard", "pegboard.testing")]


def id_of(name: PublicName) -> str:
    return f"{name.module}.{name.name}"


def examples_of(name: PublicName) -> list[doctest.Example]:
    """Of the docstring; a constant has none of its own, its example stands in the package's."""
    parser = doctest.DocTestParser()
    if ">>>" in name.doc:
        return parser.get_examples(name.doc)
    package = parser.get_examples(importlib.import_module(name.module).__doc__ or "")
    return [one for one in package if re.search(rf"\b{name.name}\b", one.source)]


def changed(released: str, current: str) -> set[str]:
    """What differs: `Name` that is there in one only or has another signature, `Name.member` of one that stays."""
    before, after = set(released.splitlines()), set(current.splitlines())
    path_of = {line: re.split(r"[(:]", line, maxsplit=1)[0] for line in before | after}
    modules = {id_of(name).rpartition(".")[0] for name in NAMES}
    changes = set()
    for path in {path_of[line] for line in before ^ after}:
        module = max((one for one in modules if path.startswith(one + ".")), key=len)
        changes.add(path.removeprefix(module + "."))
    return {name for name in changes if name.partition(".")[0] not in changes - {name}}


def unnamed(names: set[str], changelog: str) -> list[str]:
    unreleased = changelog.partition("## Unreleased")[2].partition("\n## ")[0]
    return sorted(name for name in names if not re.search(rf"\b{re.escape(name)}\b", unreleased))


@pytest.mark.parametrize("name", NAMES, ids=id_of)
def test_every_public_name_has_a_docstring(name: PublicName) -> None:
    assert name.doc, f"{id_of(name)}: write what it is, in a docstring or a string under the name"


@pytest.mark.parametrize("name", PROMISED, ids=id_of)
def test_every_name_of_the_plugin_api_is_shown_at_work(name: PublicName) -> None:
    examples = examples_of(name)
    assert examples, f"{id_of(name)}: add a `>>>` example to its docstring"


def test_what_changed_since_the_last_release_is_in_the_changelog() -> None:
    released = (ROOT / "docs" / "public_api_released.txt").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    missing = unnamed(changed(released, surface()), changelog)
    assert missing == [], (
        f"the public API changed, and the Unreleased section of CHANGELOG.md doesn't name "
        f"{', '.join(missing)}: add a line there that says what changed, with the name as it stands here"
    )


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        ({}, set()),
        ({"pegboard.Batch.num_tokens: int": None}, {"Batch.num_tokens"}),
        ({"pegboard.Batch.num_tokens: int": "pegboard.Batch.num_tokens: float"}, {"Batch.num_tokens"}),
        ({"pegboard.IGNORE_INDEX: int": None}, {"IGNORE_INDEX"}),
        ({"": "pegboard.testing.Judge()\npegboard.testing.Judge.rule: str"}, {"Judge"}),
        ({"": "pegboard_plugins.blocks.norm.melt(x: Tensor) -> Tensor"}, {"melt"}),
    ],
)  # fmt: skip
def test_a_change_is_seen_and_asked_for(lines: dict[str, str | None], names: set[str]) -> None:
    before = surface()
    kept = [line for line in before.splitlines() if line not in lines]
    added = [line for line in lines.values() if line]
    assert len(kept) == len(before.splitlines()) - len([key for key in lines if key])
    found = changed(before, "\n".join([*kept, *added]) + "\n")
    assert found == names
    assert unnamed(found, "## Unreleased\n- Nothing.\n\n## 1.0\n" + " ".join(names)) == sorted(
        names
    )
    assert unnamed(found, f"## Unreleased\n- {', '.join(names)}: other.\n\n## 1.0\n") == []
