"""Quality of emulators: gradients, loss gap, and plug-in tuning, by method.

    python -m lab.offsite --calibration ARC-Easy.train.json \
        --text openbookqa.test.json --keeps 0.7,0.5 --seeds 0,1,2 --out FILE
    python -m lab.offsite --report FILE

The owner compresses the model with calibration rows of one task; the data owner tunes the first two and last two layers
on another, OpenBookQA. Rows are questions with the texts of correct options. Measured for every emulator:

    cosine     of the outer layers' gradients on base and emulator: on held-out text of a third task, and on the tuning
               task
    loss       of that text on the emulator, and on the base
    accuracy   on held-out questions (multiple choice), and likelihood of the right answers: emulator before and after
               tuning, and the base with the adapter that was tuned on the emulator (plug-in); and the base, before and
               after tuning the same layers

`--tune none` leaves the tuning out, and is quick. A finished emulator adds a line of JSON to FILE, and one that is
there already is not made again. More emulators: `name=key:value,...` after --methods, keys of `EmulatorSettings`.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from siftune.base.environment import hardware, versions
from siftune.data.batches import Collator
from siftune.data.rows import Row, rows_from
from siftune.data.tokens import tokenize_rows
from siftune.evaluate.bootstrap import Bootstrap, Estimate, resample
from siftune.models.layers import find_layers
from siftune.models.load import load_model, use_attention
from siftune.offsite.audits.gradients import OuterGradient, cosine, outer_gradient
from siftune.offsite.audits.members import AuditRows, RowScores, score_rows, tokenize_audit
from siftune.offsite.audits.models import OffsiteModels, Tuning, parameter_shares, plugged, read_outer, tuned
from siftune.offsite.audits.settings import AuditSettings
from siftune.offsite.emulator.assemble import EmulatorParts, materialise
from siftune.offsite.emulator.make import emulators
from siftune.offsite.emulator.model import Split
from siftune.offsite.emulator.plan import EmulatorSettings
from siftune.offsite.exchange.calibration import in_batches
from siftune.offsite.exchange.own_texts import own_texts, prompt_ids
from siftune.report.table import Table, markdown_table

Job = dict[str, Any]
Line = dict[str, Any]

PAPER = {"basis": "svd", "mlp": "channels", "allot": "uniform"}
METHODS: dict[str, dict[str, Any]] = {
    "layerdrop": {"method": "layerdrop"},
    "gradot, paper's basis": PAPER,
    "gradot, paper's basis, λ 0.1": {**PAPER, "lambda_attn": 0.1, "lambda_mlp": 0.1},
    "gradot, paper's basis, DRD alone": {**PAPER, "parts": "attention"},
    "gradot, paper's basis, SCP alone": {**PAPER, "parts": "mlp"},
    "gradot, whitened": {"mlp": "channels", "allot": "uniform"},
    "gradot, whitened, MLP refit": {"mlp": "refit", "allot": "uniform"},
    "measured": {},
}
BASE = "base"
CALIBRATED = ("calibration", "rows", "length", "source", "own_length")  # settings that the base does not depend on
_BASE_SCORES = ("full_zs", "full_ft")


@dataclass(frozen=True)
class Setting:
    """Data and settings shared by all measurements.

    Attributes:
        model: The base.
        tokenizer: Its tokenizer.
        calibration: Batches that the owner has.
        text: Batches of held-out text.
        gradient: The outer layers' gradient on that text, on the base.
        data: Folder of the files that rows to tune on are drawn from.
        template: Chat template of all rows, as in a recipe.
        split: Outer layers at either end.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    calibration: list[dict[str, Tensor]]
    text: list[dict[str, Tensor]]
    gradient: OuterGradient
    data: Path
    template: str
    split: Split


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing, or print the report; return the exit code."""
    args = _parse(argv)
    if args.report:
        print(report(_read(args.report)))
        return 0
    done = [line["job"] for line in _read(args.out)] if args.out.exists() else []
    missing = [job for job in _jobs(args) if job not in done]
    if missing:
        _measure(missing, args)
    return 0


def _measure(jobs: Sequence[Job], args: argparse.Namespace) -> None:
    """Make the emulators of all jobs in one go, then measure one after the other."""
    setting = _setting(args)
    kinds = [json.loads(text) for text in dict.fromkeys(json.dumps(job["emulator"]) for job in jobs) if text != "null"]
    choices = [EmulatorSettings(**kind, split=setting.split) for kind in kinds]
    started = time.monotonic()
    made = emulators(setting.model, setting.calibration, choices) if choices else []
    print(f"{len(made)} emulators in {time.monotonic() - started:.0f} s", flush=True)
    parts = {json.dumps(kind): found for kind, found in zip(kinds, made, strict=True)}
    for job in jobs:
        begun = time.monotonic()
        emulator = parts.get(json.dumps(job["emulator"]))
        line = _base(job, setting) if emulator is None else _emulator(job, setting, emulator)
        facts = {"versions": versions(), "hardware": hardware(), "seconds": time.monotonic() - begun}
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"job": job, **line, "facts": facts}) + "\n")
        shown = {name: round(scores["nll"], 3) for name, scores in line["scores"].items()}
        print(f"{job['name']} keep {job['keep']} seed {job['seed']}: {line.get('text')} {shown}", flush=True)


def _base(job: Job, setting: Setting) -> Line:
    """The base model before and after tuning the outer layers."""
    if job["tune"] is None:
        return {"scores": {}}
    model, (rows, tuning) = setting.model, _task(job, setting)
    split = setting.split
    scores = {"full_zs": _scores(score_rows(model, rows, 32))}
    with tuned(model, split.outer(len(find_layers(model).layers)), tuning):
        scores["full_ft"] = _scores(score_rows(model, rows, 32))
    return {"scores": scores}


def _emulator(job: Job, setting: Setting, parts: EmulatorParts) -> Line:
    """An emulator: gradients, loss, and what tuning it does for itself and for the base."""
    emulator = materialise(parts)
    models = OffsiteModels(setting.model, emulator, parts.split, setting.tokenizer)
    line: Line = {"kept": asdict(parameter_shares(models.base, models.emulator, models.split))}
    line["text"] = asdict(cosine(setting.gradient, outer_gradient(emulator, setting.text, parts.split)))
    scores: dict[str, Any] = {}
    if job["tune"] is not None:
        rows, tuning = _task(job, setting)
        some = rows.held_out.select(range(min(64, len(rows.held_out))))
        shown = in_batches(some, 16, setting.tokenizer.pad_token_id)
        pair = [outer_gradient(model, shown, parts.split) for model in (setting.model, emulator)]
        line["task"] = asdict(cosine(*pair))
        scores["emulator_zs"] = _scores(score_rows(emulator, rows, 32))
        depth = len(find_layers(emulator).layers)
        with tuned(emulator, parts.split.outer(depth), tuning):
            scores["emulator_ft"] = _scores(score_rows(emulator, rows, 32))
            adapter = read_outer(emulator, parts.split)
        with plugged(setting.model, parts.split, adapter):
            scores["plug_in"] = _scores(score_rows(setting.model, rows, 32))
    return {**line, "scores": scores}


def _task(job: Job, setting: Setting) -> tuple[AuditRows, Tuning]:
    """Rows of the tuning task, and how it is tuned."""
    tune = job["tune"]
    settings = AuditSettings(
        steps=tune["steps"], lr=tune["lr"], batch_size=tune["batch"], seed=job["seed"], template=setting.template
    )
    rows, questions = tune["steps"] * tune["batch"], tune["questions"]
    parts = (("train", rows), ("test", questions))
    train, test = (_options(setting.data / f"openbookqa.{part}.json", n, job["seed"]) for part, n in parts)
    rows = tokenize_audit(rows_from(train), rows_from(test), setting.tokenizer, settings)
    return rows, Tuning(rows.train, setting.tokenizer, settings)


def _options(path: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Questions of a file of the suite, as `lab.pays` asks them."""
    from lab.pays.pool import read_options

    return random.Random(seed).sample(read_options(path, path.stem), count)


