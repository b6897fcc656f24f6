"""The yardsticks of the cost of privacy do what siftune's private steps do, or else their times mean nothing."""

import pytest
import torch
from support.trainers import adapted, arguments, rows, weights

from lab import dp_cost
from lab.dp_trainers import TRAINERS
from lab.random_llama import save_llama
from siftune.base.errors import RecipeError
from siftune.bench.workload import Workload
from siftune.data.batches import Collator
from siftune.methods.dp.accounting import Mechanism
from siftune.methods.dp.callback import DP
from siftune.methods.dp.sampling import Secret
from siftune.train.trainer import SiftTrainer


def trained(folder, method, clip=0.1, noise=0.0):
    mechanism = Mechanism(8.0, 1e-3, clip, "flat", rows=24, batch=6, steps=4, noise=noise)
    model, privacy = adapted(), DP(mechanism, 4, Secret(2))
    settings = {"max_steps": 4, "optim": "sgd", "max_grad_norm": 0, "learning_rate": 1.0}
    trainer = SiftTrainer(
        model, arguments(folder, **settings), train_dataset=rows(), data_collator=Collator(0), privacy=privacy
    )
    if method in TRAINERS:
        trainer = TRAINERS[method].take_over(trainer)
    trainer.train()
    return weights(model)


@pytest.mark.parametrize("method", ["opacus", "opacus-ghost"])
def test_opacus_clips_as_siftune_does(tmp_path, method):
    ours, theirs = trained(tmp_path, "dp-flat"), trained(tmp_path, method)
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-5)
    noisy = trained(tmp_path, method, noise=1.0)
    assert all(float((noisy[name] - value).std()) > 1e-3 for name, value in ours.items())


def test_drawn_rows_are_added_up_as_they_are(tmp_path):
    plain, unclipped = trained(tmp_path, "dense-drawn"), trained(tmp_path, "dp-flat", clip=1e9)
    for name, value in unclipped.items():
        torch.testing.assert_close(plain[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["dp-layer", "dp-flat", "dense-drawn", "opacus"])
def test_every_method_is_assembled(tmp_path, method, monkeypatch):
    monkeypatch.setattr("siftune.methods.dp.callback.Secret", Secret)  # which `build` changes
    folder = save_llama(tmp_path / "model", 2, 32, 16)
    work = Workload(folder, batch_size=4, length=16, rank=4, steps=2, warmup=1)
    trainer = dp_cost.build(method, work, tmp_path)
    assert trainer.privacy.mechanism.clipping == ("layer" if method == "dp-layer" else "flat")
    assert type(trainer) is TRAINERS.get(method, SiftTrainer)
    trainer.train()
    assert trainer.state.global_step == 3


def test_unknown_methods_are_refused():
    assert dp_cost._methods("dense, dp-flat,dense", "bfloat16") == ["dense", "dp-flat"]
    with pytest.raises(RecipeError, match="unknown method 'dp-ghost'; known: dense, dense-drawn"):
        dp_cost._methods("dense,dp-ghost", "float32")
    with pytest.raises(RecipeError, match="which Opacus' hooks do not see: give --dtype float32"):
        dp_cost._methods("dense,opacus", "bfloat16")
