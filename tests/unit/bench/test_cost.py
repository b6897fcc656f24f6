"""What the methods cost: the worker's measurements, and what is made of them."""

import importlib.util
import json
import sys
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.tiny import tiny
from support.tokenizer import byte_tokenizer
from trl import SFTTrainer

from siftune.base.errors import InputError, RecipeError, SiftuneError
from siftune.bench import cost, worker
from siftune.bench.cost import MEASURED, Measurement, check_workload, measure, parse_methods, schedule
from siftune.bench.workload import SUPPORTS, Workload
from siftune.methods import METHODS
from siftune.methods.drivers.layer_driver import LayerSelection
from siftune.methods.ist.callback import IST
from siftune.recipe.checks import check
from siftune.recipe.schema import settings_of
from siftune.train.trainer import SiftTrainer

VOCAB = 300


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A workload on a saved tiny model."""
    folder = tmp_path_factory.mktemp("model")
    tiny("llama", vocab_size=VOCAB).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return Workload(str(folder), batch_size=2, length=16, rank=4, steps=4, warmup=1, interval=2)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_method_takes_every_place_of_a_round_equally_often(count):
    methods = [f"m{i}" for i in range(count)]
    order = schedule(methods, 2 * count)
    assert [number for number, _ in order] == sorted(number for number, _ in order)
    rounds = [[method for number, method in order if number == n] for n in range(2 * count)]
    for place in range(count):
        assert sorted(names[place] for names in rounds) == sorted(2 * methods)
    assert all(sorted(names) == methods for names in rounds)


def test_rounds_rotate():
    assert schedule(["a", "b", "c"], 2) == [(0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a")]


def test_medians_and_ratios_are_those_of_numpy():
    random = np.random.default_rng(0)
    methods, rounds = ["dense", "ist", "trl"], 4
    seconds = random.uniform(1, 9, (3, rounds, 5))
    memory = random.uniform(1, 9, (3, rounds))
    taken = [
        Measurement(methods[m], r, tuple(seconds[m, r]), memory[m, r], {}) for r in range(rounds) for m in range(3)
    ]
    costs = cost.summarise(random.permutation(np.array(taken, dtype=object)).tolist(), ["dense", "trl"])
    means = seconds.mean(2)
    for m, method in enumerate(methods):
        found = costs[method]
        assert found.seconds_per_step == pytest.approx(np.median(means[m]))
        assert (found.fastest, found.slowest) == pytest.approx((means[m].min(), means[m].max()))
        assert found.peak_memory_mb == pytest.approx(np.median(memory[m]))
        for other, o in (("dense", 0), ("trl", 2)):
            assert found.seconds_ratio[other] == pytest.approx(np.median(means[m] / means[o]))
            assert found.memory_ratio[other] == pytest.approx(np.median(memory[m] / memory[o]))


def test_a_round_that_is_slow_for_all_leaves_the_ratio_alone():
    taken = [Measurement(m, r, (s * load,), 1.0, {}) for r, load in ((0, 1), (1, 30)) for m, s in (("a", 2), ("b", 1))]
    assert cost.summarise(taken, ["a"])["b"].seconds_ratio == {"a": 0.5}


@pytest.mark.parametrize(
    ("methods", "against", "expected"),
    [
        (["ist", "dense", "trl"], "trl", ["dense", "trl"]),
        (["rst", "ist"], None, ["rst"]),
        (["dense", "ist"], "dense", ["dense"]),
    ],
)
def test_dense_or_else_the_first_is_compared_with(methods, against, expected):
    assert cost.references(methods, against) == expected


def test_methods_are_split_and_taken_once():
    assert parse_methods(" dense, ist,,dense,trl") == ["dense", "ist", "trl"]


@pytest.mark.parametrize(
    ("text", "words"),
    [("dense,dens", "'dens'; did you mean dense"), ("qwerty", "known: dense, rst"), (" , ", "no method to measure")],
)
def test_an_unknown_method_is_refused_with_the_nearest(text, words):
    with pytest.raises(RecipeError, match=words):
        parse_methods(text)


def test_trl_is_asked_for_where_it_is_missing(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trl" else find(name))
    with pytest.raises(RecipeError, match=r"pip install 'siftune\[trl\]'"):
        parse_methods("dense,trl")
    assert parse_methods("dense") == ["dense"]


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0}, {"warmup": 0}, {"length": 1}, {"label_share": 0.0}, {"label_share": 1.5}, {"active": 0.0},
        {"interval": 0}, {"rank": 0}, {"batch_size": 0}, {"targets": ()},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(work, change):
    check_workload(work)
    with pytest.raises(RecipeError, match=next(iter(change))):
        check_workload(replace(work, **change))


SIFTUNES = [name for name in MEASURED if not name.startswith("trl")]


def test_every_method_is_measured_and_gast_with_each_support():
    assert {name.partition("-")[0] for name in SIFTUNES} == set(METHODS)


@pytest.mark.parametrize("name", SIFTUNES)
def test_the_workload_reaches_the_settings_of_every_method(work, name):
    recipe = replace(work, active=0.5, interval=3).recipe(name, "unused")
    check(recipe)
    assert recipe.method == name.partition("-")[0]
    assert recipe.compile == (name == "dense-compiled")
    given = {"active": 0.5, "interval": 3, "select": 0.5}
    for settings in settings_of(recipe):
        options = settings.to_dict()
        assert {key: options[key] for key in given if key in options}.items() <= given.items()
    if name.startswith("gast-"):
        own = SUPPORTS[name.removeprefix("gast-")]
        assert own
        assert own.items() <= recipe.gast.to_dict().items()


def test_a_fresh_process_measures_a_method(work):
    found = measure("ist", 3, work, threads=1)
    assert (found.method, found.round, len(found.seconds)) == ("ist", 3, work.steps)
    assert all(0 < step < 60 for step in found.seconds)
    assert 50 < found.peak_memory_mb < 20_000
    assert found.facts["dtype"] == "float32"
    assert found.facts["versions"]["torch"] == torch.__version__
    if not torch.cuda.is_available():
        assert "1 threads" in found.facts["hardware"]


def ending(monkeypatch, code):
    """Put a process that runs `code` in the worker's place."""
    monkeypatch.setattr(cost, "WORKER", (sys.executable, "-c", f"import os, sys\n{code}"))