def _scores(scores: RowScores) -> dict[str, Any]:
    correct = None if scores.correct is None else scores.correct.astype(int).tolist()
    return {
        "nll": float(scores.nll.sum() / scores.tokens.sum()),
        "accuracy": None if scores.correct is None else float(scores.correct.mean()),
        "rows": {"nll": scores.nll.round(5).tolist(), "tokens": scores.tokens.astype(int).tolist(), "correct": correct},
    }


def _setting(args: argparse.Namespace) -> Setting:
    model, tokenizer = load_model(args.model, args.dtype)
    use_attention(model, "eager" if model.device.type == "cpu" else "auto")  # rows are short
    files = ((args.calibration, args.rows), (args.text, args.text_rows))
    rows = [rows_from(_options(Path(file), count, 0)) for file, count in files]
    text = text_batches(rows[1], args.length, tokenizer, args.template)
    calibration = _calibration(rows[0], args, model, tokenizer)
    split = Split(args.outer, args.outer)
    gradient = outer_gradient(model, text, split)
    return Setting(model, tokenizer, calibration, text, gradient, Path(args.text).parent, args.template, split)


def _calibration(
    rows: Sequence[Row], args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Tensor]]:
    """Rows, or texts that the base writes freely or after the rows' prompts, or such texts and rows, half of each."""
    if args.source == "rows":
        return text_batches(rows, args.length, tokenizer, args.template)
    count = len(rows) // 2 if args.source == "mixed" else len(rows)
    length = args.own_length or args.length
    prompts = [] if args.source == "free" else prompt_ids(rows[:count], tokenizer, length, args.template)
    texts = own_texts(model, count, length, 0, prompts)
    data: list[Any] = [{**text, "labels": text["input_ids"]} for text in texts]
    if rest := rows[count:]:
        data += tokenize_rows(rest, tokenizer, args.length, args.template, completion_only=False)
    return in_batches(data, 4, tokenizer.pad_token_id)


