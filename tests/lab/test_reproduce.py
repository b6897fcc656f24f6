"""The papers' protocols: settings, printed figures, questions in the original wording, and complete tiny runs."""

import json
from pathlib import Path

import pytest
import yaml
from support.tiny import tiny
from support.tokenizer import byte_tokenizer

from lab.reproduce.__main__ import main
from lab.reproduce.harness import HARNESS
from lab.reproduce.protocol import names, protocol_of, recipe_files, sources
from lab.reproduce.tasks import TASKS, options_of
from siftune.base.errors import RecipeError
from siftune.recipe.checks import check
from siftune.recipe.schema import Recipe

PAPERS = {
    "rank": 32, "alpha": 64, "dropout": 0.05, "batch_size": 16, "epochs": 3, "warmup": 100, "max_length": 256,
    "adapter": "lora", "schedule": "linear", "completion_only": False, "template": "none",
}  # fmt: skip
OFFSITE = {
    "rank": None, "batch_size": 32, "epochs": 5, "warmup": 0, "max_length": 1024, "adapter": "full", "targets": None,
    "completion_only": True, "template": "none",
}  # fmt: skip
SMALL = {"steps": 120, "warmup": 12}  # ours, where no paper has the model
TARGETS = {
    "llama": ("up_proj", "down_proj"), "gpt": ("fc_in", "fc_out"), "opt": ("fc1", "fc2"),
    "smoll": ("up_proj", "down_proj"), "gemma": ("up_proj", "down_proj"),
}  # fmt: skip
AVERAGES = {  # as the sources print them
    "commonsense-gpt-j-6b": [59.0, 59.0, 50.2], "commonsense-llama-7b": [70.8, 72.3, 74.7, 76.3, 78.4],
    "commonsense-llama-13b": [79.5, 81.5, 80.5], "commonsense-llama3-8b": [80.8, 85.2],
    "math-gpt-j-6b": [39.6, 39.0, 41.1], "math-llama-7b": [44.6, 46.4, 46.9], "math-llama-13b": [48.9, 50.2, 51.1],
}  # fmt: skip


@pytest.mark.parametrize("name", names())
def test_a_protocol_has_the_papers_settings_and_can_train(name):
    protocol = protocol_of(name)
    recipe = protocol.recipe
    suite, _, model = name.partition("-")
    wanted = OFFSITE if suite == "gradot" else PAPERS
    if model in ("smollm2", "gemma3-270m"):
        wanted = wanted | (SMALL if suite != "gradot" else {"steps": 120})
    assert {field: getattr(recipe, field) for field in wanted} == wanted
    if suite != "gradot":
        modules = next(value for key, value in TARGETS.items() if model.startswith(key))
        assert recipe.targets == ("q_proj", "k_proj", "v_proj", *modules)
    assert 5e-5 <= recipe.lr <= 1e-3
    assert set(protocol.suite.tables) == set(protocol.suite.tasks)
    check(Recipe(**{**vars(recipe), "train": "rows.jsonl"}))
    lines = {key for file in recipe_files(name) for key in yaml.safe_load(file.read_text())}
    changed = {key for key, value in vars(recipe).items() if value != getattr(Recipe(), key)}
    assert changed <= lines


@pytest.mark.parametrize("name", names())
def test_printed_figures_have_a_source_and_the_average_that_it_prints(name):
    printed = protocol_of(name).printed
    assert all(row.source in sources() for row in printed)
    averages = [sum(row.right.values()) / len(row.right) for row in printed]
    assert averages == pytest.approx(AVERAGES.get(name, []), abs=0.11)


