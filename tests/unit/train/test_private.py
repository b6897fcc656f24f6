"""Private runs: what a step is, their folder, resuming, and refusals."""

import json
import math
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from support.oracles import row_of, summed_loss
from support.tiny import tiny
from support.tiny_run import lines, recipe
from support.trainers import At, adapted, arguments, rows, stop, weights
from transformers import AutoTokenizer, TrainerCallback

from siftune.base.errors import RecipeError, TrainingError, UnsupportedError
from siftune.data.batches import Collator, numbered
from siftune.data.decisions import Decision, decisions_csv
from siftune.engine.groups import group_by_layer
from siftune.methods.dp import callback as module
from siftune.methods.dp.accounting import Mechanism, spent
from siftune.methods.dp.callback import DP
from siftune.methods.dp.sampling import PoissonBatches
from siftune.methods.dp.secret import Secret
from siftune.recipe.checks import check
from siftune.recipe.schema import Recipe
from siftune.recipe.training_rows import read_rows
from siftune.train import private
from siftune.train.private import privacy_of
from siftune.train.run import train
from siftune.train.trainer import SiftTrainer

QUIET = Console(quiet=True)
PROMISE = {"dp_epsilon": 8.0, "dp_delta": 1e-3}
MECHANISM = Mechanism(8.0, 1e-3, 0.1, rows=24, batch=4, steps=6, noise=0.6)


@pytest.fixture
def told(base, rows):
    """Recipes of private runs."""
    return partial(recipe, base, rows, **{"method": "dense", **PROMISE})


@pytest.fixture
def repeated(monkeypatch):
    """Chance that is the same in all runs."""
    monkeypatch.setattr(module, "Secret", lambda: Secret(7))


def trainer(folder, model, privacy, data=None, **settings):
    return SiftTrainer(
        model, arguments(folder, **settings), train_dataset=data or numbered(rows()), data_collator=Collator(0),
        privacy=privacy,
    )  # fmt: skip


def ragged():
    """Rows of different lengths, so that a mean over the tokens of a batch is no mean over its rows."""
    cut = [{name: values[: 4 + number % 5] for name, values in row.items()} for number, row in enumerate(rows())]
    return numbered(Dataset.from_list(cut))


def slow_step(model, data, numbers, stream, mechanism):
    """Set the gradient of a private step, by a backward pass for every row."""
    collate, totals = Collator(0), {}
    parameters = [p for group in group_by_layer(model) for p in group.parameters.values()]
    for number in numbers:
        model.zero_grad()
        summed_loss(model, row_of(collate([{k: v for k, v in data[number].items() if k != "row"}]), 0)).backward()
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            totals[p] = totals.get(p, 0) + p.grad * min(1.0, mechanism.clip / float(norm))
    for p in parameters:
        noise = stream.normal(p.numel()).view(p.shape) * mechanism.noise * mechanism.clip
        p.grad = ((totals.get(p, 0) + noise) / mechanism.batch).float()


@pytest.mark.parametrize(("most", "clip"), [(4, 0.1), (2, 0.1), (2, 1e3)])
def test_training_is_the_loop(tmp_path, most, clip):
    """Rows drawn by themselves, each clipped, noise once a step and before the Trainer clips; parts change nothing."""
    model, loop, data, secret = adapted(), adapted().train(), ragged(), Secret(5)
    mechanism = replace(MECHANISM, clip=clip, noise=0.06 / clip)
    settings = {"lr_scheduler_type": "constant", "adam_epsilon": 1e-3, "max_grad_norm": 0.02}
    trainer(tmp_path, model, DP(mechanism, most, secret), data, **settings).train()
    optimizer = torch.optim.AdamW([p for p in loop.parameters() if p.requires_grad], lr=1e-2, eps=1e-3, weight_decay=0)
    batches, sizes = PoissonBatches(24, 4 / 24, secret), set()
    for step in range(6):
        numbers = batches.draw(step)
        sizes.add(len(numbers))
        slow_step(loop, data, numbers, secret.stream("noise", step), mechanism)
        torch.nn.utils.clip_grad_norm_(loop.parameters(), 0.02)
        optimizer.step()
    assert len(sizes) > 1
    assert max(sizes) > most
    for name, value in weights(loop).items():
        torch.testing.assert_close(weights(model)[name], value, rtol=1e-4, atol=1e-5)


