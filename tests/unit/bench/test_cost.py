"""Time and memory of the methods: the schedule, the medians, and the worker's measurements."""

import json
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.tiny import tiny
from support.tokenizer import byte_tokenizer
from trl import SFTTrainer

from siftune.base.environment import versions
from siftune.base.errors import InputError, RecipeError, SiftuneError
from siftune.bench import cost, worker
from siftune.bench.cost import MEASURED, SUPPORTS, Measurement, Workload, measure, parse_methods, schedule
from siftune.methods import METHODS
from siftune.methods.drivers.layer_driver import LayerSelection
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


def test_list_of_methods():
    assert parse_methods(" dense, ist,,dense,trl") == ["dense", "ist", "trl"]
    with pytest.raises(RecipeError, match="mean dense"):
        parse_methods("dense,dens")
    with pytest.raises(RecipeError, match="choose"):
        parse_methods(" , ")


SIFTUNES = [name for name in MEASURED if not name.startswith("trl")]


def test_all_methods_are_measured():
    assert {name.partition("-")[0] for name in SIFTUNES} == set(METHODS)


@pytest.mark.parametrize("name", SIFTUNES)
def test_the_workload_reaches_the_settings_of_every_method(work, name):
    recipe = replace(work, active=0.5, interval=3).recipe(name, "unused")
    check(recipe)
    assert recipe.method == name.partition("-")[0]
    assert recipe.compile == (name == "dense-compiled")
    assert recipe.checkpointing == (name == "dense-checkpointing")
    given = {"active": 0.5, "interval": 3, "select": 0.5}
    for settings in settings_of(recipe):
        options = settings.to_dict()
        assert {key: options[key] for key in given if key in options}.items() <= given.items()
    if name.startswith("gast-"):
        own = SUPPORTS[name.removeprefix("gast-")]
        assert own
        assert own.items() <= recipe.gast.to_dict().items()


@pytest.mark.distributed
def test_a_fresh_process_measures_a_method(work):
    found = measure("ist", 3, work, threads=1)
    assert (found.method, found.round, len(found.seconds)) == ("ist", 3, work.steps)
    assert all(0 < step < 60 for step in found.seconds)
    assert 50 < found.peak_memory_mb < 20_000
    assert found.facts["dtype"] == "float32"
    assert found.facts["versions"] == versions()  # against torch: tests/unit/base/test_environment.py
    if not torch.cuda.is_available():
        assert "1 threads" in found.facts["hardware"]


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        ("sys.stderr.write('step 1\\n'); raise OSError('disk')", SiftuneError, "OSError: disk"),
        ("sys.stderr.write('noise\\nno module\\n\\n'); sys.exit(2)", InputError, "no module"),
        ("os.kill(os.getpid(), 9)", InputError, r"SIGKILL.*--batch-size"),
        ("sys.stderr.write('threads ' + os.environ['OMP_NUM_THREADS']); sys.exit(1)", SiftuneError, "threads 7"),
    ],
)
def test_a_failed_process_is_reported(work, monkeypatch, code, kind, words):
    monkeypatch.setattr(cost, "WORKER", (sys.executable, "-c", f"import os, sys\n{code}"))
    with pytest.raises(SiftuneError, match=words) as caught:
        measure("rst", 0, work, threads=7)
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"length": 65}, "length"), ({"targets": ("c_attn",)}, "c_attn"), ({"targets": ()}, "targets"),
        ({"model": "/none"}, "/none"),
    ],
)  # fmt: skip
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
    (tmp_path / "job.json").write_text(json.dumps({"task": "ist", "workload": asdict(work)}))
    assert worker.main([str(tmp_path)]) == 0
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["seconds"] == [1, 11, 1, 11]  # steps 1 to 4; steps 2 and 4 begin with scoring


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
