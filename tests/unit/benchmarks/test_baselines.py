"""The reference ways of selecting rows: GAST's give what siftune's engine gives, GREATS what a plain loop gives."""

import weakref
from contextlib import nullcontext

import pytest
import torch
from adapted import adapted, from_config, shake
from hypothesis import given
from hypothesis import strategies as st
from oracles import flat, gradients, rest_scores, sample_gradients, summed_loss
from peft import IA3Config, LoraConfig, get_peft_model
from tiny import batch, tiny
from torch.nn.functional import cosine_similarity
from trainers import adapted as trainable
from trainers import arguments, rows, weights

from baseline_trainer import BaselineTrainer
from baselines import Greats, StoreAll, TwoPass, greedy
from siftune import GAST
from siftune.capture import ghost
from siftune.errors import RecipeError, UnsupportedError
from siftune.models.adapters import attach_adapter, group_by_layer, use_base_dtype
from siftune.sparse.gast import GASTSettings
from siftune.train.selection import GivenBatches
from siftune.train.trainer import SiftTrainer

GASTS = (TwoPass, StoreAll)


def double(family="llama", **settings):
    return adapted(family, **settings).double()


def with_ranks():
    """Matrices of different sizes, and a layer with fewer of them."""
    targets = ["q_proj", "v_proj", "layers.1.mlp.up_proj"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, rank_pattern={"v_proj": 2})
    return shake(get_peft_model(tiny("llama"), config)).eval().double()


def runner(model, seen=None):
    """Forward and backward on a batch, noting its size."""

    def run(part):
        if seen is not None:
            seen.append(len(part["input_ids"]))
        loss = summed_loss(model, part)
        loss.backward()
        return loss.detach()

    return run


def taken(model):
    """Gradients, which are cleared."""
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def by_engine(model, settings, batches, support=None):
    """Choices and gradients of siftune's engine, one optimizer step per batch."""
    found = []
    with GAST(**settings).attach(model, batches=support, loss=summed_loss) as sift:
        for inputs in batches:
            summed_loss(model, inputs).backward()
            found.append((sift.last, taken(model)))
            sift.step()
    return found


def by_baseline(kind, model, settings, batches, support=None, run=None):
    draws = GivenBatches(support) if support is not None else None
    baseline, found = kind(model, GASTSettings(**settings), draws, loss=summed_loss), []
    for inputs in batches:
        baseline.begin()
        baseline.step(inputs, run or runner(model))
        found.append((baseline.last, taken(model)))
    return found


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for (choice, grads), (wanted, wanted_grads) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(choice.scores, wanted.scores, rtol=1e-10, atol=1e-10)
        assert torch.equal(choice.selected, wanted.selected)
        assert grads.keys() == wanted_grads.keys()
        for name, grad in wanted_grads.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-10, atol=1e-10)


SETTINGS = {
    "rest": {"support": "rest"},
    "rest, highest": {"support": "rest", "choice": "topk", "select": 3},
    "sample": {"support": "sample"},
    "sample, highest": {"support": "sample", "choice": "topk"},
    "with replacement": {"support": "rest", "replacement": True, "select": 5},
    "all, with replacement": {"support": "rest", "replacement": True, "select": 1.0},
    "sum, cold, other seed": {"support": "rest", "scale": "sum", "temperature": 0.3, "seed": 5},
}


@pytest.mark.parametrize("kind", GASTS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gast_in_other_ways_is_that_of_the_engine(kind, settings):
    model = with_ranks()
    batches = [batch(model, 6, seed=1), batch(model, 5, seed=2)]
    support = [batch(model, 4, seed=3), batch(model, 2, seed=4)] if settings["support"] == "sample" else None
    wanted = by_engine(model, settings, batches, support)
    assert_same(by_baseline(kind, model, settings, batches, support), wanted)
    assert len({tuple(rows) for choice, _ in wanted for rows in choice.selected.tolist()}) > 1


@pytest.mark.parametrize("kind", GASTS)
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "opt", "mixtral"])
def test_in_every_family(kind, family):
    targets = ["q_proj", "o_proj"] if family == "mixtral" else None
    model = double(family, targets=targets)
    if family == "mixtral":
        model.set_experts_implementation("eager")
    inputs = [batch(model, 4)]
    settings = {"support": "rest"}
    assert_same(by_baseline(kind, model, settings, inputs), by_engine(model, settings, inputs))


@pytest.mark.parametrize("kind", GASTS)
@given(
    count=st.integers(3, 6), length=st.integers(3, 9), select=st.integers(1, 5), seed=st.integers(0, 99),
    choice=st.sampled_from(["stochastic", "topk"]),
)  # fmt: skip
def test_for_all_shapes(kind, count, length, select, seed, choice):
    model = double(targets=["q_proj", "down_proj"])
    inputs = [batch(model, count, length, seed)]  # of two rows, each is the other's rest: a tie
    settings = {"support": "rest", "select": min(select, count - 1), "choice": choice, "seed": seed}
    assert_same(by_baseline(kind, model, settings, inputs), by_engine(model, settings, inputs))


