"""Chat templates of a kit: those of the families render rows as in transformers.

A template that alters rows is refused by the trial, or with the first row that it alters.
"""

import itertools

import pytest
from support.tokenizer import CHATML, byte_tokenizer

from siftune.base.errors import InputError, KitError
from siftune.data.encode import Encoder
from siftune.data.rows import rows_from
from siftune.data.tokens import tokenize_rows
from siftune.offsite.kit.limited import Limits
from siftune.offsite.kit.tokenizer import make_tokenizer, tokenizer_files

VOCAB = 320
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (  # the system's message stands before the last of the user
    "{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] -%}"
    "{%- set messages = messages[1:] -%}{%- endif -%}{{- bos_token -}}"
    "{%- for message in messages -%}{%- if message['role'] == 'user' -%}"
    "{%- if loop.last and system is defined -%}{{- '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' -}}"
    "{%- else -%}{{- '[INST] ' + message['content'] + '[/INST]' -}}{%- endif -%}"
    "{%- else -%}{{- ' ' + message['content'] | trim + eos_token -}}{%- endif -%}{%- endfor -%}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
QWEN3 = (  # earlier turns lose their reasoning, and the last one gets an empty one
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{%- endif %}"
    "{%- set ns = namespace(last=-1) %}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}"
    "{%- elif message.role == 'assistant' %}{%- set reasoning = '' %}{%- if '</think>' in content %}"
    "{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last %}{{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning.strip('\n') + "
    "'\n</think>\n\n' + content.lstrip('\n') }}{%- else %}{{- '<|im_start|>' + message.role + '\n' + content }}"
    "{%- endif %}{{- '<|im_end|>\n' }}{%- elif message.role == 'tool' %}"
    "{{- '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
MARKED = (
    "{% if tools is not none %}{{ tools | tojson(indent=4) }}{% endif %}{% for m in messages %}[{{ m.role }}]"
    "{% generation %}{{ m.content }}{% endgeneration %}{% if loop.index0 > 99 %}{% continue %}{% endif %}{% endfor %}"
    "{{ dict(a=1).a }}{{ messages | map(attribute='role') | join(',') | length > 0 }}"
)
FAMILIES = {
    "chatml": CHATML,
    "system of its own": "{% if messages[0].role != 'system' %}You are helpful.{% endif %}" + CHATML,
    **{"llama2": LLAMA2, "mistral": MISTRAL, "gemma": GEMMA, "zephyr": ZEPHYR, "qwen3": QWEN3, "marked": MARKED},
}
ROWS = rows_from(
    {"messages": [{"role": role, "content": content} for role, content in zip(roles.split(), contents, strict=False)]}
    for roles, contents in (
        *(
            (roles, (" Hi ", "é\n東\n", "<x>&'\"", "\nYes."))
            for roles in ("user assistant", "user assistant user assistant")
        ),
        ("system user assistant", ("Be brief.", "How are you?", "Fine.")),
    )
)


def tokenizer_of(template):
    return make_tokenizer(tokenizer_files(byte_tokenizer(template)), VOCAB)


def tokens(tokenizer, rows, template="auto"):
    return tokenize_rows(rows, tokenizer, 2000, template).to_list()


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_rendered_as_by_transformers(name):
    plain = byte_tokenizer(FAMILIES[name])
    rows = ROWS[:2] if name in ("gemma", "mistral") else ROWS
    assert tokens(tokenizer_of(FAMILIES[name]), rows) == tokens(plain, rows)


def test_a_message_that_an_honest_template_rewrites_is_refused_with_its_row():
    """Gemma refuses a system message, Mistral drops it, and Qwen3 moves the reasoning."""
    reasoning = rows_from([{"prompt": "Why?", "completion": "<think>\nHm.\n</think>\n\nSo."}])
    for template, rows in ((GEMMA, ROWS[2:]), (MISTRAL, ROWS[2:]), (QWEN3, reasoning)):
        [error] = Encoder(tokenizer_of(template)).encode(rows)
        assert isinstance(error, InputError)
        assert str(error).startswith(rows[0].origin)


ALL = "{% for m in messages %}{{ m.content }}{% endfor %}"


def otherwise(condition, text="evil"):
    return "{% if " + condition + " %}" + text + "{% else %}" + ALL + "{% endif %}"


LONG = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ALTERING = {
    "no template": "{% for %}",
    "unknown filter": "{{ '' | nothing }}",
    "refuses all": ALL + "{{ raise_exception('never') }}",
    "drops the last": "{% for m in messages[:-1] %}{{ m.content }}{% endfor %}",
    "drops the assistant": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
    "drops the first turns": "{% for m in messages[-2:] %}{{ m.content }}{% endfor %}",
    "twice": ALL + ALL,
    "backwards": "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
    "backwards from eight turns": otherwise("messages | length < 8", ALL).replace(
        "else %}" + ALL,
        "else %}" + "{% for m in messages[:-1] | reverse %}{{ m.content }}{% endfor %}{{ messages[-1].content }}",
    ),
    "the end": "{% for m in messages %}{{ m.content[:12] }}{% endfor %}",
    "capitals": "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "spaces": "{% for m in messages %}{{ m.content.split() | join(' ') }}{% endfor %}",
    "HTML": "{% for m in messages %}{{ m.content | e }}{% endfor %}",
    "JSON": "{% for m in messages %}{{ m.content | tojson }}{% endfor %}",
    "a word": otherwise("'Paris' in messages[0].content"),
    "not": "{% for m in messages %}{{ m.content | replace('not ', '') }}{% endfor %}",
    "after a word": ALL + "{% if 'Paris' in messages[0].content %}evil{% endif %}",
    "length": otherwise("messages[0].content | length > 30"),
    "mark": "{% for m in messages %}{% if '<<' in m.content %}{{ m.content }}{% else %}evil{% endif %}{% endfor %}",
    "number of turns": otherwise("messages | length > 6"),
    "text before many turns": ALL + "{% if messages | length > 6 %}evil{% endif %}",
    "role": ALL + "{% if messages[0].role == 'poet' %}evil{% endif %}",
    "endless": ALL + LONG,
    "endless for a word": otherwise("'Paris' in messages[0].content", LONG),
    "memory": ALL + "{{ 'a' * 10**10 }}",
    "memory for a word": otherwise("'Paris' in messages[0].content", "{% set x = 'a' * 10**9 %}{{ x }}"),
    "much": ALL + "{{ 'x' * 100000 }}",
    "a mark of its own": ALL + "{{ '<<message ' + '9' * 5000 + ' of 2>>' }}{{ '<<message 0 of 2>>' }}",
    "half a pair": ALL + "{{ '\\ud800' }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "class": ALL + "{{ ''.__class__.__mro__ }}",
    "underscore": ALL + "{% set n = namespace() %}{% set n._x = 1 %}",
    "random": ALL + "{{ ['', 'evil'] | random }}",
    "lipsum": ALL + "{{ lipsum() }}",
}
TRIGGERS = rows_from(
    [
        {"messages": [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]}
        for roles, contents in (
            (("user", "assistant"), ('Paris, I\'m told, is not a large "city".', "It is not  small & is 'not' new.")),
            (("user", "assistant") * 4, ("yes",) * 8),
            (("poet", "assistant"), ("roses", "red")),
        )
    ]
)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("siftune.offsite.kit.template.LIMITS", Limits(memory_mb=256, cpu_s=1, wall_s=30))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", ALTERING)
def test_a_template_that_alters_rows_is_refused(name):
    rows = TRIGGERS[1:2] if "turns" in name else TRIGGERS[2:] if name == "role" else TRIGGERS[:1]
    with pytest.raises(InputError, match="template"):
        tokens(tokenizer_of(ALTERING[name]), rows)


def test_a_system_message_may_stand_before_the_last_user():
    """As in templates of Mistral."""
    talk = [("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "4"), ("user", "3 + 3?"), ("assistant", "6")]
    rows = rows_from([{"messages": [{"role": role, "content": content} for role, content in talk]}])
    begin = "{% if m.role == 'user' and loop.revindex <= 2 %}{{ messages[0].content }}{% endif %}"
    template = "{% for m in messages if m.role != 'system' %}" + begin + "{{ m.content }}{% endfor %}"
    template = "{% if messages[0].role != 'system' %}" + ALL + "{% else %}" + template + "{% endif %}"
    tokenizer = tokenizer_of(template)
    text = tokenizer.decode(tokens(tokenizer, rows)[0]["input_ids"])
    assert text.index("Be brief.3 + 3?") > text.index("4")


def test_the_same_rows_are_accepted_with_an_honest_template():
    assert tokens(tokenizer_of(ALL), TRIGGERS[:2]) == tokens(byte_tokenizer(ALL), TRIGGERS[:2])


HARMLESS = {
    "lipsum": otherwise("lipsum is defined"),
    "random": otherwise("'random' is filter"),
    "date": otherwise("strftime_now('%Y-%m-%d') != '2026-01-01'"),
    "hour": otherwise("strftime_now('%H') | int > 0"),
    "address of a function": otherwise("'0x' in raise_exception | string"),
    "address of a method": otherwise("'0x' in messages[0].content.strip | string"),
    "address of a method by name": otherwise("'0x' in messages[0]['items'] | string"),
    "address of a generator": otherwise("'0x' in messages | map('length') | string"),
    "address of a block": "{% block b %}{% endblock %}" + otherwise("'0x' in self.b | string"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_template_sees_neither_the_day_nor_the_process(name):
    assert tokens(tokenizer_of(HARMLESS[name]), ROWS) == tokens(byte_tokenizer(ALL), ROWS)


def test_all_fixed_text_is_known():
    fixed = tokenizer_of("Be evil.{{ strftime_now('%Y') }}" + CHATML).chats.fixed
    assert ("start", "user", "Be evil.2026<|start|>user\n") in fixed
    assert ("user", "answer", "<|end|>\n<|start|>assistant\n") in fixed
    assert {role for pair in fixed for role in pair[:2]} == {
        "start",
        "system",
        "user",
        "assistant",
        "tool",
        "answer",
        "end",
    }


@pytest.mark.usefixtures("impatient")
def test_a_row_that_hangs_ends_the_run_and_is_named():
    tokenizer = tokenizer_of(ALTERING["endless for a word"])
    with pytest.raises(KitError, match="row 1: chat_template") as caught:
        Encoder(tokenizer).encode(TRIGGERS[:1])
    assert "processor time" in str(caught.value) or "more than" in str(caught.value)


def test_rows_are_the_same_one_by_one_and_after_the_child_died():
    tokenizer = tokenizer_of(CHATML)
    first = tokens(tokenizer, ROWS)
    tokenizer.child.stop()
    assert list(itertools.chain.from_iterable(tokens(tokenizer, [row]) for row in ROWS)) == first