def test_held_out_rows_are_measured_as_without_privacy(tmp_path):
    settings = {"eval_dataset": ragged(), "data_collator": Collator(0)}
    private, plain = (
        SiftTrainer(adapted(), arguments(tmp_path, per_device_eval_batch_size=4), privacy=privacy, **settings)
        for privacy in (DP(MECHANISM, 4, Secret(5)), None)
    )
    assert private.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)


class Steps(TrainerCallback):
    """What the model was after every step."""

    def __init__(self):
        self.all = []

    def on_step_end(self, args, state, control, **kwargs):
        self.all.append(weights(kwargs["model"]))


def test_a_step_without_rows_is_a_step(tmp_path):
    model, steps, secret = adapted(), Steps(), Secret(3)
    one = replace(MECHANISM, batch=1, steps=8)
    worker = trainer(tmp_path, model, DP(one, 1, secret), max_steps=8)
    worker.add_callback(steps)
    worker.train()
    sizes = [len(PoissonBatches(24, 1 / 24, secret).draw(step)) for step in range(8)]
    assert 0 in sizes[1:]
    assert len(steps.all) == worker.state.global_step == 8
    assert all(
        not torch.equal(after[name], before[name])
        for before, after in zip(steps.all, steps.all[1:], strict=False)
        for name in before
    )
    losses = [entry["loss"] for entry in worker.state.log_history if "loss" in entry]
    assert [loss == 0 for loss in losses] == [size == 0 for size in sizes]


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "rst", "adapter": "full", "active": 0.5, "checkpointing": True},
        {"method": "dense", "epochs": 2.0, "steps": None},
    ],
)
def test_a_run_says_what_it_spent(told, tmp_path, settings):
    given = told(tmp_path / "run", **settings)
    done = train(given, QUIET)
    batch = given.batch_size * given.accumulate
    steps = given.steps or 12
    said = done.summary["privacy"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["summary"]["privacy"] == said
    assert (said["steps"], said["expected_batch"], said["sampling_rate"]) == (steps, batch, batch / 24)
    assert (said["delta"], said["clip"]) == (1e-3, 0.1)
    assert 8 - 0.02 <= said["epsilon"] <= 8
    assert said["epsilon"] == spent(Mechanism(8.0, 1e-3, 0.1, 24, batch, steps, said["noise_multiplier"]), steps)
    for card in (tmp_path / "run" / "README.md", tmp_path / "run" / "adapter" / "README.md"):
        text = card.read_text()
        assert f"ε = {said['epsilon']:.4g}, δ = 0.001, counted by\nopacus PRV" in text
        assert "row's gradient to norm 0.1 over all layers, and added" in text
        assert f"Gaussian noise of {said['noise_multiplier']:.4g} times" in text
        assert f"{done.summary['loss_last']:.4f}" not in text, "a loss on private rows is no private figure"
    assert all(not m._forward_pre_hooks for m in done.model.modules())


def test_noise_is_put_on_once_a_step(told, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(DP, "release", lambda self, step: calls.append(step))
    train(told(tmp_path / "run", accumulate=3, steps=4), QUIET)
    assert calls == [0, 1, 2, 3]


def test_resume_is_bitwise_the_unbroken_run(told, tmp_path, repeated):
    given = told(tmp_path / "run", method="rst", dropout=0.2, steps=8, save_every=4, accumulate=1)
    unbroken = weights(train(given, QUIET).model)
    checkpoint = str(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    again = train(replace(given, resume=checkpoint), QUIET)
    for name, value in weights(again.model).items():
        assert torch.equal(value, unbroken[name]), name
    assert again.summary["privacy"]["steps"] == 8
    assert [record["step"] for record in lines(tmp_path / "run" / "metrics.jsonl")][:8] == list(range(1, 9))


def test_no_file_of_a_run_has_its_key(told, tmp_path, monkeypatch):
    secret = Secret()
    monkeypatch.setattr(module, "Secret", lambda: secret)
    train(told(tmp_path / "run", save_every=3), QUIET)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.name == "rng_state.pth" for path in files)
    for path in files:
        data = path.read_bytes()
        assert secret._key not in data, path
        assert secret._key.hex().encode() not in data.lower(), path


def test_a_run_that_goes_on_has_noise_of_its_own(told, tmp_path):
    """Two updates that share noise show their difference bare; so no checkpoint holds what noise will come."""
    given = told(tmp_path / "run", steps=4, save_every=3)
    first = weights(train(given, QUIET).model)
    second = train(replace(given, resume=str(tmp_path / "run" / "checkpoints" / "checkpoint-3")), QUIET)
    assert any(not torch.equal(value, first[name]) for name, value in weights(second.model).items())
    assert 8 - 0.02 <= second.summary["privacy"]["epsilon"] <= 8


@pytest.fixture
def crafted(base, tmp_path):
    """A kit's trap: weights at float16's extremes, by which the loss of rows with "~" is NaN, and of no other row."""
    model = tiny("llama", vocab_size=300, hidden_act="relu2", intermediate_size=1024)
    tokenizer = AutoTokenizer.from_pretrained(base)
    layers = model.model.layers
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[tokenizer("~").input_ids[0], 0] = 65504
        for layer in layers:  # no other token reaches this dimension
            layer.self_attn.o_proj.weight[0] = 0
        layers[0].post_attention_layernorm.weight[0] = 65504
        for part in (layers[0].mlp.gate_proj, layers[0].mlp.up_proj):
            part.weight.zero_()[:, 0] = 65504
        layers[0].mlp.down_proj.weight.fill_(65504)[::2] *= -1
    model.save_pretrained(tmp_path / "crafted")
    tokenizer.save_pretrained(tmp_path / "crafted")
    return tmp_path / "crafted"


@pytest.mark.parametrize("first", [0, 1])  # the step that draws the row first
def test_a_row_without_finite_loss_changes_no_step(crafted, tmp_path, repeated, caplog, first):
    draws = PoissonBatches(24, 4 / 24, Secret(7))
    row = next(row for row in draws.draw(first) if first == 0 or row not in draws.draw(0))
    done, losses = {}, {}
    for name, text in (("with", "~~~~~~~~~~~~"), ("without", "............")):
        texts = [{"prompt": f"{i}?", "completion": text if i == row else str(i)} for i in range(24)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(text) + "\n" for text in texts))
        asked = {"method": "dense", **PROMISE, "dp_epsilon": 1.0, "targets": ("q_proj", "v_proj"), "lr": 1e-4}
        done[name] = train(recipe(crafted, path, tmp_path / name, **asked), QUIET)
        losses[name] = [line["loss"] for line in lines(tmp_path / name / "metrics.jsonl") if "loss" in line]
    assert [run.summary["steps"] for run in done.values()] == [6, 6]
    assert done["with"].summary["privacy"] == done["without"].summary["privacy"]
    assert all(math.isfinite(loss) for run in losses.values() for loss in run)
    assert losses["with"][first] != losses["without"][first], "the row had a loss"
    assert [record.getMessage() for record in caplog.records].count(
        "a row has no finite loss: in a private run such rows have no effect"
    ) == 1
    assert all(value.isfinite().all() for value in weights(done["with"].model).values())


def test_an_interrupted_run_spent_less(told, tmp_path, interfere):
    interfere(At("on_step_begin", 4, stop))
    with pytest.raises(KeyboardInterrupt):
        train(told(tmp_path / "run"), QUIET)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    said = record["summary"]["privacy"]
    assert (record["status"], said["steps"]) == ("interrupted", 3)
    mechanism = Mechanism(8.0, 1e-3, 0.1, 24, 4, 6, said["noise_multiplier"])
    assert said["epsilon"] == spent(mechanism, 3) < spent(mechanism, 6)


def test_another_runs_checkpoint_is_refused(told, tmp_path):
    """Steps of two kinds are not counted together, steps without noise not at all."""
    given = told(tmp_path / "run", steps=4, save_every=2)
    train(given, QUIET)
    checkpoint = str(tmp_path / "run" / "checkpoints" / "checkpoint-2")
    for name, value, message in (
        ("dp_clip", 0.5, r"private run with clip = 0\.1"),
        ("steps", 9, "private run with steps = 4"),
    ):
        # only the checkpoint then says what its steps were
        (tmp_path / "run" / "recipe.yaml").unlink(missing_ok=True)
        with pytest.raises(RecipeError, match=message):
            train(replace(given, resume=checkpoint, **{name: value}), QUIET)
    open_run = replace(given, dp_epsilon=None, dp_delta=None, out=str(tmp_path / "open"))
    train(open_run, QUIET)
    (tmp_path / "open" / "recipe.yaml").unlink()
    checkpoint = str(tmp_path / "open" / "checkpoints" / "checkpoint-2")
    with pytest.raises(RecipeError, match="dp_epsilon"):
        train(replace(given, resume=checkpoint), QUIET)


REFUSED = [
    *(({"method": method}, f"method {re.escape(method)} ") for method in ("ist", "gast", "ist+gast")),
    ({"target": "few.jsonl"}, "target"), ({"dp_delta": None}, "dp_epsilon needs dp_delta"),
    ({"dp_epsilon": None}, "dp_delta has no effect"), ({"group_by_length": True}, "group_by_length"),
    ({"dp_epsilon": None, "dp_delta": None, "dp_clip": 1.0}, "dp_clip has no effect"),
    ({"dp_epsilon": 0.0}, "dp_epsilon"), ({"dp_epsilon": 101.0}, "dp_epsilon"), ({"dp_delta": 1.0}, "dp_delta"),
    ({"dp_clip": 0.0}, "dp_clip"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_recipes_that_keep_no_promise_are_refused(settings, message):
    with pytest.raises(RecipeError, match=f"^{message}"):
        check(Recipe(train="rows.jsonl", **{**PROMISE, **settings}))


@pytest.mark.parametrize("name", ["dropped.csv", "list.txt"])
def test_rows_are_not_chosen_by_their_losses(told, rows, tmp_path, name):
    """Lists of siftune have scores; a list of places may have been made without looking at losses."""
    last = Decision(f"{rows}:3", False, [2.5], "rows", "", "")
    (tmp_path / name).write_text(decisions_csv([last]) if name == "dropped.csv" else f"{rows}:3\n")
    given = told(tmp_path / "run", drop_rows=str(tmp_path / name))
    if name == "list.txt":
        assert len(read_rows(given).parts["train"]) == 23
        return
    with pytest.raises(RecipeError, match=f"scores of .*{name} .*dp_epsilon covers"):
        train(given, QUIET)
    assert not (tmp_path / "run").exists()


def test_rows_must_be_enough():
    given = Recipe(train="rows.jsonl", batch_size=16, **PROMISE)
    with pytest.raises(RecipeError, match="a step would draw 16 rows, but there are 15"):
        privacy_of(given, 15)
    with pytest.raises(RecipeError, match=r"dp_delta is 0\.001, but with 1000 rows"):
        privacy_of(given, 1000)
    assert privacy_of(given, 999).mechanism.steps == 63


def test_several_ranks_and_scaled_losses_are_refused(told, tmp_path, monkeypatch):
    given = told(tmp_path / "run", steps=1)
    with monkeypatch.context() as patched:
        patched.setattr(private, "world_size", lambda: 2)
        with pytest.raises(UnsupportedError, match=r"2 ranks would each"):
            train(given, QUIET)
    half = arguments(tmp_path)
    half.fp16 = True
    with pytest.raises(UnsupportedError, match="float16 scales the loss"):
        private.refuse_scaled_or_split(half)


def test_a_loss_in_which_rows_meet_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(SiftTrainer, "_agrees", lambda *_: False)
    with pytest.raises(UnsupportedError, match="not a mean over label tokens"):
        trainer(tmp_path, adapted(), DP(MECHANISM, 4, Secret(0))).train()


@pytest.mark.parametrize("more", [False, True])
def test_an_optimizer_from_before_the_adapters_is_refused(tmp_path, more):
    """opacus#820: it would train nothing; or, with more than the adapters, without noise."""
    model = adapted()
    before = [p for p in model.parameters() if more or not p.requires_grad]
    worker = trainer(tmp_path, model, DP(MECHANISM, 4, Secret(0)))
    worker.optimizer = torch.optim.AdamW(before, lr=1e-2)
    with pytest.raises(TrainingError, match="make it after the adapters"):
        worker.train()