def text_batches(
    rows: Sequence[Row], length: int, tokenizer: PreTrainedTokenizerBase, template: str = "auto"
) -> list[dict[str, Tensor]]:
    """Rows in the chat template that tuning uses, every token a label; batches of 4."""
    data = tokenize_rows(rows, tokenizer, length, template, completion_only=False)
    collate = Collator(tokenizer.pad_token_id)
    return [collate([data[i] for i in range(at, min(at + 4, len(data)))]) for at in range(0, len(data), 4)]


def _jobs(args: argparse.Namespace) -> Iterator[Job]:
    """All that is asked for: for every seed the base, then the emulators."""
    tune = {"task": args.tune, "steps": args.steps, "batch": args.batch, "questions": args.questions}
    rates = [float(rate) for rate in args.lrs.split(",")]
    tunings = [None] if args.tune == "none" else [{**tune, "lr": rate} for rate in rates]
    common: Job = {"model": args.model, "calibration": Path(args.calibration).name, "rows": args.rows}
    common |= {"length": args.length, "text": Path(args.text).name, "text_rows": args.text_rows}
    common |= {"format": "options", "template": args.template}
    common |= {} if args.source == "rows" else {"source": args.source}
    common |= {} if args.own_length is None else {"own_length": args.own_length}
    common |= {} if args.outer == 2 else {"outer": args.outer}
    for seed, tuning in product(map(int, args.seeds.split(",")), tunings):
        common |= {"tune": tuning, "seed": seed}
        if tuning:
            base = {key: value for key, value in common.items() if key not in CALIBRATED}
            yield {**base, "name": BASE, "keep": None, "emulator": None}
        for keep in map(float, args.keeps.split(",")):
            for words in args.methods or METHODS:
                name, values = _method(words)
                yield {**common, "name": name, "keep": keep, "emulator": {**values, "keep": keep}}


def _method(words: str) -> tuple[str, dict[str, Any]]:
    """A method of the table, or `name=key:value,key:value`."""
    name, given, options = words.partition("=")
    if not given:
        if name not in METHODS:
            raise SystemExit(f"unknown method {name!r}; use {'; '.join(METHODS)}, or name=key:value,key:value")
        return name, METHODS[name]
    pairs = (pair.partition(":") for pair in options.split(",") if pair)
    return name, {key: _value(text) for key, _, text in pairs}


