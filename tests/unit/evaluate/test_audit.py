import copy
import gc
import json
import random
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny import tiny
from tokenizer import byte_tokenizer

from siftune.config import Recipe, resolve_recipe
from siftune.errors import DataError, KitError, LayerError, RecipeError, TrainingError
from siftune.evaluate.audit import AuditOptions, AuditSettings, OffsiteModels, audit, audit_paths, tokenize_audit
from siftune.evaluate.audit_models import plugged, random_floor, read_adapter, restored
from siftune.evaluate.audit_result import LABELS
from siftune.evaluate.audit_rows import drawn, not_among
from siftune.evaluate.gradients import gradient_cosine
from siftune.evaluate.membership import auc
from siftune.offsite.emulator import LayerShape, build, emulator_config
from siftune.offsite.kit import read_kit
from siftune.offsite.load import load_emulator
from siftune.offsite.returned import write_return
from siftune.offsite.split import Split, adapter_names
from siftune.train.rows import rows_from
from siftune.train.run import set_up
from siftune.train.run_folder import RunFolder
from siftune.train.tokenize import Collator
from siftune.train.trainer import SiftTrainer
from tiny_kit import base_model, save_kit

SPLIT = Split(1, 1)
TOKENIZER = byte_tokenizer()
SETTINGS = AuditSettings(
    steps=6, lr=3e-3, batch_size=4, max_length=48, template="none", recovery_lr=1e-3, eval_batch_size=20, resamples=300
)


@pytest.fixture(autouse=True, scope="module")
def _quick_collection():
    """The Trainer collects garbage at its end; what is there before needs no look."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def records(start, stop, choices=True):
    found = [{"prompt": f"{i} and {i}?", "completion": str(2 * i)} for i in range(start, stop)]
    return [{**row, **({"choices": [row["completion"], "no", "-1"]} if choices else {})} for row in found]


def base():
    """Five layers, in training mode, with flags of its own."""
    model = tiny("llama", 5, vocab_size=300, eos_token_id=TOKENIZER.eos_token_id, pad_token_id=0).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for p in model.parameters():
            p.data += 0.02 * torch.randn(p.shape)  # off the initialisation, which the floor may draw again
    model.config.initializer_range = 0.4  # random weights are then worse than these
    model.model.embed_tokens.requires_grad_(False)
    return model


def shorter(model):
    """An emulator of it without its third layer."""
    other = copy.deepcopy(model)
    del other.model.layers[2]
    other.config.num_hidden_layers = 4
    for number, layer in enumerate(other.model.layers):
        layer.self_attn.layer_idx = number
    return other


def whole(model):
    """An emulator of which nothing is compressed."""
    shapes = [LayerShape(number) for number in (1, 2, 3)]
    other = build(emulator_config(model.config, SPLIT, shapes), SPLIT, shapes, meta=False)
    other.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    return other


def models(emulator=shorter):
    model = base()
    return OffsiteModels(model, emulator(model), SPLIT, TOKENIZER)


def rows(choices=True):
    parts = records(0, 20, choices), records(100, 108, choices)
    made = tokenize_audit(*map(rows_from, parts), TOKENIZER, SETTINGS)
    return made if choices else replace(made, questions=None)


def snapshot(model):
    state = {name: t.clone() for name, t in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad, p.dtype) for p in model.parameters()], [m.training for m in model.modules()]
    return state, flags


def same(model, before):
    state, flags = before
    now, now_flags = snapshot(model)
    return now_flags == flags and now.keys() == state.keys() and all(torch.equal(now[n], state[n]) for n in now)


@pytest.fixture(scope="module")
def audited():
    """An audit, the models after it, and what they were before."""
    both = models()
    before = [snapshot(model) for model in (both.base, both.emulator)]
    told = []
    found = audit(both, rows(), SETTINGS, progress=lambda *what: told.append(what))
    return found, both, before, told


# --- the slow obvious way


def tune(model, layers, lr, folder):
    """A fresh copy, tuned as `siftune train` would."""
    model = copy.deepcopy(model)
    recipe = Recipe(
        method="dense", adapter="full", layers=layers, steps=6, lr=lr, batch_size=4, seed=0, out=str(folder),
    )  # fmt: skip
    data = {"train": rows().train}
    trainer, release = set_up(resolve_recipe(recipe), RunFolder(folder), model, TOKENIZER, data, Console(quiet=True))
    trainer.train()
    release()
    return model.eval()


def moved(source, target):
    """A copy of the target with the first and last layer of the source."""
    target = copy.deepcopy(target)
    for number in (0, -1):
        target.model.layers[number].load_state_dict(source.model.layers[number].state_dict())
    return target


def losses(model, data):
    """Sum per row over label tokens, row by row."""
    found = []
    for ids, labels in zip(data["input_ids"], data["labels"], strict=True):
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
        found.append(loss * sum(label != -100 for label in labels[1:]))
    return np.array(found)


def hits(model):
    """Right choices, each from a pass of its own."""
    found = []
    for row in records(100, 108):
        prompt = TOKENIZER(row["prompt"])["input_ids"]
        scores = []
        for choice in row["choices"]:
            ids = [*prompt, *TOKENIZER(choice)["input_ids"], TOKENIZER.eos_token_id]
            labels = [[-100] * len(prompt) + ids[len(prompt) :]]
            scores.append(-losses(model, {"input_ids": [ids], "labels": labels})[0])
        found.append(float(np.argmax(scores) == 0))
    return np.array(found)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The emulator with its adapter tuned."""
    return tune(models().emulator, (0, -1), 3e-3, tmp_path_factory.mktemp("small"))


