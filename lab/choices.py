"""Multiple choice beside lm-evaluation-harness: questions a second on the same tokens, and whether the scores agree.

    pip install lm_eval
    python -m lab.choices --data FOLDER/ARC-Easy.test.json --rows 200 --rounds 3 --threads 2

Questions with the texts of their options, as the harness asks ARC. Every figure is of a fresh process, and the two take
turns; loading is not timed. The harness is given token ids, so that both score the same; its batches, logits and sums
are its own (`HFLM._loglikelihood_tokens`).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from lab.quality_tasks import read_options
from siftune.data.read import load_rows
from siftune.evaluate.likelihood import ChoiceItem, score_choices
from siftune.evaluate.prepare import prepare_rows
from siftune.models.load import load_model

TOOLS = ("siftune", "lm-eval")


def questions(tokenizer: Any, data: Path, count: int) -> list[ChoiceItem]:
    """The first questions of a file of the commonsense suite, without the chat template."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "questions.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in read_options(data, data.stem)[:count]))
        items = prepare_rows(load_rows(str(file)), tokenizer, ("choices",), "none").items
    assert items is not None
    return items


def score(tool: str, model: Any, tokenizer: Any, items: Sequence[ChoiceItem], batch_size: int) -> list[list[float]]:
    """Log-likelihoods of every question's options."""
    if tool == "siftune":
        return [scores.tolist() for scores in score_choices(model, items, batch_size).loglik]
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    asked = [(("", ""), list(item.prompt_ids), list(choice)) for item in items for choice in item.choices_ids]
    scores = iter(harness._loglikelihood_tokens(asked, disable_tqdm=True))
    return [[next(scores)[0] for _ in item.choices_ids] for item in items]


def work(options: argparse.Namespace) -> None:
    """Score in this process, and print what it took."""
    model, tokenizer = load_model(options.model, options.dtype)
    items = questions(tokenizer, options.data, options.rows)
    score(options.tool, model, tokenizer, items[:1], options.batch_size)  # the first pass finds its kernels
    started, worked = time.perf_counter(), time.process_time()
    loglik = score(options.tool, model, tokenizer, items, options.batch_size)
    took = {"seconds": time.perf_counter() - started, "processor": time.process_time() - worked}
    print(json.dumps({**took, "loglik": loglik}))


def run(tool: str, options: argparse.Namespace) -> dict[str, Any]:
    """Have a fresh process score."""
    shared = ("data", "rows", "batch_size", "model", "dtype")
    words = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in shared]
    done = subprocess.run(
        [sys.executable, "-m", "lab.choices", f"--tool={tool}", *words],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(rounds: Sequence[dict[str, dict[str, Any]]]) -> None:
    """Print rates, their ratio, and by how much scores differ."""
    questions = len(rounds[0][TOOLS[0]]["loglik"])
    for unit in ("seconds", "processor"):
        ratios = [one["lm-eval"][unit] / one["siftune"][unit] for one in rounds]
        rates = {tool: questions / median(one[tool][unit] for one in rounds) for tool in TOOLS}
        print(
            f"questions a second ({unit}): {', '.join(f'{tool} {rate:.2f}' for tool, rate in rates.items())}; "
            f"{median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    ours, theirs = (rounds[0][tool]["loglik"] for tool in TOOLS)
    apart = max(abs(x - y) for one, other in zip(ours, theirs, strict=True) for x, y in zip(one, other, strict=True))
    same = np.mean([np.argmax(one) == np.argmax(other) for one, other in zip(ours, theirs, strict=True)])
    print(f"log-likelihoods differ by at most {apart:.3f} nats; {100 * same:.1f} % of the predictions are the same")


def main() -> None:
    """Read the options and go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="file of the commonsense suite")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto", help="float32 shows whether the scores agree")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16, help="options in a pass")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tool", choices=TOOLS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tool:
        return work(options)
    orders = [TOOLS if number % 2 == 0 else TOOLS[::-1] for number in range(options.rounds)]
    return compare([{tool: run(tool, options) for tool in order} for order in orders])


if __name__ == "__main__":
    main()
