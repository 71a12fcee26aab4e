"""What outside code may use: every public name of the plugin API and the libraries, with signature and docstring.

`api_page()` is docs/api.md, `surface()` docs/public_api.txt: the same names with nothing but signatures.
A name that is not there may change at any time.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

from pydantic import BaseModel

__all__ = ["Member", "PublicName", "api_page", "public_names", "surface"]

PACKAGES = ("pegboard", "pegboard.testing")
LIBRARIES = ("blocks", "texts", "media", "records")
"""Of `pegboard_plugins`; their modules are what is imported."""

HEADER = """# Public API

What a plugin may import, generated from the code: `pegboard` and `pegboard.testing`, and the libraries `blocks`,
`texts`, `media` and `records` of `pegboard_plugins`. A name or signature here changes only with a line in
`CHANGELOG.md` that names it; whatever is not on this page may change at any time. The hooks stand on
[pages of their own](hooks.md). Examples that import nothing begin after `from pegboard import *`.
"""


class Member(NamedTuple):
    """A field, method or property of a public class."""

    name: str
    signature: str
    about: str


class PublicName(NamedTuple):
    """One name that outside code may use."""

    module: str
    name: str
    signature: str
    """As in `(hidden_TD: Tensor) -> Tensor`, or `: int` of a constant."""
    doc: str
    members: tuple[Member, ...] = ()


def public_names() -> Iterator[PublicName]:
    """Every public name, package after package, each in the order of its `__all__`."""
    for package in PACKAGES:
        yield from _names_of(importlib.import_module(package))
    for library in LIBRARIES:
        root = importlib.import_module(f"pegboard_plugins.{library}")
        for found in sorted(pkgutil.iter_modules(root.__path__), key=lambda item: item.name):
            yield from _names_of(importlib.import_module(f"{root.__name__}.{found.name}"))


def surface() -> str:
    """One line for each name and member, sorted within its class: what a change of the API changes."""
    lines = []
    for item in public_names():
        path = f"{item.module}.{item.name}"
        lines.append(path + item.signature)
        lines += [f"{path}.{member.name}{member.signature}" for member in item.members]
    return "\n".join(lines) + "\n"


def api_page() -> str:
    """The page as Markdown."""
    parts, module = [HEADER], ""
    for item in public_names():
        if item.module != module:
            module = item.module
            parts.append(f"## {module}\n\n{_first_paragraph(importlib.import_module(module))}\n")
        parts.append(f"### {item.name}\n\n`{item.name}{item.signature}`\n\n{_markdown(item.doc)}")
        if item.members:
            parts.append("".join(_list_item(member) for member in item.members))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def _names_of(module: ModuleType) -> Iterator[PublicName]:
    for name in getattr(module, "__all__", ()):
        value = getattr(module, name)
        if inspect.isclass(value):
            yield PublicName(
                module.__name__, name, _signature(value), _doc(value), tuple(_members(value))
            )
        elif inspect.isfunction(value):
            yield PublicName(module.__name__, name, _signature(value), _doc(value))
        else:
            doc = _constant_doc(module, name)
            yield PublicName(module.__name__, name, f": {type(value).__name__}", doc)


def _members(cls: type[Any]) -> Iterator[Member]:
    """Of the class's own body: bases are public names of their own, or not public."""
    docs = _attribute_docs(cls)
    if issubclass(cls, BaseModel):
        docs |= {name: field.description or "" for name, field in cls.model_fields.items()}
    annotations = inspect.get_annotations(cls)
    for name, annotation in annotations.items():
        if not name.startswith("_"):
            yield Member(name, f": {_spelling(annotation)}", docs.get(name, ""))
    for name, value in vars(cls).items():
        if name.startswith("_") or name in annotations:
            continue
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if inspect.isfunction(function):
            yield Member(name, _signature(function), _summary(function))
        elif isinstance(value, property):
            yield Member(name, "", _summary(value))


