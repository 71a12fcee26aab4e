"""Parts with one fault each, and sound ones beside them: what the contract kit is held to.

A row says what is wrong, which check must find it, and which others can't help finding it too.
`python tests/core/testing/broken_parts.py` writes the table of docs/testing_a_part.md anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "PAGE",
    "Broken",
    "Sound",
    "broken_parts",
    "is_of_any_kind",
    "page_with_table",
    "sound_parts",
]

Fields = Mapping[str, Any] | Callable[[Path], Mapping[str, Any]]
PAGE = Path(__file__).resolve().parents[3] / "docs" / "testing_a_part.md"
_BEGIN, _END = "<!-- faults: begin -->\n", "<!-- faults: end -->\n"


class Broken(NamedTuple):
    """A part that breaks one promise."""

    fault: str
    """What it does wrong, after "it"."""
    check: str
    component: Any
    config: Fields = {}
    options: Mapping[str, Any] | None = None
    """Those of the sound part where none are given."""
    also: frozenset[str] = frozenset()
    """Checks that the same fault can't but fail."""

    @property
    def kind(self) -> str:
        return kind_of(self.component)


class Sound(NamedTuple):
    """The same part without the fault."""

    component: Any
    config: Fields = {}
    options: Mapping[str, Any] = {}


def kind_of(component: Any) -> str:
    return getattr(component, "kind", None) or "command"


def is_of_any_kind(row: Broken) -> bool:
    """Whether the fault is one that a part of every kind can have."""
    return str(row.component.__name__).endswith("Anything")


def broken_parts() -> list[Broken]:
    """All of them, kind by kind."""
    import broken_commands
    import broken_data
    import broken_files
    import broken_losses
    import broken_models
    import broken_texts
    import broken_training

    modules = (
        broken_data,
        broken_texts,
        broken_losses,
        broken_training,
        broken_models,
        broken_files,
        broken_commands,
    )
    return [row for module in modules for row in module.BROKEN]


def sound_parts() -> dict[str, Sound]:
    """One for each kind."""
    import broken_commands
    import broken_data
    import broken_files
    import broken_losses
    import broken_models
    import broken_texts
    import broken_training

    return {
        **broken_data.SOUND,
        **broken_texts.SOUND,
        **broken_losses.SOUND,
        **broken_training.SOUND,
        **broken_models.SOUND,
        **broken_files.SOUND,
        **broken_commands.SOUND,
    }


def page_with_table(page: str) -> str:
    """The page with the table of faults as the rows say it."""
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    lines = ["| kind | check | what a broken part did |", "|---|---|---|"]
    for row in broken_parts():
        kind = "every kind" if is_of_any_kind(row) else row.kind
        lines.append(f"| {kind} | `{row.check}` | {row.fault} |")
    return f"{before}{_BEGIN}\n" + "\n".join(lines) + f"\n\n{_END}{after}"


if __name__ == "__main__":
    import sys

    # The table is one whether this file is run or imported.
    sys.modules["broken_parts"] = sys.modules["__main__"]
    PAGE.write_text(page_with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
