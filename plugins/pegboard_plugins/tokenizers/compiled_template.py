"""A chat template compiled once and rendered as transformers' `apply_chat_template` renders it.

Messages are given to the template as that function prepares them, less its copy of every value: what
is rendered here is plain JSON already. The sandbox's checks of what a template looks up and calls are
most of a render's time; the look-ups and calls that are safe whatever the value are answered before it.
What tools and arguments are as JSON is remembered: each turn of a chat renders them again.
"""

from __future__ import annotations

import marshal
from collections.abc import Callable, Mapping, Sequence
from types import BuiltinMethodType
from typing import Any

__all__ = ["CompiledTemplate"]

_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_DICT_ATTRIBUTES = frozenset(dir(dict))
_SCALARS = frozenset({bool, int, float, str})
_MAX_TEXTS = 2048
_MAX_KEY_BYTES = 1 << 16


class CompiledTemplate:
    """One template.

    Args:
        source: the jinja text.
        special_tokens: names such as `bos_token` and their spellings, which templates may read.

    Raises:
        jinja2.TemplateError: it can't be compiled.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        # Not the cached one: its environment is changed below.
        compile_anew = getattr(_compile_jinja_template, "__wrapped__", _compile_jinja_template)
        self.source = source
        self._template = compile_anew(source)
        self._special_tokens = {name: str(token) for name, token in special_tokens.items()}
        environment = self._template.environment
        _answer_safe_look_ups(environment)
        _make_safe_calls(environment)
        filters = environment.filters
        filters["tojson"] = _remembering(filters["tojson"])
        # The chain of scopes that a template looks through, as one dict: it never changes.
        self._globals = dict(self._template.globals)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        template_kwargs: Mapping[str, Any],
    ) -> str:
        """The text; raises what the template raises."""
        if not messages:
            raise ValueError("an empty conversation; give at least one message")
        template = self._template
        context = template.new_context(
            {
                **self._globals,
                **self._special_tokens,
                "messages": [_prepared(message) for message in messages],
                "tools": None if tools is None else list(tools),
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                **template_kwargs,
            },
            shared=True,
        )
        return str(template.environment.concat(template.root_render_func(context)))


def _make_safe_calls(environment: Any) -> None:
    """Call as the sandbox would, sooner: methods of strings, but for the two that format, and `namespace`."""
    call = environment.call
    namespace = environment.globals["namespace"]
    formats = ("format", "format_map")

    def call_safely(context: Any, called: Any, *arguments: Any, **options: Any) -> Any:
        is_of_str = type(called) is BuiltinMethodType and type(called.__self__) is str
        if (is_of_str and called.__name__ not in formats) or called is namespace:
            options.pop("_loop_vars", None)
            options.pop("_block_vars", None)
            return called(*arguments, **options)
        return call(context, called, *arguments, **options)

    environment.call = call_safely


def _prepared(message: Mapping[str, Any]) -> dict[str, Any]:
    """Without null values, and with its reasoning under each name that templates read."""
    prepared = {key: value for key, value in message.items() if value is not None}
    for key in _REASONING_KEYS:
        if key in prepared:
            return {"thinking": prepared[key], **prepared, "reasoning_content": prepared[key]}
    return prepared


def _remembering(to_json: Callable[..., str]) -> Callable[..., str]:
    """The same filter, which keeps its answers by value: marshal is some ten times as fast as JSON.

    NOTE: format 2, whose bytes depend on the value alone; they differ wherever the JSON could (True
    and 1, 1 and 1.0, the order of keys), and what is of no plain type has none.
    """
    texts: dict[bytes, str] = {}

    def tojson(value: Any, *arguments: Any, **options: Any) -> str:
        if arguments or options:
            return to_json(value, *arguments, **options)
        try:
            key = marshal.dumps(value, 2)
        except ValueError:
            return to_json(value)
        text = texts.get(key)
        if text is None:
            text = to_json(value)
            if len(texts) >= _MAX_TEXTS:
                texts.clear()
            if len(key) <= _MAX_KEY_BYTES:
                texts[key] = text
        return text

    return tojson


def _answer_safe_look_ups(environment: Any) -> None:
    """Answer as the sandbox would, sooner.

    A dict: jinja tries the attribute, then the item; where dict has no such attribute the item is
    all there can be. A method of a string is safe but for the two that format. A variable of the
    loop or of a namespace is safe where its value is a number, a string or None.
    """
    from jinja2.runtime import LoopContext

    look_up = environment.getattr
    undefined = environment.undefined
    holders = (LoopContext, environment.globals["namespace"])
    safe_of_str = frozenset(name for name in dir(str) if name[0] != "_" and name[:6] != "format")

    def getattr_or_item(obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict:
            if attribute not in _DICT_ATTRIBUTES:
                try:
                    return obj[attribute]
                except KeyError:
                    return undefined(obj=obj, name=attribute)
        elif kind is str:
            if attribute in safe_of_str:
                return getattr(obj, attribute)
        elif kind in holders and attribute[0] != "_":
            try:
                value = getattr(obj, attribute)
            except AttributeError:
                return look_up(obj, attribute)
            if value is None or type(value) in _SCALARS:
                return value
        return look_up(obj, attribute)

    environment.getattr = getattr_or_item