def _signature(value: Any) -> str:
    if inspect.isclass(value) and issubclass(value, BaseModel):
        return "(**fields)"  # its fields are its members
    try:
        text = str(inspect.signature(value))
    except ValueError:  # an exception without __init__
        return "(*args)"
    text = re.sub(r"<(\w+)(?: [\w.]+)* at 0x[0-9a-f]+>", r"<\1>", text)
    return _without_quotes(text)


def _spelling(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return _without_quotes(text)


def _without_quotes(text: str) -> str:
    """Annotations as they are written: strings under `annotations`, forward references in a NamedTuple."""
    text = re.sub(r"""ForwardRef\((['"])(.*?)\1\)""", r"\2", text)
    return re.sub(r"(?<=: |> )'([^']*)'", r"\1", text)


def _doc(value: Any) -> str:
    """The value's own docstring; what a dataclass or a NamedTuple makes up by itself is none."""
    own = (vars(value) if inspect.isclass(value) else {"__doc__": value.__doc__}).get("__doc__")
    made_up = inspect.isclass(value) and (own or "").startswith(f"{value.__name__}(")
    return "" if made_up else inspect.cleandoc(own or "")


def _summary(value: Any) -> str:
    return " ".join(_doc(value).split("\n\n", 1)[0].split())


def _first_paragraph(module: ModuleType) -> str:
    return inspect.cleandoc(module.__doc__ or "").split("\n\n", 1)[0]


def _constant_doc(module: ModuleType, name: str) -> str:
    """The string under the assignment, where the constant is made."""
    tree = _tree(module)
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom) and statement.module:
            if any(alias.name == name for alias in statement.names):
                return _constant_doc(importlib.import_module(statement.module), name)
    return _docs_in(tree.body).get(name, "")


@cache
def _tree(module: ModuleType) -> ast.Module:
    return ast.parse(inspect.getsource(module))


def _attribute_docs(cls: type[Any]) -> dict[str, str]:
    module = importlib.import_module(cls.__module__)
    for statement in _tree(module).body:
        if isinstance(statement, ast.ClassDef) and statement.name == cls.__name__:
            return _docs_in(statement.body)
    return {}


def _docs_in(body: list[ast.stmt]) -> dict[str, str]:
    """Name -> the string that stands under its assignment."""
    docs = {}
    for statement, below in zip(body, body[1:], strict=False):
        if not (isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)):
            continue
        targets = (
            [statement.target] if isinstance(statement, ast.AnnAssign)
            else statement.targets if isinstance(statement, ast.Assign) else []
        )  # fmt: skip
        for target in targets:
            if isinstance(target, ast.Name) and isinstance(below.value.value, str):
                docs[target.id] = " ".join(inspect.cleandoc(below.value.value).split())
    return docs


def _list_item(member: Member) -> str:
    about = f": {member.about}" if member.about else ""
    return f"- `{member.name}{member.signature}`{about}\n"


def _markdown(doc: str) -> str:
    """A docstring with its sections as lists, its examples as blocks and the rest as it is."""
    parts = []
    for paragraph in re.split(r"\n\n(?!\s)", doc):
        heading = re.match(r"(Args|Raises|Returns|Source):\s*", paragraph)
        if paragraph.startswith(">>>"):
            parts.append(f"```pycon\n{paragraph}\n```\n")
        elif heading and heading[1] in ("Args", "Raises"):
            items = re.split(r"\n(?= {4}\S)", paragraph[heading.end() :].rstrip())
            title = "Arguments" if heading[1] == "Args" else "Raises"
            parts.append(f"{title}:\n\n" + "".join(_entry(item) for item in items if item.strip()))
        else:
            indented = re.search(r"\n {4}\S", paragraph) and not heading
            parts.append((f"```text\n{paragraph}\n```" if indented else paragraph) + "\n")
    return "\n".join(parts)


def _entry(text: str) -> str:
    name, _, about = " ".join(text.split()).partition(": ")
    return f"- `{name}`: {about}\n" if about else f"- {name}\n"
