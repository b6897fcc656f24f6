"""Training rows that are kept for being like known ones, and a run on them."""

import json

import pytest
import torch
from rich.console import Console
from support.tiny_run import lines, recipe

from siftune.base.errors import RecipeError
from siftune.models.source import load_model
from siftune.recipe.checks import check
from siftune.train.prepare import trained_rows
from siftune.train.run import train

QUIET = Console(quiet=True)


def rows_file(path, texts):
    path.write_text("".join(json.dumps({"prompt": f"{text}?", "completion": text}) + "\n" for text in texts))
    return path


def by_hand(base, texts, known):
    """The texts, the one most like a known one first: cosines of mean hidden states, a pass for each row."""
    model, tokenizer = load_model(str(base))

    def embedded(text):
        ids = tokenizer(f"{text}?")["input_ids"] + tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [*ids, tokenizer.eos_token_id]
        with torch.no_grad():
            states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        return torch.nn.functional.normalize(states.mean(0), dim=0)

    few = torch.stack([embedded(text) for text in known])
    return sorted(texts, key=lambda text: -float((few @ embedded(text)).max()))


def test_a_run_trains_on_the_rows_most_like_the_targets_and_on_these(base, tmp_path):
    texts = [f"{word} {number}" for word in ("cat", "HOUSE", "zz") for number in range(6)]
    pool, few = rows_file(tmp_path / "pool.jsonl", texts), rows_file(tmp_path / "few.jsonl", ["zz 9", "cat 77"])
    given = recipe(
        base, pool, tmp_path / "run", method="dense", template="none", retrieve=0.5, target=str(few), steps=None
    )
    done = train(given, QUIET)
    rows = trained_rows(done.folder.path, given)
    kept = [row.completion for row in rows if row.extra.get("source") != "target"]
    assert kept == [text for text in texts if text in by_hand(base, texts, ["zz 9", "cat 77"])[:9]]
    assert {row.completion for row in rows} == {*kept, "zz 9", "cat 77"}
    assert done.summary["steps"] == -(-len(rows) // given.batch_size)
    assert lines(done.folder.path / "metrics.jsonl")
    assert len(rows) - len(kept) == 3  # a quarter of what is kept, where it was of the pool: 6
    numbers = [int(number) for number in (done.folder.path / "retrieved.txt").read_text().split()]
    assert len(numbers) == len(rows)
    again = train(
        recipe(base, pool, tmp_path / "all", method="dense", template="none", target=str(few), steps=None), QUIET
    )
    assert not (again.folder.path / "retrieved.txt").exists()
    assert again.summary["steps"] > done.summary["steps"]


def test_rows_to_compare_with_need_not_be_trained_on(base, tmp_path):
    texts = [f"word {number}" for number in range(8)]
    pool, few = rows_file(tmp_path / "pool.jsonl", texts), rows_file(tmp_path / "few.jsonl", ["word 99"])
    given = recipe(base, pool, tmp_path / "run", method="rst", template="none", retrieve=0.25, support_rows=str(few))
    rows = trained_rows(train(given, QUIET).folder.path, given)
    assert [row.completion for row in rows] == sorted(by_hand(base, texts, ["word 99"])[:2])


def test_without_known_rows_it_is_refused(base, tmp_path):
    given = recipe(base, rows_file(tmp_path / "pool.jsonl", ["a", "b"]), tmp_path / "run", method="dense", retrieve=0.5)
    with pytest.raises(RecipeError, match=r"retrieve compares rows with those of --target or --support-rows"):
        check(given)


def test_where_all_rows_are_the_targets_there_is_nothing_to_choose(base, tmp_path):
    rows = [{"prompt": "a", "completion": "b", "source": "target"}] * 2
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = str(rows_file(tmp_path / "few.jsonl", ["c"]))
    given = recipe(base, path, tmp_path / "run", method="dense", template="none", retrieve=0.5, target=few)
    with pytest.raises(RecipeError, match="not the target's, and there are none"):
        train(given, QUIET)
