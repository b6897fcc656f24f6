"""GREATS chooses as a plain greedy loop does, and trains on its choice alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.by_row import double, runner, trained
from support.oracles import flat, gradients, sample_gradients, summed_loss
from support.tiny import batch
from support.trainers import adapted as trainable
from support.trainers import arguments, rows
from torch.nn.functional import cosine_similarity

from baselines import Greats, greedy
from siftune.errors import RecipeError
from siftune.methods.batches import GivenBatches
from siftune.methods.gast.settings import GASTSettings
from siftune.trainer.trainer import SiftTrainer


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


def test_greats_in_the_trainer_follows_the_mean_loss_of_its_rows(tmp_path):
    settings = {"max_steps": 1, "gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
    found, [choice] = trained(tmp_path, "sample", Greats, **settings)
    model = trainable()
    trainer = SiftTrainer(model, arguments(tmp_path, **settings), train_dataset=rows())
    first = next(iter(trainer.get_train_dataloader()))
    part = {name: value[choice.selected[0]] for name, value in first.items()}
    assert len(part["input_ids"]) == 3
    grads = gradients(model, part)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            wanted = parameter.detach() - 0.1 * grads[parameter]
            torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-6)


def test_greats_compares_with_rows_of_its_own():
    with pytest.raises(RecipeError, match="support sample, not rest"):
        Greats(double(), GASTSettings(support="rest"))
    with pytest.raises(RecipeError, match=r"give draws=\.\.\."):
        Greats(double(), GASTSettings()).begin()
