"""Sifting against a slow oracle, the files that it writes, and calls that were interrupted."""

import csv
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import load_dataset
from peft import PeftModel
from rich.console import Console
from support.tiny import tiny
from support.tokenizer import byte_tokenizer
from support.trainers import At
from transformers import AutoModelForCausalLM, AutoTokenizer

from siftune import sift
from siftune.base.errors import DataError, InputError, RecipeError
from siftune.data.decisions import read_decisions
from siftune.data.rows import rows_from
from siftune.models.load import load_model
from siftune.recipe.schema import Recipe
from siftune.recipe.training_rows import read_rows
from siftune.sifting import prompts, scoring, tuning
from siftune.sifting.choose import Choice, choose_by_losses, choose_by_margins
from siftune.suspects import answers
from siftune.suspects.decoys import decoys_of
from siftune.train.folder.run_folder import RunFolder
from siftune.train.run import train

from .conftest import write

QUIET = Console(quiet=True)


def table(folder):
    with (Path(folder) / "scores.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def excluded(file):
    """Places of the rows that a decision file leaves out."""
    return {place for place, selected in read_decisions(str(file)).selected.items() if not selected}


def losses(folder):
    return (Path(folder) / "losses.jsonl").read_bytes()


def loss(model, tokenizer, row, **settings):
    """Mean loss of a row's completion and its end, in float64."""
    prompt = tokenizer(row["prompt"], add_special_tokens=False).input_ids
    answer = [*tokenizer(row["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logs = model(ids).logits[0].double().log_softmax(-1)
    return -float(np.mean([logs[place - 1, ids[0, place]] for place in range(len(prompt), ids.shape[1])]))


def mean_state(model, tokenizer, prompt):
    """Mean of the last hidden states over the prompt's tokens, of length 1."""
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])
    with torch.no_grad():
        states = model.base_model(ids).last_hidden_state[0].double().mean(0)
    return (states / states.norm()).numpy()


def on_pool(given, tmp_path, places, **settings):
    """The run folder of a training on the rows of the pool at some places."""
    every = [json.loads(line) for line in given["train"].read_text().splitlines()]
    rows = tmp_path / "task.jsonl"
    rows.write_text("".join(json.dumps(every[place]) + "\n" for place in places))
    own = {"train": str(rows), "target": None, "out": str(tmp_path / "of the pool"), **settings}
    return train(Recipe(**{**given, **own}), QUIET).folder.path


def by_hand(given, tmp_path, number, pool=None, **settings):
    """The adapter of a training on the rows that a sifting's training took, perhaps after one on the pool."""
    seen = tmp_path / "sifted" / (f"{number}-seen.jsonl" if number else "seen.jsonl")
    own = {"train": str(seen), "target": None, "out": str(tmp_path / f"by hand {number}"), **settings}
    further = {"from_adapter": str(pool), "rank": None} if pool else {}
    return train(Recipe(**{**given, **further, **own}), QUIET).folder.adapter


def other_answers(rows, places, candidates, seed=0):
    """Places of the rows whose answers are compared with that of each row."""
    every = rows_from({"prompt": row["prompt"], "completion": row["completion"]} for row in rows)
    numbers = decoys_of(every, seed, candidates=candidates).numbers
    return {place: [other for other in numbers[place] if other >= 0] for place in places}


def margins_by_hand(rows, places, others, nll):
    """The largest gain of another answer by the prompt, minus that of the own; a gain is the usual loss minus the loss.

    The usual loss is the mean over the prompts that an answer was compared with, and over ten that have the mean loss.
    """
    size = {row["completion"]: len(row["completion"]) + 1 for row in rows}
    compared = [(rows[other]["completion"], nll(at, other)) for at in places for other in others[at]]
    mean = sum(value for _, value in compared) / sum(size[text] for text, _ in compared)

    def usual(text):
        losses = [value for answer, value in compared if answer == text]
        return (sum(losses) + 10 * mean * size[text]) / (len(losses) + 10)

    def gain(at, other):
        return usual(rows[other]["completion"]) - nll(at, other)

    return [max(gain(at, other) for other in others[at]) - gain(at, at) for at in places]


def with_two_answers(task):
    """The pool and the target with two answers, except that every sixth row of the pool has an answer of its own."""
    pool = [
        {**row, "completion": f"none {number}" if number % 6 == 0 else "more" if row["id"] > 25 else "less"}
        for number, row in enumerate(task.pool)
    ]
    target = [{**row, "completion": "more" if number > 5 else "less"} for number, row in enumerate(task.target)]
    return SimpleNamespace(pool=pool, target=target)


@pytest.mark.parametrize("kind", ["their own", "their own, as if shared", "shared"])
def test_scores_and_selection_are_those_of_a_slow_oracle(given, base, tmp_path, task, request, kind):
    """A target of fewer than 64 rows is halved: each training leaves out one half."""
    shared = kind != "their own"
    if kind == "their own, as if shared":
        request.getfixturevalue("shared_answers")
    if kind == "shared":
        task = with_two_answers(task)
        write(given["train"], task.pool)
        write(given["target"], task.target)
    sifted = sift(**given, console=QUIET)
    halves = halves_of(tmp_path / "sifted")
    assert [len(half) for half in halves] == [6, 6]
    assert sorted(halves[0] + halves[1], key=str) == sorted(task.target, key=str)
    for seen, half in zip(("1-seen.jsonl", "seen.jsonl"), halves, strict=True):
        assert records(tmp_path / "sifted" / seen) == half == [row for row in task.target if row in half]
    tokenizer, plain = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    prompts = np.stack([mean_state(plain, tokenizer, row["prompt"]) for row in (*task.pool, *task.target)])
    prompts -= prompts[:36].mean(0)
    prompts /= np.linalg.norm(prompts, axis=1, keepdims=True)
    similar, own = (prompts @ prompts[36:].T), (prompts[36:] @ prompts[36:].T)
    np.fill_diagonal(own, -1)
    np.testing.assert_allclose(sifted.similar, similar[:36].max(1), atol=2e-5)
    of_it = similar[:36].max(1) >= np.sort(own.max(1))[1] - 1e-5  # all of the twelve but one
    if kind == "shared":
        assert 0 < of_it[::6].sum() < 6
        of_it[::6] = False
    assert 8 < of_it.sum() < 36
    rows, places = [*task.pool, *task.target], of_it.nonzero()[0].tolist()
    target = [*range(36, 48)]
    steps = -(-len(places) // 8)  # half a pass over the task in batches of 4, at most the three that are given
    assert 1 < steps <= 3
    pool = on_pool(given, tmp_path, places, steps=steps) if shared else None
    candidates = [*places, *target] if shared else target
    others = other_answers(rows, [*places, *target], candidates)
    after, held_out, decoys = [], [], []
    for number, half in enumerate(halves):
        adapter = by_hand(given, tmp_path, number, pool, steps=2 if shared else 3)  # half of those that are given
        tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
        own = [36 + task.target.index(row) for row in half]

        def nll(at, other, root=1.0, tuned=tuned):
            row = {**rows[at], "completion": rows[other]["completion"]}
            return loss(tuned, tokenizer, row) * (len(row["completion"]) + 1) ** root

        if shared:
            scores = margins_by_hand(rows, [*places, *own], others, nll)
        else:
            scores = [nll(at, at, 0.5) for at in [*places, *own]]
            decoys += [nll(at, other, 0.5) for at in own for other in others[at]]
        after.append(np.full(36, np.nan))
        after[-1][places] = scores[: len(places)]
        held_out += scores[len(places) :]
    after = np.mean(after, axis=0)
    np.testing.assert_allclose(sifted.scores, after, atol=1e-4)
    found = table(sifted.folder)
    assert [line["score"] == "" for line in found] == (~of_it).tolist()
    np.testing.assert_allclose([float(line["score"] or "nan") for line in found], after, atol=1e-4)
    np.testing.assert_allclose([float(line["similarity"]) for line in found], similar[:36].max(1), atol=2e-5)
    if shared:
        answers = [row["completion"] for row in task.target]
        numbers = [answers.index(row["completion"]) if row["completion"] in answers else -1 for row in task.pool]
        chosen = choose_by_margins(after, np.array(held_out), of_it, np.array(numbers))
    else:
        chosen = choose_by_losses(after, np.array(held_out), np.array(decoys), of_it)
    chosen = chosen.rows_R.nonzero()[0].tolist()
    assert sifted.selected == chosen == [n for n, line in enumerate(found) if line["selected"] == "yes"]


@pytest.mark.parametrize("kind", ["shared", "quantized"])
def test_an_adapter_that_cannot_be_merged_exactly_is_scored_beside_its_base(given, tmp_path, task, kind):
    """On a matrix of two modules, it would change the other one too; quantized weights would be rounded again."""
    if kind == "quantized":
        pytest.importorskip("bitsandbytes")
    tokenizer = byte_tokenizer()
    tiny("llama", 2, vocab_size=len(tokenizer), tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    own = {"quantize": "8bit"} if kind == "quantized" else {"targets": ("lm_head", "q_proj")}
    sifted = sift(**given | {"model": str(tmp_path / "tied"), **own}, console=QUIET)
    plain, _ = load_model(str(tmp_path / "tied"), quantize=own.get("quantize"))
    tuned = PeftModel.from_pretrained(plain, sifted.folder / "tuning-1" / "adapter").eval()
    line = json.loads((sifted.folder / "1-losses.jsonl").read_text().splitlines()[0])
    rows = [task.pool[number] for number in line["rows"]]
    expected = [loss(tuned, tokenizer, row) * (len(row["completion"]) + 1) for row in rows]
    np.testing.assert_allclose(line["own"], expected, rtol=1e-4)


def test_rows_with_answers_of_other_tasks_are_counted_and_may_be_all_rows(given, task):
    write(given["train"], [row for row in task.pool if row["source"] == "sums"])
    task = with_two_answers(task)
    write(given["target"], task.target)
    with pytest.raises(DataError, match="shares its answer with another such row"):
        sift(**given, console=QUIET)
    write(given["train"], task.pool)
    sifted = sift(**{**given, "out": given["out"] + " 2"}, console=QUIET)
    counted = int((np.isnan(sifted.scores[::6]) & (sifted.similar[::6] >= sifted.similarity_limit)).sum())
    assert f"other tasks: {counted} row" in sifted.reason
    assert not {*sifted.selected} & {*range(0, 36, 6)}


def halves_of(folder):
    """The rows that either training leaves out."""
    return [records(folder / name) for name in ("unseen.jsonl", "1-unseen.jsonl")]


def test_classes_that_alternate_are_in_both_halves(given, tmp_path):
    rows = [{"prompt": f"{i}?", "completion": "no" if i % 2 else "yes"} for i in range(20)]
    given["target"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    sift(**given, share=9, console=QUIET)
    assert all({row["completion"] for row in half} == {"yes", "no"} for half in halves_of(tmp_path / "sifted"))


def test_several_answers_to_one_prompt_do_not_narrow_the_task(given, task):
    twice = [{**row, "completion": text} for row in task.target for text in (row["completion"], "0")]
    given["target"].write_text("".join(json.dumps(row) + "\n" for row in twice))
    sifted = sift(**given, share=12, console=QUIET)
    sums = [number for number, row in enumerate(task.pool) if row["source"] == "sums"]
    assert np.isfinite(sifted.scores[sums]).sum() >= 9


def test_rows_with_other_columns_in_one_file_are_refused(given, task):
    """The first row determines the columns of all, but it is in one of the halves alone."""
    others = [{**row, "instruction": f"{row['prompt']}!", "output": "y"} for row in task.target]
    mixed = [{"instruction": "0+0?", "output": "0"}, *others]
    given["target"].write_text("".join(json.dumps(row) + "\n" for row in mixed))
    with pytest.raises(DataError, match="different columns"):
        sift(**given, share=9, console=QUIET)


def test_hidden_states_that_are_not_finite_name_their_row(given, monkeypatch):
    original = prompts.embed

    def broken(model, texts, size):
        states = original(model, texts, size)
        if len(texts) == 16:
            states[3] = np.nan
        return states

    monkeypatch.setattr(prompts, "embed", broken)
    with pytest.raises(DataError, match=r"pool\.jsonl:4 are not finite"):
        sift(**given, share=9, console=QUIET)


def test_a_row_whose_answer_is_cut_off_is_refused_or_left_out_although_all_tokens_count(given, task):
    long = {"prompt": "x" * 70, "completion": "y"}
    write(given["train"], [*task.pool, long])
    with pytest.raises(DataError, match=r"pool\.jsonl:37: the prompt takes 70 of 72 tokens"):
        sift(**given, completion_only=False, share=9, console=QUIET)
    sifted = sift(**given, completion_only=False, bad_rows="drop", share=9, console=QUIET)
    assert len(sifted.places) == 36
    assert f"{given['train']}:37" in excluded(sifted.dropped)  # the training that follows could use it


@pytest.mark.usefixtures("shared_answers")
def test_earlier_answers_of_a_conversation_are_part_of_the_prompt(given):
    """At a rate that trains nothing, scores are those of rows whose earlier answers have no labels."""

    def conversation(number, answer, weight):
        first = {"role": "assistant", "content": "well " * (number % 5 + 1), **weight}
        asked = {"role": "user", "content": f"{number} is {answer}?"}
        return [{"role": "user", "content": "hi"}, first, asked, {"role": "assistant", "content": answer}]

    own, found = {**given, "template": "chat", "max_length": 128, "lr": 1e-9, "min_similarity": -1.0}, []
    for name, weight in (("learned", {}), ("not", {"weight": 0})):
        for file, numbers in (("train", range(20, 60)), ("target", range(12))):
            rows = [{"messages": conversation(n, ("odd", "even", "none")[n % 3], weight)} for n in numbers]
            own[file] = write(given[file].with_name(f"{name} {file}.jsonl"), rows)
        found.append(sift(**{**own, "out": f"{given['out']} {name}"}, console=QUIET))
    learned, plain = found
    np.testing.assert_array_equal(learned.similar, plain.similar)
    assert len({*plain.similar}) > 1  # the first turn, which is the same, does not decide
    np.testing.assert_allclose(learned.scores, plain.scores, atol=0.01)  # other rows are held out of the target
    assert np.std(plain.scores) > 0.05


def test_a_larger_target_has_one_training_that_leaves_out_a_fifth(given, tmp_path):
    rows = [{"prompt": f"{i}+{i}?", "completion": str(i + i)} for i in range(64)]
    given["target"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    sift(**given, share=9, console=QUIET)
    unseen = records(tmp_path / "sifted" / "unseen.jsonl")
    assert unseen == [rows[round(place)] for place in np.linspace(0, 63, 12)]
    assert records(tmp_path / "sifted" / "seen.jsonl") == [row for row in rows if row not in unseen]
    assert not (tmp_path / "sifted" / "tuning-1").exists()


@pytest.mark.usefixtures("shared_answers")
def test_the_held_out_rows_determine_the_steps(given, base, tmp_path, monkeypatch):
    """The weights are those of the least held-out loss, and training stops soon after it."""
    monkeypatch.setattr(tuning, "_EVERY", 1)
    sift(**{**given, "steps": 24, "lr": 0.1}, share=9, console=QUIET)  # at most 12 of them on the target
    run = RunFolder(tmp_path / "sifted" / "tuning")
    losses = [line["eval_loss"] for line in records(run.path / "metrics.jsonl") if "eval_loss" in line]
    best = int(np.argmin(losses)) + 1
    assert best < len(losses) == best + 2 < 12
    tokenizer, plain = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    tuned = PeftModel.from_pretrained(plain, run.adapter).eval()
    unseen = records(tmp_path / "sifted" / "unseen.jsonl")
    batches = [unseen[:4], unseen[4:]]  # the Trainer's loss is the mean of those of batches, weighted by their rows
    tokens = [[len(row["completion"]) + 1 for row in batch] for batch in batches]  # of bytes, and the end
    means = [
        np.average([loss(tuned, tokenizer, row) for row in batch], weights=counts)
        for batch, counts in zip(batches, tokens, strict=True)
    ]
    assert np.average(means, weights=[4, 2]) == pytest.approx(min(losses), abs=2e-5)


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_files(given, complete, tmp_path, task):
    sifted = sift(**given, share=9, console=QUIET)
    chosen = [task.pool[number] for number in sifted.selected]
    assert len(chosen) == 9
    found = table(sifted.folder)
    assert [line["place"] for line in found] == sifted.places == [f"{given['train']}:{n}" for n in range(1, 37)]
    for name in ("source", "prompt", "completion"):
        assert [line[name] for line in found] == [row[name] for row in task.pool]
    assert [line["selected"] for line in found] == ["yes" if n in sifted.selected else "no" for n in range(36)]
    assert records(sifted.rows) == [task.pool[n] for n in sifted.selected]
    numbers = {"words": 24, "sums": 12}
    counts = {source: sum(row["source"] == source for row in chosen) for source in numbers}
    assert sifted.shares == pytest.approx({source: counts[source] / numbers[source] for source in numbers})
    recipe = Recipe(train=str(given["train"]), drop_rows=str(sifted.dropped))
    assert [row.extra["id"] for row in read_rows(recipe).parts["train"]] == [
        task.pool[n]["id"] for n in sifted.selected
    ]
    data = load_dataset("json", data_files=str(sifted.rows), split="train", cache_dir=str(tmp_path / "cache"))
    assert data.to_list() == [task.pool[n] for n in sifted.selected]


def test_selected_shares_of_completions_are_reported_if_these_are_few(given, task):
    pool = [{**row, "completion": "yes" if number % 3 else "no"} for number, row in enumerate(task.pool)]
    given["train"].write_text("".join(json.dumps(row) + "\n" for row in pool))
    sifted = sift(**given, share=7, console=QUIET)
    of_task = [number for number, score in enumerate(sifted.scores) if np.isfinite(score)]
    for name, share in sifted.completions.items():
        own = [number for number in of_task if pool[number]["completion"] == name]
        assert share == pytest.approx(len({*own} & {*sifted.selected}) / len(own))
    assert {*sifted.completions} == {"yes", "no"}


def test_selected_shares_of_completions_are_not_reported_if_each_row_has_its_own(given, complete):
    assert sift(**given, share=7, console=QUIET).completions == {}


def as_csv(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return [{name: str(value) for name, value in row.items()} for row in rows]


def as_turns(path, rows):
    content = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
        for r in rows
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in content))  # with empty lines
    return content


@pytest.mark.parametrize(("name", "write"), [("a.csv", as_csv), ("a.jsonl", as_turns)])
def test_selected_rows_are_those_of_the_pools_files(given, tmp_path, task, name, write):
    """Two files, the first of another form than the target."""
    odd = [{**row, "prompt": f'{row["prompt"]} «ö,\n"»'} for row in task.pool[:20]]
    pool = [*write(tmp_path / name, odd), *task.pool]
    sifted = sift(**{**given, "train": [tmp_path / name, given["train"]]}, share=0.25, console=QUIET)
    assert len(sifted.selected) == 14
    assert records(sifted.rows) == [pool[n] for n in sifted.selected]
    recipe = Recipe(train=(str(tmp_path / name), str(given["train"])), drop_rows=str(sifted.dropped))
    assert len(read_rows(recipe).parts["train"]) == 14


def test_the_template_is_that_of_both(given, base, monkeypatch):
    """Rows are tokenised alike for the training and for the losses; another template is other work."""
    seen = {}
    original, scored = tuning.tune, answers.shared_nll
    monkeypatch.setattr(tuning, "tune", lambda recipe, *a: seen.update(recipe=recipe) or original(recipe, *a))

    def noted(model, pairs, *others):
        seen.setdefault("ids", []).extend(ids for ids, _ in pairs)
        return scored(model, pairs, *others)

    monkeypatch.setattr(answers, "shared_nll", noted)
    sift(**{**given, "template": "chat"}, console=QUIET)
    assert seen["recipe"].template == "chat"
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert len(seen["ids"]) > 30  # six held-out rows and their decoys, twice
    assert all("<|start|>user\n" in tokenizer.decode(ids) for ids in seen["ids"])
    with pytest.raises(RecipeError, match="template"):
        sift(**given, console=QUIET)


def test_a_template_file_counts_by_its_content(given, tmp_path):
    """A folder of it is continued from another place of the file, and refused with another content."""
    file = tmp_path / "a.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}|{% endfor %}")
    first = sift(**{**given, "template": file}, share=5, console=QUIET)
    again = shutil.copy(file, tmp_path / "b.jinja")
    assert sift(**{**given, "template": Path(again)}, share=5, console=QUIET).selected == first.selected
    file.write_text("{% for m in messages %}{{ m.content }}!{% endfor %}")
    with pytest.raises(RecipeError, match="template"):
        sift(**{**given, "template": file}, share=5, console=QUIET)


@pytest.mark.usefixtures("shared_answers")
def test_answers_alone_are_compared_if_all_tokens_count(given):
    given["lr"] = 1e-9  # trains nothing
    only = sift(**given, console=QUIET)
    every = sift(**{**given, "out": given["out"] + " all", "completion_only": False}, console=QUIET)
    np.testing.assert_array_equal(only.similar, every.similar)
    np.testing.assert_allclose(only.scores, every.scores, atol=1e-3)


def test_a_prompt_that_all_rows_share_is_that_of_the_target(given):
    """Without the mean of the pool, nothing of its embedding remains."""
    for name, numbers in (("train", range(20, 50)), ("target", range(12))):
        write(given[name], [{"prompt": "Tell a joke.", "completion": f"joke {n}"} for n in numbers])
    assert sift(**given, console=QUIET).similar.tolist() == [1.0] * 30


# --- interrupted calls ---


@pytest.mark.usefixtures("shared_answers")
@pytest.mark.parametrize("training", [1, 2])
def test_interrupted_in_a_training(given, tmp_path, interfere, monkeypatch, training):
    """In bfloat16, where an adapter that was just trained is in float32, and a saved one is not."""
    given["dtype"] = "bfloat16"
    complete = sift(**{**given, "out": str(tmp_path / "complete")}, console=QUIET).folder
    begun = []

    def stop(_):
        begun.append(True)
        if len(begun) == training:
            os.kill(os.getpid(), signal.SIGINT)

    interfere(At("on_step_begin", 1, stop))
    with pytest.raises(KeyboardInterrupt) as stopped:
        sift(**given, console=QUIET)
    assert stopped.value.__notes__ == [f"the same command with --out {given['out']} continues"]
    assert (tmp_path / "sifted" / ("pool", "tuning")[training - 1] / "adapter").exists()  # of fewer steps
    monkeypatch.undo()
    sift(**given, console=QUIET)
    for name in ("losses.jsonl", "similar.jsonl", "scores.csv", "dropped.csv", "sifted.jsonl"):
        assert (tmp_path / "sifted" / name).read_text() == (complete / name).read_text().replace("complete", "sifted")


def test_an_adapter_without_a_checkpoint_is_trained_again(given, complete, finished):
    """As a second Ctrl-C before the first checkpoint leaves it."""
    shutil.rmtree(complete / "tuning" / "checkpoints")
    (complete / "tuning" / "run.json").write_text('{"status": "interrupted", "summary": {"steps": 1}}')
    (complete / "losses.jsonl").write_text("")
    sift(**given, console=QUIET)
    assert losses(complete) == losses(finished)


def test_interrupted_between_chunks_and_in_a_line(given, complete, finished):
    lines = losses(finished).splitlines(keepends=True)
    assert len(lines) == 3
    for left in (lines[0] + lines[1][:99], lines[0] + b"\x00\n" + lines[2]):
        (complete / "losses.jsonl").write_bytes(left)
        for name in ("scores.csv", "dropped.csv", "sifted.jsonl"):
            (complete / name).unlink()
        sift(**given, console=QUIET)
        again = [json.loads(line) for line in losses(complete).splitlines()]
        assert sorted(again, key=lambda line: line["rows"]) == [json.loads(line) for line in lines]
        assert (complete / "sifted.jsonl").read_bytes() == (finished / "sifted.jsonl").read_bytes()
        values = [[line[name] for name in ("score", "selected")] for line in table(complete)]
        assert values == [[line[name] for name in ("score", "selected")] for line in table(finished)]


def test_complete_work_needs_no_model(given, complete, monkeypatch):
    monkeypatch.setattr("siftune.train.source.load_model", None)
    shutil.rmtree(complete / "tuning")
    assert len(sift(**given, share=5, console=QUIET).selected) == 5
    sift(**given, share=0.99, console=QUIET)  # all of them
    assert len(table(complete)) == 36
    assert not [line for line in table(complete) if line["selected"] == "no"]
    assert not (complete / "dropped.csv").exists()


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"steps": 4}, "steps"), ({"lr": 1e-3}, "lr"), ({"max_length": 63}, "max_length"), ({"limit": 20}, "the pool")],
)
def test_other_work_is_refused_by_name(given, complete, changes, name):
    before = {path: path.read_bytes() for path in complete.rglob("*") if path.is_file()}
    with pytest.raises(RecipeError, match=name):
        sift(**{**given, **changes}, console=QUIET)
    assert before == {path: path.read_bytes() for path in complete.rglob("*") if path.is_file()}


