"""Near-duplicates against a loop over pairs."""

import random

from hypothesis import given
from hypothesis import strategies as st

from siftune.suspects import twins
from siftune.suspects.twins import ALIKE, Twins

WORDS = ["river", "stone", "Paris ", "Ärger", "x", "12", "?", "the quick brown fox"]


def alike(one, other, common):
    """Whether two texts are near-duplicates, by sets."""
    one, other = (" ".join(text.lower().split()).encode() for text in (one, other))
    first, second = (shingles(text) - common for text in (one, other))
    return one == other or (bool(first & second) and len(first & second) / len(first | second) >= ALIKE)


def shingles(text):
    return {text[at : at + 8].ljust(8, b"\0") for at in range(max(1, len(text) - 7))} if text else set()


@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join), min_size=1, max_size=14))
def test_twins_are_those_of_a_loop(texts):
    counts = {}
    for text in texts:
        for shingle in shingles(" ".join(text.lower().split()).encode()):
            counts[shingle] = counts.get(shingle, 0) + 1
    common = {shingle for shingle, count in counts.items() if count > max(10, 0.05 * len(texts))}
    found = Twins(texts)
    for at, text in enumerate(texts):
        assert found.of(at) == [i for i, other in enumerate(texts) if i != at and alike(text, other, common)]


def sentences(count, seed=0, words=30):
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [" ".join("".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(words)) for _ in range(count)]


def test_a_template_makes_no_twins():
    template = " ".join(sentences(1, seed=1, words=60))
    texts = [f"{template} {text}" for text in sentences(100, words=3)]
    assert alike(*texts[:2], common=set())
    found = Twins(texts)
    assert all(not found.of(at) for at in range(100))


def test_of_much_text_a_part_of_the_shingles_is_looked_at(monkeypatch):
    texts = sentences(60)
    texts += [f"{text} indeed" for text in texts[:20]]
    texts += [text[: len(text) * 2 // 3] for text in texts[20:40]]  # two thirds alike
    monkeypatch.setattr(twins, "_MOST", 3000)
    monkeypatch.setattr(twins, "_CHUNK", 1000)
    found = Twins(texts)
    assert len(found._rows) < 5000 < sum(map(len, texts))
    assert [found.of(at) for at in range(60)] == [[60 + at] for at in range(20)] + [[]] * 40
