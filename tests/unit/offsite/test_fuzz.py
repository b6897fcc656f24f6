"""More than a thousand kits and returns, damaged or forged with repaired hashes, each followed to the end.

A kit is verified, loaded, its tokenizer and chat template tried on rows, trained for a step, and its return plugged
into the base; a return is verified and plugged. Either `verify` refuses it in one sentence, or all of it works: nothing
ends in a traceback, dies, stands still, or is accepted and fails later. Two things alone may come late: what only the
owner can see, who has the base; and gradients that are not finite though every number of the kit is of a sane size,
which `siftune train` says at its first step, and leaves nothing (tests/unit/trainer/test_trainer.py).

`pytest` runs a sample; `pytest -m fuzz` runs all.
"""

import random

import pytest
from support.fuzz_cases import CLASSES, cases
from support.fuzz_child import Child
from support.fuzz_forged import OF_ALL
from support.fuzz_kits import SUBJECTS, write_subject, write_tuned

SAMPLE = 1  # of each class
# said by plug alone, of a kit that is sound by itself: another base, and weights that are not the base's
OWNERS = (
    "was made from a model with fingerprint",
    "base.layers is",
    "layer_types are not those",
    "moved by",
    "but the base model's has",
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    kits = {subject: write_subject(folder, subject) for subject in SUBJECTS}
    write_tuned(folder, kits["llama"])
    return folder


@pytest.fixture(scope="module")
def child(sound):
    child = Child(sound)
    yield child
    child.stop()


def may_be_late(case, outcome):
    """Whether something that verify let through may be found out where it was."""
    if outcome.end == "late":
        return outcome.stage == "plug" and any(words in outcome.words for words in OWNERS)
    return OF_ALL in case.what and outcome.stage == "train" and outcome.words.endswith(("is not finite\n", "is nan\n"))


def faults(child, chosen):
    """What went wrong: class of the end, mutation, and words."""
    for case in chosen:
        outcome = child.outcome(case)
        if outcome.end in ("broken", "late") and not may_be_late(case, outcome):
            yield f"{outcome.end} at {outcome.stage}: {case.subject}, {case.what}: {outcome.words}"


@pytest.mark.parametrize("name", CLASSES)
def test_a_sample(child, sound, name):
    assert list(faults(child, random.Random(11).sample(cases(name, sound), SAMPLE))) == []


@pytest.mark.fuzz
@pytest.mark.parametrize("name", CLASSES)
def test_all(child, sound, name):
    assert list(faults(child, cases(name, sound))) == []


@pytest.mark.fuzz
def test_they_are_many(sound):
    assert sum(len(cases(name, sound)) for name in CLASSES) > 1000


def test_what_is_left_alone_gets_to_the_end(child):
    from support.fuzz_cases import Case

    for subject in ("llama", "llama.return", "llama.thin.return"):
        outcome = child.outcome(Case(subject, "nothing", {}))
        assert (outcome.end, outcome.words) == ("fine", "")


def test_the_child_notices_what_it_is_there_to_notice(child, monkeypatch):
    """A mutation that ends the process, and one that takes too long, are told apart from one that is refused."""
    from support import fuzz_child
    from support.fuzz_cases import Case

    assert child.outcome(Case("llama", "no JSON", {"config.json": b"{"})).end == "refused"
    child.outcome(Case("llama", "nothing", {}))
    monkeypatch.setattr(fuzz_child, "SECONDS", 0)
    assert "no end within 0 s" in child.outcome(Case("llama", "nothing", {})).words
    assert child._process is None