def test_all_conditions_are_what_they_say(audited, small, tmp_path):
    found, _, _, _ = audited
    both = models()
    full = tune(both.base, (0, -1), 3e-3, tmp_path)
    wanted = {
        "full_zs": both.base,
        "full_ft": full,
        "emulator_zs": both.emulator,
        "emulator_ft": small,
        "plug_in": moved(small, both.base),
        "recovered": tune(both.emulator, (0, 1, 2, 3), 1e-3, tmp_path),
        "floor": random_floor(both.base, 0),
    }
    data = rows().held_out
    assert found.accuracy == "choices"
    assert set(found.conditions) == set(wanted) == set(LABELS)
    for name, model in wanted.items():
        one = found.conditions[name]
        nll = losses(model, data)
        np.testing.assert_allclose(one.scores.nll, nll, rtol=2e-5, err_msg=name)
        assert one.nll.value == pytest.approx(nll.sum() / one.scores.tokens.sum(), rel=2e-5)
        assert one.nll.low < one.nll.value < one.nll.high
        assert one.scores.correct.tolist() == hits(model).tolist(), name
        assert one.accuracy.low <= one.accuracy.value == one.scores.correct.mean() <= one.accuracy.high
    assert found.conditions["full_zs"].scores.tokens.tolist() == [len(str(2 * i)) + 1 for i in range(100, 108)]


def test_the_figures_follow_from_the_conditions(audited):
    found = audited[0]
    for measure, field, sign in (("nll", "nll", -1), ("accuracy", "accuracy", 1)):
        mean = {name: sign * getattr(one, field).value for name, one in found.conditions.items()}
        one = found.comparisons[measure]
        assert one.delta.value == pytest.approx(mean["plug_in"] - mean["emulator_ft"])
        assert one.delta.low <= one.delta.value <= one.delta.high
        shares = {
            "gain_share": ("plug_in", "full_zs", "full_ft"),
            "cpl": ("emulator_zs", "floor", "full_zs"),
            "recovery": ("recovered", "emulator_zs", "full_ft"),
        }
        for name, (a, b, c) in shares.items():
            gap, estimate = mean[c] - mean[b], getattr(one, name)
            if gap > 0:
                assert estimate.value == pytest.approx((mean[a] - mean[b]) / gap)
            else:
                assert estimate.value is None
    learned = found.comparisons["nll"]
    assert learned.gain_share.low < learned.gain_share.value < learned.gain_share.high
    assert learned.recovery.low < learned.recovery.value < learned.recovery.high


def test_membership_is_that_of_the_plugged_model(audited, small):
    found = audited[0].membership
    both, data = models(), rows()
    plugged_in = moved(small, both.base)
    sides = []
    for part in (data.train, data.held_out):
        tokens = np.array([sum(label != -100 for label in labels[1:]) for labels in part["labels"]])
        sides.append([losses(model, part) / tokens for model in (both.base, plugged_in)])
    (base_in, tuned_in), (base_out, tuned_out) = sides
    assert found.loss.value == pytest.approx(auc(-tuned_in, -tuned_out))
    assert found.reference.value == pytest.approx(auc(base_in - tuned_in, base_out - tuned_out))
    assert (found.members, found.others, found.left_out) == (20, 8, 0)
    assert found.loss.low <= found.loss.value <= found.loss.high


