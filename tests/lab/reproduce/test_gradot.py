"""`python -m lab.reproduce gradot-…` from end to end on tiny random models: all stages, and a resumed run."""

import json

import pytest
from support.tiny import tiny
from support.tokenizer import byte_tokenizer

from lab.reproduce.__main__ import main

SMALL = "dtype: float32\nmax_length: 120\nbatch_size: 4\nepochs: 1\nsteps: 2\n"


def row(task, number):
    if task == "web_questions":
        return {"question": f"where is {number}?", "answers": [f"Place{number}", "there"]}
    choices = {"text": [f"{number}", f"{number + 1}"], "label": ["A", "B"]}
    stem = "question_stem" if task == "openbookqa" else "question"
    return {stem: f"What is {number}?", "choices": choices, "answerKey": "AB"[number % 2]}


@pytest.fixture
def words(tmp_path):
    """Arguments of a reproduction of some tasks on a tiny model of a family."""

    def made(model, family, tasks, *more):
        rows, folder, recipe = (tmp_path / name for name in ("rows", "model", "small.yaml"))
        rows.mkdir()
        for task in tasks:
            for part, numbers in (("train", range(125)), ("test", range(200, 203))):
                lines = "".join(json.dumps(row(task, number)) + "\n" for number in numbers)
                (rows / f"{task}.{part}.jsonl").write_text(lines)
        recipe.write_text(SMALL)
        tokenizer = byte_tokenizer(chat_template=None)
        end = tokenizer.eos_token_id
        tiny(family, layers=6, vocab_size=300, eos_token_id=end, max_position_embeddings=256).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return [
            f"gradot-{model}", "--tasks", ",".join(tasks), "--data", str(rows), "--model", str(folder),
            "--recipe", str(recipe), "--questions", "2", "--out", str(tmp_path / "out"), *more,
        ]  # fmt: skip

    return made


def error_of(capsys, arguments):
    assert main(arguments) == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")


def files(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_kits_tunings_plug_ins_and_the_table_and_nothing_is_made_twice(words, tmp_path, capsys):
    given = words("opt-1.3b", "opt", ["arc_easy"], "--rates", "1e-2")
    assert main([*given, "--keep", "0.5"]) == 0
    table, out = capsys.readouterr().out, tmp_path / "out"
    assert "gradot-opt-1.3b, % right by log-likelihood" in table
    found = json.loads((out / "results.json").read_text())
    lines = ["base", "base, outer layers tuned", "gradot", "gradot, tuned", "gradot, plugged in"]
    assert [list(found[metric]) for metric in ("likeliest", "nats")] == [lines, lines]
    assert found["rates"] == {"arc_easy on base": 0.01, "arc_easy on gradot": 0.01}
    nats = [found["nats"][line]["arc_easy"]["value"] for line in lines]
    assert len(set(nats)) == 5  # five models, and none is another
    assert nats[1] < nats[0]
    manifest = json.loads((out / "kits" / "gradot" / "manifest.json").read_text())
    assert manifest["split"] == {"first": 2, "last": 2}

    before = files(out)
    (out / "answers" / "gradot-plugged-seed0" / "arc_easy.json").unlink()
    assert main([*given, "--keep", "0.5"]) == 0
    after = files(out)
    again = {path for path in before if after[path] != before[path]}
    assert again == {"answers/gradot-plugged-seed0/arc_easy.json", "protocol.json", "results.json", "table.md"}
    assert json.loads((out / "results.json").read_text()) == found
    assert "begun with keep = 0.5, but now it is 0.7" in error_of(capsys, given)
    assert "was trained at a learning rate of" in error_of(capsys, [*given[:-1], "5", "--keep", "0.5"])
    assert "--adapters has no effect on gradot-opt-1.3b" in error_of(capsys, [*given, "--adapters", "lora"])
    assert "--methods names ist; there are gradot, whitened" in error_of(capsys, [*given, "--methods", "ist"])


@pytest.mark.matrix
@pytest.mark.parametrize(("model", "family", "emulator", "rates"), [
    ("opt-6.7b", "opt", "whitened", "1e-3"), ("llama-7b", "llama", "gradot", "1e-3,1e-2"),
    ("llama-13b", "llama", "layerdrop", "1e-2"), ("opt-1.3b", "opt", "crash", "1e-3"),
])  # fmt: skip
def test_all_stages_with_every_emulator(words, tmp_path, model, family, emulator, rates):
    task = "web_questions"
    assert main(words(model, family, [task], "--rates", rates, "--sweep-steps", "1", "--methods", emulator)) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(found["rates"]) == {f"{task} on base", f"{task} on {emulator}"}
    assert set(found["rates"].values()) <= {0.001, 0.01}
    assert list(found["likeliest"])[-1] == f"{emulator}, plugged in"
    assert all(task in figures for figures in found["nats"].values())


def test_a_dry_run_counts_tunings_of_the_base_and_of_kits(words, capsys):
    given = words("opt-1.3b", "opt", ["arc_easy", "web_questions"])
    at = given.index("--model")
    assert main([*given[:at], *given[at + 2 :], "--dry-run", "--gpu", "h100", "--seeds", "0,1"]) == 0
    told = capsys.readouterr().out
    lines = {line.split("  ")[0]: line.split() for line in told.splitlines()}
    layer = 4 * 2048 * 2048 + 2 * 2048 * 8192 + 8192 + 9 * 2048
    for task in ("arc_easy", "web_questions"):
        assert lines[f"{task} on base"][3:6] == [f"{4 * layer:,}", "5", "2"]
        assert lines[f"{task} on gradot"][-1] == "5"  # three rates, and two seeds
    assert lines["all"][-1] == "20"
    assert "a model of 1,315,758,080 parameters" in told
