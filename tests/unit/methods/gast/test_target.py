"""GAST beside a target (ours): rows of few known ones in the batch are what others are compared with."""

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from support.adapted import adapted as small
from support.oracles import sample_gradients, summed_loss
from support.seen import assert_same
from support.tiny import batch as tiny_batch
from support.trainers import adapted, rows, train, weights

from siftune import GAST
from siftune.engine.groups import group_by_layer
from siftune.errors import RecipeError, UnsupportedError
from siftune.methods.gast.settings import GASTSettings
from siftune.methods.target_rows import TargetRows

TARGET = (1, 4)  # rows of the first batch that are the target's


def cosine(one, other):
    """Of two gradients by parameter, as plain sums."""
    inner = sum(float((a * b).sum()) for a, b in zip(one, other, strict=True))
    lengths = [sum(float((a * a).sum()) for a in side) ** 0.5 for side in (one, other)]
    return inner / (lengths[0] * lengths[1]) if all(lengths) else 0.0


def only(inputs, numbers):
    return {name: values[list(numbers)] for name, values in inputs.items()}


class Loop:
    """What the rule says, sample by sample and without any of siftune's machinery."""

    def __init__(self, groups, decay, share, select):
        self.layers = [list(group.parameters.values()) for group in groups]
        self.decay, self.share, self.select = decay, share, select
        self.mean = [None] * len(self.layers)

    def choose(self, single, target):
        """Scores and choices of each layer for one batch."""
        count = len(next(iter(single.values())))
        scores = [[cosine([single[p][i] for p in ps], self._compared(layer, single, target)) for i in range(count)]
                  for layer, ps in enumerate(self.layers)]  # fmt: skip
        if self.share == "above":
            scores = [[sum(other[i] for other in scores[layer:]) for i in range(count)] for layer in range(len(scores))]
        return scores, [self._top(layer, row, target, count) for layer, row in enumerate(scores)]

    def end(self, singles, targets):
        """Move the mean by what the step's batches have of the target."""
        if not any(targets):
            return
        for layer, parameters in enumerate(self.layers):
            now = [sum(sum((s[p][i] for i in t), torch.zeros_like(p)) for s, t in zip(singles, targets, strict=True))
                   for p in parameters]  # fmt: skip
            before = self.mean[layer] or [torch.zeros_like(p) for p in parameters]
            self.mean[layer] = [self.decay * b + (1 - self.decay) * n for b, n in zip(before, now, strict=True)]

    def _compared(self, layer, single, target):
        parameters = self.layers[layer]
        mean = self.mean[layer] or [torch.zeros_like(p) for p in parameters]
        if not target:
            return mean
        own = [sum(single[p][i] for i in target) for p in parameters]
        return [self.decay * m + (1 - self.decay) * o for m, o in zip(mean, own, strict=True)]

    def _top(self, layer, scores, target, count):
        if not target and self.mean[layer] is None:
            return list(range(count))
        others = sorted((i for i in range(count) if i not in target), key=lambda i: -scores[i])
        return sorted([*target, *others[: max(0, self.select - len(target))]])


@pytest.mark.parametrize(("share", "decay"), [("own", 0.9), ("above", 0.5), ("own", 0.0)])
def test_against_a_loop_over_samples_batches_and_steps(share, decay):
    """Three steps of two batches each: without the target's rows, with two, with more than are selected."""
    model = small().double()
    known = tiny_batch(model, 6, seed=9)
    plain = [tiny_batch(model, 6, seed=seed) for seed in range(6)]
    mixed = only(known, TARGET)

    def put(inputs, numbers):
        rows_ = {name: values.clone() for name, values in inputs.items()}
        for place, number in zip(numbers, (*TARGET, *TARGET), strict=False):
            for name, values in rows_.items():
                values[place] = known[name][number]
        return rows_, sorted(numbers)

    steps = [
        [(plain[0], []), put(plain[1], (2, 3))],
        [put(plain[2], (0, 1, 4, 5)), (plain[3], [])],
        [(plain[4], []), put(plain[5], (3,))],
    ]
    gast = GAST(3, "target", choice="topk", score="cosine", share=share, decay=decay)
    loop = Loop(group_by_layer(model), decay, share, 3)
    with gast.attach(model, batches=[mixed]) as sift:
        for step in steps:
            singles = []
            for inputs, target in step:
                with sift._tape.paused():
                    single = sample_gradients(model, inputs)
                model.zero_grad()
                summed_loss(model, inputs).backward()
                scores, chosen = loop.choose(single, target)
                torch.testing.assert_close(
                    sift.last.scores.double(), torch.tensor(scores).double(), rtol=1e-6, atol=1e-9
                )
                assert sift.last.followed() == chosen
                for parameters, numbers in zip(loop.layers, chosen, strict=True):
                    for p in parameters:
                        wanted = sum((single[p][i] for i in target), torch.zeros_like(p))
                        if others := [i for i in numbers if i not in target]:  # in the place of all others
                            wanted = wanted + (6 - len(target)) / len(others) * sum(single[p][i] for i in others)
                        torch.testing.assert_close(p.grad, wanted, rtol=1e-9, atol=1e-12)
                singles.append(single)
            loop.end(singles, [target for _, target in step])
            sift.end()
            sift.step()
        means = sift.mean_tensors()
    assert len(means) == sum(map(len, loop.layers))
    for mean, wanted in zip(means.values(), [g for layer in loop.mean for g in layer], strict=True):
        torch.testing.assert_close(mean.double(), wanted, rtol=1e-6, atol=1e-12)


