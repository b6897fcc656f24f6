"""The tasks of `quality.py`, and one run on one of them: train, watch what is drawn, measure on held-out rows."""

import json
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from siftune.base.environment import hardware, versions
from siftune.base.errors import DataError
from siftune.bench.worker import Clock
from siftune.data.read import load_rows
from siftune.data.tasks import arithmetic_rows, split
from siftune.data.tokens import tokenize_rows
from siftune.engine.groups import group_by_layer
from siftune.engine.substitution import use_base_dtype
from siftune.evaluate.likelihood import score_choices
from siftune.evaluate.measure import measure
from siftune.evaluate.prepare import prepare_rows
from siftune.methods.drivers.sample_choice import SampleChoice
from siftune.methods.gast.callback import GAST
from siftune.methods.gast.maths import zscores
from siftune.models.load import load_model
from siftune.recipe.checks import check
from siftune.recipe.read import load_recipe
from siftune.recipe.schema import Recipe, resolve_recipe
from siftune.train.build import build

Record = dict[str, Any]
Job = dict[str, Any]

SUPPORT_ROWS = 100  # clean rows of the task, in neither training nor test, for support dataset
_SUITE = ("ARC-Easy", "ARC-Challenge", "openbookqa", "boolq")
_BATCH = 64  # rows per forward pass when measuring
_GENERATED_CHOICES = 100  # questions that are also asked as multiple choice where answers are generated: it takes long
_QUESTION = re.compile(r"^Please .*?question: (?P<text>.*?)\n\n(?:(?P<options>Answer1:.*?)\n\n)?Answer format:", re.S)


@dataclass(frozen=True)
class Task:
    """Rows of one seed: `prompt`, `completion`, `choices`, `answer`, `kind`, `wrong`."""

    train: list[Record]
    test: list[Record]
    support: list[Record]


def make_task(job: Job) -> Task:
    """Draw the rows of a job's task with its seed; only the training rows carry noise."""
    rows, questions, noise, seed = job["rows"], job["questions"], job["noise"], job["seed"]
    if job["task"] == "options":
        return _options(Path(job["data"]), rows, questions, noise, seed)
    train, test = split(rows, questions, seed, noise)
    return Task(train, test, arithmetic_rows(SUPPORT_ROWS, seed + 1000, exclude=[*train, *test]))


def _options(folder: Path, rows: int, questions: int, noise: float, seed: int) -> Task:
    """Draw equal numbers of rows from the four sets of the suite; no question comes twice."""
    train: list[Record] = []
    test: list[Record] = []
    support: list[Record] = []
    parts = ("train", "test")
    files = {name: [read_options(folder / f"{name}.{part}.json", name) for part in parts] for name in _SUITE}
    seen = {row["prompt"] for _, held_out in files.values() for row in held_out}
    for place, (name, (pool, held_out)) in enumerate(files.items()):
        rng = random.Random(f"{name} {seed}")
        pool = list({row["prompt"]: row for row in pool if row["prompt"] not in seen}.values())
        seen |= {row["prompt"] for row in pool}
        count, kept, asked = (_share(n, place) for n in (rows, SUPPORT_ROWS, questions))
        if count + kept > len(pool) or asked > len(held_out):
            raise DataError(f"{name} has {len(pool)} + {len(held_out)} rows, too few for {count + kept} + {asked}.")
        drawn = rng.sample(pool, count + kept)
        train, support, test = train + drawn[kept:], support + drawn[:kept], test + rng.sample(held_out, asked)
    rng = random.Random(seed)
    rng.shuffle(train)
    for row in rng.sample(train, round(noise * len(train))):
        row |= {"completion": rng.choice([c for c in row["choices"] if c != row["answer"]]), "wrong": True}
    return Task(train, test, support)


def _share(n: int, place: int) -> int:
    return (n + len(_SUITE) - 1 - place) // len(_SUITE)


def read_options(path: Path, kind: str) -> list[Record]:
    """Turn the suite's rows into questions whose completions are the texts of the options."""
    if not path.is_file():
        raise DataError(f"{path} is missing; the task options needs the commonsense suite: give its folder with --data")
    rows = []
    for record in json.loads(path.read_text(encoding="utf-8")):
        found = _QUESTION.match(record["instruction"])
        if found is None:
            raise DataError(f"{path}: no question in {record['instruction']!r}")
        listed = re.split(r"Answer\d+:", found["options"] or "")[1:]
        texts = [f" {option.strip()}" for option in listed or ("true", "false")]
        names = [f"answer{number}" for number in range(1, len(listed) + 1)] or ["true", "false"]
        answer = texts[names.index(record["answer"])]
        if len(set(texts)) == len(texts):
            question = f"Question: {found['text'].strip()}\nAnswer:"
            row = {"prompt": question, "completion": answer, "choices": texts, "answer": answer}
            rows.append({**row, "kind": kind, "wrong": False})
    return rows


