"""Render chats through a tokenizer's template, and know its ways.

A template may write several prompts for one history: Qwen3 with `enable_thinking=False` appends
an empty think block. Where a variant is always the default prompt plus a constant, which probes
show once, it costs no second render. Probes also tell whether it takes a call's arguments as an
object or as JSON text, and whether it knows the role `developer`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

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


_WORD = "pegboardprobe"


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
        self._suffixes: dict[str, str] = {}
        self._variants: tuple[dict[str, Any], ...] = ()
        variables = template_variables(tokenizer.chat_template)
        if "enable_thinking" in variables and "enable_thinking" not in self._kwargs:
            self._learn_variants(({"enable_thinking": False}, {"enable_thinking": True}))
        self._arguments = self._learn_arguments()
        self._knows_developer = self._renders_role("developer") or not self._renders_role("system")

    def adapt(self, messages: Messages) -> list[dict[str, Any]]:
        """The messages as this template reads them, new where they change.

        A call's arguments become the object or the JSON text that the template takes (as they are,
        where it takes both); `developer` becomes `system` where the template leaves it out.

        Raises:
            DataError: arguments that should be an object are no JSON text of one.
        """
        adapted = []
        for i, message in enumerate(messages):
            changed = dict(message)
            if message["role"] == "developer" and not self._knows_developer:
                changed["role"] = "system"
            if self._arguments is not None and message.get("tool_calls"):
                calls = message["tool_calls"]
                changed["tool_calls"] = [
                    _with_arguments(call, self._arguments, f"messages[{i}].tool_calls[{k}]")
                    for k, call in enumerate(calls)
                ]
            adapted.append(changed)
        return adapted

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

    def argument_of(self, prompt: str) -> str:
        """The template argument that makes this one of the `prompts`, such as `enable_thinking=false`.

        Empty for the default prompt, and where a variant is more than text after it.
        """
        for suffix, argument in self._suffixes.items():
            if prompt.endswith(suffix):
                return argument
        return ""

    def renders(self, message: Mapping[str, Any], text: str) -> bool:
        """Whether `text`, part of the assistant `message`, is rendered in a two-message chat."""
        try:
            return text in self.full(({"role": "user", "content": "a"}, message), None)
        except DataError:
            return False

    def _learn_variants(self, variants: Sequence[dict[str, Any]]) -> None:
        suffixes: dict[str, str] = {}
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
                [(name, value)] = variant.items()
                suffixes[suffix] = f"{name}={json.dumps(value)}"
        self._suffixes, self._variants = suffixes, tuple(rendered)

    def _learn_arguments(self) -> Literal["object", "text"] | None:
        """The one form of a call's arguments that the template renders; None if it takes both."""
        rendered = []
        for arguments in ({"k": _WORD}, json.dumps({"k": _WORD})):
            call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
            message = {"role": "assistant", "content": "", "tool_calls": [call]}
            try:
                text = self.full(({"role": "user", "content": "a"}, message), None)
            except DataError:
                text = ""
            rendered.append(text)
        takes_object = _WORD in rendered[0]
        takes_text = _WORD in rendered[1] and '\\"k\\"' not in rendered[1]
        if takes_object == takes_text:
            return None
        return "object" if takes_object else "text"

    def _renders_role(self, role: str) -> bool:
        try:
            return _WORD in self.full(
                ({"role": role, "content": _WORD}, {"role": "user", "content": "a"}), None
            )
        except DataError:
            return False

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


def _with_arguments(
    call: Mapping[str, Any], form: Literal["object", "text"], where: str
) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments")
    if arguments is None:
        return dict(call)
    if form == "object" and isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise DataError(f"{where}: arguments that are not JSON: {error}") from None
        if not isinstance(arguments, dict):
            raise DataError(f"{where}: arguments that are no JSON object")
    elif form == "text" and isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    changed = {**function, "arguments": arguments}
    return {**call, "function": changed} if "function" in call else changed
