"""A recipe in, a run folder out; resuming; what is left when training ends early."""

import json
import logging
import os
import signal
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from support.seen import assert_same
from support.tiny_run import choices_of, lines, recipe
from support.trainers import At, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from siftune.base.errors import InputError, TrainingError
from siftune.cli.demo_rows import arithmetic_rows
from siftune.models import attention
from siftune.recipe.read import load_recipe
from siftune.recipe.schema import resolve_recipe, select_until
from siftune.train.run import train
from siftune.train.trainer import SiftTrainer

QUIET = Console(quiet=True)
IDS = torch.tensor([[5, 80, 91, 17, 200, 44]])


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def loaded(base, folder):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found = sum(len(getattr(part, kind) or ()) for part in model.modules() for kind in kinds)
    return found + sum(len(p._backward_hooks or ()) for p in model.parameters())


# --- what a run leaves behind ---


def test_the_adapter_gives_the_logits_of_the_tuned_model(base, rows, tmp_path):
    settings = {"method": "gast", "adapter": "dora", "checkpointing": True, "steps": 3}
    done = train(recipe(base, rows, tmp_path / "run", **settings), QUIET)
    assert done.summary["steps"] == 3
    assert hooks(done.model) == 0
    with torch.no_grad():
        tuned, plain = done.model.eval()(IDS).logits, AutoModelForCausalLM.from_pretrained(base)(IDS).logits
        torch.testing.assert_close(loaded(base, done.folder.adapter)(IDS).logits, tuned)
    assert float((tuned - plain).abs().max()) > 1e-3
    assert all(p.requires_grad == ("lora" in name) for name, p in done.model.named_parameters())


