"""`siftune report`, `siftune train --watch`, and what eval leaves for reports."""

import json
import re
import urllib.request

import pytest
from support.commands import error_of, siftune
from support.report_runs import save_run

from siftune.report.page import serve
from siftune.train.progress import Metrics


def test_a_page_and_figures(tmp_path, capsys):
    run = save_run(tmp_path / "run", "gast", steps=4)
    result, told = siftune(capsys, "report", run, "-o", tmp_path / "page.html", "--figures", tmp_path / "figures")
    assert result["report"] == str(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size == result["bytes"] < 3e6
    assert f"report in {tmp_path / 'page.html'}" in told
    assert {path.split("/")[-1] for path in result["figures"]} >= {"loss.svg", "batch-run.svg"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "nothing to report on in nope: there is no folder of that name"),
        ([], "nothing to report on: give the folder of a run"),
        (["x", "--ouput", "y"], "unknown option --ouput of `siftune report`; did you mean --out?"),
    ],
)
def test_what_it_refuses(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert error_of(capsys, "report", *arguments).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_training_is_watched(base, rows, tmp_path, capsys, monkeypatch):
    pages, addresses = [], []
    plain, log = serve.serve, Metrics.on_log

    def noted(run):
        serving = plain(run)
        addresses.append(serving.__enter__())
        return _Entered(serving, addresses[0])

    def on_log(self, *given, **others):
        log(self, *given, **others)
        with urllib.request.urlopen(addresses[0], timeout=10) as answer:
            pages.append(answer.read().decode())

    monkeypatch.setattr(serve, "serve", noted)
    monkeypatch.setattr(Metrics, "on_log", on_log)
    given = ["--model", base, "--train", rows, "--steps", "3", "--log-every", "1", "--method", "rst"]
    result, told = siftune(capsys, "train", *given, "--template", "none", "--watch", "--out", tmp_path / "run")
    assert f"report, for a browser on this machine: {addresses[0]}" in told
    assert re.search("is at step 2 of 3: training loss", pages[1])
    assert "Who trained" in pages[1]
    assert result["run"] == str(tmp_path / "run")
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(addresses[0], timeout=10)


class _Entered:
    """A context that was entered already."""

    def __init__(self, context, value):
        self._context, self._value = context, value

    def __enter__(self):
        return self._value

    def __exit__(self, *error):
        return self._context.__exit__(*error)


def test_eval_keeps_figures_and_answers_in_the_run(base, tmp_path, capsys):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({"prompt": f"{i}?", "completion": str(i)}) + "\n" for i in range(23)))
    given = ["--model", base, "--train", held_out, "--steps", "2", "--batch-size", "2", "--template", "none"]
    siftune(capsys, "train", *given, "--out", tmp_path / "run")
    result, _ = siftune(capsys, "eval", tmp_path / "run", "--data", held_out)
    (kept,) = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert kept["data"] == str(held_out)
    assert kept["metrics"] == result["runs"][0]["metrics"]
    assert [answer["prompt"] for answer in kept["answers"]] == [f"{i}?" for i in range(20)]
    assert [answer["right"] for answer in kept["answers"]] == [str(i) for i in range(20)]
    report, _ = siftune(capsys, "report", tmp_path / "run", "--out", tmp_path / "page.html")
    assert "The first 20 held-out rows" in (tmp_path / "page.html").read_text()
    assert report["bytes"] > 10_000
    assert "Suspect rows" in (tmp_path / "page.html").read_text()  # a run of this version records its rows
