"""What a row counts for: its weight enters the loss as a factor, whatever the batch, the method, the accumulation."""

import json
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from support.oracles import summed_loss
from support.tiny_run import lines, recipe, save_rows
from support.trainers import At, adapted, arguments, rows, weights

from siftune import GAST
from siftune.base.errors import DataError, UnsupportedError
from siftune.data.batches import Collator, numbered, weighted
from siftune.data.rows import rows_from
from siftune.models.loss import label_positions, mean_loss, token_losses, weighed
from siftune.train.run import train
from siftune.train.trainer import SiftTrainer

QUIET = Console(quiet=True)
WEIGHTS = [0.5, 2.0, 1.0, 0.25, 4.0, 1.5, 1.0, 3.0]


@given(st.lists(st.floats(0, 10), min_size=1, max_size=4), st.integers(2, 6), st.integers(0, 2**31), st.booleans())
def test_the_loss_is_a_sum_over_rows_times_their_weights(factors, length, seed, given_items):
    draws = torch.Generator().manual_seed(seed)
    logits_BTV = torch.randn(len(factors), length, 7, generator=draws, dtype=torch.float64)
    labels_BT = torch.randint(-1, 7, (len(factors), length), generator=draws)
    labels_BT[labels_BT < 0] = -100
    total, labels = 0.0, 0
    for logits_TV, of_row, factor in zip(logits_BTV, labels_BT, factors, strict=True):
        for place in range(1, length):
            if of_row[place] != -100:
                total -= factor * float(logits_TV[place - 1].log_softmax(0)[of_row[place]])
                labels += 1
    losses_N = token_losses(logits_BTV[label_positions(labels_BT)].unsqueeze(0), labels_BT)
    found = mean_loss(weighed(losses_N, labels_BT, torch.tensor(factors)), 5 if given_items else None)
    assert float(found) == pytest.approx(total / (5 if given_items else max(1, labels)), rel=1e-5, abs=1e-6)


class Gradients:
    """Keeps the gradients of the first step as the optimizer gets them."""

    def __init__(self):
        self.of_step = {}

    def __call__(self, model):
        self.of_step = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step_of(folder, *callbacks, accumulate=1, on_select=None):
    """Gradients of a step of eight weighted rows, and each row's share of its loss by a loop in float64."""
    model, data = adapted(), rows(8)
    slow = deepcopy(model).double()
    data = numbered(data).add_column("weight", WEIGHTS)
    caught = Gradients()
    trainer = SiftTrainer(
        model, arguments(folder, max_steps=1, max_grad_norm=0, per_device_train_batch_size=8 // accumulate,
                         gradient_accumulation_steps=accumulate, remove_unused_columns=False),
        train_dataset=data, data_collator=Collator(0),
        callbacks=[*callbacks, At("on_pre_optimizer_step", 1, caught)],
    )  # fmt: skip
    for callback in callbacks:
        callback.on_select = lambda choice: on_select and on_select(choice, list(trainer.rows))
    trainer.train()
    return caught.of_step, shares(slow, data)


def shares(model, data):
    """name -> (rows, …): every row's weighted share of the step's mean over labels, each from a pass of its own."""
    total = sum(sum(label != -100 for label in row["labels"][1:]) for row in data)
    found = []
    for row in data:
        inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask", "labels")}
        model.zero_grad()
        (row["weight"] * summed_loss(model, inputs, total)).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return {name: torch.stack([of_row[name] for of_row in found]) for name in found[0]}


def assert_close(ours, oracle):
    assert ours
    for name, grad in ours.items():
        torch.testing.assert_close(grad.double(), oracle[name], rtol=1e-4, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("accumulate", [1, 8])
def test_gradients_are_those_of_a_loop(tmp_path, accumulate):
    ours, of_rows = step_of(tmp_path, accumulate=accumulate)
    assert_close(ours, {name: part.sum(0) for name, part in of_rows.items()})


def test_gast_follows_weighted_rows(tmp_path):
    chosen = []  # per micro-batch: layer -> numbers of the rows that it follows

    def note(choice, numbers):
        followed = zip(choice.layers, choice.selected.tolist(), strict=True)
        chosen.append({layer: [numbers[place] for place in places] for layer, places in followed})

    ours, of_rows = step_of(tmp_path, GAST(select=2, support="rest"), accumulate=2, on_select=note)
    assert len(chosen) == 2
    oracle = {}
    for name, part in of_rows.items():
        layer = int(name.split(".layers.")[1].split(".")[0])
        oracle[name] = sum(part[followed[layer]].sum(0) * (4 / 2) for followed in chosen)
    assert_close(ours, oracle)


def test_rows_of_weight_one_are_as_without_weights_bit_for_bit(base, tmp_path):
    plain, given = save_rows(tmp_path / "plain.jsonl"), tmp_path / "given.jsonl"
    given.write_text("".join(json.dumps(row | {"weight": 1.0}) + "\n" for row in lines(plain)))
    done = [train(recipe(base, file, tmp_path / file.stem, method="gast"), QUIET) for file in (plain, given)]
    first, second = (weights(run.model) for run in done)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert len({run.folder.path.joinpath("rows.sha256").read_text() for run in done}) == 1


def test_a_private_run_has_no_weights(base, rows, tmp_path):
    rows.write_text("".join(json.dumps(row | {"weight": 2}) + "\n" for row in lines(rows)))
    given = {"method": "dense", "dp_epsilon": 8.0, "dp_delta": 1e-3}
    with pytest.raises(UnsupportedError, match="undoes them"):
        train(recipe(base, rows, tmp_path / "run", **given), QUIET)


def test_a_loss_that_cannot_be_weighed_is_refused(tmp_path):
    model = adapted("mixtral", layers=2)
    model.get_base_model().config.output_router_logits = True  # adds an auxiliary loss
    trainer = SiftTrainer(
        model, arguments(tmp_path, remove_unused_columns=False), data_collator=Collator(0),
        train_dataset=rows(8).add_column("weight", WEIGHTS),
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="cannot be weighted"):
        trainer.train()


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), True, "heavy", [1], 10**400])
def test_what_is_no_weight_is_refused_by_file_and_line(value):
    [row] = rows_from([{"prompt": "a", "completion": "b", "weight": value}], "data.jsonl:")
    with pytest.raises(DataError, match=r"data.jsonl: 1: 'weight' is .*; give a number from 0"):
        _ = row.weight


@pytest.mark.parametrize(("value", "weight"), [(None, 1), ("", 1), ("0.5", 0.5), (2, 2), (0, 0)])
def test_what_is_a_weight(value, weight):
    [row] = rows_from([{"prompt": "a", "completion": "b", "weight": value}])
    assert row.weight == weight


def test_rows_that_all_weigh_nothing_are_refused():
    with pytest.raises(DataError, match="every row has the weight 0"):
        weighted(rows(2), rows_from([{"text": "a", "weight": 0}] * 2))
