"""A compiled template renders what transformers' apply_chat_template renders, in its sandbox."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from transformers.utils import chat_template_utils

from pegboard_plugins.tokenizers.byte_tokenizer import CHAT_TEMPLATE, make_byte_tokenizer
from pegboard_plugins.tokenizers.compiled_template import CompiledTemplate
from pegboard_plugins.tokenizers.hf_tokenizer import wrap_tokenizer

ASSETS = Path(__file__).resolve().parents[4] / "shared" / "assets"
USER = {"role": "user", "content": "q"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": "\u00e9"}}}
CHATS: list[list[dict[str, Any]]] = [
    [USER],
    [USER, {"role": "assistant", "content": "a", "reasoning_content": "r"}],
    [USER, {"role": "assistant", "content": "a", "thinking": "t"}],
    [USER, {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None}],
    [
        {"role": "system", "content": "s"},
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "<think>\nr\n</think>\n\na"},
    ],
]

if not hasattr(chat_template_utils, "_REASONING_FIELDS"):
    # Earlier releases of transformers leave reasoning under the one name that it came by, and nulls.
    LATER = {"thinking", "reasoning_content", "refusal"}
    CHATS = [chat for chat in CHATS if not any(LATER & message.keys() for message in chat)]

# What templates in use do: namespaces, loop variables, methods of strings, filters, macros, a slice,
# names of special tokens, missing keys.
TEMPLATES = [
    CHAT_TEMPLATE,
    "{{ eos_token }}{% for m in messages[::-1] %}{{ loop.index0 }}{{ loop.previtem.role if loop.previtem is defined }}"
    "{{ m.content | default('none', true) | trim | upper }}{{ m.nothing is defined }}{% endfor %}",
    "{% macro one(m) %}[{{ m['role'] }}|{{ m.get('content') }}]{% endmacro %}"
    "{% set ns = namespace(seen=0, last=none) %}{% for m in messages %}{% set ns.seen = ns.seen + 1 %}"
    "{% set ns.last = m %}{{ one(m) }}{% endfor %}{{ ns.seen }}{{ ns.last.role }}",
    "{% for m in messages %}{% for key, value in m.items() %}{{ key }}={{ value is string }};"
    "{% endfor %}{% if m.content is string %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}"
    "{{ '%s' | format(m.role) }}{{ '{}'.format(m.role) }}{% endif %}{% endfor %}",
    "{% for m in messages if m.role != 'user' %}{{ loop.first }}{{ loop.length }}"
    "{{ m.tool_calls | tojson if m.tool_calls else '' }}{{ m.thinking }}{{ m.keys() | list }}"
    "{% else %}{{ tools | tojson }}{{ documents is none }}{% endfor %}{{ enable_thinking }}",
]


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
@pytest.mark.parametrize("prompt", [False, True])
def test_the_text_is_that_of_transformers(template: str, prompt: bool) -> None:
    tokenizer: Any = make_byte_tokenizer()
    tokenizer.chat_template = template
    reference: Any = tokenizer._tokenizer
    for chat, tools in itertools.product(CHATS, (None, [CALL])):
        expected = reference.apply_chat_template(
            chat, tools=tools, add_generation_prompt=prompt, tokenize=False, enable_thinking=False
        )
        kwargs = {"enable_thinking": False}
        own = tokenizer.render(
            chat, tools=tools, add_generation_prompt=prompt, template_kwargs=kwargs
        )
        assert own == expected


def test_real_records_render_as_transformers_does() -> None:
    if not (ASSETS / "qwen3_tokenizer").is_dir():
        pytest.skip("the Qwen3 tokenizer is not on this machine")
    from transformers import AutoTokenizer

    reference: Any = AutoTokenizer.from_pretrained(str(ASSETS / "qwen3_tokenizer"))
    tokenizer = wrap_tokenizer(reference)
    for name in ("glaive_toolcall_en", "gsm8k_test"):
        with (ASSETS / "text" / f"{name}_messages.jsonl").open(encoding="utf-8") as lines:
            for record in map(json.loads, itertools.islice(lines, 50)):
                messages, tools = record["messages"], record.get("tools")
                for end in range(1, len(messages) + 1):
                    part = messages[:end]
                    expected = reference.apply_chat_template(part, tools=tools, tokenize=False)
                    assert tokenizer.render(part, tools=tools) == expected


def test_a_template_can_do_no_more_than_in_the_sandbox() -> None:
    for template in (
        "{{ messages.__class__ }}",
        "{{ messages[0].__class__.__mro__ }}",
        "{{ ''.__class__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ '{m.__class__}'.format_map({'m': messages}) }}",
        "{% set write = '{0.__class__}'.format %}{{ write(messages) }}",
        "{{ ('{0.__class__}' | attr('format'))(messages) }}",
        "{% for m in messages %}{% set write = '{0.__class__}'.format %}{{ write(m) }}{% endfor %}",
        "{% for m in messages %}{{ loop.__init__ }}{% endfor %}",
    ):
        text_or_error = ""
        try:
            text_or_error = CompiledTemplate(template, {}).render([USER], None, False, {})
        except SecurityError:
            continue
        assert "class" not in text_or_error and "method" not in text_or_error
    for template in ("{{ messages.append(1) }}", "{{ messages[0].update({'x': 1}) }}"):
        with pytest.raises(SecurityError):
            CompiledTemplate(template, {}).render([USER], None, False, {})


def test_what_a_template_raises_and_an_empty_chat_are_errors() -> None:
    with pytest.raises(TemplateError, match="no such role"):
        CompiledTemplate("{{ raise_exception('no such role') }}", {}).render(
            [USER], None, False, {}
        )
    with pytest.raises(ValueError, match="empty conversation"):
        CompiledTemplate("x", {}).render([], None, False, {})


def test_a_changed_template_is_compiled_again() -> None:
    tokenizer: Any = make_byte_tokenizer()
    tokenizer.chat_template = "a"
    assert tokenizer.render([USER]) == "a"
    tokenizer.chat_template = "b"
    assert tokenizer.render([USER]) == "b"


def test_transformers_own_environment_is_left_alone() -> None:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    shared = _compile_jinja_template("{{ messages[0].role }}").environment
    CompiledTemplate("{{ messages[0].role }}", {})
    assert "getattr" not in vars(shared)
    assert "call" not in vars(shared)


def test_a_render_leaves_nothing_behind_for_the_next() -> None:
    template = CompiledTemplate(
        "{% set ns = namespace(n=0) %}{% set seen = messages | length %}{% set ns.n = ns.n + seen %}"
        "{{ ns.n }}{{ extra is defined }}{{ raise_exception is defined }}",
        {},
    )
    assert template.render([USER], None, False, {"extra": 1}) == "1TrueTrue"
    assert template.render([USER, USER], None, False, {}) == "2FalseTrue"


def test_json_is_remembered_by_value_and_never_stale() -> None:
    """Equal to Python is not equal as JSON; what changed in place is rendered as it is now."""
    template = CompiledTemplate("{{ tools | tojson }}{{ tools[0] | tojson(indent=1) }}", {})
    tool: dict[str, Any] = {"a": 1, "b": [None, "\u00e9", "\ud800"]}
    for value in (1, True, 1.0, "1", None, 1, 2**80, {"y": 1, "x": 2}, {"x": 2, "y": 1}):
        tool["a"] = value
        for _ in range(2):
            text = template.render([USER], [tool], False, {})
            dumped = json.dumps([tool], ensure_ascii=False)
            assert text == dumped + json.dumps(tool, ensure_ascii=False, indent=1)
