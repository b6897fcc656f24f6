"""One job in a process of its own: `python -m lab.pays.job OUT DATA` reads it from stdin and adds a line to OUT.

A job writes its rows to pool.jsonl, few.jsonl (rows of the target), test.jsonl and dev.jsonl, runs the commands of its
method in their folder, and measures the tuned model on the held-out rows.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import chdir, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from lab.commands import Commands, flags, load_tuned, settings_of, summary_of, write_rows
from lab.lines import commit, read, work_off
from lab.models import source
from lab.pays.measure import measure_file, nats_per_token
from lab.pays.natural import natural_pool
from lab.pays.pool import ASKED, Pool, asked, make_pool, public_rows
from lab.pays.rivals import RULES, Candidates, choose
from siftune.base.json_files import hash_of_json
from siftune.methods.dp import callback as dp
from siftune.methods.dp.secret import Secret
from siftune.models.load import load_tokenizer
from siftune.models.smollm2 import cache_root

Record = dict[str, Any]
Job = dict[str, Any]

_TEMPLATE = "none"  # rows are questions as `asked` writes them
_PUBLIC = 1024  # rows that the owner of a model has for a kit
_FIXED = ("scenario", "cell", "model", "lr", "seed", "steps", "batch")  # the same in jobs with the same sifted pool


def run_job(job: Job, data: Path, folder: Path, lines: Sequence[Record] = ()) -> Record:
    """Draw rows, run the method's commands, and measure.

    Args:
        job: The job.
        data: Folder of the commonsense suite and of natural data.
        folder: An empty folder for files and runs.
        lines: Lines of finished jobs.
    """
    pool = draw(job, data)
    with chdir(folder):
        for name, rows in (("pool", pool.train), ("few", pool.known), ("test", pool.test), ("dev", pool.dev)):
            write_rows(f"{name}.jsonl", [_record(job, row) for row in rows])
        if "kit" in job["method"]:
            public = public_rows(data, _length_of(job), job["cell"]["longest"], _PUBLIC)
            write_rows("public.jsonl", [asked(row) for row in public])
        return _Work(job, pool, lines).run()


def draw(job: Job, data: Path) -> Pool:
    """The rows of a job."""
    return natural_pool(job, data) if job["cell"].get("natural") else make_pool(job, data, _length_of(job))


def _length_of(job: Job) -> Callable[[Record], int]:
    tokenizer = load_tokenizer(source(job["model"]))
    return lambda row: len(tokenizer("".join(asked(row).values()))["input_ids"]) + 1


def _record(job: Job, row: Record) -> Record:
    """A row as its file has it: a question, since jobs use no chat template; natural rows with their source."""
    return {**asked(row), "source": row["source"]} if job["cell"].get("natural") else asked(row)


def words_of(job: Job) -> list[str]:
    """The command that trains by a job's method."""
    method = job["method"]
    rows = method.get("rows", "pool")
    files = {"sifted": "sifted/sifted.jsonl", **dict.fromkeys(RULES, "chosen.jsonl")}
    words = ["train", "--train", files.get(rows, f"{rows}.jsonl")]
    words += ["--target", "few.jsonl"] if method.get("target") else []
    words += flags({"sift": method["sift"]}) if "sift" in method else []
    model = {"model": str(_kit_of(job))} if "kit" in method else {}
    words += [*settings_of({**job, **model}, _TEMPLATE), *flags({"steps": job["steps"], **method.get("flags", {})})]
    return [*words, "--out", "run"]


def _kit_of(job: Job) -> Path:
    """Folder of a job's kit, which other jobs with the same kit use too."""
    kit = {"model": job["model"], "longest": job["cell"]["longest"], **job["method"]["kit"]}
    return cache_root() / "kits" / hash_of_json(kit)[:16]


