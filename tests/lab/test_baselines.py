"""The reference ways to run GAST give what siftune's engine gives; passes, and what is left behind."""

import weakref
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from support.adapted import adapted, shake
from support.by_row import PASSES, assert_same, by_baseline, by_engine, double, runner, taken, trained
from support.oracles import rest_scores, sample_gradients, summed_loss
from support.tiny import batch, tiny
from support.trainers import weights

from lab.baselines import TwoPass
from siftune import GAST
from siftune.engine import kinds as per_sample
from siftune.engine.groups import group_by_layer
from siftune.engine.substitution import use_base_dtype
from siftune.methods.options import GASTSettings


def with_ranks():
    """Matrices of different sizes, and a layer with fewer of them."""
    targets = ["q_proj", "v_proj", "layers.1.mlp.up_proj"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, rank_pattern={"v_proj": 2})
    return shake(get_peft_model(tiny("llama"), config)).eval().double()


SETTINGS = {
    "rest": {"support": "rest"},
    "rest, highest": {"support": "rest", "choice": "topk", "select": 3},
    "sample": {"support": "sample"},
    "sample, highest": {"support": "sample", "choice": "topk"},
    "most rows, other seed": {"support": "rest", "select": 4, "seed": 5},
}


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gast_in_other_ways_is_that_of_the_engine(kind, settings):
    model = with_ranks()
    batches = [batch(model, 6, seed=1), batch(model, 5, seed=2)]
    support = [batch(model, 4, seed=3), batch(model, 2, seed=4)] if settings["support"] == "sample" else None
    wanted = by_engine(model, settings, batches, support)
    assert_same(by_baseline(kind, model, settings, batches, support), wanted)
    assert len({tuple(rows) for choice, _ in wanted for rows in choice.selected.tolist()}) > 1


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "opt", "mixtral"])
def test_in_every_family(kind, family):
    targets = ["q_proj", "o_proj"] if family == "mixtral" else None
    model = double(family, targets=targets)
    if family == "mixtral":
        model.set_experts_implementation("eager")
    inputs = [batch(model, 4)]
    settings = {"support": "rest"}
    assert_same(by_baseline(kind, model, settings, inputs), by_engine(model, settings, inputs))


@pytest.mark.parametrize("kind", PASSES)
@given(
    count=st.integers(3, 6), length=st.integers(3, 9), select=st.integers(1, 5), seed=st.integers(0, 99),
    choice=st.sampled_from(["stochastic", "topk"]),
)  # fmt: skip
def test_for_all_shapes(kind, count, length, select, seed, choice):
    model = double(targets=["q_proj", "down_proj"])
    inputs = [batch(model, count, length, seed)]  # of two rows, each is the other's rest: a tie
    settings = {"support": "rest", "select": min(select, count - 1), "choice": choice, "seed": seed}
    assert_same(by_baseline(kind, model, settings, inputs), by_engine(model, settings, inputs))


