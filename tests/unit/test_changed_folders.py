"""Three hundred changes of a sift folder, a run folder and an adapter, a fixed sample of kinds that differ in meaning.

Files are cut, emptied, exchanged, put into other encodings, given other forms or values of other types; they become
folders, links or pipes, or are missing. A command on a changed folder may give the same result, compute the damaged
part again, end with one sentence and exit code 2, or report the damage. A valid value in the place of another one is
damage only where a digest tells: in work folders, checkpoints, run.json, trained weights of a run, and Parquet files.
"""

import json
import os
import random
import re
import shutil
import signal
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.damage import mutations
from support.tiny_run import save_rows

from siftune.cli.main import main
from siftune.suspects.losses import Losses, trained_rows, write_losses

SECONDS = 60  # of a command that would otherwise hang
NOTES = ("damaged", "cannot be read", "not what", "not available", "skipped", "unknown", "is missing", "cut off")
COUNT = 100  # changes of each folder
MOST = {"sift": 20, "resume": 8}  # of commands that take longer


# --- kinds of changes: file -> None


def of_bytes(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def elsewhere(path):
    """Move a file away, and put a link to it in its place."""
    other = path.parent.parent.parent / "elsewhere"
    shutil.move(path, other)
    path.symlink_to(other)


def as_pipe(path):
    path.unlink()
    os.mkfifo(path)


def as_folder(path):
    path.unlink()
    path.mkdir()


OF_ANY_FILE = {
    "missing": Path.unlink,
    "link": elsewhere,
    "pipe": as_pipe,
    "folder": as_folder,
    "empty": of_bytes(lambda _: b""),
    "a third": of_bytes(lambda data: data[: len(data) // 3]),
    "without its end": of_bytes(lambda data: data[:-2]),
    "zeros": of_bytes(lambda data: bytes(len(data))),
    "zeros at its end": of_bytes(lambda data: data[:-20] + bytes(20)),
    "twice": of_bytes(lambda data: data + data[: len(data) // 2]),
    "not UTF-8": of_bytes(lambda data: data[: len(data) // 2] + b"\xff\xfe" + data[len(data) // 2 :]),
}
OF_TEXT = {
    "UTF-16": of_bytes(lambda data: data.decode().encode("utf-16")),
    "endless nesting": of_bytes(lambda _: b"[" * 100_000 + b"\n"),
    "other text": of_bytes(lambda _: b"nonsense\n"),
    "null": of_bytes(lambda _: b"null\n"),
    "a list": of_bytes(lambda _: b"[1]\n"),
}
OTHER_TYPES = ("x", [1], {"a": 1}, "@nested@", "../x")


def of_json(path, of_value):
    """Changes of the values of a JSON file: those of other types, or any, and of its keys."""
    tree = json.loads(path.read_bytes())
    for name, changed in mutations(tree):
        if of_value or any(f" = {value!r}" in name for value in OTHER_TYPES) or name.endswith("renamed"):
            text = json.dumps(changed).replace('"@nested@"', "[" * 1000 + "]" * 1000).replace('"@nan@"', "NaN")
            yield name, of_bytes(lambda _, text=text: text.encode())


def of_lines(path):
    """Changes of the lines of a work folder, also with a digit that remains a number."""
    first = path.read_text().splitlines()[0]
    digits = [place for place, char in enumerate(first) if char.isdigit()]
    for place in digits[:: max(1, len(digits) // 12)]:
        other = str((int(first[place]) + 1) % 10)
        changed = first[:place] + other + first[place + 1 :]
        yield f"another digit at {place}", of_bytes(partial(replaced, old=first, new=changed))
    yield "its lines twice", of_bytes(lambda data: data * 2)
    yield "garbage between lines", of_bytes(lambda data: data.replace(b"\n", b"\n{garbage\n"))


def of_table(_):
    """Bits of a binary file."""
    for part in range(12):
        yield f"a bit after {part} twelfths", of_bytes(partial(flipped, part=part))


def replaced(data, old, new):
    return data.replace(old.encode(), new.encode())


def flipped(data, part):
    place = len(data) * part // 12 + 3
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


def with_losses(**columns):
    def change(path):
        run = path.parent
        rows, about = trained_rows(run)
        zeros = np.zeros(len(rows))
        own = {"row": np.int32, "tokens": np.int32, "other": np.int32, "covered": bool}
        names = Losses.__annotations__
        values = {name: columns.get(name, zeros).astype(own.get(name, np.float32)) for name in names}
        write_losses(path, Losses(**values), about)

    return change


LARGE = np.full(48, 10**6)
LOSSES = {
    "rows that are too large": with_losses(row=LARGE),
    "other rows that are too large": with_losses(other=LARGE),
    "negative rows": with_losses(row=-LARGE),
    "losses that are not finite": with_losses(row=np.arange(48), loss=np.full(48, np.inf)),
}


def with_tensors(change):
    def changed(path):
        tensors = load_file(path)
        save_file({name: change(tensor).contiguous() for name, tensor in tensors.items()}, path)

    return changed


TENSORS = {
    "of another shape": with_tensors(lambda tensor: tensor[:1]),
    "of another dtype": with_tensors(lambda tensor: tensor.to(torch.int64)),
    "not finite": with_tensors(lambda tensor: tensor * torch.nan),
    "of other names": lambda path: save_file({"x": torch.zeros(1)}, path),
}


# --- folders, and commands on them


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
        (self.folder.parent / "elsewhere").unlink(missing_ok=True)

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


def sample(changes):
    """A fixed sample of changes, of each command and file as many as there are of others."""
    groups, counts = {}, Counter()
    for change in changes:
        groups.setdefault(change[:2], []).append(change)
    for group in groups.values():
        random.Random(0).shuffle(group)
    chosen = []
    for turn in range(COUNT):
        for (command, _), group in groups.items():
            if turn < len(group) and counts[command] < MOST.get(command, COUNT):
                counts[command] += 1
                chosen.append(group[turn])
    assert len(chosen) >= COUNT
    return chosen[:COUNT]


def check(subject, changes, capsys):
    """Try a sample of changes: command, file, name and change."""
    outcomes = {(*which[:3],): subject.outcome(which[0], which[1], which[3], capsys) for which in sample(changes)}
    assert len(outcomes) == COUNT
    wrong = {which: outcome for which, outcome in outcomes.items() if outcome.startswith("WRONG")}
    assert not wrong, "\n".join(f"{which}: {outcome}" for which, outcome in wrong.items())
    kinds = [*outcomes.values()]
    return {kind: kinds.count(kind) for kind in ("same", "again", "refused", "noted")}


def changes_of(subject, command, file, *kinds):
    """Changes of a file, each as command, file, name and change."""
    for kind in kinds:
        pairs = kind.items() if isinstance(kind, dict) else kind(subject.sound / file)
        yield from ((command, file, name, change) for name, change in pairs)


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
    target = ("--target", place / "few.jsonl")
    again = ("sift", *settings, *target, "--steps", 2, "--share", 20, "--out", folder)
    assert main([*map(str, again)]) == 0
    subject = Subject(
        folder,
        {"sift": again, "report": ("report", folder, "--out", page)},
        {"sift": [folder / name for name in ("sifted.jsonl", "scores.csv", "dropped.csv")], "report": [page]},
    )
    forms = (OF_ANY_FILE, OF_TEXT)
    changes = [
        *changes_of(subject, "sift", "sift.json", *forms, lambda path: of_json(path, True)),
        *changes_of(subject, "report", "sift.json", *forms, lambda path: of_json(path, True)),
        *changes_of(subject, "report", "scores.csv", *forms, of_csv),
    ]
    for file in ("similar.jsonl", "losses.jsonl", "1-losses.jsonl"):
        changes += changes_of(subject, "sift", file, *forms, of_lines)
    kinds = check(subject, changes, capsys)
    assert min(kinds["again"], kinds["refused"]) > 10


def of_csv(path):
    """Changes of a decision file that a spreadsheet or an editor may make."""
    text = path.read_text()
    first, _, rest = text.partition("\n")
    cut = "\n".join(line.rpartition(",")[0] for line in text.splitlines())
    yield "without the last column", of_bytes(lambda _: cut.encode())
    yield "without the last fields", of_bytes(lambda _: (first + "\n" + cut.partition("\n")[2]).encode())
    yield "without a header", of_bytes(lambda _: rest.encode())
    yield "semicolons", of_bytes(lambda data: data.replace(b",", b";"))
    yield "an open quote", of_bytes(lambda data: data + b'"')
    yield "a zero byte", of_bytes(lambda data: data.replace(b"yes", b"y\0s"))
    for value in ("perhaps", "", "2", "-1"):
        yield f"selected {value}", of_bytes(lambda data, new=value: data.replace(b",yes,", f",{new},".encode()))
    for value in ("nan", "1e999", "x", "1" * 400):
        yield f"similarity {value}", of_bytes(lambda data, new=value: data.replace(b",0.", f",{new}".encode()))


def test_changes_of_a_run_folder(rows_and_settings, capsys):
    place, settings = rows_and_settings
    run, page = place / "run", place / "run.html"
    few, listed = place / "few.jsonl", place / "list.csv"
    train = ("train", *settings, "--method", "rst", "--steps", 4, "--save-every", 2, "--log-every", 1, "--out", run)
    assert main([*map(str, train)]) == 0
    measure = ("eval", run, "--data", few, "--metrics", "perplexity")
    assert main([*map(str, measure)]) == 0
    write_scores(run)
    subject = Subject(
        run,
        {
            "report": ("report", run, "--out", page),
            "rows": ("rows", run, "--csv", listed),
            "eval": (*measure, "--json"),
            "resume": ("train", "--resume", run, "--steps", 5),
        },
        {"report": [page], "rows": [listed], "resume": [run / "adapter" / "adapter_model.safetensors"]},
    )
    forms = (OF_ANY_FILE, OF_TEXT)
    # a run may have no such file: nothing was chosen, or its rows are not scored yet
    present = {name: change for name, change in OF_ANY_FILE.items() if name != "missing"}
    changes = [
        *changes_of(subject, "report", "run.json", *forms, lambda path: of_json(path, False)),
        *changes_of(subject, "report", "eval.json", *forms, lambda path: of_json(path, False)),
        *changes_of(subject, "report", "metrics.jsonl", *forms),
        *changes_of(subject, "report", "recipe.yaml", *forms),
        *changes_of(subject, "report", "selections.parquet", present, of_table),
        *changes_of(subject, "rows", "run.json", *forms),
        *changes_of(subject, "rows", "losses.parquet", present, of_table, LOSSES),
        *changes_of(subject, "eval", "adapter/adapter_model.safetensors", OF_ANY_FILE, of_table, TENSORS),
        *changes_of(subject, "eval", "adapter/adapter_config.json", *forms, lambda path: of_json(path, True)),
    ]
    for file in ("trainer_state.json", "files.json", "optimizer.pt", "rng_state.pth", "adapter_model.safetensors"):
        changes += changes_of(subject, "resume", f"checkpoints/checkpoint-4/{file}", OF_ANY_FILE, of_table)
    changes += changes_of(subject, "resume", "rows.sha256", OF_ANY_FILE)
    kinds = check(subject, changes, capsys)
    assert min(kinds["again"], kinds["refused"], kinds["noted"]) > 5


def write_scores(run):
    """Write losses by which every row is compared, and a tenth is suspect."""
    rows, _ = trained_rows(run)
    number = np.arange(len(rows))
    values = {"row": number, "other": (number + 1) % len(rows), "tokens": np.ones(len(rows))}
    losses = np.where(number % 10 == 0, 20.0, 1.0)
    with_losses(**values, loss=losses, other_loss=np.full(len(rows), 8.0))(run / "losses.parquet")


def test_changes_of_an_adapter(rows_and_settings, capsys):
    place, settings = rows_and_settings
    train = ("train", *settings, "--steps", 2, "--out", place / "tuned")
    assert main([*map(str, train)]) == 0
    folder = place / "alone" / "adapter"
    shutil.copytree(place / "tuned" / "adapter", folder)
    measure = ("--data", place / "few.jsonl", "--metrics", "perplexity", "--json")
    subject = Subject(folder, {"eval": ("eval", folder, *measure)}, {})
    weights = {name: change for name, change in OF_ANY_FILE.items() if name != "zeros at its end"}
    changes = [
        *changes_of(subject, "eval", "adapter_config.json", OF_ANY_FILE, OF_TEXT, lambda path: of_json(path, False)),
        *changes_of(subject, "eval", "adapter_model.safetensors", weights, TENSORS),
    ]
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        changes += changes_of(subject, "eval", file, OF_ANY_FILE, OF_TEXT)
    kinds = check(subject, changes, capsys)
    assert kinds["refused"] > 30