def test_the_last_words_of_a_process_that_fails_are_shown(work, monkeypatch):
    ending(monkeypatch, "sys.stderr.write('step 1\\n'); raise OSError('no such luck')")
    with pytest.raises(SiftuneError, match="measuring rst failed: OSError: no such luck") as caught:
        measure("rst", 0, work)
    assert not isinstance(caught.value, InputError)
    assert "step 1" in caught.value.__notes__[0]


def test_a_refusal_by_the_process_is_the_users_to_mend(work, monkeypatch):
    ending(monkeypatch, "sys.stderr.write('noise\\nno such module\\n\\n'); sys.exit(2)")
    with pytest.raises(InputError, match="measuring ist failed: no such module"):
        measure("ist", 0, work)


def test_a_process_that_is_killed_hints_at_memory(work, monkeypatch):
    ending(monkeypatch, "os.kill(os.getpid(), 9)")
    with pytest.raises(InputError, match=r"SIGKILL.*--batch-size"):
        measure("ist", 0, work)


def test_threads_reach_the_process(work, monkeypatch):
    ending(monkeypatch, "sys.stderr.write('threads ' + os.environ['OMP_NUM_THREADS']); sys.exit(1)")
    with pytest.raises(SiftuneError, match="threads 7"):
        measure("ist", 0, work, threads=7)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"length": 65}, "takes at most 64"), ({"targets": ("c_attn",)}, "c_attn"), ({"model": "/none"}, "not exist")],
)
def test_the_worker_refuses_in_one_sentence(work, tmp_path, capsys, change, words):
    job = {"task": "dense", "workload": asdict(replace(work, **change))}
    (tmp_path / "job.json").write_text(json.dumps(job))
    assert worker.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert words in said.splitlines()[-1]
    assert not (tmp_path / "result.json").exists()


def test_a_step_holds_its_training_and_its_scoring_and_the_warmup_is_left_out(work, tmp_path, monkeypatch):
    now = [0.0]
    step, score = SiftTrainer.training_step, LayerSelection.suppressed_losses

    def training_step(trainer, *args):
        now[0] += 1 if trainer.state.global_step else 100  # the first is slow
        return step(trainer, *args)

    def scoring(selection, *args):
        now[0] += 10
        return score(selection, *args)

    monkeypatch.setattr(SiftTrainer, "training_step", training_step)
    monkeypatch.setattr(LayerSelection, "suppressed_losses", scoring)
    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    found = worker.work_off("ist", work, tmp_path)
    assert found["seconds"] == [1, 11, 1, 11]  # steps 1 to 4; steps 2 and 4 begin with scoring