def test_another_target_is_refused_by_name(given, complete, tmp_path):
    lines = given["target"].read_text().splitlines(keepends=True)
    given["target"].write_text("".join(lines[:-1]))
    with pytest.raises(RecipeError, match="the target"):
        sift(**given, console=QUIET)


# --- rows ---


def test_rows_of_the_target_and_copies_are_counted(given, task, tmp_path):
    pool = [task.target[3], *task.pool, task.pool[0], task.target[3]]
    given["train"].write_text("".join(json.dumps(row) + "\n" for row in pool))
    given["target"].write_text("".join(json.dumps(row) + "\n" for row in [*task.target, *task.target[:2]]))
    sifted = sift(**given, share=0.5, console=QUIET)
    assert len(sifted.notes) == 3
    assert [note.split()[:2] for note in sifted.notes] == [["2", "rows"], ["1", "row"], ["2", "rows"]]
    assert sifted.places == [f"{given['train']}:{number}" for number in range(2, 38)]
    assert records(sifted.rows) == [pool[n] for n in sifted.selected]
    assert {f"{given['train']}:{number}" for number in (1, 38, 39)} <= excluded(sifted.dropped)
    seen, unseen = (records(tmp_path / "sifted" / name) for name in ("seen.jsonl", "unseen.jsonl"))
    assert sorted([*seen, *unseen], key=str) == sorted(task.target, key=str)  # copies are in neither