class _Work:
    """A job in the folder of its files."""

    def __init__(self, job: Job, pool: Pool, lines: Sequence[Record]) -> None:
        self.job, self.pool, self.lines, self.method = job, pool, lines, job["method"]
        self.commands = Commands()

    def run(self) -> Record:
        """Run the commands and measure; the result of the job."""
        line: Record = {"rows": len(self.pool.train), "steps": 0}
        seconds = 0.0  # of a choice of rows that no command makes
        if self.method.get("rows") in RULES:
            numbers, seconds = self._choose()
            write_rows("chosen.jsonl", [_record(self.job, self.pool.train[number]) for number in numbers])
            line |= {**self._groups(numbers), "sift_seconds": round(seconds, 1)}
        if "kit" in self.method:
            line |= self._emulate()
        if not self.method.get("untrained"):
            line |= self._train(seconds)
        name = source(self.job["model"]) if self.method.get("untrained") else "run"
        if "kit" in self.method:
            line["emulator"] = self._measure(name)
            name = self._plug()
        return {**line, **self._measure(name), "commands": self.commands.texts}

    def _emulate(self) -> Record:
        """Make the kit, if there is none yet; processor seconds of it."""
        kit = _kit_of(self.job)
        if (kit / "manifest.json").is_file():
            return {}
        settings = {"calibration-prompts": "public.jsonl", **self.method["kit"]}
        words = flags({"model": source(self.job["model"]), "template": _TEMPLATE, **settings})
        self.commands.run("emulate", *words, "--out", str(kit))
        return {"kit_seconds": round(self.commands.seconds, 1)}

    def _plug(self) -> str:
        """Plug the return in; folder of the tuned model."""
        words = flags({"model": source(self.job["model"]), "kit": str(_kit_of(self.job)), "return": "run/return"})
        self.commands.run("plug", *words, "--out", "tuned")
        return "tuned"

    def _train(self, seconds: float) -> Record:
        commands = self.commands
        before, commands.sifted = commands.seconds, None
        if self.method.get("rows") == "sifted":
            self._sift()
        with self._engine():
            commands.run(*words_of(self.job))
        summary = summary_of("run")
        line = {
            "steps": summary["steps"],
            "processor_seconds": round(seconds + commands.seconds - before, 1),
            "followed": summary["followed"],
        }
        if commands.sifted is not None:
            line |= {**self._groups(commands.sifted.selected), "sift_seconds": round(commands.sift_seconds, 1)}
            line["reason"] = commands.sifted.reason
        return line

    def _engine(self) -> Any:
        """The steps of another engine in a private run."""
        if "engine" not in self.method:
            return nullcontext()
        from lab.dp_trainers import in_place  # imports Opacus

        return in_place(self.method["engine"])

    def _choose(self) -> tuple[list[int], float]:
        """Numbers of the rows that a rule chooses, and processor seconds of the choice."""
        rule, share = self.method["rows"], self.method.get("share")
        count = 0 if rule == "oracle" else self._sifted() if share is None else round(share * len(self.pool.train))
        settings = {"model": source(self.job["model"]), "template": _TEMPLATE, "seed": self.job["seed"]}
        candidates = Candidates(
            [row["group"] for row in self.pool.train], count, {**settings, "batch_size": self.job["batch"]}
        )
        started = time.process_time()
        return choose(rule, candidates), time.process_time() - started

    def _sifted(self) -> int:
        """Number of rows that sifting selects here: recorded with this code, or by `siftune sift`."""
        code = commit()
        for line in self.lines:
            same = all(line["job"][name] == self.job[name] for name in _FIXED)
            method = line["job"]["method"]
            if same and line.get("commit") == code and method.get("sift") is True and "flags" not in method:
                return int(line["selected"])
        return len(self._sift())

    def _sift(self) -> Sequence[int]:
        """Sift the pool; numbers of the selected rows."""
        dtype = {name: value for name, value in self.method.get("flags", {}).items() if name == "dtype"}
        words = [*settings_of(self.job, _TEMPLATE), *flags(dtype)]
        self.commands.run("sift", "--train", "pool.jsonl", "--target", "few.jsonl", *words, "--out", "sifted")
        assert self.commands.sifted is not None
        return self.commands.sifted.selected

    def _groups(self, numbers: Sequence[int]) -> Record:
        """Number of selected rows, and for each group of the pool its rows and the selected ones."""
        every = Counter(row["group"] for row in self.pool.train)
        own = Counter(self.pool.train[number]["group"] for number in numbers)
        return {"selected": len(numbers), "groups": {group: [every[group], own[group]] for group in every}}

    def _measure(self, name: str) -> Record:
        """Quality of a run, or of a base model, on the held-out rows."""
        model, tokenizer = load_tuned(name)
        letters = ASKED if self.job["cell"].get("target") == "letters" else ""
        test, dev = (measure_file(model, tokenizer, f"{part}.jsonl", _TEMPLATE, letters) for part in ("test", "dev"))
        dtype = str(model.dtype).removeprefix("torch.")
        return {**test, "dev_nats": round(nats_per_token(dev), 5), "dtype": dtype}


def main(argv: list[str]) -> int:
    """Work off the job of standard input; return the exit code."""

    def run(job: Job, data: Path, folder: Path) -> tuple[Record, str]:
        dp.Secret = lambda: Secret(job["seed"])  # private runs of a seed draw the same rows
        result = run_job(job, data, folder, read(Path(argv[0])))
        return result, f"{np.mean(result['right']):.3f} right, {nats_per_token(result):.3f} nats"

    return work_off(argv, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