def _value(text: str) -> Any:
    """Parse a number if it is one; counts are integers."""
    if text.isdigit():
        return int(text)
    return float(text) if text.replace(".", "").isdigit() else text


def report(lines: Sequence[Line]) -> str:
    """Markdown tables, one for every kept fraction; questions of all seeds pooled."""
    rest = [line for line in lines if line["job"]["emulator"] is not None]
    by_rate: dict[float, dict[int, Line]] = {}
    for line in lines:
        if line["job"]["emulator"] is None and line["scores"]:
            by_rate.setdefault(line["job"]["tune"]["lr"], {})[line["job"]["seed"]] = line
    shared = set.intersection(*map(set, by_rate.values())) if by_rate else set()
    bases = min(by_rate.values(), key=lambda runs: _loss([runs[seed] for seed in shared or runs]), default={})
    several = len(by_rate) > 1
    if several:
        rest = [{**line, "job": {**line["job"], "name": _at_rate(line["job"])}} for line in rest]
    out = [text for rate in sorted(by_rate) for text in _bases(by_rate[rate], f"lr {rate:g}, " if several else "")]
    for keep in sorted({line["job"]["keep"] for line in rest}, reverse=True):
        names = list(dict.fromkeys(line["job"]["name"] for line in rest if line["job"]["keep"] == keep))
        rows = []
        for name in names:
            runs = [line for line in rest if line["job"]["keep"] == keep and line["job"]["name"] == name]
            _refuse_mixture(name, runs)
            rows.append(_line(name, runs, bases))
        table = markdown_table(Table(_header(bool(bases)), rows))
        out += ["", f"**Kept: {keep:.0%} of the middle's matrices**", "", table]
    return "\n".join(out)


def _refuse_mixture(name: str, lines: Sequence[Line]) -> None:
    """Refuse to pool runs of other settings than the seed, as if they had other questions."""
    jobs = [{key: value for key, value in line["job"].items() if key != "seed"} for line in lines]
    different = {key for job in jobs for key in job.keys() | jobs[0].keys() if job.get(key) != jobs[0].get(key)}
    if different:
        raise SystemExit(
            f"“{name}” names emulators with different {', '.join(sorted(different))}: give each a name of its own, "
            'as by --methods "32 rows="'
        )


def _at_rate(job: Job) -> str:
    return f"{job['name']}, lr {job['tune']['lr']:g}" if job["tune"] else str(job["name"])


def _loss(bases: Sequence[Line]) -> float:
    """Mean loss of the base after tuning."""
    return mean(line["scores"]["full_ft"]["nll"] for line in bases)


def _bases(bases: dict[int, Line], rate: str) -> list[str]:
    if not bases:
        return []
    columns = _pooled(bases.values(), _BASE_SCORES, "correct")
    before, after = (_percent(np.mean(columns[name])) for name in ("full_zs", "full_ft"))
    losses = {name: mean(line["scores"][name]["nll"] for line in bases.values()) for name in _BASE_SCORES}
    return [
        f"Base: {rate}{before} of the questions correct, {after} after tuning the same layers (nats per label "
        f"{losses['full_zs']:.3f} and {losses['full_ft']:.3f}); seeds {', '.join(map(str, sorted(bases)))}."
    ]


def _header(tuned: bool) -> list[str]:
    names = ["emulator", "cosine", "on the task", "loss", "gap"]
    names += ["tuned: nats", "plug-in: nats", "Δ", "share of the gain, %"] if tuned else []
    names += ["tuned: correct", "plug-in: correct", "Δ"] if tuned else []
    return names


