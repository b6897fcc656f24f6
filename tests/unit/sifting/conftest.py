"""A pool with rows of a task among others, and a few rows of that task."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from siftune import sift


def write(path, rows):
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def task():
    """Rows of the target, of the pool, and settings that take seconds."""
    target = [{"prompt": f"{i}+{i}?", "completion": str(i + i)} for i in range(12)]
    sums = [{"prompt": f"{i}+{i}?", "completion": str(i + i), "source": "sums", "id": i} for i in range(20, 32)]
    words = [{"prompt": f"say {i}", "completion": "hello " * 3, "source": "words", "id": i} for i in range(24)]
    settings = {"template": "none", "max_length": 64, "rank": 2, "batch_size": 4, "lr": 1e-2, "steps": 3}
    return SimpleNamespace(target=target, pool=[*words[:7], *sums, *words[7:]], settings=settings)


@pytest.fixture
def given(base, tmp_path, task):
    """Arguments of `sift` for a pool in a file, with chunks of 16 rows."""
    pool, few = write(tmp_path / "pool.jsonl", task.pool), write(tmp_path / "few.jsonl", task.target)
    return {"train": pool, "target": few, "model": str(base), "out": str(tmp_path / "sifted"), **task.settings}


@pytest.fixture(scope="session", autouse=True)
def small_chunks():
    """Have the 36 rows of the pool make several lines of losses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("siftune.sifting.lines._CHUNK", 7)
        patch.setattr("siftune.sifting.prompts._CHUNK", 16)
        yield


@pytest.fixture
def shared_answers():
    """Have the rows treated as if they shared a few answers, although each sum has its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("siftune.sifting.scoring.SHARED", 0.0)
        yield


@pytest.fixture(scope="session")
def finished(base, task, tmp_path_factory, small_chunks):
    """The folder of a call that was not interrupted. Nothing in it depends on the folders of pool and target."""
    place = tmp_path_factory.mktemp("finished")
    pool, few = write(place / "pool.jsonl", task.pool), write(place / "few.jsonl", task.target)
    quiet = Console(quiet=True)
    return sift(pool, few, model=str(base), out=str(place / "sifted"), **task.settings, console=quiet).folder


@pytest.fixture
def complete(given, finished):
    """A copy of it in the place where `given` continues."""
    shutil.copytree(finished, given["out"])
    return Path(given["out"])
