"""The scanner agrees with json.loads, knows every place, and layers merge as documented."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import pytest

from pegboard.errors import ConfigError
from pegboard.json_source import JsonSyntaxError, format_path, load_layers, parse_json

SEED_TEXT = """{
\t"a": [1, -2.5e3, true, false, null, {"b c": "x\\u00e9\\ud83d\\ude00\\n"}],
  "d": {"e": {}, "f": [], "g": ""}, "h": 0.1,
  "i": "plain \u00e9 text"
}"""


def write(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def refuse(word: str) -> float:
    raise ValueError(word)


def reference(text: str) -> object:
    def finite(number: str) -> float:
        value = float(number)
        if math.isinf(value):
            raise ValueError(number)
        return value

    value = json.loads(text, parse_constant=refuse, parse_float=finite)
    json.dumps(value, ensure_ascii=False).encode("utf-8")  # lone surrogates raise
    return value


def test_the_scanner_accepts_and_refuses_what_json_loads_does() -> None:
    rng = random.Random(7)
    alphabet = '{}[],:"\\ \n\t0123456789eE+-.truefalsnNaI/\u00e9ud8'
    accepted = 0
    for _ in range(2000):
        chars = list(SEED_TEXT)
        for _ in range(rng.randint(1, 2)):
            at = rng.randrange(len(chars))
            action = rng.randrange(3)
            if action == 0:
                chars[at] = rng.choice(alphabet)
            elif action == 1:
                del chars[at]
            else:
                chars.insert(at, rng.choice(alphabet))
        text = "".join(chars)
        try:
            expected = reference(text)
        except ValueError:
            with pytest.raises(JsonSyntaxError):
                parse_json(text)
            continue
        if not isinstance(expected, dict):
            continue
        accepted += 1
        found = parse_json(text)
        assert repr(found.data) == repr(expected), text
    assert 200 < accepted < 1900


def test_every_key_and_value_has_its_line_and_column() -> None:
    source = parse_json('{\n\t"a": [1,\n  {"b": "x"}]\n}', "f.json")
    assert source.place(()) == "f.json:1:1"
    assert source.key_place(("a",)) == "f.json:2:2"
    assert source.place(("a",)) == "f.json:2:7"
    assert source.place(("a", 0)) == "f.json:2:8"
    assert source.place(("a", 1)) == "f.json:3:3"
    assert source.key_place(("a", 1, "b")) == "f.json:3:4"
    assert source.place(("a", 1, "b")) == "f.json:3:9"
    assert source.place(("a", 1, "zzz", "y")) == "f.json:3:3"
    assert source.place(("a", 9)) == "f.json:2:7"


def test_duplicate_keys_are_all_reported_with_both_places() -> None:
    source = parse_json('{"a": 1,\n "b": {"c": 1, "c": 2},\n "a": 3}', "f.json")
    assert source.problems == (
        ("f.json:2:16", "b.c: duplicate key 'c', first at f.json:2:8; keep one of them"),
        ("f.json:3:2", "a: duplicate key 'a', first at f.json:1:2; keep one of them"),
    )
    assert source.data == {"a": 3, "b": {"c": 2}}


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ('{"a": [1, 2,]}', "1:12", "trailing comma before ']'"),
        ('{"a": 1,\n}', "1:8", "trailing comma before '}'"),
        ('{"a": 1, // one\n"b": 2}', "1:10", "no comments"),
        ('{\n# one\n"b": 2}', "2:1", "no comments"),
        ('{"a": NaN}', "1:7", "NaN"),
        ('{"a": -Infinity}', "1:7", "finite"),
        ('{"a": 1e400}', "1:7", "beyond the range"),
        ('{"a": True}', "1:7", "spells it true"),
        ("{'a': 1}", "1:2", "double quotes"),
        ("{\"a\": 'x'}", "1:7", "double quotes"),
        ('{"a": 1 "b": 2}', "1:9", "expected ',' or '}'"),
        ('{"a" 1}', "1:6", "expected ':'"),
        ('{"a": "x\ny"}', "1:9", "bad string"),
        ('{"a": "\\ud800"}', "1:7", "surrogate"),
        ('{"a": 1', "1:8", "end of the file"),
        ('{"a": 1} {', "1:10", "after the end"),
        ("[1]", "1:1", "expected an object"),
        ("", "1:1", "end of the file"),
        ('{"a": 01}', "1:8", "expected ','"),
        ('{"a": ' + "9" * 5000 + "}", "1:7", "too many digits"),
    ],
)
def test_broken_text_is_refused_at_its_place_in_words(text: str, place: str, words: str) -> None:
    with pytest.raises(JsonSyntaxError, match=re.escape(words)) as caught:
        parse_json(text, "f.json")
    assert str(caught.value).startswith(f"f.json:{place}: ")


def test_deep_nesting_is_an_error_with_a_place_not_a_recursion_error() -> None:
    with pytest.raises(JsonSyntaxError, match="nested deeper than 100"):
        parse_json('{"a": ' + "[" * 100_000)


def test_a_byte_order_mark_is_accepted_and_other_encodings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bom.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert load_layers(path).data == {"a": 1}
    assert load_layers(path).place(("a",)) == f"{path}:1:7"
    path.write_bytes(b'{"a":\n "\xff"}')
    with pytest.raises(ConfigError, match=r"bom.json:2:3: not UTF-8"):
        load_layers(path)


def test_a_missing_file_or_a_folder_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_layers(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="can't read"):
        load_layers(tmp_path)


def test_objects_merge_and_lists_scalars_and_other_classes_replace(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    base = write(
        tmp_path,
        "base.json",
        {
            "$schema": "x",
            "o": {"class_name": "A", "x": 1, "y": {"z": 1}},
            "p": {"class_name": "A", "x": 1},
            "l": [1, 2],
            "s": 1,
        },
    )
    top = write(
        tmp_path / "sub",
        "top.json",
        '{"extends": "../base.json", "$comment": "c",\n "o": {"y": {"w": 2}},\n'
        ' "p": {"class_name": "B", "$comment": ["d"]}, "l": [3], "t": [{"$comment": 1}]}',
    )
    source = load_layers(top)
    assert source.data == {
        "o": {"class_name": "A", "x": 1, "y": {"z": 1, "w": 2}},
        "p": {"class_name": "B"},
        "l": [3],
        "s": 1,
        "t": [{}],
    }
    assert source.place(("o", "y", "w")) == f"{top}:2:19"
    assert source.place(("o", "x")).startswith(f"{base}:1:")
    assert source.place(("l", 0)).startswith(f"{top}:3:")


def test_extends_that_goes_round_or_nowhere_is_an_error(tmp_path: Path) -> None:
    a = write(tmp_path, "a.json", {"extends": "b.json"})
    write(tmp_path, "b.json", {"extends": "./a.json"})
    with pytest.raises(ConfigError, match="circle: .*a.json -> .*b.json -> .*a.json"):
        load_layers(a)
    c = write(tmp_path, "c.json", {"extends": "none.json"})
    with pytest.raises(ConfigError, match=r"c.json:1:13: extends: no file"):
        load_layers(c)
    d = write(tmp_path, "d.json", {"extends": 3})
    with pytest.raises(ConfigError, match="expected a path, found a number"):
        load_layers(d)


def test_overrides_take_json_or_a_bare_word_and_cite_themselves(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", {"l": [{"x": 1}], "n": None})
    source = load_layers(
        path,
        ["o.lr=1e-5", "l[0].x=data/x.jsonl", 's="3"', "i=3", "n.m=true", 'j={"k": [1]}', "w=a=b"],
    )
    assert source.data == {
        "l": [{"x": "data/x.jsonl"}],
        "n": {"m": True},
        "o": {"lr": 1e-5},
        "s": "3",
        "i": 3,
        "j": {"k": [1]},
        "w": "a=b",
    }
    assert source.place(("o", "lr")) == source.key_place(("o",)) == "--set o.lr=1e-5"
    assert source.place(("j", "k", 0)) == '--set j={"k": [1]}'


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lr", "expected path=value"),
        (".lr=1", "expected path=value"),
        ("a[x]=1", "expected path=value"),
        ("l[1]=2", r"l has 1 items, there is no [1]"),
        ("l.x=2", "l is a list, it has no key 'x'"),
        ("s.x=2", "s is a number, it has no key 'x'"),
        ("s[0]=2", "s is a number, not a list"),
        ("new[0]=2", "new is not in the config, so it has no [0]"),
        ("s=True", "JSON spells True as true"),
        ('s={"a": 1', "not JSON"),
        ("s=1e999", "beyond the range"),
        ("s=", "nothing after ="),
        ("extends=b.json", "only stand in a file"),
    ],
)
def test_an_override_that_fits_nowhere_is_refused(
    tmp_path: Path, override: str, words: str
) -> None:
    path = write(tmp_path, "a.json", {"l": [1], "s": 1})
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        load_layers(path, [override])
    assert str(caught.value).startswith(f"--set {override}: ")


def test_a_path_is_spelt_as_set_takes_it() -> None:
    assert format_path(("datasets", 1, "dataset", "name")) == "datasets[1].dataset.name"
