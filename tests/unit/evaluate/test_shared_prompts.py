"""Choices after a prompt that runs once are as likely as after prompts of their own."""

import numpy as np
import pytest
from support.adapted import adapted, base
from support.tiny import FAMILIES, tiny

from siftune.evaluate import shared_prompts
from siftune.evaluate.choices import ChoiceItem, score_choices
from siftune.evaluate.perplexity import row_nll
from siftune.evaluate.shared_prompts import Asked, shared_nll, whole_row

CHOICES = {9: (1, 3, 2), 2: (4, 1), 17: (2, 2, 2, 5), 5: (3,), 12: (1, 1)}  # tokens of a prompt -> of its choices


def questions():
    random = np.random.default_rng(0)
    drawn = [(p, *ns) for p, ns in CHOICES.items()]
    ids = [[random.integers(3, 90, length).tolist() for length in lengths] for lengths in drawn]
    return [Asked(prompt, choices) for prompt, *choices in ids]


def whole(model, asked):
    return row_nll(model, [whole_row(one.prompt_ids, choice) for one in asked for choice in one.choices_ids]).nll


def check(model):
    asked = questions()
    for batch_size in (1, 6, 16):
        found = shared_nll(model, asked, batch_size)
        assert [len(one) for one in found] == [len(one.choices_ids) for one in asked]
        # gemma2 and bloom take the softmax in float32
        np.testing.assert_allclose(np.concatenate(found), whole(model, asked), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_what_whole_rows_give(family):
    check(base(family).double())


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_adapters_count(kind):
    check(adapted("llama", kind).double())


@pytest.mark.parametrize("family", ["mamba", "rwkv", "zamba", "gemma3n"])
def test_what_keeps_more_than_keys_and_values_is_left_to_whole_rows(family):
    assert shared_nll(tiny(family), questions(), 8) is None


def test_a_window_that_counts_padding_is_left_to_whole_rows():
    longest = 17 + 5
    check(tiny("mistral", sliding_window=longest).double())
    assert shared_nll(tiny("mistral", sliding_window=longest - 1), questions(), 8) is None


def test_a_prompt_runs_once_and_no_logits_of_it_are_computed():
    model, seen = tiny("llama"), []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2].numel()))
    model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(-logits.shape[1]))
    shared_nll(model, [Asked([5] * 31, [[6], [7, 8], [9], [10]])] * 2, 4)
    trial, asked = seen[:-8], seen[-8:]
    assert len(trial) > 0
    assert asked == [30, 0, 4 * 2, -5] * 2


def test_where_the_two_differ_whole_rows_are_taken(monkeypatch, caplog):
    model, asked = tiny("gpt2"), questions()
    items = [ChoiceItem(one.prompt_ids, one.choices_ids, 0) for one in asked]
    run = shared_prompts._run
    monkeypatch.setattr(shared_prompts, "_run", lambda model, cache, ids, seen: run(model, cache, (ids + 1) % 90, seen))
    found = np.concatenate(score_choices(model, items).loglik)
    np.testing.assert_allclose(found, -whole(model, asked), rtol=0, atol=1e-4)
    assert "differ" in caplog.text
