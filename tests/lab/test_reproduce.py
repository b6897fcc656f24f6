"""The commonsense suite: the papers' settings, questions in their words, and a complete tiny run."""

import json

import pytest
from support.tiny import tiny
from support.tokenizer import byte_tokenizer

from lab.reproduce.__main__ import Options, main, recipe_of
from lab.reproduce.answers import first_option
from lab.reproduce.questions import TASKS, options_of, prepare_files, texts_of
from siftune.base.errors import DataError
from siftune.recipe.checks import check
from siftune.recipe.schema import Recipe

PAPERS = {
    "rank": 32, "alpha": 64, "dropout": 0.05, "batch_size": 16, "max_length": 256, "adapter": "lora",
    "schedule": "linear", "completion_only": False, "template": "none", "weight_decay": 0.0,
    "targets": ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
}  # fmt: skip


def test_the_recipe_has_the_papers_settings_and_can_train(tmp_path):
    recipe = recipe_of(Options("smollm2", str(tmp_path)))
    assert {field: getattr(recipe, field) for field in PAPERS} == PAPERS
    check(Recipe(**{**vars(recipe), "train": "rows.jsonl"}))


@pytest.mark.parametrize(("text", "option"), [
    ("False, and not true", "true"), ("that is untrue, so false", "true"), ("", None), ("Option1", None),
])  # fmt: skip
def test_an_answer_is_the_first_name_in_its_letter_case(text, option):
    assert first_option(text, ["true", "false", "option1"]) == option


def test_the_longer_of_two_names_is_tried_first():
    assert first_option("answer10", ["answer1", "answer10"]) == "answer10"


OPTIONS = {"boolq": ("true", "false"), "ARC-Easy": ("answer1", "answer2")}


def commonsense(task, number):
    options = OPTIONS[task]
    answer = options[number % len(options)]
    texts = "".join(f" {name.capitalize()}: {name[-1]}." for name in options if name[-1].isdigit())
    return {
        "instruction": f"{task} {number}?\n\n{texts.strip()}\n\nAnswer format: {'/'.join(options)}", "input": "",
        "output": f"the correct answer is {answer}", "answer": answer,
    }  # fmt: skip


def save_rows(folder, task):
    folder.mkdir(exist_ok=True)
    (folder / f"{task}.test.json").write_text(json.dumps([commonsense(task, n) for n in range(3)]))
    (folder / f"{task}.train.json").write_text(json.dumps([commonsense(task, n) for n in range(3, 133)]))
    return folder


def test_questions_have_their_options_as_names_letters_or_texts(tmp_path):
    data = save_rows(tmp_path / "rows", "ARC-Easy")
    for wording, prompt, choices in (
        ("names", "### Instruction:\nARC-Easy 1?", ["the correct answer is answer1", "the correct answer is answer2"]),
        ("letters", "Question: ARC-Easy 1?\nA. 1.\nB. 2.\nAnswer:", [" A", " B"]),
        ("texts", "Question: ARC-Easy 1?\nAnswer:", [" 1.", " 2."]),
    ):
        prepare_files(["ARC-Easy"], data, tmp_path / wording, 5, None, wording)
        rows = [json.loads(line) for line in (tmp_path / wording / "ARC-Easy.jsonl").read_text().splitlines()]
        assert prompt in rows[1]["prompt"]
        assert (rows[1]["choices"], rows[1]["answer"], rows[1]["completion"]) == (choices, 1, choices[1])
        assert len((tmp_path / wording / "train.jsonl").read_text().splitlines()) == 5


def test_options_are_read_from_the_instruction():
    question = "Please choose: Hot?\n\nAnswer1: ice Answer2: a fire: big\n\nAnswer format: answer1/answer2"
    assert options_of(question) == ["answer1", "answer2"]
    assert texts_of(question) == ("Hot?", ["ice", "a fire: big"])
    with pytest.raises(ValueError, match="Answer2: stands 2 times"):
        texts_of(question.replace("ice", "Answer2: ice"))


def test_missing_tasks_are_named(tmp_path):
    data = save_rows(tmp_path / "rows", "boolq")
    with pytest.raises(DataError, match="piqa"):
        prepare_files([*TASKS][:2], data, tmp_path / "data", None, None)


@pytest.fixture
def arguments(tmp_path):
    """Arguments of a reproduction on a tiny model."""
    data, recipe = save_rows(tmp_path / "rows", "boolq"), tmp_path / "tiny.yaml"
    recipe.write_text("dtype: float32\nrank: 2\nmax_length: 400\nbatch_size: 4\nwarmup: 1\nsteps: 2\n")
    model, tokenizer = tmp_path / "model", byte_tokenizer(chat_template=None)
    sizes = {"vocab_size": 300, "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 512}
    tiny("llama", layers=6, **sizes).save_pretrained(model)
    tokenizer.save_pretrained(model)
    return [
        str(model), "--tasks", "boolq", "--data", str(data), "--recipe", str(recipe), "--questions", "2",
        "--out", str(tmp_path / "out"), "--rates", "1e-2", "--metrics", "likeliest,nats",
    ]  # fmt: skip


def test_a_suite_runs_once_and_resumes(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments) == 0
    results = json.loads((out / "results.json").read_text())
    assert set(results["nats"]) == {"untuned", "dense, lora"}
    figure, run = results["likeliest"]["dense, lora"]["boolq"], out / "lora-learned" / "dense-seed0"
    assert figure["value"] == sum(json.loads((run / "boolq.answers.json").read_text())["likeliest"]["values"]) / 2
    before = (run / "run.json").stat().st_mtime_ns
    (run / "boolq.answers.json").unlink()
    assert main(arguments) == 0
    assert (run / "run.json").stat().st_mtime_ns == before
    assert json.loads((out / "results.json").read_text())["likeliest"] == results["likeliest"]
    for change, word in ((["--limit", "5"], "limit"), (["--rates", "5"], "learning rate")):
        assert main([*arguments, *change]) == 2
        assert word in capsys.readouterr().err


@pytest.mark.lab
def test_rates_are_swept_and_generated_answers_are_read(arguments, tmp_path):
    arguments = [*arguments, "--metrics", "generated", "--rates", "1e-2,1e-3", "--sweep-steps", "1"]
    assert main([*arguments, "--methods", "dense,ist", "--adapters", "lora,series", "--prompts", "masked"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["generated"]) == ["untuned", "dense, lora", "ist, lora", "dense, series", "ist, series"]
    assert set(results["rates"].values()) <= {1e-2, 1e-3}
    assert "difference" in results["generated"]["ist, lora"]


def test_a_recipe_file_cannot_set_what_an_option_sets(arguments, tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text("lr: 1e-3\n")
    assert main(arguments) == 2
    assert "lr is set by --rates" in capsys.readouterr().err
