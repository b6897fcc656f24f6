"""`python -m lab.reproduce` from end to end on tiny random models: all stages, what is printed, and going on."""

import json
import shutil

import pytest
from support.tiny import tiny
from support.tokenizer import byte_tokenizer

from lab.reproduce.__main__ import main
from lab.reproduce.protocol import protocol_of

OPTIONS = {
    "boolq": ("true", "false"), "piqa": ("solution1", "solution2"), "social_i_qa": ("answer1", "answer2", "answer3"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"), "winogrande": ("option1", "option2"),
    "ARC-Easy": ("answer1", "answer2"), "ARC-Challenge": ("answer1", "answer2"), "openbookqa": ("answer1", "answer2"),
}  # fmt: skip
SMALL = "dtype: float32\nrank: 2\nmax_length: 400\nbatch_size: 4\nepochs: 1\nwarmup: 1\nsteps: 2\n"


def commonsense(task, number):
    options = OPTIONS[task]
    answer = options[number % len(options)]
    told = "".join(f" {name.capitalize()}: {name[-1]}." for name in options if name[-1].isdigit())
    return {
        "instruction": f"{task} {number}?\n\n{told.strip()}\n\nAnswer format: {'/'.join(options)}", "input": "",
        "output": f"the correct answer is {answer}", "answer": answer,
    }  # fmt: skip


def math(task, number):
    answer = "ABCDE"[number % 5] if task == "AQuA" else str(number)
    return {"instruction": f"{task} {number}?", "input": "", "output": f"It is {answer}.", "answer": answer}


def save_suite(folder, name):
    make = commonsense if name == "commonsense" else math
    tasks = protocol_of(f"{name}-llama-7b").suite.tasks
    folder.mkdir()
    for task in tasks:
        (folder / f"{task}.test.json").write_text(json.dumps([make(task, n) for n in range(3)]))
        if name == "commonsense":
            (folder / f"{task}.train.json").write_text(json.dumps([make(task, n) for n in range(3, 73)]))
    if name == "math":
        rows = [make(task, n) for task in tasks for n in range(3, 43)]
        (folder / "math_10k.json").write_text(json.dumps(rows))
    return folder


def save_model(folder, family):
    tokenizer = byte_tokenizer()
    tiny(
        family, layers=2, vocab_size=300, eos_token_id=tokenizer.eos_token_id, max_position_embeddings=512
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def words(tmp_path):
    """Arguments of a reproduction of a suite on a model of a family."""

    def made(name, family, *more):
        recipe = tmp_path / "small.yaml"
        recipe.write_text(SMALL)
        data = tmp_path / "rows"
        data = data if data.exists() else save_suite(data, name.partition("-")[0])
        model = tmp_path / "model"
        model = model if model.exists() else save_model(model, family)
        return [
            name, "--data", str(data), "--model", str(model), "--recipe", str(recipe), "--questions", "2",
            "--out", str(tmp_path / "out"), *more,
        ]  # fmt: skip

    return made


def error_of(capsys, arguments):
    assert main(arguments) == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")


def files(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_rates_runs_answers_and_the_table_and_nothing_is_made_twice(words, tmp_path, capsys):
    tasks = ["--tasks", "boolq,ARC-Easy"]
    given = words("commonsense-llama-7b", "llama", *tasks, "--rates", "1e-3,1e-2", "--sweep-steps", "1")
    assert main(given) == 0
    table = capsys.readouterr().out
    out = tmp_path / "out"
    printed = [line for line in table.splitlines() if line.startswith("lora (LLM-Adapters)")]
    assert printed[0].split()[-3:] == ["68.9", "77.8", "73.3"]  # of these two tasks, and their mean
    found = json.loads((out / "results.json").read_text())
    assert set(found) == {"generated", "likeliest", "nats", "rates", "tables", "notes"}
    assert set(found["nats"]) == {"untuned", "dense, lora"}
    figure = found["likeliest"]["dense, lora"]["boolq"]
    assert (figure["questions"], figure["seeds"], figure["deviation"]) == (2, 1, None)
    assert figure["low"] <= figure["value"] <= figure["high"]
    run = out / "lora-learned" / "dense-seed0"
    answers = json.loads((run / "boolq.answers.json").read_text())
    assert figure["value"] == sum(answers["likeliest"]["values"]) / 2
    assert len((run.parent / "rates" / "results.jsonl").read_text().splitlines()) == 2
    best = json.loads((run.parent / "rates" / "results.json").read_text())["best"]["dense"]["lr"]
    assert json.loads(json.dumps(best)) == pytest.approx(_rate(run / "recipe.yaml"))

    assert found["rates"] == {"dense, lora": pytest.approx(best)}
    assert f"learning rates: dense, lora {best:g}" in (out / "table.md").read_text()

    before = files(out)
    (run / "boolq.answers.json").unlink()
    assert main([*given, "--seeds", "0,1"]) == 0
    after = files(out)
    again = {str(path) for path in before if after[path] != before[path]}
    assert again == {"lora-learned/dense-seed0/boolq.answers.json", "protocol.json", "results.json", "table.md"}
    assert json.loads((out / "results.json").read_text())["likeliest"]["dense, lora"]["boolq"]["seeds"] == 2
    assert "begun with questions = 2, but now it is 1" in error_of(
        capsys, [*given[:-6], "--questions", "1", *given[-6:]]
    )
    more = ["boolq,ARC-Easy,piqa" if word == "boolq,ARC-Easy" else word for word in given]
    assert "begun with rows of = ['boolq', 'ARC-Easy'], but now it is" in error_of(capsys, more)
    assert "begun with limit = None, but now it is 5" in error_of(capsys, [*given, "--limit", "5"])
    assert "was trained at a learning rate of" in error_of(capsys, [*given[:-4], "--rates", "5"])
    (run / "boolq.answers.json").write_text("{")
    assert "boolq.answers.json is damaged: remove it" in error_of(capsys, given)
    shutil.rmtree(run / "checkpoints")
    (run / "run.json").write_text('{"status": "running"}')
    (run / "boolq.answers.json").unlink()
    assert main(given) == 0  # a run that was cut off before its first checkpoint begins anew
    (out / "protocol.json").write_text("[")
    assert "protocol.json is damaged" in error_of(capsys, given)


def test_kinds_of_adapters_with_prompts_learned_and_masked_in_one_call(words, tmp_path, capsys):
    given = words("commonsense-llama-7b", "llama", "--tasks", "boolq,ARC-Easy", "--rates", "1e-2", "--metrics", "nats")
    assert main([*given, "--adapters", "lora,series", "--prompts", "learned,masked"]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["nats"]
    lines = [f"dense, {adapter}, {prompts}" for adapter in ("lora", "series") for prompts in ("learned", "masked")]
    assert list(found) == ["untuned", *lines]
    assert len({found[line]["boolq"]["value"] for line in found}) == 5
    recipes = {name: (tmp_path / "out" / name / "dense-seed0" / "recipe.yaml").read_text().splitlines()
               for name in ("lora-learned", "series-masked")}  # fmt: skip
    assert {"rank: 2", "completion_only: false"} <= set(recipes["lora-learned"])
    assert {"rank: 256", "completion_only: true"} <= set(recipes["series-masked"])
    for option, value, message in (
        ("--adapters", "lora,sirius", "--adapters names sirius; there are lora, rslora"),
        ("--prompts", "hidden", "--prompts names hidden; there are learned, masked"),
        ("--metrics", "loss", "--metrics names loss; there are generated, likeliest, nats"),
        ("--keep", "0.5", "--keep has no effect on commonsense-llama-7b"),
    ):
        assert message in error_of(capsys, [*given, option, value])


def test_answers_as_texts_are_asked_by_log_likelihood_in_a_folder_of_their_own(words, tmp_path, capsys):
    given = words("commonsense-llama-7b", "llama", "--tasks", "boolq,ARC-Easy", "--rates", "1e-2", "--answers")
    assert main([*given, "texts"]) == 0
    assert set(json.loads((tmp_path / "out" / "results.json").read_text())) == {
        "likeliest", "nats", "rates", "tables", "notes",
    }  # fmt: skip
    rows = (tmp_path / "out" / "data" / "train.jsonl").read_text().splitlines()
    assert {json.loads(row)["completion"] for row in rows} == {" true", " false", " 1.", " 2."}
    assert "begun with answers = texts, but now it is names" in error_of(capsys, [*given, "names"])
    older = tmp_path / "out" / "protocol.json"
    older.write_text(
        json.dumps({key: value for key, value in json.loads(older.read_text()).items() if key != "answers"})
    )
    assert "begun with answers = names, but now it is texts" in error_of(capsys, [*given, "texts"])
    told = error_of(capsys, [*given, "texts", "--metrics", "generated"])
    assert told == "--metrics names generated; there are likeliest, nats"
    for name in ("math-llama-7b", "gradot-opt-1.3b"):
        told = error_of(capsys, [name, "--data", str(tmp_path), "--answers", "texts"])
        assert told.startswith(f"--answers has no effect on {name}")


@pytest.mark.parametrize(("line", "where"), [
    ("lr: 1e-3", "lr is set by --rates"), ("method: gast", "method is set by --methods"),
    ("quantize: 4bit", "quantize is set nowhere"),
])  # fmt: skip
def test_lines_of_a_recipe_that_would_have_no_effect_are_refused(tmp_path, capsys, line, where):
    recipe = tmp_path / "own.yaml"
    recipe.write_text(f"{line}\n")
    told = error_of(capsys, ["math-llama-7b", "--recipe", str(recipe), "--data", str(tmp_path)])
    assert told.startswith(f"{recipe}: {where}")


def test_what_is_no_folder_is_told(words, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert "out is a file: give a folder" in error_of(capsys, words("commonsense-llama-7b", "llama"))


def _rate(recipe):
    return float(next(line for line in recipe.read_text().splitlines() if line.startswith("lr:")).split()[1])


@pytest.mark.matrix
@pytest.mark.parametrize(("suite", "model", "family", "method"), [
    ("commonsense", "llama-7b", "llama", "ist+gast"), ("commonsense", "gpt-j-6b", "gptj", "ist"),
    ("commonsense", "opt-1.3b", "opt", "gast"), ("math", "llama3-8b", "llama", "trim"),
    ("math", "gpt-j-6b", "gptj", "cut"),
])  # fmt: skip
def test_all_stages_on_every_architecture(words, tmp_path, suite, model, family, method):
    assert main(words(f"{suite}-{model}", family, "--rates", "1e-3", "--methods", method)) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    tasks = protocol_of(f"{suite}-{model}").suite.tasks
    assert {*tasks, "average"} == set(found["generated"][f"{method}, lora"])
    assert ("likeliest" in found) == (suite == "commonsense")


def test_a_dry_run_names_every_setting_and_counts_the_rows_that_are_there(words, capsys):
    given = words("commonsense-opt-1.3b", "opt")
    at = given.index("--model")
    given = [*given, "--dry-run", "--methods", "dense,cut", "--gpu", "h100"]
    assert "--dry-run reckons with the paper's model" in error_of(capsys, given)
    assert main([*given[:at], *given[at + 2 :]]) == 0
    told = capsys.readouterr().out
    assert "alpha: 64" in told
    assert "a model of 1,315,758,080 parameters; 4 rows in a step" in told
    assert "estimated on h100 of 80 GB" in told
    lines = {line.split(",")[0]: line.split()[2:] for line in told.splitlines()}
    assert lines["dense"][:3] == ["1,572,864", "440", "2"]  # of rank 2
    assert lines["dense"][-1] == "4"  # three rates, and a seed
    assert lines["cut"][-1] == "4"


@pytest.mark.parametrize(("change", "message"), [
    (["--tasks", "boolq,gsm8k"], "--tasks names gsm8k; there are boolq, piqa"),
    (["--data", "nowhere"], "nowhere is no folder: give --data a folder with"),
    (["--methods", "dense,best"], "--methods names 'best', which is unknown"),
    (["--limit", "0"], "--limit is 0, but must be 1 or more"),
])  # fmt: skip
def test_what_cannot_be_done_is_told_in_a_sentence(words, capsys, change, message):
    assert message in error_of(capsys, [*words("commonsense-llama-7b", "llama"), *change])


def test_a_task_without_rows_is_named(words, tmp_path, capsys):
    given = words("commonsense-llama-7b", "llama")
    assert "nowhere is no folder" in error_of(capsys, [*given, "--data", "nowhere"])
    (tmp_path / "rows" / "piqa.test.json").unlink()
    boolq = tmp_path / "rows" / "boolq.train.json"
    text = boolq.read_text()
    boolq.unlink()
    assert "has no train rows of boolq" in error_of(capsys, [*given, "--tasks", "boolq"])
    boolq.write_text(text)
    assert "has no test rows of piqa: put piqa.test.json there, or name the tasks" in error_of(capsys, given)