@pytest.mark.parametrize("kind", GASTS)
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


@pytest.mark.parametrize("kind", GASTS)
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


@pytest.mark.parametrize("kind", GASTS)
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


@pytest.mark.parametrize("kind", GASTS)
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


@pytest.mark.parametrize("kind", GASTS)
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
    form, alive = ghost.linear_weight, []

    def watched(*args):
        alive.append(sum(kept() is not None for kept in refs))
        formed = form(*args)
        refs.append(weakref.ref(formed))
        return formed

    monkeypatch.setattr(ghost, "linear_weight", watched)
    model = double()
    for kind in GASTS:
        refs = []
        alive.clear()
        by_baseline(kind, model, {"support": "rest"}, [batch(model, 4)])
        count = sum(p.requires_grad for p in model.parameters())
        assert alive == ([0] * count if kind is TwoPass else list(range(count)))


PASSES = {TwoPass: [6, 6], StoreAll: [6], Greats: [6, 3]}


@pytest.mark.parametrize("kind", PASSES)
def test_passes_over_the_model(kind):
    model, seen = double(), []
    support = [batch(model, 2)]
    settings = {"support": "sample" if kind is Greats else "rest"}
    by_baseline(kind, model, settings, [batch(model, 6)], support, runner(model, seen))
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


def plain_greedy(vectors, support, count, step):
    """Add the row with which Σ⟨h, g⟩ less half the step times the overlap of all different pairs is highest."""

    def utility(rows):
        pairs = sum(float(vectors[i] @ vectors[j]) for i in rows for j in rows if i != j)
        return sum(float(support @ vectors[i]) for i in rows) - step / 2 * pairs

    chosen = []
    for _ in range(count):
        others = [i for i in range(len(vectors)) if i not in chosen]
        chosen.append(max(others, key=lambda i: utility([*chosen, i])))
    return chosen


@given(
    count=st.integers(1, 7), size=st.integers(1, 5), share=st.floats(0, 1), step=st.floats(0, 4),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_greats_chooses_as_a_plain_greedy_loop_does(count, size, share, step, seed):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, size, generator=generator, dtype=torch.float64)
    support = torch.randn(size, generator=generator, dtype=torch.float64)
    wanted = max(1, round(share * count))
    found = greedy(vectors @ support, vectors @ vectors.T, wanted, step)
    assert found.tolist() == plain_greedy(vectors, support, wanted, step)


@pytest.mark.parametrize("lr", [0.0, 1.0])
def test_greats_trains_on_its_choice_alone(lr):
    model = double()
    inputs, support = batch(model, 6, seed=1), batch(model, 3, seed=2)
    parameters = [p for p in model.parameters() if p.requires_grad]
    single = flat(sample_gradients(model, inputs), parameters)
    h = torch.cat([grad.flatten() for grad in gradients(model, support).values()])
    wanted = plain_greedy(single, h, 2, lr * 6 / 2)
    assert (wanted == plain_greedy(single, h, 2, lr)) is (lr == 0)  # the step's length matters
    baseline = Greats(model, GASTSettings(select=2), GivenBatches([support]), loss=summed_loss)
    baseline.begin(lr)
    loss = baseline.step(inputs, runner(model))
    assert baseline.last.selected.tolist() == [wanted]
    torch.testing.assert_close(baseline.last.scores[0], single @ h, rtol=1e-10, atol=1e-12)
    chosen = {name: value[wanted] for name, value in inputs.items()}
    torch.testing.assert_close(loss, summed_loss(model, chosen).detach(), rtol=1e-12, atol=0)
    for parameter, grad in gradients(model, chosen).items():
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-10, atol=1e-12)


def test_a_longer_step_makes_greats_choose_rows_that_differ():
    model = double()
    inputs = batch(model, 4, length=9, seed=1)
    inputs = {name: value[[0, 0, 0, 1, 2, 3]] for name, value in inputs.items()}  # one row three times
    support = {name: value[:1] for name, value in inputs.items()}
    single = flat(sample_gradients(model, inputs), [p for p in model.parameters() if p.requires_grad])
    assert cosine_similarity(single[0], single[1], 0) > 0.999
    chosen = {}
    for lr in (0.0, 1e3):
        baseline = Greats(model, GASTSettings(select=3), GivenBatches([support]), loss=summed_loss)
        baseline.begin(lr)
        baseline.step(inputs, runner(model))
        chosen[lr] = sorted(baseline.last.selected[0].tolist())
    assert chosen[0.0] == [0, 1, 2]
    assert len({0, 1, 2} & set(chosen[1e3])) == 1


