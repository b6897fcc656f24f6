"""GAST among recent rows: windows, shares, gradients and steps against a slow loop."""

import math

import pytest
import torch
from support.adapted import adapted
from support.oracles import gradients, row_of, summed_loss
from support.recent import SlowStream
from support.tiny import batch

from siftune import GAST, Static
from siftune.engine.groups import group_by_layer
from siftune.methods.drivers.sample_choice import Unit
from siftune.methods.gast import maths
from siftune.methods.gast.maths import Scored
from siftune.methods.gast.settings import GASTSettings
from siftune.methods.gast.stream import Stream

DIVISOR = 8


@pytest.fixture
def model():
    return adapted().double()


def loss_of(model, inputs):
    return summed_loss(model, inputs)


def recent(select=0.5, **settings):
    return GAST(select, **{"support": "dataset", "among": "recent", **settings})


def cut(inputs, parts):
    """Equal micro-batches of a batch."""
    pieces = {name: value.chunk(parts) for name, value in inputs.items()}
    return [{name: value[i] for name, value in pieces.items()} for i in range(parts)]


def attached(method, model, lr=0.05):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    rows = [batch(model, 3, seed=7)] if method.needs_rows else None
    return method.attach(model, batches=rows, optimizer=optimizer, loss=loss_of), optimizer


def train(method, model, steps=8, rows=8, parts=1, lr=0.05):
    """Steps on batches in micro-batches; the choices."""
    (sift, optimizer), found = attached(method, model, lr), []
    with sift:
        for step in range(steps):
            for inputs in cut(batch(model, rows, seed=100 + step), parts):
                summed_loss(model, inputs, DIVISOR).backward()
                found.append(sift.last)
            optimizer.step()
            optimizer.zero_grad()
    return found, sift.state_dict()


def layers(model):
    return [list(group.parameters.values()) for group in group_by_layer(model)]


# --- whole steps


@pytest.mark.parametrize("parts", [2, 8])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"choice": "topk", "score": "cosine"},
        {"choice": "random", "select": 0.3},
        {"score": "cosine", "select": 0.75},
        {"pairs": True},
    ],
)
def test_steps_are_those_of_a_slow_loop(model, settings, parts):
    """Chances, draws and gradients, from the scores alone; the numbers that are drawn come from the step's seed."""
    method = recent(**settings)
    (sift, optimizer), slow = attached(method, model), {}
    generator, half = torch.Generator().manual_seed(0), 2 if method.pairs else 1
    counts = set()
    with sift:
        for step in range(4):
            seed = int(torch.randint(2**62, (), generator=generator))
            first = torch.Generator().manual_seed(seed)
            uniform = torch.rand(len(sift.rule.units), 1, generator=first, dtype=torch.float64)
            wanted = {p: torch.zeros_like(p) for own in layers(model) for p in own}
            for inputs in cut(batch(model, 8 * half, seed=100 + step), parts):
                with sift._tape.paused():
                    single = rows_of(model, inputs, half)
                summed_loss(model, inputs, DIVISOR).backward()
                choice = sift.last
                for number, unit in enumerate(sift.rule.units):
                    loop = slow.setdefault(unit, SlowStream(method))
                    rows, _, factor = loop.follow(
                        choice.scores[number].tolist(), [True] * len(choice.scores[number]), float(uniform[number])
                    )
                    assert choice.followed()[number] == rows
                    counts.add(len(rows))
                    for parameter in unit.parameters:
                        wanted[parameter] += single[parameter][rows].sum(0) * factor
            for parameter, total in wanted.items():
                torch.testing.assert_close(parameter.grad, total, rtol=1e-9, atol=1e-13)
            optimizer.step()
            optimizer.zero_grad()
            for loop in slow.values():
                loop.end()
    assert len(counts) > 1  # rows of some batches were left out, and not as many everywhere
    assert parts < 8 or 0 in counts


def rows_of(model, inputs, half):
    """Gradients of single samples: the norms of these models round to float32, so that the divisor is the same."""
    ones = [gradients(model, row_of(inputs, i), DIVISOR) for i in range(len(inputs["labels"]))]
    return {p: torch.stack([grads[p] for grads in ones]).unflatten(0, (half, -1)).sum(0) for p in ones[0]}


