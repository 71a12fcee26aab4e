"""What MkDocs does not do by itself: links from a page into the source tree lead to a page that shows the source.

On a code host such a link opens the file; the site has no such host, so it carries the files that it speaks of.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, InclusionLevel

__all__ = ["on_files", "on_page_markdown", "source_links"]

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(?<=\]\()(?P<path>\.\.?/[^)#\s]+)(?P<anchor>#[^)\s]*)?(?=\))")
_FOLDER = "source"
_LANGUAGES = {".py": "python", ".json": "json", ".jsonl": "json", ".toml": "toml", ".mjs": "js"}


def source_links(page: str, text: str) -> dict[str, str]:
    """Links of a page that leave docs/ for something that exists -> its path in the repository."""
    found = {}
    for link in _LINK.finditer(text):
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link["path"]))
        outside = not path.startswith(("docs/", "../")) or path.endswith((".py", ".txt"))
        if outside and (ROOT / path).exists():
            found[link["path"]] = path
    return found


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each source that a page links to."""
    linked = {
        path
        for file in files.documentation_pages()
        for path in source_links(file.src_uri, file.content_string).values()
    }
    for path in sorted(linked):
        files.append(
            File.generated(
                config,
                f"{_FOLDER}/{path}.md",
                content=_source_page(path),
                inclusion=InclusionLevel.NOT_IN_NAV,
            )
        )
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead those links to these pages."""
    page_path = page.file.src_uri
    links = source_links(page_path, markdown)

    def to_source_page(link: re.Match[str]) -> str:
        path = links.get(link["path"])
        if path is None:
            return link[0]
        return posixpath.relpath(f"{_FOLDER}/{path}.md", posixpath.dirname(page_path) or ".")

    return _LINK.sub(to_source_page, markdown)


def _source_page(path: str) -> str:
    """The file, or the Python files of the folder, as code blocks."""
    source = ROOT / path
    files = sorted(source.glob("*.py")) if source.is_dir() else [source]
    parts = ["---\nsearch:\n  exclude: true\n---\n", f"# {path}\n"]
    for file in files:
        if source.is_dir():
            parts.append(f"## {file.name}\n")
        text = file.read_text(encoding="utf-8").rstrip()
        # A fence longer than any in the text.
        fence = "`" * (3 + max((len(run) for run in re.findall(r"`{3,}", text)), default=0))
        parts.append(f"{fence}{_LANGUAGES.get(file.suffix, 'text')}\n{text}\n{fence}\n")
    return "\n".join(parts)
