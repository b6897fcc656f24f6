"""Files of data and a tiny model for the laboratory's scripts."""

import json
import signal

import pytest
import torch
from support.tiny_run import save_base


@pytest.fixture(autouse=True)
def limit():
    """Stop a test that waits for a child process too long."""

    def stop(*_):
        raise TimeoutError("the test took more than five minutes")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)  # some scripts set it


def question(name, number):
    text = f"Please choose the correct answer to the question: {name}{number}?\n\nAnswer1: a{number} Answer2: b{number}"
    answer = {"output": "the correct answer is answer1", "answer": "answer1"}
    return {"instruction": f"{text}\n\nAnswer format: answer1/answer2", **answer}


@pytest.fixture
def suite(tmp_path):
    """The files of the commonsense suite."""
    folder = tmp_path / "suite"
    folder.mkdir()
    for file in ("ARC-Easy", "ARC-Challenge", "openbookqa", "boolq"):
        for part in ("train", "test"):
            rows = [question(f"{file[:5]}{part}", number) for number in range(60)]
            (folder / f"{file}.{part}.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def base(tmp_path):
    return str(save_base(tmp_path / "base"))


@pytest.fixture
def small_pools(monkeypatch):
    from lab.pays import natural, pool

    for name, value in {"QUESTIONS": 12, "DEV_QUESTIONS": 6, "OTHER_QUESTIONS": 4, "_PROBLEMS": 600}.items():
        monkeypatch.setattr(pool, name, value)
    for name, value in {"QUESTIONS": 12, "DEV_QUESTIONS": 6, "_CLEAN": 16}.items():
        monkeypatch.setattr(natural, name, value)
