"""Time to read and tokenise many rows.

    python -m lab.tokens --rows 200000

The rows are those of `siftune.data.tasks`, numbered, written to a file in a new folder. It prints a line of JSON:
seconds on the clock and of processor time.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from siftune.base.environment import hardware
from siftune.data.tasks import arithmetic_rows
from siftune.models.source import resolve
from siftune.recipe.schema import Recipe
from siftune.records.rows import read_rows
from siftune.train.prepare import prepare


def write_rows(path: Path, count: int) -> None:
    """Write rows that all differ, by their numbers."""
    drawn = arithmetic_rows(min(count, 10_000), 0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = drawn[number % len(drawn)]
            file.write(json.dumps({**row, "prompt": f"({number}) {row['prompt']}"}) + "\n")


def timed(recipe: Recipe, model: str) -> dict[str, Any]:
    """Read and tokenise, and say how long it took."""
    tokenizer = AutoTokenizer.from_pretrained(resolve(model))
    started, before = time.perf_counter(), time.process_time()
    read = read_rows(recipe)
    reading = time.perf_counter() - started
    prepare(recipe, tokenizer, read)
    found = {
        "seconds": time.perf_counter() - started, "of_them_reading": reading, "processor": time.process_time() - before,
    }  # fmt: skip
    return {name: round(value, 1) for name, value in found.items()}


def main(argv: list[str] | None = None) -> None:
    """Time it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--model", default="smollm2")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(rows, options.rows)
        times = timed(Recipe(train=str(rows)), options.model)
    about = {"rows": options.rows, "cores": len(os.sched_getaffinity(0)), "hardware": hardware()}
    print(json.dumps({**about, **times}))


if __name__ == "__main__":
    main()