def _line(name: str, lines: Sequence[Line], bases: dict[int, Line]) -> list[str]:
    text = lines[0]["text"]
    cells = [name, f"{text['overall']:.3f}"]
    cells.append(f"{mean(line['task']['overall'] for line in lines):.3f}" if "task" in lines[0] else "")
    cells += [f"{text['loss_emulator']:.2f}", f"{text['loss_emulator'] - text['loss_full']:+.2f}"]
    tuned = [line for line in lines if line["scores"] and line["job"]["seed"] in bases]
    if tuned:
        cells += _tuned(tuned, [bases[line["job"]["seed"]] for line in tuned])
    return cells


def _tuned(lines: Sequence[Line], bases: Sequence[Line]) -> list[str]:
    """Scores after tuning, and what follows from them; Δ and share are high where the plug-in is good."""
    names = ("emulator_ft", "plug_in")
    losses = _pooled(lines, names, "nll") | _pooled(bases, _BASE_SCORES, "nll")
    nats = resample(
        {name: -column for name, column in losses.items()},
        _pooled(bases, ("full_zs",), "tokens")["full_zs"],
        Bootstrap(4000),
    )
    right = resample(_pooled(lines, names, "correct"), None, Bootstrap(4000))
    return [
        *(f"{-nats.point[name]:.3f}" for name in names),
        _interval(nats.difference("plug_in", "emulator_ft"), 1, "+.3f"),
        _interval(nats.share("plug_in", "full_zs", "full_ft"), 100),
        *(_percent(right.point[name]) for name in names),
        _interval(right.difference("plug_in", "emulator_ft"), 100),
    ]


def _pooled(lines: Iterable[Line], names: Sequence[str], what: str) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """A score, question by question, the seeds one after the other."""
    runs = list(lines)
    return {n: np.concatenate([np.array(x["scores"][n]["rows"][what], float) for x in runs]) for n in names}


def _percent(value: Any) -> str:
    return f"{100 * float(value):.1f} %"


def _interval(estimate: Estimate, factor: float, form: str = "+.1f") -> str:
    if estimate.value is None:
        return "–"
    if estimate.low is None or estimate.high is None:
        return f"{factor * estimate.value:{form}}"
    return f"{factor * estimate.value:{form}} ({factor * estimate.low:{form}} to {factor * estimate.high:{form}})"


def _read(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2", help="base model")
    add("--dtype", default="auto", help="number format of the base")
    add("--calibration", default="", help="file of the owner's rows")
    add(
        "--source",
        choices=("rows", "free", "prompted", "mixed"),
        default="rows",
        help="of calibration: rows of the file; texts that the base writes freely, or after prompts of the file; "
        "prompted and rows each",
    )
    add("--text", default="", help="file of held-out rows on which gradients and losses are compared")
    add("--rows", type=int, default=32, help="calibration rows")
    add("--text-rows", type=int, default=64, help="held-out rows")
    add(
        "--template",
        choices=("auto", "chat", "none"),
        default="none",
        help="chat template, also of the rows to tune on",
    )
    add("--own-length", type=int, help="longest own text in tokens; --length if not given")
    add("--outer", type=int, default=2, help="layers at either end that are not compressed")
    add("--length", type=int, default=128, help="longest calibration row in tokens")
    add("--keeps", default="0.7,0.5", help="kept fractions of the middle's matrices")
    add("--methods", nargs="+", help=f"of {'; '.join(METHODS)}; all if not given; or name=key:value,...")
    add("--tune", choices=("options", "none"), default="options", help="options: files beside --text")
    add("--steps", type=int, default=100, help="optimizer steps of a tuning")
    add("--lrs", default="2e-4", help="peak learning rates; the gain is the base's at its best")
    add("--batch", type=int, default=16, help="rows in a step")
    add("--questions", type=int, default=300, help="held-out questions")
    add("--seeds", default="0", help="of the tuning task")
    add("--threads", type=int, default=torch.get_num_threads(), help="processor threads")
    add("--out", type=Path, default=Path(__file__).parent / "results" / "offsite.jsonl")
    add("--report", type=Path, metavar="FILE", help="print the table of these results, and measure nothing")
    args = parser.parse_args(argv)
    if not args.report and not (args.calibration and args.text):
        parser.error("--calibration and --text are needed")
    torch.set_num_threads(args.threads)
    return args


if __name__ == "__main__":
    sys.exit(main())
