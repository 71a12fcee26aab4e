"""Render chats through a tokenizer's template, and know its prompt variants.

A template may write several prompts for one history: Qwen3 with `enable_thinking=False` appends
an empty think block. Where a variant is always the default prompt plus a constant, which probes
show once, it costs no second render.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pegboard.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pegboard.contracts import Tokenizer

__all__ = ["ChatRenderer", "template_variables"]

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None

_PROBE_CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
_PROBES: tuple[tuple[dict[str, Any], ...], ...] = (
    ({"role": "user", "content": "a"},),
    ({"role": "system", "content": "s"}, {"role": "user", "content": "a"}),
    (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ),
    (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]},
        {"role": "tool", "name": "f", "content": "d"},
    ),
)


def template_variables(template: str) -> frozenset[str]:
    """Names that the template reads but does not set, such as `messages` and `enable_thinking`."""
    from jinja2 import TemplateSyntaxError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # Published templates use the `generation` tag and loop controls, which only transformers' own
    # environment knows.
    try:
        environment = _compile_jinja_template(template).environment
    except TemplateSyntaxError as error:
        raise ConfigError(f"chat template, line {error.lineno}: {error.message}") from error
    assert isinstance(environment, ImmutableSandboxedEnvironment)
    return frozenset(meta.find_undeclared_variables(environment.parse(template)))


class ChatRenderer:
    """The chat template of a tokenizer with fixed template arguments.

    Args:
        template_kwargs: arguments of the template. An explicit `enable_thinking` is the only
            variant then, so that a model can be trained to write the empty think block itself.

    Raises:
        ConfigError: the tokenizer has no chat template, or one that doesn't compile.
    """

    def __init__(
        self, tokenizer: Tokenizer, template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        if tokenizer.chat_template is None:
            raise ConfigError(
                "tokenizer: it has no chat template; set tokenizer.chat_template to a jinja file"
            )
        self._tokenizer = tokenizer
        self._kwargs = dict(template_kwargs or {})
        self._suffixes: tuple[str, ...] = ()
        self._variants: tuple[dict[str, Any], ...] = ()
        variables = template_variables(tokenizer.chat_template)
        if "enable_thinking" in variables and "enable_thinking" not in self._kwargs:
            self._learn_variants(({"enable_thinking": False}, {"enable_thinking": True}))

    def full(self, messages: Messages, tools: Tools) -> str:
        """The whole chat, as trained on.

        Raises:
            DataError: the template refuses these messages.
        """
        return self._render(messages, tools, False, {})

    def prompts(self, messages: Messages, tools: Tools) -> list[str]:
        """What the model may be given to write the next turn: the default, then its variants."""
        prompt = self._render(messages, tools, True, {})
        prompts = [prompt, *(prompt + suffix for suffix in self._suffixes)]
        prompts += [self._render(messages, tools, True, variant) for variant in self._variants]
        return prompts

    def renders(self, message: Mapping[str, Any], text: str) -> bool:
        """Whether `text`, part of the assistant `message`, is rendered in a two-message chat."""
        try:
            return text in self.full(({"role": "user", "content": "a"}, message), None)
        except DataError:
            return False

    def _learn_variants(self, variants: Sequence[dict[str, Any]]) -> None:
        suffixes: list[str] = []
        rendered: list[dict[str, Any]] = []
        for variant in variants:
            found = set()
            for probe in _PROBES:
                try:
                    default = self._render(probe, None, True, {})
                    other = self._render(probe, None, True, variant)
                except DataError:  # a template without system or tool messages
                    continue
                found.add(other[len(default) :] if other.startswith(default) else None)
            suffix = next(iter(found)) if len(found) == 1 else None
            if suffix is None:
                rendered.append(variant)
            elif suffix:
                suffixes.append(suffix)
        self._suffixes, self._variants = tuple(suffixes), tuple(rendered)

    def _render(
        self, messages: Messages, tools: Tools, prompt: bool, variant: Mapping[str, Any]
    ) -> str:
        from jinja2 import TemplateError

        refusals = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
        try:
            return self._tokenizer.render(
                messages,
                tools=tools,
                add_generation_prompt=prompt,
                template_kwargs={**self._kwargs, **variant},
            )
        except refusals as error:
            line = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"messages: the chat template refuses them: {line}") from error
