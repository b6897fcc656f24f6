"""Pools whose errors nobody planted, as cells of `lab.pays`: rows of people, simple programs and language models.

    raters              newspaper sentences and product reviews, each with the sign that one random rater gave; the
                        target are newspaper sentences with the sign of most raters
    raters-nyt, -amazon  only newspaper sentences, or only reviews, in pool and target
    intents-a, -b, -c   questions to a bank with the label of a weak labeller; the target has the correct labels
    tasks-intents       a fifth intents, four fifths other tasks, all correct
    tasks-slots         the same with booking requests
    solutions           word problems with solutions of four language models, of which 63 % are wrong
    translations-el, -bg  strings of a program; entries marked fuzzy are translations of similar strings

A cell is the plain dictionary of `cells.py`, with `natural` true. Rows have `prompt`, `completion` (as in the pool),
`answer` (the correct one) and `group`: "target" for a correct row of the task, "wrong", "known", or another source.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lab.pays.pool import DEV_QUESTIONS, Pool
from siftune.base.errors import DataError

Record = dict[str, Any]
Job = dict[str, Any]

FOLDER = "natural"  # inside the folder of the data
ROWS = 1440  # of a pool
QUESTIONS = 500  # held-out rows of the target
_AGREE = 0.6  # of a sentence's raters
_OPTIONS = "positive, negative or neutral?"


def natural_cells(known: int) -> list[dict[str, Any]]:
    """The cells, each with a number of known rows."""
    names = {
        "raters": ("", "-nyt", "-amazon"),
        "intents": ("-a", "-b", "-c"),
        "tasks": ("-intents", "-slots"),
        "solutions": ("",),
        "translations": ("-el", "-bg"),
    }
    return [
        {"name": kind + part, "natural": True, "known": known, "rows": ROWS}
        for kind, parts in names.items()
        for part in parts
    ]


def natural_pool(job: Job, folder: Path) -> Pool:
    """Draw the rows of a job; pool and held-out rows do not depend on the number of known rows.

    Args:
        job: The job; of it count `cell` and `seed`.
        folder: Folder of the data, with the folder `natural` in it.

    Raises:
        DataError: A file is missing or has too few rows.
    """
    cell, rng = job["cell"], random.Random(f"natural {job['seed']}")
    kind, _, part = cell["name"].partition("-")
    draw: dict[str, Callable[..., tuple[list[Record], list[Record], list[Record]]]] = {
        "raters": _raters,
        "intents": _intents,
        "tasks": _tasks,
        "solutions": _solutions,
        "translations": _translations,
    }
    train, clean, test = draw[kind](folder / FOLDER, part, cell["rows"], rng)
    rng.shuffle(train)
    known = [{**row, "completion": row["answer"], "group": "known"} for row in clean[: cell["known"]]]
    count = min(QUESTIONS, len(test) - DEV_QUESTIONS)
    questions = [{**row, "completion": row["answer"]} for row in test[: count + DEV_QUESTIONS]]
    return Pool(train, known, questions[:count], questions[count:], {}, [])


def _read(path: Path) -> list[Record]:
    if not path.is_file():
        raise DataError(f"{path} is missing; give the folder of the data, with its folder natural, with --data")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _row(prompt: str, given: str, answer: str, source: str) -> Record:
    group = "target" if given == answer else "wrong"
    return {"prompt": prompt, "completion": given, "answer": answer, "group": group, "source": source}


def _take(rows: list[Record], count: int, name: str) -> list[Record]:
    if count > len(rows):
        raise DataError(f"{name} has {len(rows)} rows left, too few for {count}; make the pool smaller")
    taken = rows[:count]
    del rows[:count]
    return taken


_CLEAN = 256  # rows of the target that are set aside for the known ones


def _raters(folder: Path, part: str, rows: int, rng: random.Random) -> tuple[list[Record], ...]:
    """Two thirds newspaper, one third reviews, with a target of the newspaper; or one of them alone."""
    sources: dict[str, list[Record]] = {"nyt": [], "amazon": []}
    for record in _read(folder / "raters.jsonl"):
        signs = [_sign(rating) for rating in record["ratings"]]
        most, count = Counter(signs).most_common(1)[0]
        if count >= _AGREE * len(signs):
            prompt = f"{record['text'].strip()}\n{_OPTIONS}"
            sources[record["source"]].append(_row(prompt, rng.choice(signs), most, record["source"]))
    for source in sources.values():
        rng.shuffle(source)
    of_target = part or "nyt"
    test = _take(sources[of_target], QUESTIONS + DEV_QUESTIONS, of_target)
    clean = _take(sources[of_target], _CLEAN, of_target)
    counts = {part: rows} if part else {"nyt": rows * 2 // 3, "amazon": rows - rows * 2 // 3}
    return [row for name, count in counts.items() for row in _take(sources[name], count, name)], clean, test


def _sign(rating: int) -> str:
    return "positive" if rating > 0 else "negative" if rating < 0 else "neutral"


def _intents(folder: Path, part: str, rows: int, rng: random.Random) -> tuple[list[Record], ...]:
    train, test = _intent_rows(folder, part, rng)
    clean = _take(train, _CLEAN, f"intents-{part}")
    return _take(train, rows, f"intents-{part}"), clean, test


def _intent_rows(folder: Path, part: str, rng: random.Random) -> tuple[list[Record], list[Record]]:
    records = _read(folder / f"intents-{part}.jsonl")
    rng.shuffle(records)
    made = [
        (
            record["split"],
            _row(record["text"].strip(), record.get("weak", record["intent"]), record["intent"], "intents"),
        )
        for record in records
    ]
    return [row for split, row in made if split == "train"], [row for split, row in made if split == "test"]


def _tasks(folder: Path, part: str, rows: int, rng: random.Random) -> tuple[list[Record], ...]:
    """A fifth of the rows from each of five tasks, all with correct completions."""
    intents, intents_test = _intent_rows(folder, "a", rng)
    slots = [
        _row(record["text"], record["slots"], record["slots"], "slots") for record in _read(folder / "slots.jsonl")
    ]
    rng.shuffle(slots)
    decks = {"intents": [{**row, "completion": row["answer"], "group": "target"} for row in intents], "slots": slots}
    for record in _read(folder / "others.jsonl"):
        decks.setdefault(record["source"], []).append(
            _row(record["prompt"], record["completion"], record["completion"], record["source"])
        )
    for source in [*decks][2:]:
        rng.shuffle(decks[source])
    test = intents_test if part == "intents" else _take(slots, QUESTIONS + DEV_QUESTIONS, "slots")
    clean = _take(decks[part], _CLEAN, part)
    few = len(decks["roles"])  # there are fewest of these
    short = max(0, rows // 5 - few)
    train = []
    for source, deck in decks.items():
        taken = _take(deck, min(len(deck), rows // 5 + (short // 4 if source != "roles" else 0)), source)
        train += taken if source == part else [{**row, "group": source} for row in taken]
    return train, clean, test


def _solutions(folder: Path, _: str, rows: int, rng: random.Random) -> tuple[list[Record], ...]:
    """Solutions of training questions; the correct one of a held-out question is the reference."""
    records = _read(folder / "solutions.jsonl")
    rng.shuffle(records)
    test = [_row(one["question"], one["answer"], one["answer"], "solutions") for one in records[:200]]
    made: list[tuple[bool, Record]] = []
    for record in records[200:]:
        for solution in record["solutions"]:
            row = _row(record["question"], solution["text"], record["answer"], solution["model"])
            made.append((solution["correct"], {**row, "group": "target" if solution["correct"] else "wrong"}))
    rng.shuffle(made)
    correct = [row for good, row in made if good]
    # the last ones, since the pool has the first rows, with the correct ones among them
    clean = [{**row, "answer": row["completion"]} for row in correct[-(_CLEAN // 2) :]]
    gone = {row["completion"] for row in clean}
    pool = [row for _, row in made if row["completion"] not in gone]
    return pool[:rows], clean, test


def _translations(folder: Path, part: str, rows: int, rng: random.Random) -> tuple[list[Record], ...]:
    language = {"el": "Greek", "bg": "Bulgarian"}[part]
    made: dict[str, Record] = {}
    for record in _read(folder / "translations.jsonl"):
        if record["lang"] == part:
            prompt = f"Translate into {language}: {record['source']}"
            made[prompt] = {
                **_row(prompt, record["target"], record["target"], "translations"),
                "group": "wrong" if record["fuzzy"] else "target",
            }
    records = sorted(made.values(), key=lambda row: row["prompt"])
    rng.shuffle(records)
    correct = [row for row in records if row["group"] == "target"]
    # the last ones, as for solutions
    clean, test = correct[-_CLEAN:], correct[:-_CLEAN][-(QUESTIONS + DEV_QUESTIONS) :]
    gone = {row["prompt"] for row in (*test, *clean)}
    return [row for row in records if row["prompt"] not in gone][:rows], clean, test


def shares(rows: Sequence[Record]) -> dict[str, float]:
    """Share of each group."""
    return {group: count / len(rows) for group, count in Counter(row["group"] for row in rows).items()}
