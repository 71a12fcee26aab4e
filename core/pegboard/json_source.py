"""Reads JSON configs without losing where each key and value stands.

Our own scanner keeps line and column (from 1, in characters) of every key and value.
Layers (`extends`, then `--set`) are merged as trees of nodes, so a place names whoever spoke last.
Grammar: RFC 8259, less NaN, numbers beyond float64, lone surrogates and duplicate keys.
"""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from json.decoder import JSONDecodeError, scanstring  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

from pegboard.errors import ConfigError

__all__ = [
    "ConfigSource",
    "JsonPath",
    "JsonSyntaxError",
    "format_path",
    "load_layers",
    "parse_json",
]

JsonPath = tuple[str | int, ...]

MAX_DEPTH = 100
"""Levels of nesting; far beyond any config, and below every parser's own limit."""

_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"(-?(?:0|[1-9][0-9]*))(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_WORD = re.compile(r"[A-Za-z_$][A-Za-z0-9_$]*")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LITERALS: dict[str, Any] = {"true": True, "false": False, "null": None}
_MISSPELT = {"True": "true", "False": "false", "None": "null", "undefined": "null"}
_SET_PATH = re.compile(r"[A-Za-z_][\w-]*(?:\.[A-Za-z_][\w-]*|\[[0-9]+\])*", re.ASCII)
_SET_STEP = re.compile(r"([A-Za-z_][\w-]*)|\[([0-9]+)\]", re.ASCII)


class JsonSyntaxError(ConfigError):
    """Text that is not JSON; the message starts with its place."""


@dataclass(slots=True)
class _Node:
    """A JSON value with its place; objects and lists hold nodes."""

    value: Any
    place: str
    key_place: str = ""


@dataclass(frozen=True)
class ConfigSource:
    """A config after all layers: plain data, and the place of each part of it."""

    data: dict[str, Any]
    """Without `extends`, `$schema` and `$comment`."""
    root: _Node
    problems: tuple[tuple[str, str], ...] = ()
    """(place, message) of what was read but is wrong: duplicate keys."""

    def place(self, path: JsonPath) -> str:
        """`file:line:column` of the value at `path`, or `--set ...`; if missing, its parent's."""
        return self._nearest(path)[0].place

    def key_place(self, path: JsonPath) -> str:
        """As `place`, but of the key (for a list item, the value)."""
        node, found = self._nearest(path)
        return node.key_place if found and node.key_place else node.place

    def _nearest(self, path: JsonPath) -> tuple[_Node, bool]:
        node = self.root
        for step in path:
            child = _child(node, step)
            if child is None:
                return node, False
            node = child
        return node, True


