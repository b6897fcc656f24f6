"""Secrets: exposure by counting, the rows that are made, and greedy decoding by decoding."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from support.audits import TOKENIZER, base

from siftune.data.tokenize import tokenize_rows
from siftune.evaluate.bootstrap import Bootstrap
from siftune.offsite.audit.canaries import exposure, group, make_canaries
from siftune.offsite.audit.planting import completed


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.integers(0, 9))
def test_exposure_is_by_rank(others, canary):
    ranks = [1 + sum(other < canary for other in others), 1 + sum(other <= canary for other in others)]
    assert exposure(canary, others) == pytest.approx(math.log2(len(others) + 1) - math.log2(sum(ranks) / 2))


def test_exposure_of_what_was_not_learned_is_small_and_that_of_the_first_whole():
    rng = np.random.default_rng(0)
    found = [exposure(losses[0], losses[1:]) for losses in rng.normal(size=(4000, 128))]
    assert np.mean(found) == pytest.approx(math.log2(math.e), abs=0.1)
    assert exposure(-1.0, np.zeros(127)) == 7


def test_canaries_differ_in_their_prompts_and_their_others_in_the_code_alone():
    made = make_canaries(3, 5, 0)
    assert len({canary[0].prompt for canary in made}) == 3
    for canary in made:
        data = tokenize_rows(canary, TOKENIZER, 64, "none", True)
        starts, codes = set(), set()
        for ids, labels in zip(data["input_ids"], data["labels"], strict=True):
            length = sum(label == -100 for label in labels)
            starts.add(tuple(ids[:length]))
            codes.add(TOKENIZER.decode(ids[length:], skip_special_tokens=True).strip())
        assert len(starts) == 1
        assert len(codes) == 6
        assert all(len(code) == 9 for code in codes)
    assert make_canaries(3, 5, 0) == made != make_canaries(3, 5, 1)


def test_a_group():
    found = group(4, [1.0, 3.0], np.array([0.0, 1.0]), Bootstrap(200))
    assert (found.repeats, found.canaries, found.exposure.value, found.verbatim.value) == (4, 2, 2.0, 0.5)
    assert found.exposure.low <= 2.0 <= found.exposure.high
    assert 0 < found.verbatim.low < 0.5 < found.verbatim.high < 1


def test_completed_is_what_greedy_decoding_writes():
    model = base().eval()
    prompt = TOKENIZER("The code of locker 1 is")["input_ids"]
    written = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=6,
        min_new_tokens=6, do_sample=False, eos_token_id=None,
    )[0].tolist()  # fmt: skip
    other = [*written[:-1], (written[-1] + 1) % 260]
    labels = [[-100] * len(prompt) + ids[len(prompt) :] for ids in (written, other)]
    data = Dataset.from_dict({"input_ids": [written, other], "labels": labels})
    assert completed(model, data).tolist() == [1.0, 0.0]
