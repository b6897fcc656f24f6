"""Folders of sifted pools for report pages, written without a model."""

import json
import math
import random
from pathlib import Path

from siftune.base.work_folder import record_text
from siftune.data.decisions import Decision, decisions_csv

LIMITS = (1.25, 0.6)  # on the score, and on the similarity of prompts


def save_pool(path: Path, count: int, long: int = 0) -> Path:
    """Write a pool of sums with wrong answers among them, and of another task; `long` letters are added to prompts."""
    generator, lines = random.Random(0), []
    for number in range(count):
        a, b, wrong = number % 89 + 10, (number * 7) % 83 + 10, generator.random() < 0.3
        record = {
            "prompt": f"What is {a} + {b}? {'.' * long}",
            "completion": f" {a + b + 10 * wrong}",
            "source": "sums",
        }
        if number % 3 == 2:
            record = {
                "prompt": f'Name a "city", with {a} letters.\n{"." * long}',
                "completion": " Rome",
                "source": "cities",
            }
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def save_sifting(folder: Path, pool: Path, rare: int = 0) -> Path:
    """Write the folder of `siftune sift` of such a pool: scores around the limits, and none for the other task.

    Rows of the task whose number is a multiple of `rare` are selected whatever their score; none for 0.
    """
    generator, decisions = random.Random(1), []
    for number, line in enumerate(pool.read_text(encoding="utf-8").splitlines(), 1):
        record = json.loads(line)
        of_task = record["source"] == "sums"
        similarity = generator.uniform(0.61, 0.99) if of_task else generator.uniform(0.05, 0.59)
        score = abs(generator.gauss(0.9, 0.7)) if of_task else math.nan
        texts = [text if len(text) <= 300 else f"{text[:300]}…" for text in (record["prompt"], record["completion"])]
        selected = score <= LIMITS[0] or (of_task and rare > 0 and number % rare == 0)
        decision = Decision(f"{pool}:{number}", selected, [score, similarity], record["source"], *texts)
        decisions.append(decision)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.csv").write_text(decisions_csv(decisions, ["score", "similarity"]), encoding="utf-8")
    state = {
        "seconds": 90,
        "reason": "their prompts are like the target's",
        "score_limit": 1.25,
        "similarity_limit": 0.6,
    }
    (folder / "sift.json").write_text(record_text({"model": "tiny", "columns": []}, state))
    return folder