class LabelWatch:
    """Notes which rows GAST draws: how many with a wrong label, how it scores them, and of what kind.

    The rows of a batch are known by their tokens, which a hook on the model sees; the choice comes from GAST.

    Args:
        data: The tokenised training rows.
        rows: The rows that they were made of.
    """

    def __init__(self, data: Dataset, rows: Sequence[Record]) -> None:
        self._rows = dict(zip(map(tuple, data["input_ids"]), rows, strict=True))
        self._kinds: dict[str, list[int]] = {row["kind"]: [0, 0] for row in rows}  # drawn, seen
        self._batch: Mapping[str, Any] = {}
        self._notes: list[list[float]] = []  # per batch and unit, see `summary`

    def attach(self, model: nn.Module, method: GAST) -> None:
        """Listen to the model's training passes and to the choices of `method`, beside whoever listens already."""
        model.register_forward_pre_hook(self._see, with_kwargs=True)
        inner = method.on_select

        def both(samples: SampleChoice) -> None:
            if inner is not None:
                inner(samples)
            self._note(samples)

        method.on_select = both

    def _see(self, model: nn.Module, _: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        if model.training:  # support passes come before the pass of the batch, which thus is the last one
            self._batch = inputs

    def _note(self, samples: SampleChoice) -> None:
        pairs = zip(self._batch["input_ids"], self._batch["attention_mask"].bool(), strict=True)
        rows = [self._rows[tuple(ids[seen].tolist())] for ids, seen in pairs]
        wrong_S = torch.tensor([row["wrong"] for row in rows])
        for layer, numbers, scores_S in zip(samples.layers, samples.selected.tolist(), samples.scores, strict=True):
            drawn_K = torch.tensor(numbers, dtype=torch.int64)
            z_S = zscores(scores_S.double(), torch.ones_like(wrong_S))
            drawn = [len(drawn_K), int(wrong_S[drawn_K].sum()), len(wrong_S), int(wrong_S.sum())]
            for counter, chosen in enumerate((drawn_K.tolist(), range(len(rows)))):
                for row in chosen:
                    self._kinds[rows[row]["kind"]][counter] += 1
            self._notes.append([samples.step, layer, *drawn, float(z_S[wrong_S].sum()), float(z_S[~wrong_S].sum())])

    def summary(self) -> Record:
        """Shares of wrong rows among the draws, in all and by thirds, and mean z-scores by layer."""
        notes = np.array(self._notes)
        layers, thirds = notes[:, 1], [_thirds(notes[:, column]) for column in (1, 0)]
        by_layer = [_sums(notes[layers == layer]) for layer in np.unique(layers)]
        return {
            "drawn_by_kind": {kind: round(drawn / seen, 4) for kind, (drawn, seen) in self._kinds.items() if seen},
            "wrong_in_batches": _ratio(notes, 5, 4),
            "wrong_in_draws": _ratio(notes, 3, 2),
            "wrong_by_layers": [_ratio(notes[thirds[0] == third], 3, 2) for third in range(3)],
            "wrong_by_time": [_ratio(notes[thirds[1] == third], 3, 2) for third in range(3)],
            "z_wrong": [_number(total[6] / total[5]) for total in by_layer if total[5]],
            "z_right": [_number(total[7] / (total[4] - total[5])) for total in by_layer],
        }


def _thirds(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Number the thirds of a range of whole numbers that begins at 0: 0, 1, 2."""
    return np.asarray(values * 3 // (values.max() + 1), dtype=np.int64)


def _sums(notes: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(notes.sum(axis=0))


def _ratio(notes: NDArray[np.float64], over: int, under: int) -> float | None:
    return _number(notes[:, over].sum() / notes[:, under].sum()) if len(notes) else None


def _number(value: float) -> float | None:
    """Four digits; None where there are no scores."""
    return None if np.isnan(value) else round(float(value), 4)


def recipe_of(job: Job, folder: Path) -> Recipe:
    """Make a job's recipe, checked, for rows in `folder`."""
    values = {**job["settings"], **job["overrides"], "seed": job["seed"]}
    for name in ("add_support", "untrained"):  # of the job, not of the recipe
        values.pop(name, None)
    values |= {"template": "none", "train": str(folder / "train.jsonl"), "out": str(folder), "log_every": 50}
    if values.get("support") == "dataset":
        values |= {"target": str(folder / "support.jsonl"), "target_share": 0.0}
    file = folder / "quality.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    recipe: Recipe = resolve_recipe(load_recipe(file))
    check(recipe)
    return recipe


def run_job(job: Job, folder: Path) -> Record:
    """Train and measure one job in this process; `folder` holds rows and logs meanwhile."""
    task = make_task(job)
    if job["overrides"].get("add_support"):
        task.train[-len(task.support) :] = task.support  # in the place of others: as many rows, as many steps
    for name in ("train", "test", "support"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in getattr(task, name)))
    recipe = recipe_of(job, folder)
    model, tokenizer, found = _train(recipe, folder, task.train, bool(job["overrides"].get("untrained")))
    started = time.perf_counter()
    with use_base_dtype(model, group_by_layer(model)):  # as in training; release() has taken that off
        measured = _measure(model, tokenizer, folder / "test.jsonl", task.test, generate=job["task"] == "arithmetic")
    seconds = round(time.perf_counter() - started, 1)
    return {**measured, **found, "seconds_measuring": seconds, "hardware": hardware(), "versions": versions()}


def _train(
    recipe: Recipe, folder: Path, rows: Sequence[Record], untrained: bool
) -> tuple[nn.Module, PreTrainedTokenizerBase, Record]:
    """Train as `siftune train` does, or only prepare for it: the model, its tokenizer, and what was seen meanwhile."""
    model, tokenizer = load_model(recipe.model, recipe.dtype)
    files = {"train": recipe.train, "support": recipe.target}
    data = {
        name: tokenize_rows(load_rows(file), tokenizer, recipe.max_length, recipe.template)
        for name, file in files.items()
        if file is not None
    }
    built = build(recipe, model, tokenizer, data, folder / "checkpoints")
    trainer = built.trainer
    watch, clock = LabelWatch(data["train"], rows), Clock()
    trainer.add_callback(clock)
    methods = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, GAST)]
    for method in methods:
        watch.attach(trainer.model, method)
    processor = time.process_time()
    try:
        if untrained:
            return trainer.model, tokenizer, {"steps": 0}
        trainer.train()
    finally:
        built.release()
    steps = trainer.state.global_step
    found = {
        "steps": steps,
        "seconds_per_step": round(float(np.mean(clock.seconds(1))), 4),
        "processor_seconds_per_step": round((time.process_time() - processor) / steps, 4),  # for a busy machine
    }
    return trainer.model, tokenizer, {**found, **(watch.summary() if methods else {})}


