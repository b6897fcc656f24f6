"""What must not change the result, beside what holds of every method: IST's scoring, and its checkpoints."""

import json

import pytest
import torch
from support.seen import assert_same
from support.trainers import adapted, rows, train, weights

from siftune import IST


def recorded(method):
    method.all = []
    method.on_select = method.all.append
    return method


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_scoring_leaves_training_alone_bit_for_bit(tmp_path, dropout):
    methods = ([], [IST(active=1.0, interval=2)])
    plain, ours = (train(tmp_path, *m, model=adapted(dropout=dropout), max_steps=20)[0] for m in methods)
    assert_same(weights(plain), weights(ours))


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