def test_a_recipe_stands_in_the_place_of_the_papers(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("adapter: dora\nrank: 16\n")
    recipe = protocol_of("math-llama-7b", str(own)).recipe
    assert (recipe.adapter, recipe.rank, recipe.alpha) == ("dora", 16, 64)


def test_a_name_that_is_none_is_refused_with_the_nearest():
    with pytest.raises(RecipeError, match=r"no protocol 'commonsense-lama-7b'; "):
        protocol_of("commonsense-lama-7b")


HUB = {
    "boolq": ({"question": "is it so", "answer": True}, "question: is it so?", "true/false", "true"),
    "piqa": (
        {"goal": "Fix it.", "sol1": "Glue.", "sol2": "Tape.", "label": 1},
        "question: Fix it.\n\nSolution1: Glue.\n\nSolution2: Tape.", "solution1/solution2", "solution2",
    ),
    "social_i_qa": (
        {"context": "He ran.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        "He ran. Why?\n\nAnswer1: a Answer2: b Answer3: c", "answer1/answer2/answer3", "answer3",
    ),
    "hellaswag": (
        {"activity_label": "Sport", "ctx": "He", "endings": ["a", "b", "c", "d"], "label": "0"},
        "Sport: He\n\nEnding1: a Ending2: b Ending3: c Ending4: d", "ending1/ending2/ending3/ending4", "ending1",
    ),
    "winogrande": (
        {"sentence": "_ ran.", "option1": "Al", "option2": "Bo", "answer": "2"},
        "_ ran.\n\nOption1: Al Option2: Bo", "option1/option2", "option2",
    ),
    "ARC-Easy": (
        {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
        "Q?\n\nAnswer1: x Answer2: y", "answer1/answer2", "answer2",
    ),
    "ARC-Challenge": (
        {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "1"},
        "Q?\n\nAnswer1: x Answer2: y", "answer1/answer2", "answer1",
    ),
    "openbookqa": (
        {"question_stem": "S", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"},
        "S\n\nAnswer1: x Answer2: y", "answer1/answer2", "answer1",
    ),
    "gsm8k": ({"question": "How many?", "answer": "2+2=<<2+2=4>>4\n#### 1,004"}, "How many?", None, "1,004"),
    "AQuA": (
        {"question": "Sum?", "options": ["A)1", "B)2"], "rationale": "one", "correct": "A"},
        "Sum? Answer Choices: A)1 B)2", None, "A",
    ),
    "mawps": ({"question": "How many?", "result": "4"}, "How many?", None, "4"),
    "SVAMP": ({"Body": "He has 4.", "Question": "How many?", "Answer": 4.0}, "He has 4. How many?", None, "4.0"),
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_a_row_of_the_hub_becomes_a_question(task):
    row, ends, form, answer = HUB[task]
    question = TASKS[task].question(row)
    assert question["instruction"].endswith(ends if form is None else f"{ends}\n\nAnswer format: {form}")
    assert question["answer"] == answer
    options = options_of(question["instruction"])
    assert (answer in options) == (TASKS[task].reader == "option") == bool(options)
    if options:
        assert question["output"] == f"the correct answer is {answer}"


LABELLED = {"choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}
ROWS = {  # row of the hub, prompt, options or accepted texts, the right one
    "openbookqa": ({"question_stem": "The sun is", **LABELLED, "answerKey": " B"}, "The sun is", [" x", " y"], 1),
    "piqa": ({"goal": "Fix it.", "sol1": "Glue. ", "sol2": "Tape.", "label": 0},
             "Question: Fix it.\nAnswer:", [" Glue.", " Tape."], 0),
    "arc_easy": ({"question": "Why?", **LABELLED}, "Question: Why?\nAnswer:", [" x", " y"], 1),
    "arc_challenge": ({"question": "Why?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "1"},
                      "Question: Why?\nAnswer:", [" x", " y"], 0),
    "hellaswag": (
        {"activity_label": "Sport", "ctx_a": "A man [title] runs.", "ctx_b": "he", "label": "1",
         "endings": ["falls  down.", "[step] stops.", "c", "d"]},
        "Sport: A man. runs. He", [" falls down.", " stops.", " c", " d"], 1,
    ),
    "sciq": ({"support": " Cells are small.", "question": "What?", "distractor1": "a", "distractor2": "b",
              "distractor3": "c", "correct_answer": "d"},
             "Cells are small.\nQuestion: What?\nAnswer:", [" a", " b", " c", " d"], 3),
    "web_questions": ({"question": "where?", "answers": ["Paris", "France"]},
                      "Question: where?\nAnswer:", ["Paris", "France"], 0),
    "race": ({"article": "Long.", "question": "What?", "options": ["a", "b", "c", "d"], "answer": "C"},
             "Article: Long.\n\nQuestion: What?\n\nAnswer:", [" a", " b", " c", " d"], 2),
}  # fmt: skip


@pytest.mark.parametrize("task", HARNESS)
def test_a_row_becomes_a_question(task):
    row, prompt, texts, right = ROWS[task]
    question = HARNESS[task].question(row)
    if task == "web_questions":
        assert question == {"prompt": prompt, "completion": " Paris", "accepted": texts}
    else:
        assert question == {"prompt": prompt, "completion": texts[right], "choices": texts, "answer": right}


@pytest.mark.lab
def test_questions_are_those_of_lm_evaluation_harness(tmp_path):
    """Its own tasks on our rows; left out are RACE, of which it has no training rows, and WebQs, read differently."""
    tasks = pytest.importorskip("lm_eval.tasks")
    manager, folder = tasks.TaskManager(include_defaults=False), Path(tasks.__file__).parent
    for task in HARNESS.keys() - {"web_questions", "race"}:
        row = {**ROWS[task][0], "ind": 0}
        (tmp_path / f"{task}.json").write_text(json.dumps([row]))
        files = {part: str(tmp_path / f"{task}.json") for part in ("train", "validation", "test")}
        local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        spec = tmp_path / f"{task}.yaml"
        spec.write_text(yaml.safe_dump({"include": str(next(folder.rglob(f"{task}.yaml"))), "task": task, **local}))
        (harness,) = manager.load([str(spec)])["tasks"].values()
        (doc,) = harness.training_docs()
        question = HARNESS[task].question(row)
        assert question["prompt"] == harness.doc_to_text(doc)
        assert [text.strip() for text in question["choices"]] == [text.strip() for text in harness.doc_to_choice(doc)]
        assert question["answer"] == int(harness.doc_to_target(doc))


OPTIONS = {
    "boolq": ("true", "false"), "piqa": ("solution1", "solution2"), "social_i_qa": ("answer1", "answer2", "answer3"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"), "winogrande": ("option1", "option2"),
    "ARC-Easy": ("answer1", "answer2"), "ARC-Challenge": ("answer1", "answer2"), "openbookqa": ("answer1", "answer2"),
}  # fmt: skip
TINY = "dtype: float32\nrank: 2\nmax_length: 400\nbatch_size: 4\nepochs: 1\nwarmup: 1\nsteps: 2\n"


def commonsense(task, number):
    options = OPTIONS[task]
    answer = options[number % len(options)]
    told = "".join(f" {name.capitalize()}: {name[-1]}." for name in options if name[-1].isdigit())
    return {
        "instruction": f"{task} {number}?\n\n{told.strip()}\n\nAnswer format: {'/'.join(options)}", "input": "",
        "output": f"the correct answer is {answer}", "answer": answer,
    }  # fmt: skip


def save_rows(folder, task):
    """The files of a task of either suite."""
    folder.mkdir(exist_ok=True)
    if task in OPTIONS:
        (folder / f"{task}.test.json").write_text(json.dumps([commonsense(task, n) for n in range(3)]))
        (folder / f"{task}.train.json").write_text(json.dumps([commonsense(task, n) for n in range(3, 133)]))
        return
    for part, numbers in (("train", range(125)), ("test", range(3))):
        made = [{**ROWS[task][0], "question": f"What {n}?"} for n in numbers]
        (folder / f"{task}.{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))


@pytest.fixture
def arguments(tmp_path):
    """Arguments of a reproduction on a tiny model."""

    def made(name, task, *more):
        save_rows(tmp_path / "rows", task)
        recipe = tmp_path / "tiny.yaml"
        recipe.write_text(TINY.replace("rank: 2\n", "") if name.startswith("gradot") else TINY)
        model, tokenizer = tmp_path / "model", byte_tokenizer(chat_template=None)
        sizes = {"vocab_size": 300, "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 512}
        tiny("llama", layers=6, **sizes).save_pretrained(model)
        tokenizer.save_pretrained(model)
        return [
            name, "--tasks", task, "--data", str(tmp_path / "rows"), "--model", str(model), "--recipe", str(recipe),
            "--questions", "2", "--out", str(tmp_path / "out"), "--rates", "1e-2", *more,
        ]  # fmt: skip

    return made


def test_a_suite_runs_once_and_resumes(arguments, tmp_path, capsys):
    given, out = arguments("commonsense-llama-7b", "boolq", "--metrics", "likeliest,nats"), tmp_path / "out"
    assert main(given) == 0
    results = json.loads((out / "results.json").read_text())
    assert set(results["nats"]) == {"untuned", "dense, lora"}
    figure, run = results["likeliest"]["dense, lora"]["boolq"], out / "lora-learned" / "dense-seed0"
    assert figure["value"] == sum(json.loads((run / "boolq.answers.json").read_text())["likeliest"]["values"]) / 2
    before = (run / "run.json").stat().st_mtime_ns
    (run / "boolq.answers.json").unlink()
    assert main(given) == 0
    assert (run / "run.json").stat().st_mtime_ns == before
    assert json.loads((out / "results.json").read_text())["likeliest"] == results["likeliest"]
    for change, word in ((["--limit", "5"], "limit"), (["--rates", "5"], "learning rate"), (["--keep", ".5"], "keep")):
        assert main([*given, *change]) == 2
        assert word in capsys.readouterr().err


@pytest.mark.lab
@pytest.mark.parametrize("emulator", ["gradot", "layerdrop"])
def test_offsite_tuning_runs_completely(arguments, tmp_path, emulator):
    assert main(arguments("gradot-llama-7b", "sciq", "--methods", emulator)) == 0
    nats = json.loads((tmp_path / "out" / "results.json").read_text())["nats"]
    assert list(nats)[-1] == f"{emulator}, plugged in"
    values = [line["sciq"]["value"] for line in nats.values()]
    assert len(set(values)) == 5  # five models, and none is another
    assert values[1] < values[0]
