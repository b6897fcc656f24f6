import math
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch
from support.tiny import tiny
from support.tokenizer import byte_tokenizer

from siftune.base.errors import DataError
from siftune.data.rows import rows_from
from siftune.evaluate.bootstrap import Bootstrap, accuracy_interval, paired_bootstrap
from siftune.evaluate.measure import Metric, compare, measure
from siftune.evaluate.prepare import prepare_rows
from siftune.models import attention

TOKENIZER = byte_tokenizer()
QUESTIONS = rows_from(
    [{"prompt": f"{i}?", "completion": str(i), "choices": [str(i), "no", "yes"], "answer": i % 3} for i in range(5)]
)


@pytest.fixture
def model():
    tiny_one = tiny("llama", layers=2, vocab_size=len(TOKENIZER), max_position_embeddings=64)
    mute = [
        i
        for i, token in enumerate(TOKENIZER.convert_ids_to_tokens(range(260)))
        if not token.isascii() or len(token) > 1
    ]
    tiny_one.lm_head.weight.data[mute] = 0  # it writes ASCII, so that decoding loses nothing
    return tiny_one.train()


def test_choices_and_perplexity_of_questions(model):
    result = measure(model, prepare_rows(QUESTIONS, TOKENIZER))
    assert list(result) == ["choices", "choices_per_token", "perplexity"]
    assert model.training
    # the slow obvious way, text by text
    nll, hits = [], []
    for row in QUESTIONS:
        head = TOKENIZER(f"<|start|>user\n{row.prompt[0].content}<|end|>\n<|start|>assistant\n")["input_ids"]
        losses = []
        for text in (*row.extra["choices"], row.completion):
            ids = head + TOKENIZER(text + "<|end|>")["input_ids"]
            labels = [-100] * len(head) + ids[len(head) :]
            with torch.no_grad():
                loss = model.eval()(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
            losses.append(loss.item() * (len(ids) - len(head)))
        nll.append(losses.pop())
        hits.append(int(np.argmin(losses)) == row.extra["answer"])
    assert result["choices"].values.tolist() == hits
    assert 0 < result["choices"].value < 1
    np.testing.assert_allclose(result["perplexity"].values, nll, rtol=1e-5)
    tokens = sum(len(row.completion) + 1 for row in QUESTIONS)
    assert result["perplexity"].value == pytest.approx(math.exp(sum(nll) / tokens), rel=1e-5)


@pytest.mark.parametrize("metric", ["choices", "perplexity"])
def test_losses_that_are_not_finite_are_refused(model, metric):
    prepared = prepare_rows(QUESTIONS, TOKENIZER, [metric])
    model.lm_head.weight.data[ord("3")] = math.nan
    with pytest.raises(DataError, match="row 1: the model's loss is not finite"):
        measure(model, prepared)


def test_short_rows_take_their_own_products(model, monkeypatch):
    calls, products = [], attention._products
    monkeypatch.setattr(attention, "_products", lambda *given: calls.append(1) or products(*given))
    measure(model.bfloat16(), prepare_rows(QUESTIONS, TOKENIZER, ["perplexity"]))
    assert calls


def write(model, rows):
    return measure(model, prepare_rows(rows, TOKENIZER, ("exact_match",), max_new_tokens=6))["exact_match"]


def test_exact_match_compares_what_the_model_writes(model):
    rows = rows_from([{"prompt": f"{i}?", "completion": "longer text"} for i in range(4)])
    first = write(model, rows)
    assert first.values.tolist() == [0, 0, 0, 0]
    assert all(first.texts)
    assert "<|" not in "".join(first.texts)
    # with what the model wrote as the answer, it's right, by answer or by completion
    rows[1].extra["answer"] = f" {first.texts[1]} "
    rows[2] = replace(rows[2], completion=first.texts[2])
    assert write(model, rows).values.tolist() == [0, 1, 1, 0]


def test_the_model_s_own_end_token_ends_a_text_too(model):
    rows = rows_from([{"prompt": "1?", "completion": "longer text"}])
    whole = prepare_rows(rows, TOKENIZER, ("exact_match",))
    written = measure(model, whole)["exact_match"].texts[0]
    end = TOKENIZER(written)["input_ids"][3]
    model.generation_config.eos_token_id = [end]
    assert len(measure(model, whole)["exact_match"].texts[0]) < len(written)


def test_progress_counts_the_rows_of_every_metric(model):
    told = []
    prepared = prepare_rows(QUESTIONS[:3], TOKENIZER, ("choices", "exact_match", "perplexity"))
    plain = measure(model, prepared, 2)
    counted = measure(model, prepared, 2, lambda *what: told.append(what))
    assert counted["exact_match"].texts == plain["exact_match"].texts
    choices = sum(len(item.choices_ids) for item in prepared.items)
    for stage, total in (("scoring choices", choices), ("writing answers", 3), ("scoring rows", 3)):
        counts = [done for name, done, of in told if (name, of) == (stage, total)]
        assert (counts[0], counts[-1]) == (0, total)
        assert counts == sorted(counts)
    assert {stage for stage, *_ in told} == {"scoring choices", "writing answers", "scoring rows"}


@pytest.mark.parametrize("metric", ["choices", "exact_match", "perplexity"])
def test_rows_beyond_the_window_are_named(model, metric):
    long = {"prompt": "?" * 70, "completion": "y", "choices": ["y", "n"]}
    rows = rows_from([{"prompt": "?", "completion": "y", "choices": ["y", "n"]}, long], name="held-out row")
    with pytest.raises(DataError, match=r"held-out row 2: .* window is 64"):
        measure(model, prepare_rows(rows, TOKENIZER, (metric,)))


def rate(values, name="choices"):
    return Metric(name, np.array(values, dtype=float), np.ones(len(values)))


def nll(values, tokens=(1.0, 2.0, 3.0)):
    return Metric("perplexity", np.array(values), np.array(tokens))


def test_compare_takes_the_interval_that_fits_the_metric():
    base = {"choices": rate([0, 1, 0]), "perplexity": nll([1.0, 4.0, 5.0])}
    tuned = {"choices": rate([1, 1, 0]), "perplexity": nll([1.0, 3.0, 3.0])}
    choices, perplexity = compare(base, tuned, level=0.9, seed=4)
    assert (choices.metric, choices.rows, choices.base, choices.tuned) == ("choices", 3, 1 / 3, 2 / 3)
    change = paired_bootstrap([0, 1, 0], [1, 1, 0], Bootstrap(level=0.9, seed=4))
    assert (choices.difference, choices.low, choices.high) == (change.value, change.low, change.high)
    assert choices.base_interval == accuracy_interval([0, 1, 0], 0.9)
    assert choices.tuned_interval == accuracy_interval([1, 1, 0], 0.9)
    assert perplexity.base == pytest.approx(math.exp(10 / 6))
    assert perplexity.difference == pytest.approx(math.exp(7 / 6) - math.exp(10 / 6))
    assert perplexity.low < perplexity.difference < perplexity.high <= 0
    assert perplexity.base_interval is None


def test_compare_refuses_what_cannot_be_compared():
    with pytest.raises(ValueError, match="measure the same ones"):
        compare({"choices": rate([1])}, {"exact_match": rate([1], "exact_match")})
    with pytest.raises(ValueError, match="other rows"):
        compare({"perplexity": nll([1.0, 1.0, 1.0])}, {"perplexity": nll([1.0, 1.0, 1.0], (1.0, 2.0, 4.0))})
    with pytest.raises(ValueError, match="other rows"):
        compare({"choices": rate([1, 0])}, {"choices": rate([1])})


def test_a_tokenizer_that_panics_on_what_was_written_is_a_sentence(model, monkeypatch):
    broken = byte_tokenizer()
    parts = [tokenizers.decoders.Fuse(), tokenizers.decoders.Strip("!", 2, 2)]
    broken.backend_tokenizer.decoder = tokenizers.decoders.Sequence(parts)
    written = [[broken.convert_tokens_to_ids("!")]]
    monkeypatch.setattr("siftune.evaluate.measure.greedy", lambda *_: written)
    prepared = prepare_rows(rows_from([{"prompt": "1?", "completion": "!"}]), broken, ("exact_match",))
    with pytest.raises(DataError, match=r"^the tokenizer fails on tokens") as caught:
        measure(model, prepared)
    assert type(caught.value.__cause__).__name__ == "PanicException"
