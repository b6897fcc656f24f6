import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.commands import siftune
from support.tiny import tiny
from support.tokenizer import byte_tokenizer

from siftune.base.errors import DataError, RecipeError
from siftune.cli.eval import Options, run
from siftune.cli.main import main
from siftune.data.read import load_rows
from siftune.data.target import held_out
from siftune.evaluate import measure as evaluation
from siftune.recipe.read import recipe_to_yaml
from siftune.recipe.schema import Recipe
from siftune.recipe.training_rows import digest_of, read_rows
from siftune.report.evals import value_text
from siftune.train.folder.run_folder import RunFolder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a tiny model, two runs on it, and held-out rows."""
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_tokenizer()
    for seed, name in enumerate(("one", "two")):
        model = tiny("llama", layers=2, vocab_size=len(tokenizer))
        if seed == 0:
            model.save_pretrained("base")
            tokenizer.save_pretrained("base")
        torch.manual_seed(seed)
        tuned = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
        tuned.save_pretrained(f"{name}/adapter")
        recipe = Recipe(model="base", eval="rows.jsonl", template="none")
        (tmp_path / name / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    rows = [{"prompt": f"{i}+{i}=", "completion": str(2 * i), "wrong": str(2 * i)[::-1]} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_a_run_on_its_own_rows(place, capsys):
    [found] = run(Options(("one",)))["runs"]
    assert (found["run"], found["model"], found["data"]) == ("one", "base", "rows.jsonl")
    match, perplexity = found["metrics"]
    assert (match["metric"], match["rows"]) == ("exact_match", 8)
    assert perplexity["low"] <= perplexity["difference"] <= perplexity["high"]
    assert perplexity["tuned"] == pytest.approx(perplexity["base"] + perplexity["difference"])
    assert perplexity["tuned"] != pytest.approx(perplexity["base"], rel=1e-3)
    shown = capsys.readouterr().out
    assert "one on rows.jsonl" in shown
    assert value_text("perplexity", perplexity["tuned"]) in shown


def test_flags_override_the_recipe(place):
    [plain] = run(Options(("one",), metrics=("perplexity",)))["runs"]
    [chat] = run(Options(("one",), metrics=("perplexity",), template="chat", limit=3, level=0.5))["runs"]
    assert plain["metrics"][0]["rows"] == 8
    assert chat["metrics"][0]["rows"] == 3
    assert chat["level"] == 0.5


def test_bad_held_out_rows_that_the_run_left_out_are_left_out_again(place):
    (place / "held.jsonl").write_text((place / "rows.jsonl").read_text() + '\n{"prompt": "a", "completion": ""}\n')
    given = Recipe(model="base", train="rows.jsonl", eval="held.jsonl", template="none", bad_rows="drop")
    (place / "one" / "recipe.yaml").write_text(recipe_to_yaml(given))
    [found] = run(Options(("one",), metrics=("perplexity",)))["runs"]
    assert found["metrics"][0]["rows"] == len((place / "rows.jsonl").read_text().splitlines())


def test_a_run_is_measured_on_the_share_that_it_held_out(place, monkeypatch):
    """Of 40 rows and one that no run could use: another limit of what is measured, and once for two runs."""
    rows = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(40)]
    pool = place / "pool.jsonl"
    pool.write_text("\n".join(map(json.dumps, rows)))
    given = Recipe(model="base", train=str(pool), eval_share=0.3, template="none")
    held = [row.completion for row in held_out(load_rows(str(pool)), 0.3)[1]]
    bad = next(number for number, row in enumerate(rows, 1) if row["completion"] == held[1])
    for name in ("one", "two"):
        (place / name / "recipe.yaml").write_text(recipe_to_yaml(given))
        (place / name / "bad_rows.txt").write_text(f"{pool}:{bad}: the prompt takes it all\n")
    seen, real = [], evaluation.measure

    def measure(model, prepared, *rest):
        seen.append(isinstance(model, PeftModel))
        return real(model, prepared, *rest)

    monkeypatch.setattr(evaluation, "measure", measure)
    one, two = run(Options(("one", "two"), metrics=("perplexity",)))["runs"]
    assert one["data"] == f"30 % of {pool}"
    assert one["metrics"][0]["rows"] == len(held) - 1
    assert one["metrics"][0]["base"] == two["metrics"][0]["base"]
    assert seen == [False, True, True]
    [few] = run(Options(("one",), metrics=("perplexity",), limit=2))["runs"]
    assert few["metrics"][0]["rows"] == 2
    record = json.loads((place / "one" / "eval.json").read_text())
    measured = [(entry["data"], entry["rows"]) for entry in record]
    assert measured == [(one["data"], 2), (one["data"], len(held) - 1)]  # the larger one remains


def test_runs_on_one_base_measure_it_once(place, monkeypatch):
    calls, real = [], evaluation.measure

    def measure(model, *args):
        if not isinstance(model, PeftModel):
            calls.append(1)
        return real(model, *args)

    monkeypatch.setattr(evaluation, "measure", measure)
    options = Options(("one", "two", "base"), data="rows.jsonl", template="none", metrics=("perplexity",))
    one, two, base = run(options)["runs"]
    assert len(calls) == 1
    assert one["metrics"][0]["base"] == two["metrics"][0]["base"] == base["metrics"][0]["base"]
    assert one["metrics"][0]["tuned"] != two["metrics"][0]["tuned"]
    assert base["metrics"][0]["tuned"] is None
    [alone] = run(replace(options, runs=("base",)))["runs"]
    assert alone["metrics"][0]["base"] == pytest.approx(base["metrics"][0]["base"], rel=1e-6)
    assert len(calls) == 2
    run(replace(options, runs=("one", "two"), template="chat"))
    run(replace(options, runs=("one",), template="none"))
    assert len(calls) == 4


def test_runs_on_the_same_rows_are_compared_row_by_row(place, capsys, caplog):
    found = run(Options(("one", "two"), metrics=("perplexity",)))
    [compared], [one, two] = found["compared"], found["runs"]
    assert (compared["run"], compared["against"]) == ("two", "one")
    [metric] = compared["metrics"]
    assert (metric["base"], metric["tuned"]) == (one["metrics"][0]["tuned"], two["metrics"][0]["tuned"])
    assert metric["low"] <= metric["difference"] <= metric["high"]
    shown = capsys.readouterr().out
    assert "two against one" in shown
    assert shown.count("perplexity") == 2
    recipe = place / "two" / "recipe.yaml"
    before = recipe.read_text()
    recipe.write_text(before.replace("columns: []", "columns: [completion=wrong]"))
    assert run(Options(("one", "two"), metrics=("perplexity",)))["compared"] == []
    assert "give --data FILE" in caplog.messages[-1]
    (place / "longer.jinja").write_text("{% for message in messages %}{{ message['content'] }}, and so on{% endfor %}")
    recipe.write_text(before.replace("template: none", "template: longer.jinja"))
    assert run(Options(("one", "two"), metrics=("perplexity",)))["compared"] == []
    assert "templates give different label tokens" in caplog.messages[-1]
    recipe.write_text(before)
    (place / "others.jsonl").write_text((place / "rows.jsonl").read_text())
    recipe.write_text(recipe.read_text().replace("rows.jsonl", "others.jsonl"))
    assert run(Options(("one", "two"), metrics=("perplexity",)))["compared"] == []


def test_an_adapter_has_the_chat_template_that_was_saved_with_it(place):
    """As `ask` and `export` have it; its base is measured with it, too."""
    text = "{% for message in messages %}{{ message['content'] }}, and so on{% endfor %}"
    (place / "one" / "adapter" / "chat_template.jinja").write_text(text)
    options = Options(("one/adapter", "two/adapter"), data="rows.jsonl", metrics=("perplexity",), base="base")
    one, two = run(options)["runs"]
    [given] = run(replace(options, runs=("one/adapter",), template=place / "one" / "adapter" / "chat_template.jinja"))[
        "runs"
    ]
    assert one["metrics"] == given["metrics"]
    assert one["metrics"][0]["base"] != two["metrics"][0]["base"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runs": ()}, "nothing to measure"),
        ({"metrics": ()}, "--metrics"),
        ({"runs": ("base",)}, "base .*--data FILE"),
    ],
)
def test_options_that_cannot_be_used(place, options, message):
    with pytest.raises(RecipeError, match=message):
        run(Options(**{"runs": ("one",), **options}))


def test_the_command(place, capsys):
    assert main(["eval", "one", "--metrics", "perplexity", "--limit", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["metrics"][0]["rows"] == 2
    assert main(["eval", "nowhere/at/all", "--data", "rows.jsonl"]) == 2
    assert "no run nowhere/at/all" in capsys.readouterr().err


def test_files_that_a_recipe_names_are_logged_and_missing_ones_refused(place, capsys):
    (place / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    recipe = Recipe(model="base", eval=str(place / "rows.jsonl"), template=place / "chat.jinja")
    (place / "one" / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    _, told = siftune(capsys, "eval", "one", "--metrics", "perplexity")
    for name in ("rows.jsonl", "chat.jinja"):
        assert f"{place / name}: " in told
    (place / "chat.jinja").unlink()
    with pytest.raises(DataError, match=r"chat\.jinja.*recipe\.yaml"):
        run(Options(("one",)))
    (place / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl.*recipe\.yaml"):
        run(Options(("one",), template="none"))


def test_a_changed_file_of_rows_is_refused_for_the_share_that_was_held_out(place):
    pool = place / "pool.jsonl"
    rows = [json.dumps({"prompt": f"{i}+{i}=", "completion": str(2 * i)}) for i in range(40)]
    pool.write_text("\n".join(rows))
    recipe = Recipe(model="base", train=str(pool), eval_share=0.3, template="none")
    (place / "one" / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    digest = digest_of(read_rows(recipe).parts["train"])
    RunFolder(place / "one", create=False).write_run(status="finished", rows=digest)
    assert run(Options(("one",), metrics=("perplexity",)))["runs"]
    pool.write_text("\n".join(rows).replace("+", "-"))
    with pytest.raises(DataError, match="have changed"):
        run(Options(("one",), metrics=("perplexity",)))


def test_a_template_is_no_large_file(place):
    (place / "chat.jinja").write_text("x" * 2**19)
    with pytest.raises(RecipeError, match="more than"):
        run(Options(("one",), template=place / "chat.jinja"))


def test_names_in_brackets_are_no_markup(place, capsys):
    name = "x[/y]"
    shutil.copytree("base", name)
    way = ("--metrics", "perplexity", "--template", "none")
    assert main(["eval", name, "--data", "rows.jsonl", *way]) == 0
    assert main(["emulate", "--model", f"{name}/gone", "--calibration", "rows.jsonl", "--out", "out"]) == 2
    assert f"{name}/gone" in capsys.readouterr().err