def format_path(path: JsonPath) -> str:
    """The spelling that `--set` takes: `datasets[1].dataset.name`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def parse_json(text: str, name: str = "<text>") -> ConfigSource:
    """Parse one text whose root is an object; `name` stands in places.

    Raises JsonSyntaxError for text that is not JSON; duplicate keys are collected in `problems`.
    """
    problems: list[tuple[str, str]] = []
    root = _Scanner(text, name, problems).document()
    if not isinstance(root.value, dict):
        raise JsonSyntaxError(
            f"{root.place}: expected an object '{{...}}', found {_kind(root.value)}"
        )
    return ConfigSource(_plain(root), root, tuple(problems))


def load_layers(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> ConfigSource:
    """Read a config, what it extends, and `--set` overrides (`optimizer.lr=1e-5`); the last wins.

    `extends` is relative to the file that says it. Objects merge key by key, an object with another
    `class_name` replaces the former, lists and scalars replace.

    Raises:
        ConfigError: a file that can't be read, is not JSON or extends itself; an override that fits
            nowhere.
    """
    problems: list[tuple[str, str]] = []
    root = _load_file(os.fspath(path), (), problems)
    for override in overrides:
        _apply_override(root, override, problems)
    return ConfigSource(_plain(root), root, tuple(problems))


class _Scanner:
    """Recursive descent over one text."""

    def __init__(self, text: str, name: str, problems: list[tuple[str, str]]) -> None:
        self.text = text.removeprefix("\ufeff")
        self.name = name
        self.problems = problems
        self.line_starts = [0] + [match.end() for match in re.finditer("\n", self.text)]

    def place(self, at: int) -> str:
        line = bisect_right(self.line_starts, at)
        return f"{self.name}:{line}:{at - self.line_starts[line - 1] + 1}"

    def fail(self, at: int, message: str) -> JsonSyntaxError:
        return JsonSyntaxError(f"{self.place(at)}: {message}")

    def skip(self, at: int) -> int:
        match = _SPACE.match(self.text, at)
        assert match
        at = match.end()
        if self.text.startswith(("//", "/*", "#"), at):
            raise self.fail(at, 'JSON has no comments; write a "$comment" key instead')
        return at

    def document(self) -> _Node:
        node, at = self.value(self.skip(0), ())
        at = self.skip(at)
        if at < len(self.text):
            raise self.fail(at, f"text after the end of the JSON value: {self.found(at)}")
        return node

    def found(self, at: int) -> str:
        if at >= len(self.text):
            return "the end of the file"
        word = _WORD.match(self.text, at)
        return ascii(word.group() if word else self.text[at])

    def value(self, at: int, path: JsonPath) -> tuple[_Node, int]:
        char = self.text[at : at + 1]
        if len(path) >= MAX_DEPTH and char in ("{", "["):
            raise self.fail(at, f"nested deeper than {MAX_DEPTH} levels")
        if char == "{":
            return self.object(at, path)
        if char == "[":
            return self.list(at, path)
        if char == '"':
            text, end = self.string(at)
            return _Node(text, self.place(at)), end
        if number := _NUMBER.match(self.text, at):
            return self.number(number), number.end()
        for word, literal in _LITERALS.items():
            if self.text.startswith(word, at):
                return _Node(literal, self.place(at)), at + len(word)
        raise self.fail(at, self.complaint(at))

    def complaint(self, at: int) -> str:
        word = _WORD.match(self.text, at)
        if word and word.group() in _MISSPELT:
            return (
                f"expected a value, found {word.group()}; JSON spells it {_MISSPELT[word.group()]}"
            )
        if self.text.startswith(("NaN", "Infinity", "-Infinity"), at):
            return "NaN and Infinity are not JSON; write a finite number"
        if self.text.startswith("'", at):
            return "strings have double quotes in JSON, found a single quote"
        return f"expected a value, found {self.found(at)}"

    def string(self, at: int) -> tuple[str, int]:
        try:
            text, end = scanstring(self.text, at + 1, True)
        except JSONDecodeError as error:
            raise self.fail(min(error.pos, len(self.text)), f"bad string: {error.msg}") from None
        if _SURROGATE.search(text):
            raise self.fail(at, "the string holds half of a surrogate pair (\\ud800 to \\udfff)")
        return text, end

    def number(self, match: re.Match[str]) -> _Node:
        whole, fraction, exponent = match.groups()
        place = self.place(match.start())
        if fraction is None and exponent is None:
            try:
                return _Node(int(whole), place)
            except ValueError:  # Python refuses thousands of digits
                raise self.fail(match.start(), "the number has too many digits") from None
        value = float(match.group())
        if math.isinf(value):
            raise self.fail(match.start(), f"{match.group()} is beyond the range of a 64-bit float")
        return _Node(value, place)

    def list(self, at: int, path: JsonPath) -> tuple[_Node, int]:
        node = _Node([], self.place(at))
        at = self.skip(at + 1)
        if self.text.startswith("]", at):
            return node, at + 1
        while True:
            item, at = self.value(at, (*path, len(node.value)))
            node.value.append(item)
            at, ended = self.separator(at, "]")
            if ended:
                return node, at

    def object(self, at: int, path: JsonPath) -> tuple[_Node, int]:
        node = _Node({}, self.place(at))
        at = self.skip(at + 1)
        if self.text.startswith("}", at):
            return node, at + 1
        while True:
            if not self.text.startswith('"', at):
                raise self.fail(at, f"expected a key in double quotes, found {self.found(at)}")
            key_place = self.place(at)
            key, at = self.string(at)
            at = self.skip(at)
            if not self.text.startswith(":", at):
                raise self.fail(at, f"expected ':' after the key {key!a}, found {self.found(at)}")
            item, at = self.value(self.skip(at + 1), (*path, key))
            item.key_place = key_place
            if key in node.value and key != "$comment":
                first = node.value[key].key_place
                where = format_path((*path, key))
                self.problems.append(
                    (
                        key_place,
                        f"{where}: duplicate key {key!r}, first at {first}; keep one of them",
                    )
                )
            node.value[key] = item
            at, ended = self.separator(at, "}")
            if ended:
                return node, at

    def separator(self, at: int, closing: str) -> tuple[int, bool]:
        """Past `,` (and the space after it), or past the closing bracket."""
        at = self.skip(at)
        if self.text.startswith(closing, at):
            return at + 1, True
        if not self.text.startswith(",", at):
            raise self.fail(at, f"expected ',' or '{closing}', found {self.found(at)}")
        comma, at = at, self.skip(at + 1)
        if self.text.startswith(closing, at):
            raise self.fail(comma, f"trailing comma before '{closing}'; remove it")
        return at, False


def _load_file(path: str, above: tuple[str, ...], problems: list[tuple[str, str]]) -> _Node:
    root = _Scanner(_read(path), path, problems).document()
    if not isinstance(root.value, dict):
        raise JsonSyntaxError(
            f"{root.place}: expected an object '{{...}}', found {_kind(root.value)}"
        )
    root.value.pop("$schema", None)
    base = root.value.pop("extends", None)
    if base is None:
        return root
    if not isinstance(base.value, str) or not base.value:
        raise ConfigError(f"{base.place}: extends: expected a path, found {_kind(base.value)}")
    base_path = os.path.normpath(os.path.join(os.path.dirname(path), base.value))
    chain = (*above, path)
    if os.path.realpath(base_path) in [os.path.realpath(link) for link in chain]:
        circle = " -> ".join((*chain, base_path))
        raise ConfigError(f"{base.place}: extends: goes round in a circle: {circle}")
    if not os.path.isfile(base_path):
        raise ConfigError(f"{base.place}: extends: no file {base_path!r} (relative to this config)")
    return _merge(_load_file(base_path, chain, problems), root)


def _read(path: str) -> str:
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't read the config: {error.strerror}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - (content.rfind(b"\n", 0, error.start) + 1) + 1
        raise JsonSyntaxError(
            f"{path}:{line}:{column}: not UTF-8 text; save the file as UTF-8"
        ) from None


def _merge(base: _Node, top: _Node) -> _Node:
    """`top` over `base`; a merged object has the place of `top`."""
    if not (isinstance(base.value, dict) and isinstance(top.value, dict)):
        return top
    old, new = base.value.get("class_name"), top.value.get("class_name")
    if old is not None and new is not None and old.value != new.value:
        return top
    merged = dict(base.value)
    for key, node in top.value.items():
        merged[key] = _merge(merged[key], node) if key in merged else node
    return _Node(merged, top.place, top.key_place)


def _apply_override(root: _Node, override: str, problems: list[tuple[str, str]]) -> None:
    """Set one `path=value`; objects on the way are made, list items never."""
    place = f"--set {override}"
    where, equals, text = override.partition("=")
    where = where.strip()
    if not equals or not _SET_PATH.fullmatch(where):
        raise ConfigError(
            f"{place}: expected path=value, such as optimizer.lr=1e-5 or savers[0].every_steps=2"
        )
    if where == "extends":
        raise ConfigError(f"{place}: extends can only stand in a file")
    path: list[str | int] = [
        name if name else int(index) for name, index in _SET_STEP.findall(where)
    ]
    node, done = root, ()
    for step, following in zip(path, path[1:], strict=False):
        child = _child(node, step)
        if child is None or (child.value is None and isinstance(step, str)):
            if isinstance(node.value, dict) and isinstance(following, int):
                here = format_path((*done, step))
                raise ConfigError(
                    f"{place}: {here} is not in the config, so it has no [{following}]"
                )
            child = _Node({}, place, place)
            _put(node, step, child, place, done)
        node, done = child, (*done, step)  # type: ignore[assignment]
    _put(node, path[-1], _override_value(text.strip(), place, problems), place, done)


def _put(node: _Node, step: str | int, child: _Node, place: str, done: JsonPath) -> None:
    here = format_path(done) or "the config"
    if isinstance(step, str):
        if not isinstance(node.value, dict):
            raise ConfigError(f"{place}: {here} is {_kind(node.value)}, it has no key {step!r}")
        child.key_place = place
        node.value[step] = child
        return
    if not isinstance(node.value, list):
        raise ConfigError(f"{place}: {here} is {_kind(node.value)}, not a list")
    if step >= len(node.value):
        raise ConfigError(f"{place}: {here} has {len(node.value)} items, there is no [{step}]")
    node.value[step] = child


def _override_value(text: str, place: str, problems: list[tuple[str, str]]) -> _Node:
    """JSON, else a bare word."""
    if not text:
        raise ConfigError(f'{place}: nothing after =; write "" for an empty string, null for none')
    if text in _MISSPELT:
        raise ConfigError(f"{place}: JSON spells {text} as {_MISSPELT[text]}")
    try:
        node = _Scanner(text, place, problems).document()
    except JsonSyntaxError as error:
        if text[0] in '{["' or _NUMBER.fullmatch(text):
            raise ConfigError(
                f"{place}: not JSON: {str(error).removeprefix(place + ':')}"
            ) from None
        return _Node(text, place, place)
    return _placed(node, place)


def _placed(node: _Node, place: str) -> _Node:
    value = node.value
    if isinstance(value, dict):
        value = {key: _placed(child, place) for key, child in value.items()}
    elif isinstance(value, list):
        value = [_placed(child, place) for child in value]
    return _Node(value, place, place)


def _child(node: _Node, step: str | int) -> _Node | None:
    if isinstance(node.value, dict):
        found = node.value.get(step)
        return found if isinstance(found, _Node) else None
    if isinstance(node.value, list) and isinstance(step, int) and 0 <= step < len(node.value):
        item = node.value[step]
        return item if isinstance(item, _Node) else None
    return None


def _plain(node: _Node) -> Any:
    if isinstance(node.value, dict):
        return {key: _plain(child) for key, child in node.value.items() if key != "$comment"}
    if isinstance(node.value, list):
        return [_plain(child) for child in node.value]
    return node.value


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), "a number")