def test_siftunes_methods_run_on_its_own_training_path(work, tmp_path):
    trainer, chosen = worker.build_trainer("ist", work, tmp_path), []
    method = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, IST))
    method.on_select = chosen.append
    trainer.train()
    assert type(trainer) is SiftTrainer
    assert trainer._label_logits_only is True
    assert trainer.state.global_step == work.warmup + work.steps
    assert method.importance.abs().max() > 0
    assert {len(choice.layers) for choice in chosen} == {1}


def test_all_methods_train_the_same_weights_on_the_same_rows(work, tmp_path):
    ours, theirs = (worker.build_trainer(name, work, tmp_path / name) for name in ("dense", "trl"))
    for column in ("input_ids", "labels"):
        assert list(ours.train_dataset[column]) == list(theirs.train_dataset[column])
    shapes = [{n: p.shape for n, p in t.model.named_parameters() if p.requires_grad} for t in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert ours.args.per_device_train_batch_size == theirs.args.per_device_train_batch_size == work.batch_size
    scales = [next(m.scaling for m in t.model.modules() if hasattr(m, "scaling")) for t in (ours, theirs)]
    assert scales[0] == scales[1]


@pytest.mark.parametrize(("name", "passes"), [("trl", 2), ("trl-no-checkpointing", 1)])
def test_trl_trains_with_its_own_defaults(work, tmp_path, name, passes):
    clock, calls = worker.Clock(), []
    trainer = worker.build_trainer(name, work, tmp_path, clock)
    assert type(trainer) is SFTTrainer
    attention = next(module for path, module in trainer.model.named_modules() if path.endswith("layers.1.self_attn"))
    attention.register_forward_pre_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == passes * (work.warmup + work.steps)  # checkpointing computes activations again
    assert trainer.args.bf16 is True
    assert len(clock.seconds(work.warmup)) == work.steps


def test_rows_are_full_and_learned_at_their_end(work):
    rows = worker.random_rows(replace(work, label_share=0.3), VOCAB).with_format("numpy")
    ids, labels = rows["input_ids"][:], rows["labels"][:]
    assert ids.shape == labels.shape == (10, 16)
    assert 0 <= ids.min() < 20
    assert VOCAB - 20 < ids.max() < VOCAB
    assert (labels[:, :11] == -100).all()
    assert (labels[:, 11:] == ids[:, 11:]).all()


def _step_flops(work):
    """Products of a dense step of the tiny llama, by hand: 2·m·k·n each."""
    tokens, hidden, inner, grouped = work.batch_size * work.length, 32, 48, 16
    linears = {"q": (hidden, hidden), "k": (hidden, grouped), "v": (hidden, grouped), "o": (hidden, hidden)}
    linears |= {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
    total = 0
    for layer in range(4):
        for name, (wide, out) in linears.items():
            # the embeddings are frozen, so that the inputs of the first q, k and v need no gradient
            passes = 1 if layer == 0 and name in "qkv" else 2
            total += passes * 2 * tokens * wide * out
            if name in ("q", "k", "v", "up", "down"):
                total += (passes + 1) * 2 * tokens * wide * work.rank  # A
                total += 3 * 2 * tokens * work.rank * out  # B
        attention = 2 * 2 * work.batch_size * work.length**2 * hidden
        total += attention + attention * 5 // 2
    return total + 2 * 2 * work.batch_size * work.labels() * hidden * VOCAB


def test_the_rate_is_that_of_the_fastest_product(monkeypatch):
    times = iter([4.0, 1.0, 2.0, 0.5, 3.0])
    monkeypatch.setattr(worker, "_timed", lambda _: next(times))
    rate = worker.product_rate(2, 3, 5, torch.float32, torch.device("cpu"), least=7.2)
    assert rate == 2 * 2 * 3 * 5 / 0.5
    assert next(times) == 3.0


def test_a_product_is_timed(monkeypatch):
    assert 0.05 < worker._timed(lambda: time.sleep(0.05)) < 5
    assert 1e6 < worker.product_rate(64, 64, 64, torch.float32, torch.device("cpu"), least=0) < 1e15
