"""Draw the chart of docs/which_method.md: quality of the methods against their time and memory.

    python -m lab.chart

Quality is the difference in correct answers to LoRA on all rows (`dense`), paired by seed and question, with 95 %
bootstrap intervals over seeds and questions. It comes from `pays.jsonl` and `quality.jsonl`. Time and memory of
`gast` and `ist` come from `gast_cost.jsonl`, the time of `--target` from its own runs. The few rows alone have one
seed. The SVG follows the reader's light or dark theme.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from lab.seeds import seed_means

HERE = Path(__file__).parent
TEXT, MIXED, CLEAN = "#010203", "#2f81f7", "#d1730b"
STEPS = 120
THEME = "<style>svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e6edf3}}</style>"


@dataclass(frozen=True)
class Point:
    """A method: difference to `dense` in points of correct answers, with its interval; ratios of time and memory."""

    name: str
    colour: str
    points: float
    low: float
    high: float
    time: float
    memory: float | None


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read a file of JSON lines."""
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def paired(ours: dict[int, list[float]], dense: dict[int, list[float]]) -> tuple[float, float, float]:
    """Mean difference in points over seeds and questions, and its bootstrap interval over both."""
    seeds = sorted(ours.keys() & dense.keys())
    values = {
        name: [[100.0 * right for right in runs[seed]] for seed in seeds]
        for name, runs in (("ours", ours), ("dense", dense))
    }
    difference = seed_means(values, [[1.0] * len(ours[seed]) for seed in seeds]).difference("ours", "dense")
    assert difference.low is not None
    assert difference.high is not None
    assert difference.value is not None
    return difference.value, difference.low, difference.high


def from_pays(path: Path, cell: str, known: int, lr: float) -> dict[str, dict[int, dict[str, Any]]]:
    """Method -> seed -> run of SmolLM2; the last of equal jobs counts."""
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines(path):
        job = line["job"]
        same = (job["model"], job["cell"]["name"], job["cell"]["known"], job["lr"], job["steps"])
        if same == ("smollm2", cell, known, lr, STEPS):
            runs.setdefault(job["method"]["name"], {})[job["seed"]] = line
    return runs


def costs(path: Path) -> dict[str, tuple[float, float]]:
    """Method -> (seconds of a step, peak MB) as ratios to `dense`: medians over the rounds of means over steps."""
    rounds: dict[str, dict[int, tuple[float, float]]] = {}
    for line in lines(path):
        rounds.setdefault(line["method"], {})[line["round"]] = (fmean(line["seconds"]), line["peak_memory_mb"])
    dense = rounds["dense"]
    return {
        name: tuple(median(measured[i][part] / dense[i][part] for i in measured) for part in (0, 1))  # type: ignore[misc]
        for name, measured in rounds.items()
    }


def points(results: Path) -> list[Point]:
    """Collect the methods of the chart from the recorded runs."""
    price = costs(results / "gast_cost.jsonl")
    mixed = from_pays(results / "pays.jsonl", "mix", 100, 5e-4)
    clean = from_pays(results / "pays.jsonl", "clean", 0, 1e-3)
    quality: dict[str, dict[int, list[float]]] = {}
    for line in lines(results / "quality.jsonl"):
        job = line["job"]
        if job["task"] == "arithmetic" and job["noise"] == 0 and job["settings"]["lr"] == 5e-4:
            quality.setdefault(job["method"], {})[job["seed"]] = line["correct"]["exact_match"]

    def right(runs: dict[int, dict[str, Any]]) -> dict[int, list[float]]:
        return {seed: run["right"] for seed, run in runs.items()}

    def slower(name: str) -> float:
        key, dense = "processor_seconds_per_step", mixed["late-known"]
        return median(run[key] / dense[seed][key] for seed, run in mixed[name].items() if seed in dense)

    gast = paired(quality["sample 12 of 16"], quality["dense"])
    ist = paired(right(clean["ist"]), right(clean["dense"]))
    return [
        Point("the few rows alone", MIXED, *paired(right(mixed["known-alone"]), right(mixed["dense"])), 1.0, None),
        Point("--target", MIXED, *paired(right(mixed["late-known"]), right(mixed["dense"])), 1.0, None),
        Point("--target --method gast", MIXED, *paired(right(mixed["late-gast-half"]), right(mixed["dense"])),
              slower("late-gast-half"), None),
        Point("gast", CLEAN, *gast, *price["gast-sample"]),
        Point("ist", CLEAN, *ist, *price["ist"]),
    ]  # fmt: skip


def draw(methods: list[Point], out: Path) -> None:
    """Draw both panels and write the SVG."""
    plt.rcParams |= {
        "font.size": 11, "svg.fonttype": "none", "svg.hashsalt": "siftune", "font.family": "sans-serif",
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT),
    }  # fmt: skip
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.6), sharey=True, width_ratios=(1.35, 1), layout="constrained")
    for axes, part, label in zip(panels, ("time", "memory"), ("time", "peak memory"), strict=True):
        axes.axhline(0, color=TEXT, linewidth=0.8)
        axes.plot(1, 0, "s", color=TEXT, markersize=7)
        for point in methods:
            x = getattr(point, part)
            if x is not None:
                bars = [[point.points - point.low], [point.high - point.points]]
                axes.errorbar(x, point.points, bars, fmt="o", color=point.colour, capsize=3, markersize=7)
                axes.annotate(point.name, (x, point.points), (9, 4), textcoords="offset points", color=point.colour)
        axes.set_xlabel(f"{label}, × LoRA on all rows")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_xlim(0.8, 2.2)
    panels[1].set_xlim(0.86, 1.14)
    panels[0].set_ylabel("points of correct answers")
    legend = (("mixed pool, a few correct rows", MIXED), ("rows without errors", CLEAN), ("■ LoRA on all rows", TEXT))
    for place, (text, colour) in enumerate(legend):
        panels[1].text(0.02, 0.98 - 0.09 * place, text, color=colour, transform=panels[1].transAxes, va="top")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, transparent=True, metadata={"Date": None})
    svg = out.read_text(encoding="utf-8").replace(TEXT, "currentColor")
    svg = "\n".join(line.rstrip() for line in svg.replace("<defs>", f"{THEME}\n<defs>", 1).splitlines())
    out.write_text(svg + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Read the records and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the recorded runs")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "images" / "chart.svg")
    options = parser.parse_args(argv)
    methods = points(options.results)
    for point in methods:
        print(point)
    draw(methods, options.out)


if __name__ == "__main__":
    main()