@pytest.mark.parametrize("kind", PASSES)
def test_scores_and_gradients_are_those_of_a_loop_over_rows(kind):
    model, settings = double(), {"support": "rest", "choice": "topk", "select": 2}
    inputs = batch(model, 5)
    single = sample_gradients(model, inputs)
    [(choice, grads)] = by_baseline(kind, model, settings, [inputs])
    names = dict(model.named_parameters())
    for group, scores in zip(group_by_layer(model), choice.scores, strict=True):
        wanted = rest_scores(single, list(group.parameters.values()))
        torch.testing.assert_close(scores, wanted, rtol=1e-10, atol=1e-12)
        best = wanted.argsort(descending=True)[:2]
        for name in group.parameters:
            full = f"{group.name}.{name}"
            torch.testing.assert_close(grads[full], single[names[full]][best].sum(0) * 5 / 2, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", PASSES)
def test_gradients_are_added_to_those_that_are_there(kind):
    model, settings = double(), GASTSettings(support="rest")
    baseline, parts = kind(model, settings), []
    batches = [batch(model, 4, seed=seed) for seed in (1, 2)]
    for inputs in batches:
        baseline.step(inputs, runner(model))
        parts.append(taken(model))
    baseline = kind(model, settings)
    for inputs in batches:
        baseline.step(inputs, runner(model))
    for name, grad in taken(model).items():
        torch.testing.assert_close(grad, parts[0][name] + parts[1][name], rtol=1e-10, atol=1e-10)
    assert any(not torch.equal(parts[0][name], parts[1][name]) for name in parts[0])


@pytest.mark.parametrize("kind", PASSES)
def test_several_batches_in_a_step_are_drawn_as_the_engine_draws_them(kind):
    model, settings = double(), {"support": "rest"}
    batches = [batch(model, 6, seed=seed) for seed in (1, 2, 3)]
    baseline, ours, theirs = kind(model, GASTSettings(**settings)), [], []
    with GAST(**settings).attach(model) as sift:
        for inputs in batches:
            summed_loss(model, inputs).backward()
            theirs.append((sift.last, taken(model)))
    for inputs in batches:
        baseline.step(inputs, runner(model))
        ours.append((baseline.last, taken(model)))
    assert_same(ours, theirs)


@pytest.mark.parametrize("kind", PASSES)
def test_both_passes_have_the_same_dropout(kind):
    model, settings = double(dropout=0.5).train(), {"support": "rest", "choice": "topk"}
    inputs = [batch(model, 4)]
    torch.manual_seed(0)
    wanted = by_engine(model, settings, inputs)
    torch.manual_seed(0)
    assert_same(by_baseline(kind, model, settings, inputs), wanted)
    torch.manual_seed(1)
    other = by_engine(model, settings, inputs)
    assert not torch.allclose(other[0][0].scores, wanted[0][0].scores)


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(kind, reentrant):
    model, settings = double(), {"support": "rest"}
    inputs = [batch(model, 4)]
    wanted = by_engine(model, settings, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    assert_same(by_baseline(kind, model, settings, inputs), wanted)


def test_two_passes_keep_no_rows_gradient_and_one_pass_keeps_all(monkeypatch):
    form, alive = per_sample.linear_weight, []

    def watched(*args):
        alive.append(sum(kept() is not None for kept in refs))
        formed = form(*args)
        refs.append(weakref.ref(formed))
        return formed

    monkeypatch.setattr(per_sample, "linear_weight", watched)
    model = double()
    for kind in PASSES:
        refs = []
        alive.clear()
        by_baseline(kind, model, {"support": "rest"}, [batch(model, 4)])
        count = sum(p.requires_grad for p in model.parameters())
        assert alive == ([0] * count if kind is TwoPass else list(range(count)))


@pytest.mark.parametrize("kind", PASSES)
def test_passes_over_the_model(kind):
    model, seen = double(), []
    by_baseline(kind, model, {"support": "rest", "select": 3}, [batch(model, 6)], run=runner(model, seen))
    assert seen == PASSES[kind]


@pytest.mark.parametrize("kind", PASSES)
def test_all_rows_are_plain_training(kind):
    model, seen = double(), []
    inputs = batch(model, 3)
    summed_loss(model, inputs).backward()
    plain = taken(model)
    settings = {"support": "sample", "select": 3}
    [(choice, grads)] = by_baseline(kind, model, settings, [inputs], [inputs], runner(model, seen))
    assert choice is None
    assert seen == [3]
    assert all(torch.equal(grads[name], grad) for name, grad in plain.items())


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(kind, fails):
    model = double()
    before = {name: (dict(vars(m)), m.training) for name, m in model.named_modules() if "lora" in name}
    wanted = [p.requires_grad for p in model.parameters()]
    values, state = weights(model), torch.get_rng_state()

    def failing(part):
        summed_loss(model, part)
        raise OSError("no luck")

    with pytest.raises(OSError, match="no luck") if fails else nullcontext():
        by_baseline(
            kind, model, {"support": "sample"}, [batch(model, 4)], [batch(model, 2)], failing if fails else None
        )
    after = {name: (dict(vars(m)), m.training) for name, m in model.named_modules() if "lora" in name}
    assert [set(old[0]) for old in before.values()] == [set(new[0]) for new in after.values()]
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(torch.equal(value, weights(model)[name]) for name, value in values.items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("support", ["rest", "sample"])
def test_in_the_trainer_it_is_the_callback(kind, support, tmp_path):
    wanted, history = trained(tmp_path, support)
    found, choices = trained(tmp_path, support, kind)
    assert [c.selected.tolist() for c in choices] == [c.selected.tolist() for c in history]
    assert len(choices) == 6
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", PASSES)
def test_float32_matrices_on_a_bfloat16_base(kind):
    model = adapted().to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    settings, inputs = {"support": "rest", "choice": "topk"}, batch(model, 4)
    with use_base_dtype(model, group_by_layer(model)):
        [(wanted, wanted_grads)] = by_engine(model, settings, [inputs])
        [(choice, grads)] = by_baseline(kind, model, settings, [inputs])
    assert torch.equal(choice.selected, wanted.selected)
    torch.testing.assert_close(choice.scores, wanted.scores, rtol=1e-4, atol=1e-5)
    for name, grad in wanted_grads.items():
        assert grads[name].dtype == torch.float32
        assert (grads[name] - grad).norm() <= 0.02 * grad.norm()
