"""Files and folders that do not exist are refused before torch is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

from siftune.cli.main import main

MISTAKES = [
    (["train", "--train", "none.jsonl"], "none.jsonl does not exist"),
    (["train", "--train", "rows.jsonl", "--model", "./none"], "model folder none does not exist"),
    (["train", "--train", "rows.jsonl", "others.jsonl"], "none of the 2 rows of others.jsonl can be used: "),
    (["train", "--train", "rows.jsonl", "--columns", "text=a"], "the column 'a' of --columns text=a is missing"),
    (["sift", "--train", "rows.jsonl", "--target", "others.jsonl"], "give --columns prompt=q completion=a"),
    (["train", "--train", "rows.jsonl", "--gast.select", "4"], "gast.select is 4"),
    (["sift", "--train", "rows.jsonl", "--target", "none.jsonl"], "none.jsonl does not exist"),
    (["sift", "--train", "rows.jsonl", "--avoid", "none.jsonl"], "none.jsonl does not exist"),
    (["train", "--train", "rows.jsonl", "--keep", "none.jsonl"], "none.jsonl does not exist"),
    (["train", "--train", "rows.jsonl", "--sift"], "give --target FILE or --avoid FILE"),
    (["train", "--train", "rows.jsonl", "--target", "rows.jsonl"], "target rows.jsonl is also a file of the train"),
    (["sift", "--train", "rows.jsonl"], "give --target FILE or --avoid FILE"),
    (["sift", "--train", "rows.jsonl", "--target", "rows.jsonl"], "rows.jsonl is named twice"),
    (["sift", "--train", "rows.jsonl", "--target", "few.jsonl", "--out", "full"], "full is not empty"),
    (["train", "--train", "rows.jsonl", "--out", "full"], "full is no run folder, since x is in it"),
    (["train", "--train", "rows.jsonl", "--out", "run"], "run holds a run already"),
    (["train", "--train", "rows.jsonl", "--model", "full"], "full holds no model: there is no config.json in it"),
    (["sift", "--train", "rows.jsonl", "--target", "few.jsonl", "--model", "full"], "full holds no model"),
    (["export", "run", "--base", "full"], "full holds no model"),
    (["train", "--train", "rows.jsonl", "--template", "none.jinja"], "template none.jinja cannot be read"),
    (["eval", "run", "--template", "none.jinja"], "template none.jinja cannot be read"),
    (["train", "--train", "rows.jsonl", "--report-to", "wandbb"], "unknown tracker 'wandbb'; did you mean"),
    (["train", "--train", "rows.jsonl", "--resume", "none"], "none is no complete checkpoint"),
    (["train", "--resume", "none"], "run folder none does not exist"),
    (["train", "--resume"], "--resume RUN"),
    (["eval", "run", "--data", "none.jsonl"], "none.jsonl does not exist"),
    (["eval", "rum", "--data", "rows.jsonl"], "did you mean run?"),
    (["export", "none"], "there is no run none: no such folder"),
    (["export", "run", "--out", "full"], "full is not empty"),
    (["find-lr", "--train", "rows.jsonl"], "no held-out rows to compare rates on: give --eval FILE"),
    (["find-lr", "--train", "rows.jsonl", "--eval", "few.jsonl", "--methods", "dens"], "did you mean dense?"),
    (["find-lr", "--train", "rows.jsonl", "--eval", "few.jsonl", "--out", "full"], "full is not empty"),
    (["demo", "--out", "full"], "full is not empty"),
    (["eval", "none", "--data", "rows.jsonl"], "there is no run none: no such folder"),
    (["eval", "./none"], "there is no run ./none"),
    (["export", "./none"], "there is no run ./none"),
    (["rows", "none"], "there is no run folder none"),
    (["rows", "."], ". has no recipe.yaml, so it is no run folder"),
    (["report", "none"], "there is no folder none"),
    (["verify", "none"], "there is no folder none"),
    (["plug", "--kit", "none", "--return", "none", "--out", "x"], "there is no folder none"),
    (["emulate", "--calibration", "none.jsonl", "--out", "x"], "none.jsonl does not exist"),
    (["audit", "--kit", "k", "--train", "none.jsonl", "--eval", "rows.jsonl"], "none.jsonl does not exist"),
]
EACH = """
import io, json, sys
from contextlib import redirect_stderr
from siftune.cli.main import main
for words in json.load(sys.stdin):
    with redirect_stderr(io.StringIO()) as said:
        code = main(words)
    print(json.dumps([code, said.getvalue(), "torch" in sys.modules]))
"""


def test_mistakes_are_reported_without_torch(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    (tmp_path / "few.jsonl").write_text('{"prompt": "c", "completion": "d"}')
    (tmp_path / "others.jsonl").write_text('{"q": "a", "a": "b"}\n' * 2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text("train: rows.jsonl\n")
    done = subprocess.run(
        [sys.executable, "-c", EACH],
        input=json.dumps([words for words, _ in MISTAKES]),
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    for (words, message), line in zip(MISTAKES, done.stdout.splitlines(), strict=True):
        code, said, torch = json.loads(line)
        assert (code, torch) == (2, False), words
        assert message in said, words


def test_a_similar_folder_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("first").mkdir()
    assert main(["report", "frist"]) == 2
    assert "did you mean first?" in capsys.readouterr().err
