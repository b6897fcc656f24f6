"""GAST in custom loops: support modes, choices and gradients against the obvious computation."""

import logging
import math

import pytest
import torch
from support.adapted import adapted
from support.oracles import flat, gradients, rest_scores, sample_gradients, summed_loss
from support.tiny import batch

from siftune import GAST, IST, RST
from siftune.base.errors import RecipeError
from siftune.engine.groups import group_by_layer


@pytest.fixture
def model():
    return adapted().double()


@pytest.fixture
def inputs(model):
    return batch(model, 6)


def loss_of(model, inputs):
    return summed_loss(model, inputs)


def layers(model):
    return [list(group.parameters.values()) for group in group_by_layer(model)]


def backward(model, inputs):
    model.zero_grad()
    summed_loss(model, inputs).backward()


def assert_follows(model, inputs, choice, factor=None):
    """The parameters' gradients are those of the chosen rows, scaled up to the batch."""
    single = sample_gradients(model, inputs)
    for parameters, selected in zip(layers(model), choice.selected, strict=True):
        for parameter in parameters:
            wanted = single[parameter][selected].sum(0) * (factor or len(single[parameter]) / len(selected))
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-10, atol=1e-14)


def assert_scores(choice, wanted):
    torch.testing.assert_close(choice.scores, torch.stack(wanted), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("select", [2, 0.5])
def test_rest(model, inputs, select):
    with GAST(select, "rest").attach(model) as sift:
        backward(model, inputs)
    assert_scores(sift.last, [rest_scores(sample_gradients(model, inputs), own) for own in layers(model)])
    assert sift.last.selected.shape == (4, 2 if select == 2 else 3)
    assert sift.last.layers == (0, 1, 2, 3)
    assert sift.last.units[1] == "base_model.model.model.layers.1"
    assert_follows(model, inputs, sift.last)


@pytest.mark.parametrize(("support", "score"), [("sample", "inner"), ("dataset", "cosine")])
def test_support_rows(model, inputs, support, score):
    sets = [batch(model, 3, seed=seed) for seed in (7, 8)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    method, single = GAST(2, support, score=score), sample_gradients(model, inputs)
    directions = [gradients(model, given) for given in sets]
    with method.attach(model, batches=sets, optimizer=optimizer, loss=loss_of) as sift:
        for towards in (directions[0], directions[1], directions[0]):
            backward(model, inputs)
            wanted = []
            for own in layers(model):
                rows, h = flat(single, own), torch.cat([towards[p].flatten() for p in own])
                scores = rows @ h
                wanted.append(scores / rows.norm(dim=1) / h.norm() if score == "cosine" else scores)
            assert_scores(sift.last, wanted)
            with sift._tape.paused():
                assert_follows(model, inputs, sift.last)
            optimizer.step()
    assert sift.steps == 3


def test_the_support_gradient_is_formed_now_and_then_and_averaged(model, inputs):
    drawn = []

    def sets():
        for seed in range(9):
            drawn.append(seed)
            yield batch(model, 2, seed=seed)

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    method, average = GAST(2, "dataset", support_every=2), None
    with method.attach(model, batches=sets(), optimizer=optimizer, loss=loss_of) as sift:
        for step in range(5):
            with sift._tape.paused():
                fresh = gradients(model, batch(model, 2, seed=step // 2))
                single = sample_gradients(model, inputs)
            if average is None:
                average = fresh
            elif step % 2 == 0:
                average = {p: 0.9**2 * average[p] + (1 - 0.9**2) * fresh[p] for p in fresh}
            backward(model, inputs)
            directions = [torch.cat([average[p].flatten() for p in own]) for own in layers(model)]
            assert_scores(sift.last, [flat(single, own) @ h for own, h in zip(layers(model), directions, strict=True)])
            assert drawn == list(range(step // 2 + 1))
            optimizer.step()


def test_the_support_set_is_drawn_once_per_optimizer_step(model, inputs):
    drawn = []

    def sets():
        for seed in range(9):
            drawn.append(seed)
            yield batch(model, 2, seed=seed)

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with GAST(2, "sample").attach(model, batches=sets(), optimizer=optimizer, loss=loss_of):
        for step in range(2):
            for _ in range(3):
                backward(model, inputs)
                assert drawn == list(range(step + 1))
            optimizer.step()


@pytest.mark.parametrize("choice", ["stochastic", "topk", "random"])
def test_choices(model, inputs, choice):
    with GAST(3, "rest", choice=choice, seed=2).attach(model) as sift:
        backward(model, inputs)
    assert_follows(model, inputs, sift.last)
    if choice == "topk":
        assert torch.equal(sift.last.selected, sift.last.scores.topk(3).indices.sort().values)
    if choice == "random":
        assert sift.last.scores.isnan().all()
    assert all(len(set(rows)) == 3 for rows in sift.last.selected.tolist())


def test_the_same_seed_gives_the_same_choices_and_another_does_not(model, inputs):
    def choices(seed):
        with GAST(3, "rest", seed=seed).attach(model) as sift:
            found = []
            for _ in range(4):
                backward(model, inputs)
                found.append(sift.last.selected)
        return torch.stack(found)

    first = choices(0)
    assert torch.equal(first, choices(0))
    assert not torch.equal(first, choices(1))
    assert not torch.equal(first[0], first[1])  # each batch has numbers of its own


# --- edges


def test_rows_without_a_label_are_followed_only_if_there_are_no_others(model, inputs):
    inputs["labels"][[0, 2, 3]] = -100
    with GAST(2, "rest").attach(model) as sift:
        for _ in range(20):
            backward(model, inputs)
            assert {row for rows in sift.last.selected.tolist() for row in rows} <= {1, 4, 5}
        assert_follows(model, inputs, sift.last, 3 / 2)
    with GAST(5, "rest").attach(model) as sift:
        backward(model, inputs)
        assert all({1, 4, 5} < set(rows) for rows in sift.last.selected.tolist())
        assert_follows(model, inputs, sift.last, 1.0)
    inputs["labels"][:] = -100
    with GAST(2, "rest").attach(model) as sift:
        backward(model, inputs)
    assert all(p.grad is not None and not p.grad.any() for own in layers(model) for p in own)


@pytest.mark.parametrize("rows", [1, 3])
def test_small_batches_are_followed_whole_bit_for_bit(rows, caplog):
    model = adapted()
    inputs = batch(model, rows)
    plain = gradients(model, inputs)
    with caplog.at_level(logging.INFO, "siftune"), GAST(3, "rest").attach(model) as sift:
        for _ in range(2):
            backward(model, inputs)
            assert all(torch.equal(p.grad, plain[p]) for own in layers(model) for p in own)
    assert sift.last.selected.tolist() == [list(range(rows))] * 4
    assert sift.last.scores.isnan().all()
    assert caplog.text.count("all of them are followed") == 1


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_gradients_that_are_not_finite_arrive_as_such(model, inputs, bad):
    """GradScaler and the Trainer's guard must see them, whatever rows were drawn."""
    with GAST(2, "rest").attach(model) as sift:
        for _ in range(5):
            model.zero_grad()
            loss = summed_loss(model, inputs)
            row = torch.zeros(6, dtype=torch.float64)
            row[3] = bad
            logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
            (loss + (logits.sum((1, 2)) * row).sum()).backward()
            assert not any(bool(p.grad.isfinite().all()) for p in layers(model)[0])
    assert sift.last.selected.shape == (4, 2)


def test_grad_scaler(model, inputs):
    """A loss scale changes neither choice nor step, and a step whose gradients overflow is skipped."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with GAST(2, "sample").attach(model, batches=[inputs], loss=loss_of) as sift:
        backward(model, inputs)
        plain, choice = [p.grad.clone() for p in parameters], sift.last.selected
    with GAST(2, "sample").attach(model, batches=[inputs], loss=loss_of) as sift:
        model.zero_grad()
        scaler.scale(summed_loss(model, inputs)).backward()
        scaler.unscale_(optimizer)
        assert torch.equal(sift.last.selected, choice)
        for parameter, grad in zip(parameters, plain, strict=True):
            torch.testing.assert_close(parameter.grad, grad)
        scaler.step(optimizer)
        scaler.update()
        before = [p.detach().clone() for p in parameters]
        model.zero_grad()
        scaler.scale(summed_loss(model, inputs) * math.inf).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(torch.equal(p, value) for p, value in zip(parameters, before, strict=True))
    assert scaler.get_scale() == 2.0**11


def hooks_with_state(model):
    """A caller's hooks that hold state from the beginning of a forward pass to its end."""
    within = []

    def begin(*_):
        assert not within, "a forward pass runs within another"
        within.append(True)

    model.register_forward_pre_hook(begin)
    model.register_forward_hook(lambda *_: within.clear())


@pytest.mark.parametrize("resumed", [False, True])
def test_no_pass_over_support_rows_runs_within_that_of_the_caller(model, inputs, resumed):
    hooks_with_state(model.train())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with GAST(select=2).attach(model, batches=[inputs], optimizer=optimizer) as sift:
        if resumed:
            sift.load_state_dict(sift.state_dict())
        for _ in range(2):
            model(**inputs).loss.backward()
            assert sift.last.selected.shape[1] == 2
            optimizer.step()


def test_an_evaluation_before_the_first_step_takes_no_support_rows(model, inputs):
    taken = []

    def batches():
        while True:
            taken.append(1)
            yield inputs

    with GAST(select=2).attach(model.train(), batches=batches()):
        with torch.no_grad():
            model(**inputs)
        assert not taken
        model(**inputs).loss.backward()
        assert taken


def test_gast_attached_before_ist_is_refused(model, inputs):
    with GAST(2, "rest").attach(model), pytest.raises(RecipeError, match="IST"):
        IST().attach(model, batches=[inputs])
    IST().attach(model, batches=[inputs]).remove()  # the tape is removed


def test_what_attach_needs(model):
    with pytest.raises(RecipeError, match="batches"):
        GAST(2, "sample").attach(model)
    GAST(2, "sample", choice="random").attach(model).remove()  # a random choice compares with nothing


@pytest.mark.parametrize("method", [GAST(2, "rest", choice="topk"), RST(active=0.25)], ids=["gast", "rst"])
def test_a_compiled_model_that_has_trained_before(method):
    """torch keeps the code that it compiled without hooks."""
    found = []
    for compiled in (False, True):
        model = adapted().train()
        inputs = batch(model, 4)
        run = torch.compile(model, backend="eager") if compiled else model
        run(**inputs).loss.backward()
        model.zero_grad()
        with method.attach(run):
            run(**inputs).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)