def test_copies_of_the_target_are_dropped_although_all_others_are_selected(given, task):
    given["train"].write_text("".join(json.dumps(row) + "\n" for row in [*task.pool, task.target[0]]))
    sifted = sift(**given, share=36, console=QUIET)
    assert len(sifted.selected) == len(sifted.places) == 36
    assert excluded(sifted.dropped) == {f"{given['train']}:37"}


def test_unusable_rows_are_left_out_on_request(given, task):
    bad = [{"prompt": "no answer"}, *task.pool[:10], {"prompt": "x" * 70, "completion": "y"}, *task.pool[10:]]
    weight = {**task.target[0], "weight": -1, "prompt": "7?"}
    given["train"].write_text("".join(json.dumps(row) + "\n" for row in bad))
    given["target"].write_text("".join(json.dumps(row) + "\n" for row in [weight, *task.target]))
    with pytest.raises(DataError, match="3 rows cannot be used") as refused:
        sift(**given, console=QUIET)
    assert all(place in str(refused.value) for place in ("pool.jsonl:1:", "pool.jsonl:12", "few.jsonl:1:"))
    assert not Path(given["out"]).exists()
    sifted = sift(**given, bad_rows="drop", share=6, console=QUIET)
    assert "3 rows left out" in sifted.notes[0]
    assert len(sifted.places) == 36
    assert records(sifted.rows) == [bad[n] for n in sifted.selected]
    recipe = Recipe(train=str(given["train"]), drop_rows=str(sifted.dropped), bad_rows="drop")
    assert f"{given['train']}:12" in [row.origin for row in read_rows(recipe).parts["train"]]  # dropped by tokens alone