def trained(folder, support, kind=None, **settings):
    """Weights after a few steps, and the choices, with GAST as a callback or with a baseline in its place."""
    settings = {"learning_rate": 0.1, "optim": "sgd", "max_steps": 3, "gradient_accumulation_steps": 2, **settings}
    model, choices = trainable(), []
    gast = GAST(support=support, seed=2, keep=True)
    callbacks = [] if kind else [gast]
    trainer = SiftTrainer(model, arguments(folder, **settings), train_dataset=rows(), callbacks=callbacks)
    if kind:
        trainer = BaselineTrainer.take_over(trainer, kind, gast.settings)
        step = trainer.baseline.step

        def watched(*args):
            loss = step(*args)
            choices.append(trainer.baseline.last)
            assert trainer.baseline.lr == pytest.approx(0.1 * (1 - trainer.state.global_step / settings["max_steps"]))
            return loss

        trainer.baseline.step = watched
    trainer.train()
    return weights(model), choices if kind else gast.history


@pytest.mark.parametrize("kind", GASTS)
@pytest.mark.parametrize("support", ["rest", "sample"])
def test_in_the_trainer_it_is_the_callback(kind, support, tmp_path):
    wanted, history = trained(tmp_path, support)
    found, choices = trained(tmp_path, support, kind)
    assert [c.selected.tolist() for c in choices] == [c.selected.tolist() for c in history]
    assert len(choices) == 6
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_greats_in_the_trainer_follows_the_mean_loss_of_its_rows(tmp_path):
    settings = {"max_steps": 1, "gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
    found, [choice] = trained(tmp_path, "sample", Greats, **settings)
    model = trainable()
    trainer = SiftTrainer(model, arguments(tmp_path, **settings), train_dataset=rows())
    first = next(iter(trainer.get_train_dataloader()))
    part = {name: value[choice.selected[0]] for name, value in first.items()}
    assert len(part["input_ids"]) == 2
    grads = gradients(model, part)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            wanted = parameter.detach() - 0.1 * grads[parameter]
            torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize(
    "settings",
    [{"support": "momentum"}, {"choice": "random"}, {"score": "cosine"}, {"pool": "module"}, {"support": "dataset"}],
)
def test_other_settings_are_refused(kind, settings):
    with pytest.raises(RecipeError, match=f"{next(iter(settings))} .*not {next(iter(settings.values()))}"):
        kind(double(), GASTSettings(**settings))


def test_greats_compares_with_rows_of_its_own():
    with pytest.raises(RecipeError, match="support sample, not rest"):
        Greats(double(), GASTSettings(support="rest"))
    with pytest.raises(RecipeError, match=r"give draws=\.\.\."):
        Greats(double(), GASTSettings()).begin()


def with_head():
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    return get_peft_model(tiny("llama"), config)


OTHERS = {
    "dora": lambda: attach_adapter(tiny("llama"), "dora", rank=2),
    "ia3": lambda: from_config(IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "biases": lambda: get_peft_model(tiny("qwen2"), LoraConfig(r=2, target_modules=["q_proj"], bias="all")),
    "LoRA's biases": lambda: get_peft_model(
        tiny("opt"), LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True)
    ),
    "aLoRA": lambda: get_peft_model(
        tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    ),
    "the head": with_head,
    "all weights": lambda: tiny("llama"),
    "experts": lambda: from_config(
        LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]), "mixtral"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_only_lora_matrices_of_linear_modules_may_train(name):
    with pytest.raises(UnsupportedError, match="plain LoRA on linear modules"):
        TwoPass(OTHERS[name](), GASTSettings(support="rest"))


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr("baselines.world_size", lambda: 2)
    with pytest.raises(UnsupportedError, match="one process; 2 are at work"):
        StoreAll(double(), GASTSettings(support="rest"))


@pytest.mark.parametrize("kind", GASTS)
def test_modules_that_do_not_see_rows_are_refused(kind):
    model = double()
    matrix = model.get_submodule(next(n for n, _ in model.named_modules() if n.endswith("lora_A.default")))
    matrix.register_forward_pre_hook(lambda _, args: (args[0].transpose(0, 1),))
    with pytest.raises(UnsupportedError, match="cannot be told apart"):
        kind(model, GASTSettings(support="rest")).step(batch(model, 4), runner(model))


@pytest.mark.parametrize(("count", "uses"), [(0, 0), (2, 2)])
def test_matrices_are_used_once(count, uses):
    model = double(targets=["q_proj"])
    run = runner(model)

    def often(part):
        for _ in range(count):
            run(part)
        return torch.zeros(())

    matrices = sum(p.requires_grad for p in model.parameters())
    with pytest.raises(UnsupportedError, match=f"{uses * matrices} uses of {matrices}"):
        StoreAll(model, GASTSettings(support="rest")).step(batch(model, 4), often)


@pytest.mark.parametrize("kind", GASTS)
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
