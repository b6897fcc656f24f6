"""A kit with a chat template of Qwen3's form: messages are rendered as by transformers, and rows train."""

import dataclasses
import json

import pytest
from support.commands import siftune
from support.kits import contents
from support.tokenizer import byte_tokenizer

from siftune.data.rows import rows_from
from siftune.data.tokens import tokenize_rows
from siftune.offsite.kit.folder import load_tokenizer, write_kit

# Turns before the last question lose their reasoning. The answer to it has a block of reasoning, be it empty.
QWEN3 = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- '# Tools\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last_query=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == 'user' and message.content is string
        and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = message.content.split('</think>')[0].rstrip('\n').split('<think>')[-1] %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query and (loop.last or reasoning_content) %}
            {{- '<|im_start|>assistant\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' }}
            {{- content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\n' + content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""

THOUGHT = {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\n4"}
PLAIN = {"role": "assistant", "content": "4"}
CALL = {"function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
TALKS = {
    "one question": [{"role": "user", "content": "2 + 2?"}],
    "reasoning in the content": [{"role": "user", "content": "2 + 2?"}, THOUGHT],
    "reasoning of its own": [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "Two and two."},
    ],
    "two questions": [{"role": "user", "content": "2 + 2?"}, THOUGHT, {"role": "user", "content": "And 3 + 3?"}],
    "tools": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "5"},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "5"},
    ],
}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    parts = dataclasses.replace(contents(max_position_embeddings=256), tokenizer=byte_tokenizer(QWEN3))
    return write_kit(tmp_path_factory.mktemp("qwen3") / "kit", parts)


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": True},
        {"add_generation_prompt": True, "enable_thinking": False},
        {"tools": TOOLS, "add_generation_prompt": True},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_messages_are_rendered_as_by_transformers(kit, talk, options):
    tokenizers = load_tokenizer(kit), byte_tokenizer(QWEN3)
    ours, plain = (one.apply_chat_template(TALKS[talk], tokenize=False, **options) for one in tokenizers)
    assert ours == plain
    assert "<|im_start|>" in ours


def test_the_template_does_what_the_other_tests_compare(kit):
    tokenizer = load_tokenizer(kit)
    texts = {name: tokenizer.apply_chat_template(talk, tokenize=False) for name, talk in TALKS.items()}
    start = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    answer = "<think>\nTwo and two.\n</think>\n\n4<|im_end|>\n"
    assert texts["reasoning in the content"] == texts["reasoning of its own"] == start + answer
    assert texts["two questions"].startswith(start + "4<|im_end|>\n")
    assert texts["tools"].count('{"name": "add", "arguments": {"a": 2, "b": 3}}') == 2
    assert texts["tools"].count("<tool_response>") == 2


def test_rows_with_reasoning_are_tokenised_as_by_transformers(kit):
    rows = rows_from([{"messages": [*TALKS["one question"], answer]} for answer in (THOUGHT, PLAIN)])
    ours, plain = (
        tokenize_rows(rows, one, 2000, "auto").to_list() for one in (load_tokenizer(kit), byte_tokenizer(QWEN3))
    )
    assert ours == plain
    assert len(ours) == 2


def test_rows_with_reasoning_train(kit, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(4 * (json.dumps({"messages": TALKS["reasoning in the content"]}) + "\n"))
    options = ("--steps", "2", "--batch-size", "2", "--adapter", "full", "--max-length", "256")
    siftune(capsys, "train", "--model", kit.path, "--train", rows, "--out", tmp_path / "run", *options)
    found, _ = siftune(capsys, "verify", tmp_path / "run" / "return", "--kit", kit.path)
    assert found["largest"]["update"] > 0
    _, said = siftune(capsys, "verify", kit.path)
    assert "with a chat template" in said
