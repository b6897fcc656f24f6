"""Changed files of a sift folder and a run folder, tried with every command that reads them.

Files are cut, emptied or exchanged, become folders, or are missing. A command on a changed folder may give the same
result, compute the damaged part again, end with one sentence and exit code 2, or report the damage. How single files
are checked is tested with the modules that read them.
"""

import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from support.tiny_run import save_rows

from siftune.cli.main import main
from siftune.suspects.losses import Losses, trained_rows, write_losses

SECONDS = 60  # of a command that would otherwise hang
NOTES = ("damaged", "cannot be read", "not what", "not available", "skipped", "unknown", "is missing", "cut off")


def of_bytes(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def as_folder(path):
    path.unlink()
    path.mkdir()


CHANGES = {
    "missing": Path.unlink,
    "folder": as_folder,
    "empty": of_bytes(lambda _: b""),
    "a third": of_bytes(lambda data: data[: len(data) // 3]),
    "zeros at its end": of_bytes(lambda data: data[:-20] + bytes(20)),
    "not UTF-8": of_bytes(lambda data: data[: len(data) // 2] + b"\xff\xfe" + data[len(data) // 2 :]),
    "another value": of_bytes(lambda data: data.replace(b"0", b"1")),
    "another form": of_bytes(lambda _: b"[1]\n"),
}
OPTIONAL = ("sift.json", "eval.json", "metrics.jsonl", "selections.parquet", "losses.parquet")
EDITED = ("scores.csv", "metrics.jsonl", "recipe.yaml", "adapter/tokenizer.json")  # by people; they have no digest


def is_damage(file, kind):
    if kind == "missing":
        return file not in OPTIONAL
    if kind == "another value":
        return file not in EDITED
    return (file, kind) != ("metrics.jsonl", "empty")


class Subject:
    """A folder, and commands on it with their results.

    Args:
        folder: The folder; it is put right after each change.
        commands: Command by name.
        results: Files by the name of a command, whose content is its result besides what it prints.
    """

    def __init__(self, folder, commands, results):
        self.folder, self.commands, self.results = folder, commands, results
        self.sound = folder.with_name(f"{folder.name} that is sound")
        shutil.copytree(folder, self.sound)
        self.expected = {}

    def restore(self):
        shutil.rmtree(self.folder)
        shutil.copytree(self.sound, self.folder)

    def run(self, name, capsys):
        """Run a command; returns its exit code, its result, and what it says, its error last."""
        capsys.readouterr()
        signal.alarm(SECONDS)
        try:
            code = main([*map(str, self.commands[name])])
        except BaseException as error:
            return None, None, repr(error)
        finally:
            signal.alarm(0)
        out, err = capsys.readouterr()
        files = [file.read_bytes() if file.is_file() else b"" for file in self.results.get(name, ())]
        files = [re.sub(rb"Made \d+-\d+-\d+ \d+:\d+ by", b"Made by", content) for content in files]
        return code, (out, *files), "\n".join([*(content.decode(errors="replace") for content in files), out, err])

    def outcome(self, name, file, change, capsys):
        """Change a file, and run a command: "same", "again", "refused" or "noted", or what must not happen."""
        if name not in self.expected:
            code, self.expected[name], said = self.run(name, capsys)
            assert code == 0, said
            self.restore()
        change(self.folder / file)
        code, result, said = self.run(name, capsys)
        self.restore()
        noted = any(note in said.lower() for note in NOTES)
        if code == 2:
            last = said.strip().splitlines()[-1]
            is_sentence = last.startswith("siftune: error: ") and "Traceback" not in said
            return "refused" if is_sentence else f"WRONG: {said[-300:]}"
        if code != 0:
            return f"WRONG: exit code {code}: {said[-300:]}"
        if result == self.expected[name]:
            return "again" if noted else "same"
        return "noted" if noted else "WRONG: another result without a note"

    def check(self, files, capsys):
        """Try every change of files, which are given with the command that reads them."""
        outcomes = {
            (name, file, kind): self.outcome(name, file, change, capsys)
            for name, file in files
            for kind, change in CHANGES.items()
            if is_damage(file, kind)
        }
        wrong = {which: outcome for which, outcome in outcomes.items() if outcome.startswith("WRONG")}
        assert not wrong, "\n".join(f"{which}: {outcome}" for which, outcome in wrong.items())
        kinds = [*outcomes.values()]
        return {kind: kinds.count(kind) for kind in ("same", "again", "refused", "noted")}


@pytest.fixture(scope="module")
def rows_and_settings(base, tmp_path_factory):
    """A folder with a pool and a target, and settings."""
    place = tmp_path_factory.mktemp("changed")
    save_rows(place / "pool.jsonl", 48)
    save_rows(place / "few.jsonl", 8)
    settings = ("--model", base, "--template", "none", "--max-length", 64, "--rank", 2, "--batch-size", 8)
    return place, (*settings, "--train", place / "pool.jsonl")


@pytest.fixture(autouse=True)
def no_hang():
    """A signal ends a command that hangs."""

    def stop(*_):
        raise TimeoutError("the command hangs")

    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.signal(signal.SIGALRM, before)


def test_changes_of_a_sift_folder(rows_and_settings, capsys):
    place, settings = rows_and_settings
    folder, page = place / "sifted", place / "sifted.html"
    again = ("sift", *settings, "--target", place / "few.jsonl", "--steps", 2, "--share", 20, "--out", folder)
    assert main([*map(str, again)]) == 0
    subject = Subject(
        folder,
        {"sift": again, "report": ("report", folder, "--out", page)},
        {"sift": [folder / name for name in ("sifted.jsonl", "scores.csv", "dropped.csv")], "report": [page]},
    )
    files = [("report", "sift.json"), ("report", "scores.csv")]
    files += [("sift", name) for name in ("sift.json", "similar.jsonl", "losses.jsonl")]
    kinds = subject.check(files, capsys)
    assert min(kinds["again"], kinds["refused"]) > 5


def test_changes_of_a_run_folder(rows_and_settings, capsys):
    place, settings = rows_and_settings
    run, page = place / "run", place / "run.html"
    few, listed = place / "few.jsonl", place / "list.csv"
    train = ("train", *settings, "--method", "rst", "--steps", 4, "--save-every", 2, "--log-every", 1, "--out", run)
    assert main([*map(str, train)]) == 0
    measure = ("eval", run, "--data", few, "--metrics", "perplexity")
    assert main([*map(str, measure)]) == 0
    write_scores(run)
    commands = {
        "report": ("report", run, "--out", page),
        "rows": ("rows", run, "--csv", listed),
        "eval": (*measure, "--json"),
        "resume": ("train", "--resume", run, "--steps", 5),
    }
    subject = Subject(
        run, commands, {"report": [page], "rows": [listed], "resume": [run / "adapter" / "adapter_model.safetensors"]}
    )
    read = {
        "report": ("run.json", "eval.json", "metrics.jsonl", "recipe.yaml", "selections.parquet"),
        "rows": ("run.json", "losses.parquet"),
        "eval": ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/tokenizer.json"),
        "resume": ("checkpoints/checkpoint-4/optimizer.pt", "rows.sha256"),
    }
    kinds = subject.check([(command, file) for command, files in read.items() for file in files], capsys)
    assert min(kinds["again"], kinds["refused"], kinds["noted"]) > 2


def write_scores(run):
    """Write losses by which every row is compared, and a tenth is suspect."""
    rows, about = trained_rows(run)
    number = np.arange(len(rows), dtype=np.int32)
    losses = Losses(
        row=number,
        tokens=np.ones(len(rows), np.int32),
        other=(number + 1) % np.int32(len(rows)),
        covered=np.zeros(len(rows), bool),
        loss=np.where(number % 10 == 0, 20, 1).astype(np.float32),
        other_loss=np.full(len(rows), 8, np.float32),
        usual=np.zeros(len(rows), np.float32),
        other_usual=np.zeros(len(rows), np.float32),
    )
    write_losses(run / "losses.parquet", losses, about)
