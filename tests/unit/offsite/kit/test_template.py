"""Chat templates of the families come through, and what drops or multiplies what is said does not."""

import itertools
from datetime import datetime

import pytest
from support.tokenizer import CHATML, byte_tokenizer

from siftune.base.errors import KitError
from siftune.offsite.kit import template
from siftune.offsite.kit.template import try_template

NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
ALTERNATE = (
    "{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] -%}"
    "{%- set messages = messages[1:] -%}{%- endif -%}{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('roles must alternate') -}}{%- endif -%}"
    "{%- if message['role'] == 'user' -%}"
    "{%- if loop.last and system is defined -%}{{- '[INST] ' + system + '\n\n' + message['content'] + ' [/INST]' -}}"
    "{%- else -%}{{- '[INST] ' + message['content'] + ' [/INST]' -}}{%- endif -%}"
    "{%- else -%}{{- ' ' + message['content'] | trim + eos_token -}}{%- endif -%}{%- endfor -%}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "<start_of_turn>{{ role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
)
DATED = (
    "{%- set today = strftime_now('%d %b %Y') if strftime_now is defined else '1 Jan' %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set words = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set words = '' %}{%- endif %}"
    "{{- bos_token }}<|system|>{{ today }}\n{{ words }}"
    "{% if tools is not none %}{{ tools | tojson(indent=4) }}{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}{% endfor %}"
)
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% set ns.last = loop.index0 %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "[{{ m.role }}]{% generation %}{{ content }}{% endgeneration %}{% if loop.index0 > 99 %}{% continue %}{% endif %}"
    "{% endfor %}{{ dict(a=1).a }}"
)
FAMILIES = {
    "chatml": CHATML,
    "with a system of its own": "{% if messages[0].role != 'system' %}You are helpful.{{ 'x' * 3 }}{% endif %}"
    + CHATML,
    "alternate": ALTERNATE,
    "no system": NO_SYSTEM,
    "dated": DATED,
    "thinking": THINKING,
    "in json": "{% for m in messages %}{{ m.content | tojson }}{% endfor %}",
}
TALKS = [
    [{"role": role, "content": content} for role, content in zip(roles, ("Hi ", "é\n東", "<x>&'\""), strict=False)]
    for roles in (("user",), ("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant", "user"))
]


@pytest.mark.parametrize("name", FAMILIES)
def test_templates_of_the_families_are_accepted_and_shown(name):
    shown = try_template(FAMILIES[name], NAMED)
    for words in ("How many legs has a spider?", "Eight.", "And an ant?"):
        assert words in shown


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("talk", "open_turn"), [*itertools.product(range(len(TALKS)), (False, True))])
def test_what_is_rendered_is_what_transformers_renders(name, talk, open_turn):
    tokenizer = byte_tokenizer(FAMILIES[name])
    render, _ = template._compiled(FAMILIES[name], tokenizer.special_tokens_map, datetime.now())
    answers = []
    for ask in (
        lambda: render(TALKS[talk], open_turn),
        lambda: tokenizer.apply_chat_template(TALKS[talk], tokenize=False, add_generation_prompt=open_turn),
    ):
        try:
            answers.append(ask())
        except Exception as error:
            answers.append(str(error))
    assert answers[0] == answers[1]


DROPS = {
    "the last": (
        "{% for m in messages[:-1] %}{{ m.content }}{% endfor %}",
        "the user says in a conversation of 1 turn",
    ),
    "the assistant": (
        "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}",
        "the assistant says in a conversation of 2 turns",
    ),
    "the first of many": ("{% for m in messages[-4:] %}{{ m.content }}{% endfor %}", "the user says in .* of 9 turns"),
    "the system": (
        "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
        "the system says in a conversation of 2 turns",
    ),
    "the end": ("{% for m in messages %}{{ m.content[:12] }}{% endfor %}", "the user says"),
    "letters": ("{% for m in messages %}{{ m.content | replace('é', '') }}{% endfor %}", "the user says"),
    "all": ("hello", "the user says"),
    "what is short": ("{% for m in messages if m.content | length > 9 %}{{ m.content }}{% endfor %}", "the user says"),
    "what is ASCII": ("{% for m in messages if 'é' in m.content %}{{ m.content }}{% endfor %}", "the user says"),
    "several lines": ("{% for m in messages %}{{ m.content.split('\n')[0] }}{% endfor %}", "the user says"),
    "spaces": ("{% for m in messages %}{{ m.content.split() | join(' ') }}{% endfor %}", "the user says"),
    "capitals": ("{% for m in messages %}{{ m.content | lower }}{% endfor %}", "the user says"),
    "marks of HTML": ("{% for m in messages %}{{ m.content | e }}{% endfor %}", "the user says"),
    "addresses": ("{% for m in messages %}{{ m.content | urlize }}{% endfor %}", "the user says"),
    "the end of a long text": ("{% for m in messages %}{{ m.content[:7999] }}{% endfor %}", "the user says"),
    "the hundredth": ("{% for m in messages[:100] %}{{ m.content }}{% endfor %}", "the user says .* of 128 turns"),
}


