"""Losses by source in the log, against losses of single rows."""

import json
import math
from types import SimpleNamespace

import pyarrow as pa
import pytest
from pyarrow import parquet
from rich.console import Console
from support.tiny_run import lines, recipe
from transformers import AutoTokenizer, Trainer

from siftune.data.read import load_rows
from siftune.data.target import source_or_file
from siftune.evaluate.likelihood import row_nll
from siftune.train.run import train
from siftune.train.trainer import SiftTrainer

QUIET = Console(quiet=True)


def write(path, count, source, shift=0):
    """Rows of different lengths; `source` names that of each."""
    rows = [{"prompt": f"{i} or {i * i}?", "completion": str((i + shift) ** 3)} for i in range(count)]
    rows = [{**row, **({"source": name} if (name := source(at)) else {})} for at, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tokens_of(tokenizer, path):
    """Ids and labels of the rows of a file."""
    pairs = []
    for row in lines(path):
        ids, answer = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        answer = [*answer, tokenizer.eos_token_id]
        pairs.append((ids + answer, [-100] * len(ids) + answer))
    return pairs


@pytest.mark.parametrize("own_loss", [False, True])
def test_losses_of_sources_are_those_of_their_rows(base, tmp_path, monkeypatch, own_loss):
    """Also if the model's own loss must be used."""
    pool = write(tmp_path / "pool.jsonl", 24, lambda at: "web" if at % 3 else "books")
    held_out = write(tmp_path / "held.jsonl", 10, lambda at: "web" if at < 4 else "books", shift=50)
    tokenizer = AutoTokenizer.from_pretrained(base)
    pairs, visits, step_of = tokens_of(tokenizer, pool), [], SiftTrainer.training_step

    def noted(trainer, model, inputs, *args):
        rows = inputs["row"].tolist()
        model.eval()
        visits.append((trainer.state.global_step, rows, row_nll(model, [pairs[row] for row in rows], 4)))
        return step_of(trainer, model.train(), inputs, *args)

    monkeypatch.setattr(SiftTrainer, "training_step", noted)
    if own_loss:
        monkeypatch.setattr(SiftTrainer, "_agrees", lambda *_: False)
    run = train(
        recipe(
            base, pool, tmp_path / "run", eval=str(held_out), method="dense", log_every=2, eval_every=6, batch_size=4
        ),
        QUIET,
    )
    logged = lines(tmp_path / "run" / "metrics.jsonl")
    assert logged[0]["loss/web"] > 0
    assert "eval_loss/web" not in logged[0]

    since = 0
    for line in (line for line in logged if "loss" in line):
        sums = {"web": [], "books": []}
        for rows, losses in ((rows, losses) for step, rows, losses in visits if since <= step < line["step"]):
            for row, nll, tokens in zip(rows, losses.nll, losses.tokens, strict=True):
                sums["web" if row % 3 else "books"].append((float(nll), int(tokens)))
        for name, pairs in sums.items():
            losses, tokens = (sum(part) for part in zip(*pairs, strict=True)) if pairs else (None, None)
            expected = None if losses is None else round(losses / tokens, 4)
            assert line.get(f"loss/{name}") == pytest.approx(expected, abs=1e-4)
        since = line["step"]
    assert since == 6

    found = row_nll(run.model.eval(), tokens_of(tokenizer, held_out), 4)
    last = next(line for line in reversed(logged) if "eval_loss" in line)
    for name, own in (("web", slice(0, 4)), ("books", slice(4, 10))):
        assert math.isclose(last[f"eval_loss/{name}"], found.nll[own].sum() / found.tokens[own].sum(), abs_tol=1e-4)
    assert run.summary["eval_loss"] == last["eval_loss"]


def test_a_model_with_a_loss_of_its_own_and_no_logits_trains_without_losses_of_sources(base, tmp_path, monkeypatch):
    compute = Trainer.compute_loss

    def without_logits(trainer, *args):
        loss, _ = compute(trainer, *args)
        return loss, SimpleNamespace()

    monkeypatch.setattr(SiftTrainer, "_agrees", lambda *_: False)
    monkeypatch.setattr(Trainer, "compute_loss", without_logits)
    pool = write(tmp_path / "pool.jsonl", 24, lambda at: "web" if at % 3 else "books")
    train(recipe(base, pool, tmp_path / "run", method="dense", steps=2), QUIET)
    logged = lines(tmp_path / "run" / "metrics.jsonl")
    assert logged[0]["loss"] > 0
    assert not any("loss/" in key for line in logged for key in line)


def test_files_are_sources_and_one_source_has_no_further_losses(base, tmp_path):
    first, second = (write(tmp_path / f"{name}.jsonl", 8, lambda _: None) for name in "ab")
    two = recipe(base, first, tmp_path / "two", method="dense", steps=2)
    two = type(two)(**{**vars(two), "train": (str(first), str(second)), "eval": str(first)})
    train(two, QUIET)
    keys = set().union(*lines(tmp_path / "two" / "metrics.jsonl"))
    assert {key for key in keys if "loss/" in key} == {"loss/a.jsonl", "loss/b.jsonl"}
    train(recipe(base, first, tmp_path / "one", method="dense", steps=2), QUIET)
    assert not any("loss/" in key for line in lines(tmp_path / "one" / "metrics.jsonl") for key in line)


def test_names_of_sources(tmp_path):
    files = [tmp_path / "a" / "x.jsonl", tmp_path / "b" / "x.jsonl", tmp_path / "c" / "x.parquet"]
    for file in files:
        file.parent.mkdir(exist_ok=True)
    for file in files[:2]:
        write(file, 2, lambda at: "web/en" if at else None)
    parquet.write_table(pa.table({"text": ["one"]}), files[2])
    rows = [row for file in files for row in load_rows(str(file))]
    assert source_or_file(rows) == ["a/x.jsonl", "web/en", "b/x.jsonl", "web/en", "c/x.parquet"]
