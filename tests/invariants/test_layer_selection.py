"""What must not change the result of layer selection: its limits, accumulation, checkpointing, resuming."""

import json

import pytest
import torch
from support.seen import Seen, assert_same
from support.trainers import adapted, rows, train, weights

from siftune import IST, RST
from siftune.engine.groups import group_by_layer


def recorded(method):
    method.all = []
    method.on_select = method.all.append
    return method


@pytest.mark.parametrize(
    "method", [IST(active=1.0, interval=None), IST(active=1.0, interval=2), RST(active=1.0)]
)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_everything_active_is_plain_training_bit_for_bit(tmp_path, method, dropout):
    runs = [
        train(tmp_path, *callbacks, model=adapted(dropout=dropout), max_steps=20)[0] for callbacks in ([], [method])
    ]
    assert_same(weights(runs[0]), weights(runs[1]))


def test_selection_equals_a_loop_that_trains_the_drawn_layers(tmp_path):
    """Against the obvious loop: full gradients of every layer, those of the others thrown away."""
    method, model = recorded(RST(active=0.5)), adapted()
    seen = Seen(model)
    train(tmp_path, method, model=model, max_steps=8, weight_decay=0.1, lr_scheduler_type="constant")
    oracle = adapted()
    oracle.train()
    groups = group_by_layer(oracle)
    optimizer = torch.optim.AdamW([p for p in oracle.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for choice, inputs in zip(method.all, seen.all, strict=True):
        oracle(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(
            [p for g in groups if g.index in choice.layers for p in g.parameters.values()], 1.0
        )
        for group in groups:
            if group.index not in choice.layers:
                for parameter in group.parameters.values():
                    parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
    for name, value in weights(model).items():
        torch.testing.assert_close(value, weights(oracle)[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_changes_nothing(tmp_path, accumulate):
    runs = []
    for size, steps in ((8, 1), (8 // accumulate, accumulate)):
        method = recorded(IST(active=0.5, interval=2, score_batch_size=6))
        model, _ = train(
            tmp_path, method, per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=6
        )
        runs.append((weights(model), [c.layers for c in method.all]))
    assert runs[0][1] == runs[1][1]
    for name, value in runs[0][0].items():
        torch.testing.assert_close(value, runs[1][0][name], rtol=1e-4, atol=1e-5)


def test_checkpointing_changes_nothing(tmp_path):
    runs = []
    for wanted in (False, True):
        method = recorded(IST(active=0.5, interval=2, score_batch_size=6))
        model, _ = train(
            tmp_path, method, activation_checkpointing=wanted,
            activation_checkpointing_kwargs={"use_reentrant": False} if wanted else None,
        )  # fmt: skip
        runs.append((weights(model), [c.layers for c in method.all]))
    assert runs[0][1] == runs[1][1]
    for name, value in runs[0][0].items():
        torch.testing.assert_close(value, runs[1][0][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stop", [3, 4, 8])  # within an epoch, right at a scoring step, in the second epoch
@pytest.mark.parametrize("restore", [False, True])
def test_resume_is_bitwise_the_unbroken_run(tmp_path, stop, restore):
    settings = {"max_steps": 10, "save_strategy": "steps", "save_steps": stop, "save_total_limit": 1}
    settings["restore_callback_states_from_checkpoint"] = restore
    whole = recorded(IST(active=0.5, interval=2, score_batch_size=6))
    unbroken, _ = train(tmp_path / "whole", whole, **settings | {"save_total_limit": None})
    broken = IST(active=0.5, interval=2, score_batch_size=6)
    train(tmp_path / "broken", broken, **settings | {"save_total_limit": None})
    checkpoint = tmp_path / "broken" / f"checkpoint-{stop}"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert len(state["stateful_callbacks"]["IST"]["attributes"]["_resumed"]["importance"]) == 4
    resumed = recorded(IST(active=0.5, interval=2, score_batch_size=6))
    model, worker = train(tmp_path / "broken", resumed, resume=str(checkpoint), **settings)
    assert_same(weights(unbroken), weights(model))
    method = next(c for c in worker.callback_handler.callbacks if isinstance(c, IST))
    assert torch.equal(method.importance, whole.importance)
    if not restore:  # otherwise the Trainer has made a callback of its own, without ours
        assert [c.layers for c in resumed.all] == [c.layers for c in whole.all[stop:]]


def test_resume_of_an_iterable_continues_its_walk(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from rows().with_format("torch")

    def fresh():
        return recorded(IST(active=0.5, interval=2, score_batch_size=5))

    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 5, "dataset": Stream()}
    whole, resumed = fresh(), fresh()
    train(tmp_path, whole, **settings)
    train(tmp_path, resumed, resume=str(tmp_path / "checkpoint-5"), **settings)
    assert [c.losses for c in resumed.all] == [c.losses for c in whole.all[5:]]
