"""A tokenizer of 256 bytes and nine chat tokens, with its own ChatML template.

Byte b has id b; the chat tokens follow. It is an ordinary `tokenizers` BPE without merges, so a
saved folder opens with AutoTokenizer. The template follows Qwen3's rules: reasoning is shown only
after the last user message, the last answer always has a think block, and `enable_thinking=False`
puts an empty one in the prompt.

Source: byte-to-character table of the byte-level pre-tokenizer, as in GPT-2 (Radford et al.,
2019).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pegboard_plugins.tokenizers.hf_tokenizer import wrap_tokenizer

if TYPE_CHECKING:
    from pegboard_plugins.tokenizers.hf_tokenizer import TransformersTokenizer

__all__ = ["CHAT_TEMPLATE", "CHAT_TOKENS", "IMAGE_TOKENS", "byte_characters", "make_byte_tokenizer"]

CHAT_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)

IMAGE_TOKENS = ("<IMG_CONTEXT>", "<img>", "</img>")
"""Ids 265 to 267 of a tokenizer with image tokens."""

CHAT_TEMPLATE = r"""
{%- set first_is_system = messages and messages[0].role == 'system' -%}
{%- if tools or first_is_system -%}
    {{- '<|im_start|>system\n' -}}
    {%- if first_is_system -%}
        {{- messages[0].content -}}
        {%- if tools %}{{- '\n\n' -}}{%- endif -%}
    {%- endif -%}
    {%- if tools -%}
        {{- 'You can call these functions, one JSON schema a line:\n<tools>\n' -}}
        {%- for tool in tools -%}
            {{- tool | tojson -}}{{- '\n' -}}
        {%- endfor -%}
        {{- '</tools>\nCall one with ' -}}
        {{- '<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>' -}}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endif -%}
{%- set question = namespace(index=-1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- set question.index = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else '' -%}
    {%- if message.role == 'assistant' -%}
        {%- set reasoning = message.reasoning_content or '' -%}
        {%- if not reasoning and '</think>' in content -%}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] -%}
            {%- set content = content.split('</think>')[-1].lstrip('\n') -%}
        {%- endif -%}
        {{- '<|im_start|>assistant\n' -}}
        {%- if loop.index0 > question.index and (loop.last or reasoning) -%}
            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' -}}
            {%- set content = content.lstrip('\n') -%}
        {%- endif -%}
        {{- content -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set function = call.function or call -%}
            {%- if content or not loop.first %}{{- '\n' -}}{%- endif -%}
            {{- '<tool_call>\n{"name": ' + function.name | tojson + ', "arguments": ' -}}
            {%- if function.arguments is string -%}
                {{- function.arguments -}}
            {%- else -%}
                {{- (function.arguments or {}) | tojson -}}
            {%- endif -%}
            {{- '}\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\n' -}}
    {%- elif message.role == 'tool' -%}
        {%- if loop.first or loop.previtem.role != 'tool' -%}
            {{- '<|im_start|>user' -}}
        {%- endif -%}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' -}}
        {%- if loop.last or loop.nextitem.role != 'tool' -%}
            {{- '<|im_end|>\n' -}}
        {%- endif -%}
    {%- elif not (loop.first and first_is_system) -%}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if enable_thinking is defined and not enable_thinking -%}
        {{- '<think>\n\n</think>\n\n' -}}
    {%- endif -%}
{%- endif -%}
""".strip()


def make_byte_tokenizer(*, image_tokens: bool = False) -> TransformersTokenizer:
    """Build it; no file is read.

    Args:
        image_tokens: three more tokens, for pictures as Intern-S1 writes them.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    rust = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_tokens(
        [
            AddedToken(
                token, normalized=False, special=token.startswith("<|") or token in IMAGE_TOKENS
            )
            for token in (*CHAT_TOKENS, *(IMAGE_TOKENS if image_tokens else ()))
        ]
    )
    make: Callable[..., Any] = PreTrainedTokenizerFast
    return wrap_tokenizer(
        make(
            tokenizer_object=rust,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            chat_template=CHAT_TEMPLATE,
            clean_up_tokenization_spaces=False,
        )
    )


def byte_characters() -> list[str]:
    """The printable character that stands for each byte: itself, or the next one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