def test_gradients_and_sizes(audited):
    found, both, _, _ = audited
    inputs = [Collator(0)(list(rows().held_out))]
    wanted = gradient_cosine(both.base, both.emulator, inputs, SPLIT)
    assert found.cosine.per_layer == pytest.approx(wanted.per_layer, abs=1e-5)
    assert found.cosine.overall == pytest.approx(wanted.overall, abs=1e-5)
    assert found.kept.middle == pytest.approx(2 / 3)
    counts = [sum(p.numel() for p in model.parameters()) for model in (both.emulator, both.base)]
    assert found.kept.whole == counts[0] / counts[1]


def test_models_are_as_they_were(audited):
    _, both, before, _ = audited
    assert same(both.base, before[0])
    assert same(both.emulator, before[1])


def test_progress_is_told(audited):
    told = audited[3]
    tunings = [label for label, done, total in told if (done, total) == (6, 6)]
    assert tunings == [f"{label}: tuning" for label in ("Full FT", "Emulator FT", "Recovered")]
    assert [label for label, done, _ in told if not done and label.endswith("measuring")] == [
        f"{label}: measuring"
        for label in ("Full ZS", "Emulator ZS", "Random weights", "Full FT", "Emulator FT", "Plug-in", "Recovered")
    ]


QUICK = replace(SETTINGS, steps=3, recovery=False, membership=False, resamples=50)


def test_an_emulator_that_is_the_base_loses_nothing():
    both = models(whole)
    questions = tokenize_audit(*map(rows_from, (records(0, 9), records(100, 104, choices=False))), TOKENIZER, QUICK)
    found = audit(both, questions, replace(QUICK, recovery=True, membership=True))
    scores = {name: one.scores for name, one in found.conditions.items()}
    for twin, other in (("emulator_zs", "full_zs"), ("plug_in", "full_ft"), ("emulator_ft", "full_ft")):
        assert scores[twin].nll.tolist() == scores[other].nll.tolist()
        assert scores[twin].correct.tolist() == scores[other].correct.tolist()
    assert found.accuracy == "exact_match"
    one = found.comparisons["nll"]
    assert (one.delta.value, one.delta.low, one.delta.high) == (0, 0, 0)
    assert (one.gain_share.value, one.gain_share.low, one.gain_share.high) == (1, 1, 1)
    assert one.cpl.value == 1
    assert found.cosine.per_layer == pytest.approx([1, 1], abs=1e-12)
    assert (found.kept.middle, found.kept.whole) == (1, 1)


def test_all_tunings_see_the_same_rows_in_the_same_order(monkeypatch):
    seen = {}
    step = SiftTrainer.training_step

    def recording(self, model, inputs, *args):
        seen.setdefault(id(self), []).append(inputs["input_ids"].tolist())
        return step(self, model, inputs, *args)

    monkeypatch.setattr(SiftTrainer, "training_step", recording)
    audit(models(), rows(False), replace(QUICK, recovery=True))
    first, second, third = seen.values()
    assert first == second == third
    assert len(first) == 3
    shown = [row for inputs in first for row in inputs]
    assert len({tuple(row) for row in shown}) == 12  # steps for 12 of the 20 rows: none of them twice


def test_the_same_seed_gives_the_same_audit_and_leaves_the_generators_alone():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = audit(models(), rows(False), QUICK).to_dict(rows=True)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    torch.rand(3)
    assert audit(models(), rows(False), QUICK).to_dict(rows=True) == first
    other = audit(models(), rows(False), replace(QUICK, seed=1)).to_dict(rows=True)
    assert other["conditions"]["floor"]["nll"] != first["conditions"]["floor"]["nll"]
    assert other["conditions"]["full_ft"]["nll"] != first["conditions"]["full_ft"]["nll"]
    assert other["conditions"]["full_zs"]["rows"] == first["conditions"]["full_zs"]["rows"]


def test_what_is_left_out_is_not_there(audited):
    found = audit(models(), rows(False), QUICK)
    assert found.membership is None
    assert "recovered" not in found.conditions
    assert all(one.recovery is None for one in found.comparisons.values())


