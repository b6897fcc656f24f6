"""`siftune report`, and the measurements that eval leaves for it."""

import json

from support.commands import error_of, siftune
from support.report_runs import save_run
from support.sifted_pools import save_pool, save_sifting


def test_a_page(tmp_path, capsys):
    run = save_run(tmp_path / "run", "gast", steps=4)
    result, told = siftune(capsys, "report", run, "-o", tmp_path / "page.html")
    assert result["report"] == str(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size == result["bytes"] < 3e6
    assert f"report in {tmp_path / 'page.html'}" in told


def test_a_list_and_a_sifted_pool(tmp_path, capsys):
    pool = save_pool(tmp_path / "pool.jsonl", 30)
    folder = save_sifting(tmp_path / "sifted", pool)
    page = tmp_path / "page.html"
    for subject in (folder, folder / "scores.csv"):
        _, told = siftune(capsys, "report", subject, "--out", page)
        assert "cannot be corrected here" not in page.read_text()
        assert f"{pool}: rows of the list" in told
    assert "is no folder and no CSV file" in error_of(capsys, "report", pool)
    (folder / "scores.csv").write_text("row,text\n1,x\n")
    assert f"{folder / 'scores.csv'} has no column 'place'" in error_of(capsys, "report", folder)


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
    assert f"siftune rows {tmp_path / 'run'}" in (tmp_path / "page.html").read_text()