def test_one_choice_for_all_layers_follows_the_target_too():
    model = small().double()
    inputs = tiny_batch(model, 6)
    gast = GAST(3, "target", choice="topk", score="cosine", share="all")
    with gast.attach(model, batches=[only(inputs, TARGET)]) as sift:
        summed_loss(model, inputs).backward()
    (numbers,) = sift.last.followed()
    assert len(numbers) == 3
    assert set(TARGET) < set(numbers)


def mixed_rows():
    """Training rows of which every third is the target's, and these."""
    pool, target = rows(), rows(8, seed=9)
    order = [i // 3 if i % 3 == 0 else 8 + i for i in range(24)]
    return concatenate_datasets([target, pool]).select(order), target


def test_a_trainer_follows_the_targets_rows_and_learns_from_them(tmp_path):
    data, target = mixed_rows()
    gast = GAST(2, target=target, keep=True)
    assert gast.support == "target"
    given = []
    model = adapted()
    model.register_forward_pre_hook(lambda m, a, k: given.append(k["input_ids"].tolist()), with_kwargs=True)
    train(tmp_path, gast, model=model, dataset=data, save_strategy="steps", save_steps=3)
    assert (tmp_path / "checkpoint-3" / "gast_mean.safetensors").is_file()
    known, met = target["input_ids"], 0
    for choice, ids in zip(gast.history, given, strict=True):
        places = [place for place, row in enumerate(ids) if row in known]
        met += len(places)
        for numbers in choice.followed():
            assert set(places) <= set(numbers)
            assert len(numbers) == max(2, len(places)) if places or choice.step else 4
    assert met >= 6


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}])
def test_resume_is_bitwise(tmp_path, settings):
    data, target = mixed_rows()
    runs = {"max_steps": 8, "save_strategy": "steps", "save_steps": 5, "dataset": data, **settings}
    whole, again = GAST(2, target=target, keep=True), GAST(2, target=target, keep=True)
    unbroken, _ = train(tmp_path, whole, model=adapted(dropout=0.2), **runs)
    model, _ = train(tmp_path, again, model=adapted(dropout=0.2), resume=str(tmp_path / "checkpoint-5"), **runs)
    assert_same(weights(unbroken), weights(model))
    late = [choice for choice in whole.history if choice.step >= 5]
    assert all(torch.equal(a.scores, b.scores) for a, b in zip(late, again.history, strict=True))


def test_activation_checkpointing_changes_no_choice(tmp_path):
    data, target = mixed_rows()
    told = []
    for settings in (
        {},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    ):
        gast = GAST(2, target=target, keep=True)
        train(tmp_path, gast, dataset=data, **settings)
        told.append([choice.followed() for choice in gast.history])
    assert told[0] == told[1]


def test_rows_are_known_whatever_their_padding():
    ids = torch.tensor([[0, 0, 5, 6], [5, 6, 7, 8]])
    known = TargetRows([{"input_ids": ids, "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])}])
    right = torch.tensor([[5, 6, 0], [6, 5, 0], [0, 5, 6], [5, 6, 7]])
    masks = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 1, 1], [1, 1, 1]])
    assert known.among(right, masks).tolist() == [True, False, True, False]
    assert known.among(torch.tensor([[5, 6, 7, 8]]), None).tolist() == [True]


def test_until_the_target_is_met_all_rows_are_followed_and_that_is_said(tmp_path, caplog):
    gast = GAST(2, target=rows(3, seed=77), keep=True)
    ours, _ = train(tmp_path / "ours", gast, max_steps=130)
    plain, _ = train(tmp_path / "plain", max_steps=130)
    assert all(numbers == [0, 1, 2, 3] for choice in gast.history for numbers in choice.followed())
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(ours)[name], value, rtol=1e-2, atol=1e-3)
    warned = [r.getMessage() for r in caplog.records if "was one of the target's" in r.getMessage()]
    assert len(warned) == 1
    assert warned[0].startswith("none of 500 rows")


def test_a_model_that_is_given_no_tokens_is_refused():
    model = small().double()
    inputs = tiny_batch(model, 4)
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    with (
        GAST(2, "target", choice="topk").attach(model, batches=[inputs]),
        pytest.raises(UnsupportedError, match="input_ids"),
    ):
        model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"])


def test_refusals():
    with pytest.raises(RecipeError, match="give choice topk, and among batch"):
        GASTSettings(support="target")
    with pytest.raises(RecipeError, match="give choice topk, and among batch"):
        GASTSettings(0.5, support="target", choice="topk", among="recent")
    with pytest.raises(RecipeError, match=r'support="target" compares with rows: give attach'):
        GAST(2, "target", choice="topk").attach(small())
    with pytest.raises(RecipeError, match="at least one"):
        GAST(2, "target", choice="topk").attach(small(), batches=[])
    with pytest.raises(RecipeError, match=r"target=\.\.\."):
        GAST(2, target=rows(2), support="rest")


def test_without_its_rows_a_trainer_refuses(tmp_path):
    with pytest.raises(RecipeError, match="was given no rows of a target"):
        train(tmp_path, GAST(2, target=[]))
    with pytest.raises(RecipeError, match='support="target" needs rows: give GAST'):
        train(tmp_path, GAST(2, "target", choice="topk"))


def test_rows_in_hand_may_be_an_iterable(tmp_path):
    data, target = mixed_rows()
    gast = GAST(2, target=(row for row in list(target)), keep=True)
    train(tmp_path, gast, dataset=Dataset.from_list(list(data)))
    assert any(len(numbers) == 2 for choice in gast.history for numbers in choice.followed())
