"""Run folders for reports, written without training: losses that fall, choices that look like choices."""

from pathlib import Path

import numpy as np
import torch

from siftune.evaluate.measure import MetricRow
from siftune.methods.drivers.layer_driver import LayerChoice
from siftune.methods.drivers.sample_choice import SampleChoice
from siftune.recipe.read import recipe_to_yaml
from siftune.recipe.schema import Recipe, resolve_recipe
from siftune.report.evals import Answer, Eval, record_eval
from siftune.train.folder.run_folder import RunFolder
from siftune.train.folder.selections import SelectionRecord
from siftune.train.results import FollowedShares

KINDS = ("arithmetic", "facts", "wrong")
SAMPLES = 8  # rows of a batch


def save_run(path: Path, method: str = "dense", steps: int = 40, depth: int = 12, seed: int = 0, **settings) -> Path:
    """Write the folder of a finished run; `settings` go to its recipe."""
    generator = np.random.default_rng(seed)
    path.mkdir(parents=True)
    given = {"model": "tiny", "train": "pool.jsonl", "eval": "test.jsonl", "steps": steps, "seed": seed, **settings}
    recipe = resolve_recipe(Recipe(method=method, out=str(path), **given))
    (path / "recipe.yaml").write_text(recipe_to_yaml(recipe), encoding="utf-8")
    folder = RunFolder(path)
    for step in range(1, steps + 1):
        folder.append("metrics.jsonl", _line(step, steps, generator))
        if step % 10 == 0:
            folder.append("metrics.jsonl", {"step": step, "eval_loss": 0.5 + 1.3 / step**0.5})
    figures = {"loss_first": 2.1, "loss_last": 0.4, "eval_loss": 0.7 + seed / 50, "seconds": 61.5 + 9 * seed}
    kinds = [KINDS[number % 3] for number in range(steps * SAMPLES)]
    record, followed = SelectionRecord(path, kinds), FollowedShares(kinds)
    if "ist" in method or method == "rst":
        _layers(record, method, steps, depth, generator)
    if "gast" in method:
        _rows(record, followed, steps, depth, generator)
    record.write()
    memory = {"peak_memory_mb": 1800.0 + 90 * seed}
    summary = {"steps": steps, **figures, "tokens": 4000, **memory, "followed": followed.shares()}
    folder.write_run(status="finished", summary=summary)
    return path


def _line(step, steps, generator):
    noise = generator.normal()
    return {
        "step": step, "loss": 0.4 + 1.7 / step**0.7 + 0.03 * noise, "grad_norm": 1 + 0.1 * noise,
        "learning_rate": 5e-4 * (1 - step / steps), "tokens_per_second": 130 + noise,
        "seconds_per_step": 3 + 0.1 * noise,
        "peak_memory_mb": 1700.0 + min(step, 10) * 10, "active_layers": 3,
    }  # fmt: skip


def _layers(record, method, steps, depth, generator):
    importance = torch.zeros(depth, dtype=torch.float64)
    for step in range(steps):
        moved = method.startswith("ist") and step % 10 == 0 and step > 0
        if moved:
            importance = importance + torch.from_numpy(generator.normal(size=depth)) * 0.4
        weights = torch.sigmoid(importance).numpy()
        chosen = generator.choice(depth, max(1, depth // 4), replace=False, p=weights / weights.sum())
        given = importance if method.startswith("ist") else None
        record.layers(LayerChoice(step, tuple(sorted(chosen.tolist())), given, moved))


def _rows(record, followed, steps, depth, generator):
    for step in range(steps):
        rows = list(range(step * SAMPLES, (step + 1) * SAMPLES))
        kind = np.array([row % 3 for row in rows])
        common = 1.0 - kind + generator.normal(size=SAMPLES)
        scores = torch.from_numpy(1e-9 * (common + 0.7 * generator.normal(size=(depth, SAMPLES)))).float()
        selected = scores.topk(SAMPLES // 2).indices.sort().values
        layers = tuple(range(depth))
        choice = SampleChoice(step, 0, tuple(map(str, layers)), layers, scores, selected)
        record.rows(choice, rows)
        followed.add(choice, rows)


def _answer(i):
    right, written = 2 * i + 7, 2 * i + 7 + i % 3
    base = "" if i % 2 else "The answer"
    return Answer(f"What is {i} + {i + 7}?\nAnswer:", str(right), base, str(written), False, right == written)


def save_eval(run: Path, base: float = 0.03, tuned: float = 0.5, answers: tuple[Answer, ...] | None = None) -> None:
    """Write what was measured of a run."""
    rows = (
        MetricRow("exact_match", 200, base, tuned, tuned - base, tuned - base - 0.06, tuned - base + 0.07,
                  (base - 0.01, base + 0.03), (tuned - 0.06, tuned + 0.06)),
        MetricRow("choices", 200, 0.42, 0.6, 0.18, 0.105, 0.255, (0.35, 0.49), (0.53, 0.67)),
        MetricRow("perplexity", 200, 6.5, 1.7, -4.8, -5.2, -4.4),
    )  # fmt: skip
    given = answers or tuple(map(_answer, range(20)))
    record_eval(run, Eval("test.jsonl", 200, 0.95, rows, given))
