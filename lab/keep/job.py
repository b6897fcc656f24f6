"""One job in a process of its own: `python -m lab.keep.job OUT DATA` reads it from stdin and adds a line to OUT."""

import random
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lab.keep.arms import Elastic, OwnRows, fisher_ratios, orthogonal_adapters, train_best_half
from lab.lines import work_off
from lab.pays import pool as pools
from lab.pays.measure import measure_rows
from lab.pays.pool import asked, make_pool
from lab.training import Work, load
from siftune.data.sampled_texts import sample_texts
from siftune.engine.groups import group_by_layer
from siftune.engine.suppression import suppress
from siftune.methods.keep import callback
from siftune.methods.keep.callback import Keep, Penalty

Record = dict[str, Any]

SCALES = (0.25, 0.5, 0.75)  # of the adapter after training
_OTHERS = 60  # held-out rows of each other task, and of text
_PROSE = 32  # tokens of a piece of prose
_TEXTS, _LENGTH = 128, 32
_LOSSES = {"kl": Penalty, "ce": OwnRows, "ewc": Elastic}


def prose(tokenizer: Any) -> dict[str, list[Record]]:
    """Pieces of Python's documentation: `public`, to train on, and `prose`, to measure; of different topics."""
    from pydoc_data.topics import topics

    parts: dict[str, list[Record]] = {"public": [], "prose": []}
    for number, name in enumerate(sorted(topics)):
        ids = tokenizer(topics[name])["input_ids"]
        first = ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []  # Gemma is lost without it
        pieces = [[*first, *ids[start : start + _PROSE]] for start in range(len(first), len(ids) - _PROSE, _PROSE)]
        rows = [{"input_ids": piece, "labels": piece, "length": len(piece)} for piece in pieces]
        parts["prose" if number % 2 else "public"] += rows
    for rows in parts.values():
        random.Random(0).shuffle(rows)
    return {name: rows[:_OTHERS] if name == "prose" else rows[:_TEXTS] for name, rows in parts.items()}


class KeepWork(Work):
    """A job with a penalty, a gate of layers or an adapter of another kind."""

    seconds_sampling = 0.0

    def run(self) -> Record:
        """Train and measure."""
        with orthogonal_adapters() if self.method.get("oft") else nullcontext():
            return super().run()

    def _add_to(self, built: Any) -> None:
        keep, rows = self.method.get("penalty"), self.pool.train
        if self.method.get("gate"):
            texts = self._texts("own", built.trainer.model, rows)
            started = time.process_time()
            task = self.tokenized(random.Random(self.job["seed"]).sample(list(rows), min(_TEXTS, len(rows))))
            self.layers = train_best_half(built.trainer.model, fisher_ratios(built.trainer.model, list(task), texts))
            self.seconds_sampling += time.process_time() - started
        if keep is not None:
            settings = {key: value for key, value in keep.items() if key not in ("rows", "loss")}
            texts = self._texts(keep["rows"], built.trainer.model, rows)
            callback.Penalty = _LOSSES[keep.get("loss", "kl")]  # type: ignore[misc]
            built.trainer.add_callback(Keep(texts, seed=self.job["seed"], **settings))

    def _texts(self, kind: str, model: Any, rows: Sequence[Record]) -> Any:
        """The texts of the penalty: written freely, half with prompts of training rows, public, or training rows."""
        if kind not in ("own", "prompts", "public", "task"):
            raise ValueError(f"rows are own, prompts, public or task, not {kind!r}")
        if kind == "task":
            return self.tokenized(rows)
        if kind == "public":
            return prose(self.tokenizer)["public"]
        picked = random.Random(self.job["seed"]).sample(list(rows), _TEXTS // 2) if kind != "own" else []
        prompts = [self.tokenizer(asked(row)["prompt"])["input_ids"] for row in picked]
        groups = group_by_layer(model)
        started = time.process_time()
        with suppress(groups, range(len(groups)), 0.0):
            texts = sample_texts(model.get_base_model(), _TEXTS, _LENGTH, self.job["seed"], prompts)
        self.seconds_sampling += time.process_time() - started
        self.examples = [self.tokenizer.decode(text["input_ids"]) for text in (*texts[:2], *texts[-4:])]
        random.Random(self.job["seed"]).shuffle(texts)
        return texts

    def _measure(self, model: Any) -> Record:
        """The task, other tasks and text, also with a smaller response of the adapter."""
        measured = self._all(model)
        if self.seconds_sampling:
            measured |= {"seconds_sampling": round(self.seconds_sampling, 1), "examples": self.examples}
        if self.method.get("gate"):
            measured["layers"] = self.layers
        if self.method.get("scales"):
            groups = group_by_layer(model)
            measured["scaled"] = {}
            for scale in SCALES:
                with suppress(groups, range(len(groups)), scale):
                    measured["scaled"][str(scale)] = self._all(model)
        return measured

    def _all(self, model: Any) -> Record:
        others = {name: self.tokenized(rows) for name, rows in self.pool.other.items()}
        others["text"] = self.tokenized(self.pool.text, completion_only=False)
        # text ends with the form of the task, "Answer:", and the end token; training changes what follows on purpose
        asked_ids = [self.tokenizer(row["text"].removesuffix("\nAnswer:"))["input_ids"] for row in self.pool.text]
        others["questions"] = _Rows({"input_ids": ids, "labels": ids, "length": len(ids)} for ids in asked_ids)
        others["prose"] = _Rows(prose(self.tokenizer)["prose"])
        return {
            **measure_rows(model, self.tokenized(self.pool.test), self.collate),
            "others": {name: _sums(measure_rows(model, data, self.collate)) for name, data in others.items()},
        }


class _Rows(list[Record]):
    """Rows that are also read by column, as those of a `Dataset`."""

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def _sums(measured: Mapping[str, Sequence[float]]) -> Record:
    return {"nll": [round(nll, 3) for nll in measured["nll"]], "tokens": measured["tokens"]}


def run_job(job: Record, data: Path, folder: Path) -> Record:
    """Load, draw, train and measure."""
    pools.OTHER_QUESTIONS = _OTHERS
    model, tokenizer = load(job)
    pool = make_pool(job, data, lambda row: len(tokenizer("".join(asked(row).values()))["input_ids"]) + 1)
    started = time.process_time()
    result = KeepWork(job, model, tokenizer, pool, folder).run()
    seconds = {"processor_seconds": round(time.process_time() - started, 1)}
    return {**result, **seconds}


def main(argv: list[str]) -> int:
    """Work off the job of standard input; return the exit code."""

    def run(job: Record, data: Path, folder: Path) -> tuple[Record, str]:
        result = run_job(job, data, folder)
        nats = {name: sum(part["nll"]) / sum(part["tokens"]) for name, part in result["others"].items()}
        rest = ", ".join(f"{name} {value:.3f}" for name, value in nats.items())
        return result, f"{sum(result['right']) / len(result['right']):.3f} right, {rest}"

    return work_off(argv, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
