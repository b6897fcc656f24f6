"""Decoys have the answers of rows with similar prompts."""

import numpy as np

from siftune.data.rows import rows_from
from siftune.suspects import decoys as module
from siftune.suspects.decoys import decoys_of


def test_decoys_are_of_the_nearest_prompts_with_other_answers():
    tasks = [f"What is {n} plus {n + 3}?" for n in range(10, 40)], [f"Spell backwards: word{n}" for n in range(10, 40)]
    rows = rows_from(
        {"prompt": text, "completion": f"{text[-3:]} {n % 7}"} for task in tasks for n, text in enumerate(task)
    )
    decoys = decoys_of(rows, seed=0).numbers
    assert decoys.shape == (60, 8)
    for at, others in enumerate(decoys):
        answers = {rows[other].completion for other in others}
        assert len(answers | {rows[at].completion}) == 9
        assert {other // 30 for other in others[:2]} == {at // 30}  # of the same task


def test_the_similarity_is_the_cosine_of_trigrams_by_rarity():
    """What most prompts have in common counts less than the animal in which they differ."""
    frames = ("Please classify this message", "What is the request")
    animals = ("zebra", "monkey", "falcon", "salmon", "hamster", "spider", "beetle", "turtle")
    prompts = [f"{frame}: {animal}" for frame in frames for animal in animals]
    rows = rows_from({"prompt": text, "completion": str(n)} for n, text in enumerate(prompts))
    grams = [{f" {text.lower()} ".encode()[i : i + 3] for i in range(len(text))} for text in prompts]
    rarity = {gram: np.log(17 / (1 + sum(gram in own for own in grams))) for own in grams for gram in own}

    def similar(one, other):
        lengths = [np.sqrt(sum(rarity[gram] ** 2 for gram in own)) for own in (one, other)]
        return sum(rarity[gram] ** 2 for gram in one & other) / np.prod(lengths)

    for at, others in enumerate(decoys_of(rows, seed=0).numbers):
        best = max((place for place in range(16) if place != at), key=lambda place: similar(grams[at], grams[place]))
        assert others[0] == best == (at + 8) % 16


def test_rows_of_two_answers_have_one_decoy_with_the_other():
    rows = rows_from({"prompt": f"number {n}?", "completion": "yes" if n % 3 else "no"} for n in range(30))
    decoys = decoys_of(rows, seed=0)
    for row, (other, *rest) in zip(rows, decoys.numbers, strict=True):
        assert rows[other].completion != row.completion
        assert {*rest} == {-1}
    assert decoys.covered.all()


def test_rows_without_a_prompt_or_another_answer_have_none():
    for rows in ({"text": str(n)} for n in range(50)), ({"prompt": str(n), "completion": "yes"} for n in range(50)):
        assert (decoys_of(rows_from(rows), seed=0).numbers == -1).all()


def test_long_answers_have_fewer_decoys():
    for characters, count in ((32, 8), (64, 4), (128, 2), (1000, 2)):
        rows = rows_from({"prompt": f"number {n}?", "completion": f"{n:0{characters}}"} for n in range(20))
        assert decoys_of(rows, seed=0).numbers.shape == (20, count)


def test_only_candidates_serve_as_decoys():
    rows = rows_from({"prompt": f"number {n}?", "completion": str(n % 20)} for n in range(60))
    decoys = decoys_of(rows, seed=0, candidates=[*range(40, 60)])
    assert (decoys.numbers >= 40).all()
    assert decoys.covered[:40].any()
    assert not decoys.covered[40:].any()  # no other candidate has the answer


def test_other_rows_get_no_decoys():
    rows = rows_from({"prompt": f"number {n}?", "completion": str(n % 20)} for n in range(60))
    every, some = decoys_of(rows, seed=0), decoys_of(rows, seed=0, numbers=[3, 50])
    for place in range(60):
        own = every.numbers[place] if place in (3, 50) else -1
        assert (some.numbers[place] == own).all()
        assert some.covered[place] == (every.covered[place] if place in (3, 50) else False)


def test_an_answer_is_covered_if_another_of_the_nearest_rows_has_it():
    rows = rows_from({"prompt": f"a {n}", "completion": f"answer {n // 2}"} for n in range(20))
    assert decoys_of(rows, seed=0).covered.any()
    rows = rows_from({"prompt": f"a {n}", "completion": f"answer {n}"} for n in range(20))
    assert not decoys_of(rows, seed=0).covered.any()  # but for the row itself


def test_of_many_rows_a_sample_is_compared(monkeypatch):
    rows = rows_from({"prompt": f"number {n}?", "completion": str(n)} for n in range(60))
    monkeypatch.setattr(module, "_CANDIDATES", 10)
    monkeypatch.setattr(module, "_AT_ONCE", 7)
    decoys = decoys_of(rows, seed=0).numbers
    assert (decoys >= 0).all()
    assert len(np.unique(decoys)) <= 10
    assert (decoys_of(rows, seed=1).numbers != decoys).any()