def test_a_return_takes_the_place_of_tuning():
    both = models()
    sent = {name: t + 0.01 for name, t in read_adapter(both.base, SPLIT).items()}
    found = audit(both, rows(False), replace(QUICK, membership=True), sent)
    for model, name in ((both.emulator, "emulator_ft"), (both.base, "plug_in")):
        changed = copy.deepcopy(model)
        for number in (0, -1):
            for p in changed.model.layers[number].parameters():
                p.data += 0.01
        np.testing.assert_allclose(found.conditions[name].scores.nll, losses(changed, rows().held_out), rtol=2e-5)
    assert found.membership.members == 20  # though the steps suffice for 12
    assert found.facts["returned"]


def test_a_rounded_emulator_starts_from_the_base_s_own_adapter():
    both = models(whole)
    both.emulator.bfloat16().float()
    before = snapshot(both.emulator)
    found = audit(both, rows(False), QUICK)
    assert same(both.emulator, before)
    exact = copy.deepcopy(both.emulator)
    wanted = losses(moved(both.base, exact), rows().held_out)
    np.testing.assert_allclose(found.conditions["emulator_zs"].scores.nll, wanted, rtol=2e-5)


def test_half_precision_comes_back_bit_for_bit():
    model = base().bfloat16()
    both = OffsiteModels(model, shorter(model), SPLIT, TOKENIZER)
    before = [snapshot(one) for one in (both.base, both.emulator)]
    audit(both, rows(False), replace(QUICK, steps=1, recovery=True))
    assert same(both.base, before[0])
    assert same(both.emulator, before[1])


def test_models_that_share_their_tensors_come_back():
    model = base()
    emulator = shorter(model)
    for number, source in enumerate((0, 1, 3, 4)):  # all layers, as parts that were not compressed are shared
        for name, parameter in model.model.layers[source].named_parameters():
            emulator.model.layers[number].get_parameter(name).data = parameter.data
    both = OffsiteModels(model, emulator, SPLIT, TOKENIZER)
    before = snapshot(model)
    found = audit(both, rows(False), replace(QUICK, recovery=True))
    assert same(model, before)
    apart = audit(models(), rows(False), replace(QUICK, recovery=True))
    for name, one in apart.conditions.items():
        assert found.conditions[name].scores.nll.tolist() == one.scores.nll.tolist()


@pytest.mark.parametrize(
    ("break_at", "at"), [("Full FT: tuning", 0), ("Emulator FT: tuning", 1), ("Plug-in: measuring", 0)]
)
def test_models_come_back_after_an_interruption(break_at, at):
    model = base().bfloat16()
    both = OffsiteModels(model, shorter(model), SPLIT, TOKENIZER)
    before = [snapshot(one) for one in (both.base, both.emulator)]

    def stop(what, done, total):
        if what == break_at and done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(both, rows(False), QUICK, progress=stop)
    assert same(both.base, before[0])
    assert same(both.emulator, before[1])


def test_a_loss_of_nan_is_one_sentence():
    both = models()
    with pytest.raises(TrainingError, match="loss is nan"):
        audit(both, rows(False), replace(QUICK, lr=1e30))


def test_an_overfitted_adapter_gives_its_rows_away():
    settings = replace(QUICK, steps=30, lr=1e-2, batch_size=8, membership=True)
    generator = random.Random(1)
    letters = [["".join(generator.choices("abcdefgh", k=5)) for _ in range(2)] for _ in range(32)]
    made = rows_from([{"prompt": prompt, "completion": completion} for prompt, completion in letters])
    data = replace(tokenize_audit(made[:8], made[8:], TOKENIZER, settings), questions=None)
    both = models(whole)
    found = audit(both, data, settings)
    assert found.accuracy is None
    assert list(found.comparisons) == ["nll"]
    assert found.membership.loss.value > 0.95
    assert found.membership.reference.value > 0.95
    untuned = audit(both, data, replace(settings, steps=1), read_adapter(both.base, SPLIT)).membership
    assert untuned.loss.low < 0.5 < untuned.loss.high
    assert untuned.reference.value == untuned.reference.low == untuned.reference.high == 0.5


