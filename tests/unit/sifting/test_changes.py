"""Pools that change while they are sifted, two processes in one folder, and damaged files of an interrupted sifting."""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console
from support.visited import visits

from siftune import sift
from siftune.base.errors import DataError, InputError
from siftune.recipe.schema import Recipe
from siftune.sifting import files, prompts, tuning
from siftune.sifting import sift as module
from siftune.train.run import train

QUIET = Console(quiet=True)


def records(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def exchange(pool, row=None):
    """Put other rows in the place of a pool's, or of one of them, and add one."""
    rows = records(pool)
    for place in range(len(rows)) if row is None else [row]:
        rows[place] = {"prompt": f"other {place}", "completion": "never scored"}
    pool.write_text("".join(json.dumps(each) + "\n" for each in [*rows, {"prompt": "new", "completion": "too"}]))


@pytest.fixture
def changing(given, monkeypatch):
    """Have the pool exchanged when the first training begins."""
    tune = tuning.tune

    def changed(*args):
        exchange(given["train"])
        return tune(*args)

    monkeypatch.setattr(tuning, "tune", changed)
    return given


def test_the_rows_that_were_scored_are_written_although_the_pool_changes_meanwhile(changing, finished, tmp_path):
    sifted = sift(**changing, console=QUIET)
    assert "never scored" in changing["train"].read_text()
    for name in ("sifted.jsonl", "losses.jsonl", "1-losses.jsonl"):
        assert (sifted.folder / name).read_bytes() == (finished / name).read_bytes()


def test_a_run_trains_on_the_rows_that_were_scored_although_the_pool_changes_meanwhile(changing, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STEPS", 3)
    before = records(changing["train"])
    settings = {**changing, "train": str(changing["train"]), "target": str(changing["target"])}
    settings["out"] = str(tmp_path / "run")
    recipe, sifted, read = module.sift_first(Recipe(**settings), None, QUIET)
    assert "never scored" in changing["train"].read_text()
    rows = [row for row in read.parts["train"] if not row.of_target]
    assert [row.origin for row in rows] == [sifted.places[number] for number in sifted.selected]
    texts = [(row.prompt[0].content, row.completion) for row in rows]
    assert texts == [(before[number]["prompt"], before[number]["completion"]) for number in sifted.selected]
    with visits() as trained:
        train(recipe, QUIET, read=read)
    places = {visit.place for visit in trained if "pool" in visit.place}
    assert 0 < len(places) == len(places & {row.origin for row in rows})


@pytest.mark.parametrize("row", [0, 35])
def test_a_pool_that_changes_before_it_is_copied_is_refused_by_the_row(given, monkeypatch, row):
    copied = files.placed_records

    def changed(*args):
        exchange(given["train"], row)
        return copied(*args)

    monkeypatch.setattr(files, "placed_records", changed)
    with pytest.raises(DataError, match=rf"pool\.jsonl:{row + 1} has changed since"):
        sift(**given, console=QUIET)
    assert not Path(given["out"]).exists()


def test_a_pool_that_loses_its_last_row_is_refused(given, monkeypatch):
    copied = files.placed_records
    monkeypatch.setattr(files, "placed_records", lambda *args: [*copied(*args)][:-1])
    with pytest.raises(DataError, match=r"pool\.jsonl:36 has changed"):
        sift(**given, console=QUIET)


LOCK = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print(flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process_in(folder):
    """Another process that has locked a folder."""
    command = [sys.executable, "-c", LOCK, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            yield
        finally:
            process.stdin.close()


def test_a_second_process_in_the_run_folder_does_not_sift(given, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    settings = {**given, "train": str(given["train"]), "target": str(given["target"]), "out": str(run)}
    with another_process_in(run), pytest.raises(InputError, match="another process is working in"):
        module.sift_first(Recipe(**settings), None, QUIET)
    assert [path.name for path in run.iterdir()] == ["checkpoints"]


def test_embeddings_that_were_changed_are_computed_again(given, complete, finished, monkeypatch):
    """An interruption while the prompts are embedded leaves chunks, of which one is then damaged."""
    (complete / "similar.jsonl").unlink()
    compared = prompts._compared

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prompts, "_compared", stop)
    with pytest.raises(KeyboardInterrupt):
        sift(**given, console=QUIET)
    monkeypatch.setattr(prompts, "_compared", compared)
    path, embedded = complete / "prompts.f32", []
    content = bytearray(path.read_bytes())
    of_row = (len(content) - 3 * 32) // 36  # a digest of 32 bytes after each chunk
    content[(16 * of_row + 32) + 10] ^= 1
    path.write_bytes(content)
    embed = prompts.embed
    monkeypatch.setattr(prompts, "embed", lambda *args: embedded.append(len(args[1])) or embed(*args))
    sift(**given, console=QUIET)
    assert embedded == [12, 16, 4]
    assert (complete / "similar.jsonl").read_bytes() == (finished / "similar.jsonl").read_bytes()
