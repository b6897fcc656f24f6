"""GAST with each support: what must not change the result, beyond the invariants of all methods."""

import json

import pytest
import torch
from support.seen import assert_same
from support.trainers import adapted, rows, train, weights

from siftune import GAST, IST
from siftune.base.errors import RecipeError
from siftune.methods.gast import maths


def method(support="rest", select=2, **settings):
    if support == "averaged":  # formed in every third step
        support, settings = "dataset", {"support_every": 3, "score": "cosine", **settings}
    return GAST(select, support, keep=True, support_set=rows(9, seed=4) if support == "dataset" else None, **settings)


def assert_same_choices(first, second):
    for one, other in zip(first, second, strict=True):
        assert (one.step, one.batch, one.layers) == (other.step, other.batch, other.layers)
        assert torch.equal(one.selected, other.selected)
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_everything_selected_by_the_tape_is_plain_training(tmp_path, monkeypatch, kind):
    """The tape records although all rows are followed: as many as there are, each of them once."""
    monkeypatch.setattr(maths, "choose", lambda scores, *_: torch.arange(scores.numel()))
    plain, _ = train(tmp_path, model=adapted(kind=kind), max_steps=8)
    ours, _ = train(tmp_path, method(), model=adapted(kind=kind), max_steps=8)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(ours)[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("support", ["sample", "averaged"])
def test_scores_of_rows_do_not_depend_on_accumulation(tmp_path, support):
    """A row's score against support of its own is the same in any batch; the weights are fixed."""
    runs = []
    for parts in (1, 2):
        ours = method(support, 0.5)
        size = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
        train(tmp_path, ours, learning_rate=1e-12, **size)
        runs.append([torch.cat([s.scores for s in ours.history if s.step == step], 1) for step in range(6)])
    for full, parts in zip(*runs, strict=True):
        torch.testing.assert_close(parts, full, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("support", "stop", "with_ist"),  # within an epoch, and in the second
    [("averaged", 8, True), ("averaged", 3, False), ("dataset", 3, False)],
)
def test_resume_is_bitwise_the_unbroken_run(tmp_path, support, stop, with_ist):
    settings = {"max_steps": 10, "save_strategy": "steps", "save_steps": stop, "gradient_accumulation_steps": 2}

    def methods():
        before = [IST(active=0.5, interval=2, score_batch_size=6)] if with_ist else []
        return [*before, method(support)]

    whole, again = methods(), methods()
    unbroken, _ = train(tmp_path, *whole, model=adapted(dropout=0.2), **settings)
    checkpoint = tmp_path / f"checkpoint-{stop}"
    assert (checkpoint / "gast_mean.safetensors").exists() == (support == "averaged")
    model, _ = train(tmp_path, *again, model=adapted(dropout=0.2), resume=str(checkpoint), **settings)
    assert_same(weights(unbroken), weights(model))
    rest = [s for s in whole[-1].history if s.step >= stop]
    assert_same_choices(rest, again[-1].history)
    assert all(torch.equal(a.scores, b.scores) for a, b in zip(rest, again[-1].history, strict=True))


@pytest.mark.parametrize(
    ("support", "steps_known", "with_ist"),
    [("dataset", True, True), ("rest", False, False), ("averaged", True, False)],
)
def test_a_custom_loop_resumes_bitwise(support, steps_known, with_ist):
    """Without the optimizer's steps every pass counts on."""

    def loop(steps, model, saved=None):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        batches = [_batch(i) for i in (10, 11, 12)]
        ist = IST(active=0.5, interval=2).attach(model, batches=batches, optimizer=optimizer) if with_ist else None
        support_sets = batches if support in ("dataset", "averaged") else None
        sift = method(support).attach(model, batches=support_sets, optimizer=optimizer if steps_known else None)
        if saved:
            state, mean, optimizer_state, layers = saved
            optimizer.load_state_dict(optimizer_state)
            sift.load_state_dict(json.loads(state))
            sift.load_mean_tensors(mean)
            if ist:
                ist.load_state_dict(json.loads(layers))
        choices = []
        for step in steps:
            for part in range(2):  # accumulated
                model(**_batch(2 * step + part)).loss.backward()
                choices.append(sift.last)
            optimizer.step()
            optimizer.zero_grad()
        own = json.dumps(ist.state_dict()) if ist else None
        state = json.dumps(sift.state_dict()), sift.mean_tensors(), optimizer.state_dict(), own
        sift.remove()
        if ist:
            ist.remove()
        return choices, state

    whole, broken = adapted(), adapted()
    wanted, _ = loop(range(6), whole)
    first, saved = loop(range(3), broken)
    second, _ = loop(range(3, 6), broken, saved)
    assert_same(weights(whole), weights(broken))
    assert_same_choices(wanted, first + second)
    assert not all(torch.equal(one.selected, wanted[0].selected) for one in wanted[1:])


def _batch(seed):
    return {name: torch.tensor(values) for name, values in rows(4, seed=seed).to_dict().items()}


def until(share, support):
    ours = method(support)
    ours.select_until = share
    return ours


def test_steps_after_the_end_of_selection_are_plain_training(tmp_path, caplog):
    caplog.set_level("INFO", logger="siftune")
    never = until(0.05, "rest")
    train(tmp_path / "plain", model=(plain := adapted()))
    train(tmp_path / "never", never, model=(ours := adapted()))
    assert_same(weights(plain), weights(ours))
    assert all(s.selected.shape == (4, 4) and s.scores.isnan().all() for s in never.history)
    some = until(0.67, "sample")
    train(tmp_path / "some", some)
    assert [s.selected.shape[1] for s in some.history] == [2, 2, 2, 2, 4, 4]
    assert all(s.scores.isfinite().all() for s in some.history[:4])
    assert "more than are to be selected" not in caplog.text


@pytest.mark.parametrize("stop", [2, 4])  # before the selection ends, and as it ends
def test_resume_around_the_end_of_selection(tmp_path, stop):
    settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": stop}
    unbroken, _ = train(tmp_path, until(0.57, "averaged"), **settings)
    model, _ = train(tmp_path, until(0.57, "averaged"), resume=str(tmp_path / f"checkpoint-{stop}"), **settings)
    assert_same(weights(unbroken), weights(model))


def test_another_training_begins_anew(tmp_path):
    """The Trainer hands the state of the run before to the next one too."""
    again = method("sample", choice="random")
    _, worker = train(tmp_path, again)
    first = list(again.history)
    worker.train()
    second = again.history[len(first) :]
    assert [one.step for one in second] == [one.step for one in first]
    assert all(torch.equal(a.selected, b.selected) for a, b in zip(first, second, strict=True))


def test_a_checkpoint_without_the_running_mean_is_refused(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3}
    train(tmp_path, method("averaged"), **settings)
    (tmp_path / "checkpoint-3" / "gast_mean.safetensors").unlink()
    with pytest.raises(RecipeError, match="gast_mean"):
        train(tmp_path, method("averaged"), resume=str(tmp_path / "checkpoint-3"), **settings)
