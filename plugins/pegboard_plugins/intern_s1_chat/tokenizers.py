"""Tokenizers with a change: pictures in the text, and Intern-S1's chat format for those without a template.

ChatML; the generation prompt opens `<think>` unless `enable_thinking` is false; reasoning is shown
after the last user message only; tool calls stand between `<|action_start|><|plugin|>` and
`<|action_end|>`, results in a turn of the role `environment`.

NOTE: written from third-party descriptions of the published format; where a tokenizer has its own
template, that one is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from pegboard.contracts import Tokenizer

__all__ = ["INTERN_S1_TEMPLATE", "WithPlaceholders", "WithTemplate", "with_intern_s1_template"]

_PLACEHOLDER = "<IMG_CONTEXT>"

INTERN_S1_TEMPLATE = r"""
{%- set question = namespace(index=-1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{%- set question.index = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if tools -%}
    {{- '<|im_start|>system name=<|plugin|>\n' + (tools | tojson) + '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.content is string -%}
        {%- set content = message.content -%}
    {%- else -%}
        {%- set parts = namespace(text='') -%}
        {%- for part in message.content or [] -%}
            {%- if part.type == 'image' -%}
                {%- set parts.text = parts.text + '<IMG_CONTEXT>\n' -%}
            {%- else -%}
                {%- set parts.text = parts.text + part.text -%}
            {%- endif -%}
        {%- endfor -%}
        {%- set content = parts.text -%}
    {%- endif -%}
    {%- if message.role == 'tool' -%}
        {{- '<|im_start|>environment name=<|plugin|>\n\n' + content + '<|im_end|>\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\n' -}}
        {%- if message.reasoning_content and loop.index0 > question.index -%}
            {{- '<think>\n' + message.reasoning_content.strip('\n') + '\n</think>\n\n' -}}
        {%- endif -%}
        {{- content -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set function = call.function or call -%}
            {{- '<|action_start|><|plugin|>\n{"name": ' + function.name | tojson -}}
            {{- ', "parameters": ' -}}
            {%- if function.arguments is string -%}
                {{- function.arguments -}}
            {%- else -%}
                {{- (function.arguments or {}) | tojson -}}
            {%- endif -%}
            {{- '}\n<|action_end|>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\n' -}}
    {%- else -%}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if enable_thinking is not defined or enable_thinking -%}{{- '<think>' -}}{%- endif -%}
{%- endif -%}
""".strip()


class WithPlaceholders:
    """A tokenizer for a record's text after its pictures became `<IMG_CONTEXT>`.

    That token is then no longer something that a user typed: it is taken out of `added_tokens`, by
    which typed special tokens are told. Whatever else is asked goes to the tokenizer itself.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added: Mapping[str, bool] = getattr(tokenizer, "added_tokens", {})
        self.added_tokens = {token: kind for token, kind in added.items() if token != _PLACEHOLDER}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # not yet there while it is unpickled
            raise AttributeError(name)
        return getattr(self._tokenizer, name)


class WithTemplate(WithPlaceholders):
    """A tokenizer that renders with another chat template than its own."""

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        super().__init__(tokenizer)
        self.added_tokens = getattr(tokenizer, "added_tokens", {})
        self.chat_template = template

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Callable[..., Any] = render_jinja_template
        rendered, _ = render(
            conversations=[list(messages)],
            tools=None if tools is None else list(tools),
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            **(template_kwargs or {}),
        )
        return str(rendered[0])

    def fingerprint(self) -> str:
        return f"{self._tokenizer.fingerprint()} {self.chat_template}"


def with_intern_s1_template(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with Intern-S1's chat format in place of its own."""
    return cast("Tokenizer", WithTemplate(tokenizer, INTERN_S1_TEMPLATE))