@pytest.mark.parametrize("name", DROPS)
def test_a_template_that_drops_what_is_said_is_refused(name):
    source, words = DROPS[name]
    with pytest.raises(KitError, match=f"leaves out or changes what {words}"):
        try_template(source, NAMED)


ALL = "{% for m in messages %}{{ m.content }}{% endfor %}"
GROWS = {
    "a square of messages": ALL + "{% for m in messages %}" + "{% for n in messages %}x{% endfor %}{% endfor %}",
    "all again for each": "{% for m in messages %}" + ALL.replace("m ", "n ").replace("m.", "n.") + "{% endfor %}",
    "a square of characters": "{% for m in messages %}{% for c in m.content %}{{ m.content }}{% endfor %}{% endfor %}",
    "a power": ALL
    + "{% set n = namespace(t='x') %}{% for m in messages[2:20] %}{% set n.t = n.t + n.t %}{% endfor %}{{ n.t }}",
    "much for each": ALL + "{% for m in messages %}{{ 'x' * 2000 }}{% endfor %}",
    "much for all": ALL + "{{ 'x' * 100000 }}",
    "five for one": "{% for m in messages %}{{ m.content * 60 }}{% endfor %}",
    "for a word of its own": ALL + "{% if messages[0].content == 'open' %}{{ 'x' * 100000 }}{% endif %}",
    "for a role of its own": ALL + "{% if messages[0].role == 'open' %}{{ 'x' * 100000 }}{% endif %}",
}


@pytest.mark.parametrize("name", GROWS)
def test_a_template_that_outgrows_what_is_said_is_refused(name):
    with pytest.raises(KitError, match=r"writes \d+ characters for|writes ever more for each of the"):
        try_template(GROWS[name], NAMED)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for %}", "is no template"),
        ("{{ '' | nothing }}", "is no template"),
        (ALL + "{{ raise_exception('never') }}", r"fails on a conversation of 1 turns \(user\): never"),
        (ALL + "{% if messages[1] is defined %}{{ 1 // 0 }}{% endif %}", "2 turns .*by zero"),
        (ALL + "{{ dict.get({'a': 1}, 'a') }}", "fails .*get"),
        (ALL + "{{ messages.append(1) }}", "fails .*not safe|fails .*append"),
        (ALL + "{{ ''.__class__.__mro__ }}", "fails .*__class__"),
        (ALL + "{% set n = namespace(_x=1) %}", "fails .*namespace"),
        (ALL + "{% set n = namespace() %}{% set n._x = 1 %}", "fails .*namespace"),
        (ALL + "{{ messages[0].content.x.y }}", "fails .*undefined|fails .*no attribute"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "fails .*recursion"),
    ],
)
def test_a_template_that_fails_is_refused_in_words(source, words):
    with pytest.raises(KitError, match=words) as caught:
        try_template(source, NAMED)
    assert str(caught.value).startswith("chat_template.jinja")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ strftime_now('%H:%M') }}" + ALL, "the time of the day"),
        ("{{ strftime_now('%d %b, %f') }}" + ALL, "the time of the day"),
        ("{{ [1, 2] | random }}" + ALL, "No filter named 'random'"),
        ("{{ lipsum(n=1) }}" + ALL, "'lipsum' is undefined"),
    ],
)
def test_a_template_that_does_not_write_the_same_twice_is_refused(source, words):
    with pytest.raises(KitError, match=words):
        try_template(source, NAMED)


def test_a_template_that_takes_ever_longer_is_refused(monkeypatch):
    monkeypatch.setattr(template, "MAX_SECONDS", 0.05)  # as at longer texts with half a second
    loops = (
        "{% for m in messages %}{% for a in m.content %}{% for b in m.content %}{% endfor %}{% endfor %}{% endfor %}"
    )
    with pytest.raises(KitError, match=r"takes \d\.\d\d s for 2 messages with \d+ characters; it may take"):
        try_template(loops + ALL, NAMED)


def test_what_is_said_cannot_be_known_before():
    talks = [template._talk(9) for _ in range(9)]
    said = [message["content"] for talk in talks for message in talk]
    assert len(set(said)) == 81


def test_the_example_is_cut():
    assert len(try_template(ALL + "{{ 'x' * 60000 }}", NAMED)) == template.MAX_SHOWN