def test_the_folder_is_complete(base, rows, tmp_path):
    given = recipe(base, rows, tmp_path / "run", eval=str(rows), eval_every=3, save_every=4, accumulate=2)
    done = train(given, QUIET)
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        "recipe.yaml", "rows.sha256", "run.json", "metrics.jsonl", "selections.parquet", "adapter",
        "checkpoints", "README.md",
    }  # fmt: skip
    assert load_recipe(folder / "recipe.yaml") == resolve_recipe(given)
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["summary"] == done.summary
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert record["hardware"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    assert tokenizer("a?").input_ids == AutoTokenizer.from_pretrained(base)("a?").input_ids
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-6"]


def few_rows(path):
    """A file of three rows of a target."""
    path.write_text("".join(json.dumps(row) + "\n" for row in arithmetic_rows(3, seed=9)))
    return path


def test_a_target_is_trained_on_steers_and_is_told_of(base, rows, tmp_path):
    few = few_rows(tmp_path / "few.jsonl")
    run = tmp_path / "run"
    file = tmp_path / "recipe.yaml"
    own = f"train: {rows}\ntarget: {few}\ntemplate: none\nbatch_size: 4\nsteps: 8\nrank: 2\nout: {run}\n"
    file.write_text(own)
    assert load_recipe(file).method == "dense"
    file.write_text(f"{own}method: gast\n")
    done = train(replace(load_recipe(file), model=str(base)), QUIET)
    count = len(rows.read_text().splitlines())
    numbers = {row for record in choices_of(run) for row in record["rows"]}
    assert max(numbers) < count + max(3, round(count / 3))
    assert any(row >= count for row in numbers)
    assert set(done.summary["followed"]) == {"other", "target"}
    assert done.summary["followed"]["target"] == 1
    assert 0 < done.summary["followed"]["other"] < 1
    again = load_recipe(run / "recipe.yaml")
    assert (again.method, again.gast.support, select_until(again)) == ("gast", "dataset", 0.67)
    batches = choices_of(run)
    assert all(not set(numbers) & set(range(count, count + 30)) for batch in batches[:5] for numbers in [batch["rows"]])
    assert [sum(batch["followed"][0]) for batch in batches] == [2] * 5 + [4] * 3


@pytest.mark.parametrize(("steps", "warmup", "moved"), [(1, 0.03, False), (1, 0, True), (2, 0.03, True)])
def test_a_run_of_warmup_alone_is_told(base, rows, tmp_path, caplog, steps, warmup, moved):
    train(recipe(base, rows, tmp_path / "run", steps=steps, warmup=warmup), QUIET)
    told = "all steps are warm-up, the first of them at learning rate 0: give more steps, or warmup 0"
    assert (told in caplog.messages) == (not moved)
    saved = adapter(tmp_path / "run" / "adapter")
    assert any(value.any() for name, value in saved.items() if "lora_B" in name) == moved


def test_the_records_have_a_line_per_step(base, rows, tmp_path):
    done = train(recipe(base, rows, tmp_path / "run", eval=str(rows), eval_every=3), QUIET)
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    logs = [line for line in metrics if "loss" in line]
    assert [line["step"] for line in logs] == [1, 2, 3, 4, 5, 6]
    for line in logs:
        assert line["active_layers"] == 2
        assert line["loss"] > 0
        assert line["peak_memory_mb"] > 0
        assert (line["step"] == 1) == ("tokens_per_second" not in line) == ("seconds_per_step" not in line)
        assert {"learning_rate", "grad_norm"} <= set(line)
    evals = [line for line in metrics if "eval_loss" in line]
    assert [line["step"] for line in evals] == [3, 6]
    summary = done.summary
    assert (summary["loss_first"], summary["loss_last"]) == (logs[0]["loss"], logs[-1]["loss"])
    assert summary["eval_loss"] == evals[-1]["eval_loss"]
    selection = choices_of(tmp_path / "run")
    assert [line["step"] for line in selection] == list(range(6))
    assert all(len(line["layers"]) == 2 and set(line["layers"]) <= set(range(4)) for line in selection)
    assert [line["step"] for line in selection if line["importance"]] == [2, 4]


def test_tokens_are_counted_without_padding(base, rows, tmp_path):
    done = train(recipe(base, rows, tmp_path / "run", steps=6), QUIET)
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [row["prompt"] + row["completion"] for row in lines(rows)]
    assert done.summary["tokens"] == pytest.approx(sum(len(tokenizer(text).input_ids) for text in texts), abs=24)


def test_the_seed_decides_everything(base, rows, tmp_path):
    settings = {"dropout": 0.1, "interval": 2}
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(runs))  # what was drawn before must not matter
        train(recipe(base, rows, tmp_path / name, seed=seed, **settings), QUIET)
        runs.append((adapter(tmp_path / name / "adapter"), choices_of(tmp_path / name)))
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1] != runs[2][1]
    name = next(name for name in runs[0][0] if "lora_A" in name)
    assert not torch.allclose(runs[0][0][name], runs[2][0][name], atol=0.02)


@pytest.mark.usefixtures("restored_algorithms")
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_deterministic_run_uses_deterministic_algorithms_alone(base, rows, tmp_path, monkeypatch, deterministic):
    on, step = [], SiftTrainer.training_step

    def watched(self, *args, **kwargs):
        on.append(torch.are_deterministic_algorithms_enabled())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SiftTrainer, "training_step", watched)
    train(recipe(base, rows, tmp_path / "out", method="ist+gast", steps=3, deterministic=deterministic), QUIET)
    assert on == [deterministic] * 3


@pytest.mark.parametrize(("named", "taken"), [("auto", True), ("sdpa", False)])
def test_short_rows_take_their_own_products_unless_an_attention_is_named(
    base, rows, tmp_path, monkeypatch, named, taken
):
    gradients, products = [], attention._products
    monkeypatch.setattr(
        attention, "_products", lambda *given: gradients.append(torch.is_grad_enabled()) or products(*given)
    )
    settings = {"eval": str(rows), "eval_every": 1, "dtype": "bfloat16", "attention": named, "steps": 1}
    train(recipe(base, rows, tmp_path / "run", **settings), QUIET)
    assert set(gradients) == ({True, False} if taken else set())  # in training, and in evaluation


def test_the_attention_of_the_recipe_is_used(base, rows, tmp_path):
    run = train(recipe(base, rows, tmp_path / "run", attention="eager", steps=1), QUIET)
    assert run.model.config._attn_implementation == "eager"
    with pytest.raises(InputError, match="attention flash_attention_2 cannot be used"):
        train(recipe(base, rows, tmp_path / "other", attention="flash_attention_2"), QUIET)


