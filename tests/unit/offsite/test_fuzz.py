"""Thousands of kits and returns, damaged, forged or made with intent, each followed to the end.

A kit is verified, loaded, its tokenizer and chat template used on rows, trained for a step, and its return plugged into
the base; a return is verified and plugged. Its hashes are right, unless they are what was changed. Either it is refused
in one sentence, or all of it works, and the rows say what their owner wrote. `support/fuzz_counts.py` has the
exceptions, and prints the counts.

`pytest` runs a sample; `pytest -m fuzz` runs all.
"""

import random

import pytest
from support.fuzz_cases import CLASSES, Case, cases
from support.fuzz_child import Child, altered
from support.fuzz_counts import outcomes
from support.fuzz_kits import write_all

SAMPLE = 1  # of each class


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    write_all(folder)
    return folder


@pytest.fixture(scope="module")
def child(sound):
    child = Child(sound)
    yield child
    child.stop()


def faults(child, name, chosen):
    return [
        f"{outcome.end} at {outcome.stage}: {case.subject}, {case.what}: {outcome.words}"
        for case, outcome, fault in outcomes(child, name, chosen)
        if fault
    ]


@pytest.mark.parametrize("name", CLASSES)
def test_a_sample(child, sound, name):
    assert faults(child, name, random.Random(11).sample(cases(name, sound), SAMPLE)) == []


@pytest.mark.fuzz
@pytest.mark.parametrize("name", CLASSES)
def test_all(child, sound, name):
    assert faults(child, name, cases(name, sound)) == []


@pytest.mark.fuzz
def test_they_are_many(sound):
    assert sum(len(cases(name, sound)) for name in CLASSES) > 2175


@pytest.mark.parametrize("case", [Case("llama", "nothing", {}), Case("llama.return", "nothing", {})])
def test_an_untouched_folder_gets_to_the_end(child, case):
    assert child.outcome(case).end == "harmless"


def test_outcomes_are_told_apart(child, sound, monkeypatch):
    from support import fuzz_child

    def end(files, **options):
        return child.outcome(Case("llama", "a change", files, **options)).end

    emulator = (sound / "llama" / "emulator.safetensors").read_bytes()
    template = (sound / "llama" / "chat_template.jinja").read_bytes()
    assert end({"config.json": b"{"}) == "refused"
    assert end({"emulator.safetensors": emulator[:-1] + bytes([emulator[-1] ^ 1])}) == "other numbers"
    assert end({"chat_template.jinja": template + b"{# a comment #}"}) == "harmless"
    monkeypatch.setattr(fuzz_child, "CLOCK_SECONDS", 0)
    assert end({}) == "hang"
    assert child._process is None


@pytest.mark.parametrize(
    ("change", "template"),
    [
        (lambda text: text.replace("not ", ""), "none"),
        (lambda text: text + " Obey.", "none"),
        (lambda text: text.replace("refund", "refund. Obey."), "auto"),
        (lambda text: "Obey. " * ("refund" in text) + text, "auto"),
    ],
)
def test_altered_rows_are_noticed(change, template):
    from support.fuzz_child import ROWS

    def text(row):
        talk = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
        return "".join(f"{message['content']}\n" for message in talk) + row["completion"]

    texts = [text(row) for row in ROWS[template]]
    assert altered(texts, template) is None
    assert altered([*map(change, texts)], template)
