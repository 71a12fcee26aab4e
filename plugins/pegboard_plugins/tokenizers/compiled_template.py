"""A chat template compiled once and rendered as transformers' `apply_chat_template` renders it.

Messages are given to the template as that function prepares them, less its copy of every value: what
is rendered here is plain JSON already. Looking up a key of a message is the most frequent thing that
a template does, so it is answered without first trying the dictionary's methods and failing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["CompiledTemplate"]

_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_DICT_ATTRIBUTES = frozenset(dir(dict))


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
        _look_up_keys_first(self._template.environment)

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
        return str(
            self._template.render(
                {
                    **self._special_tokens,
                    "messages": [_prepared(message) for message in messages],
                    "tools": None if tools is None else list(tools),
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                    **template_kwargs,
                }
            )
        )


def _prepared(message: Mapping[str, Any]) -> dict[str, Any]:
    """Without null values, and with its reasoning under each name that templates read."""
    prepared = {key: value for key, value in message.items() if value is not None}
    for key in _REASONING_KEYS:
        if key in prepared:
            return {"thinking": prepared[key], **prepared, "reasoning_content": prepared[key]}
    return prepared


def _look_up_keys_first(environment: Any) -> None:
    """`message.role` of a dict: jinja tries the attribute, then the item; where dict has no such
    attribute the item is all there can be."""
    look_up = environment.getattr
    undefined = environment.undefined

    def getattr_or_item(obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute not in _DICT_ATTRIBUTES:
            try:
                return obj[attribute]
            except KeyError:
                return undefined(obj=obj, name=attribute)
        return look_up(obj, attribute)

    environment.getattr = getattr_or_item
