"""Steps with numbers that are not finite: nothing of them stays, they are told with their rows, and many end a run."""

import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from support.tiny_run import lines, recipe
from support.trainers import At
from transformers import TrainerCallback, TrainerControl, TrainerState

from siftune.base.errors import TrainingError
from siftune.models import loss as losses
from siftune.train import trainer as module
from siftune.train.guards import non_finite as module_guard
from siftune.train.run import train

QUIET = Console(quiet=True)


class Watch(TrainerCallback):
    """Keeps what the optimizer has after every step."""

    def __init__(self):
        self.after = []

    def on_step_end(self, args, state, control, **kwargs):
        moments = [part for values in kwargs["optimizer"].state.values() for part in values.values()]
        trained = [p for p in kwargs["model"].parameters() if p.requires_grad]
        self.after.append([part.detach().clone() for part in (*trained, *moments)])


@pytest.fixture
def break_rows(monkeypatch):
    """Return a function that makes the losses of a batch's second row NaN in some optimizer steps."""

    def broken(steps):
        at = []

        class Step(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                at[:] = [state.global_step + 1]

        def token_losses(logits, labels):
            found = losses.token_losses(logits, labels)
            row_N = losses.label_positions(labels).nonzero()[:, 0]
            return found.masked_fill(row_N == 1, torch.nan) if at and at[0] in steps else found

        monkeypatch.setattr(module, "token_losses", token_losses)
        return Step()

    return broken


@pytest.mark.parametrize("settings", [{"method": "dense", "weight_decay": 0.1}, {"accumulate": 2}])
def test_a_broken_step_changes_nothing_and_is_told_with_its_row(
    base, rows, tmp_path, interfere, break_rows, caplog, settings
):
    watch = Watch()
    interfere(break_rows({3}))
    interfere(watch)
    done = train(recipe(base, rows, tmp_path / "run", **settings), QUIET)
    before, broken, later = watch.after[1], watch.after[2], watch.after[3]
    assert len(before) == len(broken) > 0
    if "method" in settings:  # layers that IST draws anew begin with moments of their own
        assert all(torch.equal(a, b) for a, b in zip(before, broken, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(broken, later, strict=True))
    assert all(torch.isfinite(part).all() for part in watch.after[-1])
    assert done.summary["skipped_steps"] == 1
    [said] = [record.getMessage() for record in caplog.records if "is skipped" in record.getMessage()]
    assert "the loss is nan (rows: " in said
    assert "at step 3, which is skipped; 2 more" in said
    places = {f"{rows}:{number}" for number in range(1, 25)}
    named = said.partition("(rows: ")[2].partition(")")[0].split(", ")
    assert len(named) == settings.get("accumulate", 1)
    assert set(named) <= places
    assert [line["skipped_steps"] for line in lines(tmp_path / "run" / "metrics.jsonl") if "skipped_steps" in line] == [
        1
    ]


def test_too_many_end_the_run_also_where_it_was_resumed_between(base, rows, tmp_path, interfere, break_rows):
    settings = {"method": "dense", "save_every": 1, "steps": 7}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.SiftTrainer, "__init__", module.SiftTrainer.__init__)
        interfere(break_rows({2, 3, 5, 6}))
        interfere(At("on_step_begin", 4, stop_now))
        with pytest.raises(KeyboardInterrupt):
            train(recipe(base, rows, tmp_path / "run", **settings), QUIET)
    interfere(break_rows({2, 3, 5, 6}))
    with pytest.raises(TrainingError, match=r"the loss is nan .* step 6.* 3 such steps"):
        train(recipe(base, rows, tmp_path / "run", resume=True, **settings), QUIET)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["summary"]["skipped_steps"] == 3


def test_a_run_whose_last_steps_were_left_out_is_not_done(base, rows, tmp_path, interfere, break_rows):
    interfere(break_rows({6}))
    assert train(recipe(base, rows, tmp_path / "one", method="dense"), QUIET).summary["skipped_steps"] == 1
    interfere(break_rows({5, 6}))
    with pytest.raises(TrainingError, match="the last steps, 5 and 6"):
        train(recipe(base, rows, tmp_path / "two", method="dense"), QUIET)
    with pytest.raises(TrainingError, match="the last steps, 5 and 6"):  # nor by continuing from its end
        train(recipe(base, rows, tmp_path / "two", method="dense", resume=True), QUIET)


def stop_now(_):
    raise KeyboardInterrupt


def test_a_step_without_a_gradient_is_no_broken_step():
    guard, parameter = module_guard.BrokenSteps(3), torch.nn.Parameter(torch.ones(1))
    guard.look(torch.tensor(0.5), [0], None, torch.tensor([[1, 2]]))
    state, optimizer = TrainerState(), torch.optim.SGD([parameter], lr=1.0)
    guard.on_pre_optimizer_step(SimpleNamespace(fp16=False, device="cpu"), state, TrainerControl(), optimizer=optimizer)
    assert parameter.grad is None