def test_bfloat16_weights_keep_their_dtype_and_the_adapter_is_float32(base, rows, tmp_path):
    done = train(recipe(base, rows, tmp_path / "run", dtype="bfloat16"), QUIET)
    dtypes = {"lora" in name: p.dtype for name, p in done.model.named_parameters()}
    assert dtypes == {False: torch.bfloat16, True: torch.float32}
    assert all(value.dtype == torch.float32 for value in adapter(done.folder.adapter).values())


# --- resuming ---


def figures(folder):
    """The lines of the metrics without times."""
    names = ("step", "loss", "grad_norm", "learning_rate", "eval_loss", "num_input_tokens_seen", "active_layers")
    return [
        {name: line[name] for name in names if name in line}
        for line in lines(folder / "metrics.jsonl")
        if "loss" in line or "eval_loss" in line
    ]


# --- training that ends early ---


def test_an_interrupt_leaves_the_adapter_of_the_last_whole_step(base, rows, tmp_path, interfere):
    kept = {}

    def act(model):
        kept.update(weights(model))
        raise KeyboardInterrupt

    interfere(At("on_pre_optimizer_step", 4, act))
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(recipe(base, rows, tmp_path / "run", adapter="dora"), QUIET)
    assert stopped.value.__notes__ == [f"the adapter after step 3 is in {tmp_path}/run/adapter"]
    assert_same(weights(trainable(loaded(base, tmp_path / "run" / "adapter"))), kept)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["summary"]["steps"]) == ("interrupted", 3)


def trainable(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora" in name
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("number", "times"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_has_the_step_saved_and_a_second_one_ends_at_once(
    base, rows, tmp_path, interfere, number, times, request
):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored in the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    settings = {"method": "ist+gast", "dropout": 0.1, "eval": str(rows)}
    train(recipe(base, rows, tmp_path / "whole", **settings), QUIET)
    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]

    def send(_):
        for _ in range(times):
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SiftTrainer, "__init__", SiftTrainer.__init__)
        interfere(At("on_step_begin", 3, send))
        with pytest.raises(KeyboardInterrupt) as stopped:
            train(recipe(base, rows, tmp_path / "run", **settings), QUIET)
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == handlers
    run = tmp_path / "run"
    said = f"the adapter after step {4 - times} is in {run}/adapter"
    onward = f", and `siftune train --resume {run}` continues from there"
    assert stopped.value.__notes__ == [said + (onward if times == 1 else "")]
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    if times == 1:
        done = train(recipe(base, rows, run, resume=True, **settings), QUIET)
        assert_same(adapter(run / "adapter"), adapter(tmp_path / "whole" / "adapter"))
        assert choices_of(run) == choices_of(tmp_path / "whole")
        assert figures(run) == figures(tmp_path / "whole")  # no evaluation more, and none less
        assert done.summary["steps"] == 6
    else:
        assert not list((run / "checkpoints").iterdir())


def test_broken_numbers_leave_the_adapter_of_the_step_before(base, rows, tmp_path, interfere):
    kept = {}

    def act(model):
        kept.update(weights(model))
        model.get_input_embeddings().weight.data.fill_(float("nan"))

    interfere(At("on_step_begin", 4, act))
    with pytest.raises(TrainingError, match=r"the loss is nan .*step 7.*; so far, .* step 6"):
        train(recipe(base, rows, tmp_path / "run", steps=8), QUIET)
    assert_same(weights(trainable(loaded(base, tmp_path / "run" / "adapter"))), kept)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "stopped"


# --- what is refused before the model is loaded ---


def test_the_trainer_says_nothing_of_its_own(base, rows, tmp_path, capsys, caplog):
    with caplog.at_level(logging.WARNING, "siftune"):
        train(recipe(base, rows, tmp_path / "run", log_every=2))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 7, captured.err  # what is trained, steps 1, 2, 4, 6
    assert not caplog.records