def test_held_out_rows_that_are_training_rows_are_left_out():
    parts = rows_from(records(0, 8)), rows_from([*records(6, 8), *records(100, 103)])
    data = tokenize_audit(*parts, TOKENIZER, QUICK)
    found = audit(models(), data, replace(QUICK, membership=True)).membership
    assert (found.members, found.others, found.left_out) == (8, 3, 2)
    both = models()
    data = tokenize_audit(parts[0], parts[0][2:4], TOKENIZER, QUICK)
    with pytest.raises(DataError, match="every held-out row is a training row"):
        audit(both, data, replace(QUICK, membership=True))


def test_draws_of_rows():
    assert drawn(range(5), 5, 0) == [0, 1, 2, 3, 4]
    some = drawn(range(10, 60), 20, 0)
    assert some == sorted(set(some))
    assert (len(some), some[0] >= 10, some[-1] < 60) == (20, True, True)
    assert drawn(range(10, 60), 20, 0) == some != drawn(range(10, 60), 20, 1)
    data = rows()
    assert not_among(data.held_out, data.train) == list(range(8))
    assert not_among(data.train, data.train.select([3, 5])) == [i for i in range(20) if i not in (3, 5)]


def test_other_models_are_refused():
    both = models()
    other = base()
    other.model.layers[-1].self_attn.q_proj.weight.data[0, 0] *= 1.05
    with pytest.raises(KitError, match=r"tensor last\.0\.self_attn\.q_proj\.weight is not the base model's"):
        audit(replace(both, base=other), rows(False), QUICK)
    wide = base()
    wide.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 64, bias=False)
    with pytest.raises(KitError, match=r"tensor first\.0\.mlp\.up_proj\.weight is not the base model's"):
        audit(replace(both, base=wide), rows(False), QUICK)
    biased = base()
    biased.model.layers[0].mlp.up_proj.bias = torch.nn.Parameter(torch.zeros(48))
    with pytest.raises(KitError, match=r"tensor first\.0\.mlp\.up_proj\.bias is not the base model's"):
        audit(replace(both, base=biased), rows(False), QUICK)
    with pytest.raises(LayerError, match="no middle"):
        audit(replace(both, split=Split(2, 2)), rows(False), QUICK)


def test_other_returns_are_refused():
    both = models()
    right = read_adapter(both.base, SPLIT)
    name = "last.0.mlp.up_proj.weight"
    with pytest.raises(KitError, match=f"tensor {name} is missing from the return"):
        audit(both, rows(False), QUICK, {key: t for key, t in right.items() if key != name})
    with pytest.raises(KitError, match=r"tensor last\.1\.x is not the adapter's"):
        audit(both, rows(False), QUICK, {**right, "last.1.x": right[name]})
    with pytest.raises(KitError, match=rf"tensor {name} .* shape \(32, 48\)"):
        audit(both, rows(False), QUICK, {**right, name: right[name].T})
    with pytest.raises(KitError, match=rf"tensor {name} .* not finite"):
        audit(both, rows(False), QUICK, {**right, name: right[name] * float("nan")})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("steps", 0, "steps is 0"),
        ("max_length", 1, "max_length is 1"),
        ("lr", 0.0, "lr is 0.0"),
        ("recovery_lr", float("inf"), "recovery_lr is inf"),
        ("level", 1.0, "level is 1.0"),
        ("seed", -1, "seed is -1"),
    ],
)
def test_ranges(field, value, words):
    with pytest.raises(RecipeError, match=words):
        audit(None, None, replace(SETTINGS, **{field: value}))


def test_rows_without_labels_are_refused():
    data = rows(False)
    bare = data.held_out.map(
        lambda row, i: {"labels": [-100] * len(row["labels"])} if i == 3 else row, with_indices=True
    )
    with pytest.raises(DataError, match="row 3 has no label"):
        audit(models(), replace(data, held_out=bare), QUICK)


def test_swaps():
    model = base()
    tensors = {name: t + 1 for name, t in read_adapter(model, SPLIT).items()}
    before = snapshot(model)
    names = set(adapter_names(model, SPLIT).values())

    def inside():
        with plugged(model, SPLIT, tensors):
            assert all(torch.equal(t, before[0][n] + (n in names)) for n, t in model.state_dict().items())
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        inside()
    assert same(model, before)
    with restored(model):
        for p in model.parameters():
            p.data.zero_()
    assert same(model, before)