def test_rows_of_the_target_that_are_too_long_are_not_held_out(given, task):
    """Those that would have been held out of all."""
    long = [{"prompt": "x" * 70 + str(n), "completion": "y"} for n in range(12)]
    rows = [row for pair in zip(long, task.target, strict=True) for row in pair]
    given["target"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    sifted = sift(**given, bad_rows="drop", share=6, console=QUIET)
    assert "12 rows left out" in sifted.notes[0]
    assert all(row in task.target for half in halves_of(sifted.folder) for row in half)


def test_texts_are_compared_after_a_token_that_begins_all_of_them(given, base, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(base, model)
    byte_tokenizer(add_bos=True).save_pretrained(model)
    for name in ("train", "target"):
        rows = map(json.loads, given[name].read_text().splitlines())
        texts = [{"text": f"{row['prompt']} {row['completion']}"} for row in rows]
        given[name].write_text("".join(json.dumps(row) + "\n" for row in texts))
    sifted = sift(**{**given, "model": str(model)}, share=6, console=QUIET)
    by_task = [sifted.similar[[place in sums for place in range(36)]].mean() for sums in (range(7, 19), range(7))]
    assert by_task[0] > by_task[1] + 0.2


def test_held_out_rows_are_neither_scored_nor_dropped(given):
    settings = {"train": str(given["train"]), "target": str(given["target"]), "eval_share": 0.3}
    held_out = [row.origin for row in read_rows(Recipe(**settings)).parts["eval"]]
    assert held_out
    sifted = sift(**given, eval_share=0.3, share=4, console=QUIET)
    assert len(sifted.places) == 36 - len(held_out)
    assert not set(held_out) & {*sifted.places, *excluded(sifted.dropped)}
    again = read_rows(Recipe(**settings, drop_rows=str(sifted.dropped), target_share=0.0))
    assert [row.origin for row in again.parts["eval"]] == held_out
    assert len(again.parts["train"]) == 4


def test_places_hold_in_another_folder(given, complete, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sifted = sift(**{**given, "train": "pool.jsonl", "target": "few.jsonl", "out": "sifted"}, share=4, console=QUIET)
    assert sifted.places[0] == "pool.jsonl:1"
    dropped = str(sifted.dropped)
    monkeypatch.chdir("/")
    assert len(read_rows(Recipe(train=str(given["train"]), drop_rows=dropped)).parts["train"]) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"target": "few rows"}, {"train": "target"}, {"train": ["pool", "target"]}, {"train": ["pool", "pool"]},
        {"train": "copy of target"}, {"share": 37}, {"share": 0}, {"share": 1.0}, {"share": -0.5}, {"share": True},
        {"steps": 0}, {"drop_rows": "target"}, {"dp_epsilon": 1.0, "dp_delta": 1e-6}, {"sharding": "fsdp"},
        {"train": ""}, {"target": ""}, {"train": "nowhere.jsonl"}, {"no_such_setting": 1},
        {"adapter": "nothing"}, {"eval": "nowhere.jsonl"},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_input_is_one_sentence_before_the_model_is_loaded(given, tmp_path, task, monkeypatch, changes):
    monkeypatch.setattr("siftune.train.source.load_model", None)
    few = tmp_path / "7.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in [*task.target[:7], *task.target[:3]]))
    shutil.copy(given["target"], tmp_path / "copy.jsonl")
    places = {"few rows": str(few), "pool": str(given["train"]), "target": str(given["target"])}
    places["copy of target"] = str(tmp_path / "copy.jsonl")
    named = {
        key: [places[name] for name in value] if isinstance(value, list) else places.get(value, value)
        for key, value in changes.items()
    }
    with pytest.raises(InputError) as refused:
        sift(**{**given, **named}, console=QUIET)
    assert "\n" not in str(refused.value)
    assert not Path(given["out"]).exists()


def test_a_pool_without_a_row_like_the_target(given, complete, monkeypatch):
    monkeypatch.setattr(scoring, "choose_by_losses", lambda *given: Choice(np.zeros(36, bool), "", 0.1))
    with pytest.raises(DataError, match="no row of the pool"):
        sift(**given, console=QUIET)
    assert (complete / "losses.jsonl").exists()
    assert len(sift(**given, share=3, console=QUIET).selected) == 3


def test_a_loss_that_is_not_finite_names_its_row(given, complete, monkeypatch):
    original = answers.shared_nll

    first = int(np.isfinite(sift(**given, console=QUIET).scores).argmax())
    given["out"] += " again"

    def broken(model, rows, *others):
        result = original(model, rows, *others)
        return replace(result, nll=np.where(np.arange(len(rows)) == 0, np.nan, result.nll))

    monkeypatch.setattr(answers, "shared_nll", broken)
    monkeypatch.setattr(answers, "row_nll", broken)
    with pytest.raises(DataError, match=rf"pool\.jsonl:{first + 1} is not finite"):
        sift(**given, console=QUIET)