@pytest.mark.parametrize("choice", ["stochastic", "topk", "random"])
def test_the_division_of_a_step_does_not_matter(choice):
    """Eight rows at a time, and one at a time: the same rows are followed, and the same windows kept."""
    whole, apart = adapted().double(), adapted().double()
    first, kept = train(recent(choice=choice), whole)
    second, left = train(recent(choice=choice), apart, parts=8)
    for step in range(8):
        together, ones = first[step], second[8 * step : 8 * step + 8]
        for unit in range(4):
            rows = [row for row, one in enumerate(ones) if one.followed()[unit]]
            assert rows == together.followed()[unit]
    assert any(-1 in one.selected for one in first) or choice != "stochastic"
    windows, others = kept["stream"]["windows"], left["stream"]["windows"]
    assert windows.keys() == others.keys()
    for name in windows:
        for one, other in zip(decoded(windows[name]), decoded(others[name]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-15)
    for p, q in zip(whole.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def decoded(texts):
    from siftune.methods.gast.stream import _scores

    return [_scores(text) for text in texts]


def test_all_rows_are_followed_until_there_are_rows_to_compare_with(model):
    choices, _ = train(recent(0.25), model, steps=4, rows=6, parts=3)
    assert all(c.followed() == [[0, 1]] * 4 for c in choices[:9])  # three steps have 18 rows
    assert any(c.followed() != [[0, 1]] * 4 for c in choices[9:])
    plain = adapted().double()
    for inputs in cut(batch(plain, 6, seed=100), 3):
        summed_loss(plain, inputs, DIVISOR).backward()
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    fresh = adapted().double()
    sift, _ = attached(recent(0.25), fresh)
    with sift:
        for inputs in cut(batch(fresh, 6, seed=100), 3):
            summed_loss(fresh, inputs, DIVISOR).backward()
    for name, p in fresh.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, wanted[name], rtol=1e-10, atol=1e-14)


def test_a_share_of_one_is_plain_training_bit_for_bit():
    model = adapted()
    inputs = batch(model, 3)
    plain = gradients(model, inputs)
    with recent(1.0).attach(model, batches=[inputs]) as sift:
        summed_loss(model, inputs).backward()
    assert all(torch.equal(p.grad, plain[p]) for own in layers(model) for p in own)
    assert sift.last.followed() == [[0, 1, 2]] * 4


# --- expectation


def test_an_even_draw_has_the_full_gradient_in_expectation(model):
    """Exactly, over an even grid of where the running sum begins: chances of 3/4 on a grid of 8."""
    inputs, total = batch(model, 5), {}
    plain = gradients(model, inputs)
    with recent(0.75, choice="random").attach(model) as sift:
        for start in range(8):
            begun = {str(unit): start * maths.TURN // 8 for unit in range(4)}
            sift.rule.stream.load_state_dict({"sums": begun})
            for inputs_ in cut(inputs, 5):
                model.zero_grad()
                summed_loss(model, inputs_, (inputs["labels"][:, 1:] != -100).sum()).backward()
                for p in plain:
                    assert p.grad is not None or not any(p is q for own in layers(model) for q in own)
                    total[p] = total.get(p, 0) + p.grad / 8
    for p, wanted in plain.items():
        torch.testing.assert_close(total[p], wanted, rtol=1e-10, atol=1e-14)


def test_draws_of_many_steps_have_the_full_gradient_in_the_mean():
    model = adapted(layers=(2, 3)).double()
    inputs, steps = batch(model, 3), 120
    plain, total, squares = gradients(model, inputs), {}, {}
    sift, optimizer = attached(recent(0.4, choice="random", seed=3), model, lr=0.0)
    with sift:
        for _ in range(steps):
            model.zero_grad()
            summed_loss(model, inputs).backward()
            optimizer.step()
            for p in plain:
                total[p] = total.get(p, 0) + p.grad / steps
                squares[p] = squares.get(p, 0) + p.grad.square() / steps
    for own in layers(model):
        for p in own:
            error = ((squares[p] - total[p].square()) / steps).sqrt()
            assert float(((total[p] - plain[p]).abs() / (error + 1e-12)).max()) < 5


def units(count=1):
    return [Unit(place, place, f"unit {place}", (torch.nn.Parameter(torch.zeros(1)),)) for place in range(count)]


def stream_of(select=0.5, **settings):
    (unit,) = units()
    return Stream(GASTSettings(select=select, support="dataset", among="recent", **settings), [unit]), unit


def follow(stream, unit, scores, live=None, uniform=0.5):
    scores = torch.as_tensor(scores, dtype=torch.float64)
    live = torch.ones(len(scores), dtype=torch.bool) if live is None else torch.tensor(live)
    followed, factor = stream.follow(unit, Scored(scores, live), torch.tensor([uniform], dtype=torch.float64))
    return followed.tolist(), float(factor)


@pytest.mark.parametrize("choice", ["stochastic", "topk", "random"])
@pytest.mark.parametrize(
    ("rows", "parts", "share", "heavy"),
    [(1, 1, 0.5, False), (8, 8, 0.25, True), (12, 3, 0.75, False), (12, 2, 0.25, True)],
)
def test_the_share_is_kept(choice, rows, parts, share, heavy):
    """Over 1,200 rows: three standard deviations of as many independent draws, which these are at worst."""
    stream, unit = stream_of(share, choice=choice)
    generator, followed = torch.Generator().manual_seed(1), []
    for _ in range(1224 // rows):
        scores = torch.randn(rows, generator=generator, dtype=torch.float64)
        uniform = float(torch.rand((), generator=generator))
        for part in (scores**3 if heavy else scores).chunk(parts):
            followed += follow(stream, unit, part, uniform=uniform)[0]
        stream.end()
    kept = followed[24:]
    assert abs(sum(kept) / len(kept) - share) < 3 * math.sqrt(share * (1 - share) / len(kept))


def test_better_rows_are_followed_more_often():
    for choice, least in (("stochastic", 0.75), ("topk", 0.95)):
        stream, unit = stream_of(0.5, choice=choice)
        generator, high = torch.Generator().manual_seed(1), []
        for _ in range(300):
            scores = torch.randn(2, generator=generator, dtype=torch.float64)
            followed, _ = follow(stream, unit, scores, uniform=float(torch.rand((), generator=generator)))
            stream.end()
            high += [chosen for chosen, score in zip(followed, scores.tolist(), strict=True) if score > 1]
        assert sum(high) / len(high) > least


# --- windows


def window(stream):
    (texts,) = stream.state_dict()["windows"].values()
    return [step.tolist() for step in decoded(texts)]


def test_the_window_holds_the_newest_steps_that_have_enough_rows():
    stream, unit = stream_of()
    for step in range(12):
        for part in range(2):
            follow(stream, unit, [float(step + 1), part - 100.0, 200.0 + part, 7.0, 8.0])
        stream.end()
        steps = [[-100.0, -99.0, *sorted([s + 1.0] * 2 + [7.0] * 2 + [8.0] * 2), 200.0, 201.0] for s in range(step + 1)]
        assert window(stream) == steps[-7:]  # seven steps of ten rows
    follow(stream, unit, torch.arange(1.0, 101.0))
    stream.end()
    assert window(stream) == [list(range(1, 101))]


def test_a_step_is_not_judged_by_itself():
    """Within a step the window stands still, and it moves when the step ends."""
    stream, unit = stream_of(choice="topk")
    follow(stream, unit, [1.0 + i / 100 for i in range(64)])
    stream.end()
    for _ in range(64):
        assert follow(stream, unit, [5.0]) == ([True], 2.0)
    stream.end()
    assert sum(follow(stream, unit, [5.0])[0][0] for _ in range(4)) == 2  # among others that are as good


def test_rows_without_a_gradient_do_not_count():
    plain, other = stream_of(), stream_of()
    for step in range(8):
        scores = [float((7 * step + i) % 11 + 1) for i in range(4)]
        first, _ = follow(*plain, scores, uniform=0.3)
        second, _ = follow(*other, [9.0, *scores[:2], -50.0, *scores[2:]], [False, True, True, False, True, True], 0.3)
        ready = step * 4 >= 16
        assert [second[i] for i in (1, 2, 4, 5)] == first
        assert (second[0], second[3]) == (not ready, not ready)
        plain[0].end()
        other[0].end()
    assert window(plain[0]) == window(other[0])


def test_scores_of_zero_and_faults_stay_out_of_the_window():
    stream, unit = stream_of()
    follow(stream, unit, [0.0, 1.0, math.nan, math.inf, -2.0])
    stream.end()
    assert window(stream) == [[-2.0, 1.0]]
    follow(stream, unit, [0.0, math.nan])
    stream.end()
    assert window(stream) == [[-2.0, 1.0]]


def test_a_fault_does_not_spoil_the_running_sum():
    stream, unit = stream_of(choice="topk")
    follow(stream, unit, [float(i) for i in range(1, 33)])
    stream.end()
    assert follow(stream, unit, [math.nan, 50.0, -math.inf, 0.5])[0] == [False, True, False, False]


def test_gradients_that_are_not_finite_arrive_as_such(model):
    sift, optimizer = attached(recent(), model)
    with sift:
        for step in range(4):
            loss = summed_loss(model, batch(model, 8, seed=step))
            (loss * (math.inf if step == 3 else 1)).backward()
            assert all(bool(p.grad.isfinite().all()) == (step < 3) for p in layers(model)[0])
            before = sift.state_dict()["stream"]["windows"]
            if step == 3:
                sift.end()
                assert sift.state_dict()["stream"]["windows"] == before
            else:
                optimizer.step()
            optimizer.zero_grad()


def test_layers_that_do_not_train_remember_nothing(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    with (
        Static((0, 2)).attach(model),
        recent(choice="topk").attach(
            model, batches=[batch(model, 3, seed=7)], optimizer=optimizer, loss=loss_of
        ) as sift,
    ):
        for step in range(3):
            summed_loss(model, batch(model, 8, seed=step)).backward()
            assert sift.last.layers == (0, 2)
            optimizer.step()
    assert [sum(map(len, decoded(texts))) for texts in sift.state_dict()["stream"]["windows"].values()] == [
        24,
        0,
        24,
        0,
    ]


def test_momentum_compares_with_no_rows_before_there_is_a_mean(model):
    _, state = train(recent(support="momentum"), model, steps=4)
    assert [len(texts) for texts in state["stream"]["windows"].values()] == [3] * 4


def test_rows_without_labels_get_exactly_nothing(model):
    sift, optimizer = attached(recent(), model)
    with sift:
        for step in range(4):
            inputs = batch(model, 8, seed=step)
            if step == 3:
                inputs["labels"][:] = -100
            optimizer.zero_grad(set_to_none=True)
            summed_loss(model, inputs).backward()
            optimizer.step()
    assert sift.last.selected.shape == (4, 0)
    assert all(p.grad is not None and not p.grad.any() for own in layers(model) for p in own)