def test_the_floor_is_random_weights_of_the_same_architecture():
    model = base()
    before = snapshot(model)
    states = torch.get_rng_state()
    one, again, other = random_floor(model, 0), random_floor(model, 0), random_floor(model, 1)
    assert torch.equal(torch.get_rng_state(), states)
    assert same(model, before)
    assert not one.training
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    assert {name: t.shape for name, t in one.state_dict().items()} == shapes
    weight = "model.layers.1.mlp.up_proj.weight"
    weights = [m.state_dict()[weight] for m in (one, again, other, model)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])
    assert weights[0].std().item() == pytest.approx(model.config.initializer_range, rel=0.1)
    assert random_floor(model.bfloat16(), 0).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """A base model, a kit of it, a return and rows."""
    folder = tmp_path_factory.mktemp("kit")
    kit = save_kit(folder / "kit")
    base_model().save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    names = adapter_names(base_model(), kit.manifest.split)
    state = base_model().state_dict()
    write_return(folder / "return", {neutral: state[name] + 0.01 for neutral, name in names.items()}, kit)
    for name, part in (("train", records(0, 20, False)), ("eval", records(100, 108, False))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def options(folder, **changes):
    paths = {name: str(folder / name) for name in ("kit", "train", "eval")}
    paths = {**paths, "train": paths["train"] + ".jsonl", "eval": paths["eval"] + ".jsonl"}
    quick = {field.name: getattr(QUICK, field.name) for field in fields(QUICK)}
    return AuditOptions(**{**quick, "model": str(folder / "base"), **paths, **changes})


def test_a_kit_on_disk(on_disk, tmp_path):
    out = tmp_path / "out"
    found = audit_paths(options(on_disk, out=out, limit=9, eval_limit=5))
    assert {path.name for path in out.iterdir()} == {"audit.json", "audit.md", "audit.png"}
    assert json.loads((out / "audit.json").read_text()) == found.to_dict(rows=True)
    parts = [rows_from(records(*bounds, False)) for bounds in ((0, 9), (100, 105))]
    kit = read_kit(on_disk / "kit")
    both = OffsiteModels(base_model(), load_emulator(on_disk / "kit"), kit.manifest.split, TOKENIZER)
    wanted = audit(both, tokenize_audit(*parts, TOKENIZER, QUICK), QUICK)
    assert type(found.settings) is AuditSettings
    assert found.conditions.keys() == wanted.conditions.keys()
    for name, one in wanted.conditions.items():
        assert found.conditions[name].scores.nll.tolist() == one.scores.nll.tolist()
    assert found.accuracy == "exact_match"
    assert found.facts["kit"] == kit.digest
    assert (found.facts["train_rows"], found.facts["held_out_rows"]) == (9, 5)
    assert found.kept.middle == pytest.approx(1 / 3)


def test_a_return_on_disk(on_disk):
    found = audit_paths(options(on_disk, returned=on_disk / "return", membership=True))
    changed = base_model()
    for number in (0, 1, -1):
        for p in changed.model.layers[number].parameters():
            p.data += 0.01
    wanted = losses(changed, rows().held_out)
    np.testing.assert_allclose(found.conditions["plug_in"].scores.nll, wanted, rtol=2e-5)
    assert found.membership.members == 20


def test_a_kit_of_another_base(on_disk, tmp_path):
    other = base_model()
    other.lm_head.weight.data[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    TOKENIZER.save_pretrained(tmp_path / "other")
    with pytest.raises(KitError, match=r"manifest\.json: base\.fingerprint is not that of the model"):
        audit_paths(options(on_disk, model=str(tmp_path / "other"), out=tmp_path / "out"))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"kit": ""}, RecipeError, "no kit given: name it with --kit"),
        ({"eval": ""}, RecipeError, "no eval given"),
        ({"limit": 0}, RecipeError, "limit is 0"),
        ({"steps": 0}, RecipeError, "steps is 0"),
        ({"kit": "/nowhere"}, KitError, "nowhere"),
        ({"train": "/nowhere.jsonl"}, DataError, "does not exist"),
    ],
)
def test_options_that_cannot_be_used(on_disk, changes, error, words):
    with pytest.raises(error, match=words):
        audit_paths(options(on_disk, **changes))


def test_an_out_that_cannot_be_written_is_found_first(on_disk, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be written to"):
        audit_paths(options(on_disk, model="/nowhere", out=tmp_path / "file"))