def _measure(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, file: Path, rows: Sequence[Record], generate: bool
) -> Record:
    """Measure a model on held-out rows.

    Returns:
        `correct`, per metric 0 or 1 for each question that was asked; `nll`, of each right answer with its end, in
        nats; `accuracy`, the means of `correct`; `by_kind`, for the first metric the same by kind of question.
    """
    prepared = prepare_rows(load_rows(str(file)), tokenizer, ("choices", *(["exact_match"] * generate)), "none")
    assert prepared.items is not None
    correct: dict[str, list[int]] = {}
    if generate:
        written = measure(model, replace(prepared, items=None), _BATCH)["exact_match"]
        correct["exact_match"] = written.values.astype(int).tolist()
    asked = _GENERATED_CHOICES if generate else len(rows)
    alone = [replace(item, choices_ids=[item.choices_ids[item.answer]], answer=0) for item in prepared.items[asked:]]
    scores = score_choices(model, [*prepared.items[:asked], *alone], _BATCH)
    correct["choices_per_token"] = scores.correct(normalised=True)[:asked].astype(int).tolist()
    correct["choices"] = scores.correct()[:asked].astype(int).tolist()
    pairs = zip(scores.loglik, scores.answers, strict=True)
    first = np.array(next(iter(correct.values())))
    kinds = np.array([row["kind"] for row in rows])
    return {
        "accuracy": {name: round(float(np.mean(values)), 4) for name, values in correct.items()},
        "by_kind": {str(kind): round(float(first[kinds == kind].mean()), 4) for kind in dict.fromkeys(kinds.tolist())},
        "correct": correct,
        "nll": [round(float(-loglik[answer]), 5) for loglik, answer in pairs],
    }
