"""Several returns of one kit: merged as a plain loop in float64 does it, each held to all that a single one is."""

import copy
import math
import shutil
import weakref
from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file
from support.emulators import base, made_kit
from support.tiny_run import save_rows
from support.tokenizer import byte_tokenizer

from siftune.base.errors import KitError, RecipeError
from siftune.data.read import load_rows
from siftune.evaluate.prepare import prepare_rows
from siftune.offsite.emulator.model import outer_names
from siftune.offsite.exchange.emulate import KitOptions
from siftune.offsite.exchange.plug import plug, plug_in
from siftune.offsite.exchange.returned import OpenReturn, open_return, write_return
from siftune.offsite.exchange.settings import PlugSettings
from siftune.offsite.exchange.updates import OwnRows

UP = "last.0.mlp.up_proj.weight"
LIMIT = 100.0


def whole(kit, seed, size=0.01):
    """A return of whole tensors, every number of which has moved."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(kit.path / "adapter.safetensors")
    return {name: t + size * torch.randn(t.shape, generator=generator).to(t.dtype) for name, t in tensors.items()}


def thin(kit, seed, size=0.05):
    """A return of factors; which matrices it has, and their rank, is another for every seed."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [name for name, spec in kit.manifest.outer.items() if len(spec.shape) == 2]
    found = {}
    for name in matrices[seed % 3 :: 2]:
        rows, columns = kit.manifest.outer[name].shape
        found[f"{name}.up"] = size * torch.randn(rows, 1 + seed % 4, generator=generator)
        found[f"{name}.down"] = size * torch.randn(1 + seed % 4, columns, generator=generator)
    return found


def outer_of(model, kit):
    state = model.state_dict()
    return {neutral: state[name] for neutral, name in outer_names(model, kit.manifest.split).items()}


def change(before, returned, name):
    """What a return changes in a tensor, number by number in float64."""
    if name in returned:
        return returned[name].double() - before[name].to(returned[name].dtype).double()
    if f"{name}.up" not in returned:
        return torch.zeros(before[name].shape, dtype=torch.float64)
    up, down = returned[f"{name}.up"].double(), returned[f"{name}.down"].double()
    return sum(torch.outer(up[:, r], down[r]) for r in range(up.shape[1]))


def plain(before, returns, weights=None):
    """The merged outer layers, by loops."""
    weights = weights or [1.0] * len(returns)
    changes = [{name: change(before, returned, name) for name in before} for returned in returns]
    merged = {}
    for name, old in before.items():
        merged[name] = old.double() + sum(p[name] * w / sum(weights) for p, w in zip(changes, weights, strict=True))
    return merged


@pytest.mark.parametrize("kind", [whole, thin])
@pytest.mark.parametrize(("count", "weights"), [(2, None), (3, None), (3, (1, 2, 7.5))])
def test_against_a_plain_loop(model, kit, count, weights, kind):
    returns = [kind(kit, seed, 0.01 * (1 + seed)) for seed in range(count)]
    before = {name: tensor.clone() for name, tensor in outer_of(model, kit).items()}
    plugged = copy.deepcopy(model)
    report = plug_in(plugged, kit, returns, LIMIT, weights=weights)
    wanted, found = plain(before, returns, weights), outer_of(plugged, kit)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor.float()) or torch.allclose(
            found[name].double(), tensor, rtol=2e-7, atol=1e-9
        ), name
    inner = set(model.state_dict()) - set(outer_names(model, kit.manifest.split).values())
    assert all(torch.equal(plugged.state_dict()[name], model.state_dict()[name]) for name in inner)
    check_parts(report.parts, before, returns, wanted, weights or [1] * count)


def check_parts(parts, before, returns, wanted, weights):
    """Sizes, cosines and weights against flat vectors."""
    flat = [torch.cat([change(before, r, name).flatten() for name in before]) for r in returns]
    merged = torch.cat([(wanted[name] - before[name].double()).flatten() for name in before])
    size = torch.cat([before[name].double().flatten() for name in before]).norm()
    assert [part.name for part in parts] == [str(n) for n in range(1, len(returns) + 1)]
    for part, vector, weight in zip(parts, flat, weights, strict=True):
        assert part.report.whole.relative == pytest.approx(float(vector.norm() / size), rel=1e-5)
        assert part.cosine == pytest.approx(float(torch.cosine_similarity(vector, merged, dim=0)), abs=1e-5)
        assert part.weight == pytest.approx(weight / sum(weights))


def test_the_mean_of_products_is_no_product_of_means(model, kit):
    """The short way would give something else: so this is not done."""
    returns = [{f"{UP}.up": torch.randn(48, 2), f"{UP}.down": torch.randn(2, 32)} for _ in range(2)]
    plugged = copy.deepcopy(model)
    plug_in(plugged, kit, returns, LIMIT)
    up, down = ((returns[0][f"{UP}{end}"] + returns[1][f"{UP}{end}"]) / 2 for end in (".up", ".down"))
    old = outer_of(model, kit)[UP]
    assert float((outer_of(plugged, kit)[UP] - (old + up @ down)).abs().max()) > 0.1


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_kit_of_half_precision_does_not_round_the_base(model, tmp_path, dtype, count):
    """The kit's copy is rounded; what is added to the base is what moved since."""
    kit = made_kit(model, tmp_path / "kit", KitOptions(outer_dtype=dtype))
    returns = [whole(kit, seed) for seed in range(count)]
    before = {name: tensor.clone() for name, tensor in outer_of(model, kit).items()}
    plugged = copy.deepcopy(model)
    plug_in(plugged, kit, returns, LIMIT)
    for name, tensor in plain(before, returns).items():
        torch.testing.assert_close(outer_of(plugged, kit)[name].double(), tensor, rtol=2e-7, atol=1e-9)


# --- what is refused


def untouched(model, kit, returns, words, error=KitError, limit=LIMIT, **options):
    plugged = copy.deepcopy(model)
    with pytest.raises(error, match=words):
        plug_in(plugged, kit, returns, limit, **options)
    assert all(torch.equal(plugged.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("factor", [math.nan, -3.0])
def test_each_is_held_to_what_a_single_one_is(model, kit, factor):
    returns = [whole(kit, seed) for seed in range(3)]
    returns[1][UP].mul_(factor)
    untouched(model, kit, returns, f"return 2: .*{UP}", limit=0.9)


@pytest.mark.parametrize(
    ("weights", "count", "words"),
    [
        (None, 0, "--return"),
        ((1,), 2, "--weights"),
        ((1, 1, 1), 2, "--weights"),
        ((1,), 1, "--weights"),
        ((), 2, "--weights"),
        ((1, 0), 2, "weights is"),
        ((1, math.nan), 2, "weights is"),
    ],
)
def test_weights_that_cannot_be_used(model, kit, weights, count, words):
    untouched(model, kit, [whole(kit, seed) for seed in range(count)], words, RecipeError, weights=weights)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_setting_out_of_its_range_is_refused(bad):
    with pytest.raises(RecipeError, match="weights"):
        PlugSettings(weights=(1.0, bad))


def test_two_kinds_are_refused(model, kit):
    untouched(model, kit, [whole(kit, 0), thin(kit, 1)], "return 2 .* return 1")


def test_returns_that_change_nothing_have_no_direction(model, kit):
    same = {name: tensor.clone() for name, tensor in outer_of(model, kit).items()}
    returns = [dict(same), whole(kit, 0), dict(same)]
    report = plug_in(copy.deepcopy(model), kit, returns, LIMIT)
    assert [part.cosine is None for part in report.parts] == [True, False, True]


def test_returns_that_cancel_leave_the_base(model, kit):
    before = outer_of(model, kit)
    one = {name: tensor + 0.01 for name, tensor in before.items()}
    other = {name: 2 * tensor.double() - one[name].double() for name, tensor in before.items()}
    plugged = copy.deepcopy(model)
    plug_in(plugged, kit, [one, other], LIMIT)
    assert all(torch.allclose(outer_of(plugged, kit)[name], t, rtol=0, atol=1e-8) for name, t in before.items())


# --- from disk


@pytest.fixture
def written(kit, tmp_path):
    return [write_return(tmp_path / f"of{seed}", thin(kit, seed), kit) for seed in range(3)]


def saved(model, folder):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def test_folders_are_merged_as_what_they_hold(model, kit, written, tmp_path):
    source = saved(model, tmp_path / "base")
    wanted = plain(outer_of(model, kit), [thin(kit, seed) for seed in range(3)], weights=[1, 2, 3])
    result = plug(source, kit, written, tmp_path / "tuned", PlugSettings(max_update=LIMIT, weights=(1, 2, 3)))
    found = load_file(tmp_path / "tuned" / "model.safetensors")
    for neutral, name in outer_names(model, kit.manifest.split).items():
        torch.testing.assert_close(found[name].double(), wanted[neutral], rtol=2e-7, atol=1e-9)
    assert [part.name for part in result.report.parts] == [str(folder) for folder in written]
    assert [part.weight for part in result.report.parts] == pytest.approx([1 / 6, 2 / 6, 3 / 6])


def test_the_same_return_twice_is_named(model, kit, written, tmp_path):
    source = saved(model, tmp_path / "base")
    shutil.copytree(written[0], tmp_path / "again")
    for other in (written[0], tmp_path / "again"):
        with pytest.raises(KitError, match=f"the returns {written[0]} and {other} make the same update"):
            plug(source, kit, [written[0], written[1], other], tmp_path / "tuned", PlugSettings(max_update=LIMIT))


def one_bit(returned):
    return {name: torch.nextafter(tensor, 2 * tensor) for name, tensor in returned.items()}


def longer(returned):
    return {name: tensor * (1.2 if name.endswith(".up") else 1.0) for name, tensor in returned.items()}


def other_factors(returned):
    return {name: tensor * (-4 if name.endswith(".up") else -0.25) for name, tensor in returned.items()}


@pytest.mark.parametrize(("kind", "change"), [(whole, one_bit), (thin, one_bit), (thin, longer), (thin, other_factors)])
def test_the_same_update_votes_once(model, kit, kind, change):
    """Whatever its file: two with the same direction are one."""
    first = kind(kit, 0)
    untouched(model, kit, [first, kind(kit, 1), change(first)], "returns 1 and 3 make the same update")


def test_a_return_of_another_kit_is_named(model, kit, written, tmp_path):
    other = made_kit(base(layers=3, vocab_size=300, initializer_range=0.2).float(), tmp_path / "other")
    strange = write_return(tmp_path / "strange", thin(other, 5), other)
    with pytest.raises(KitError, match=rf"return {strange}: manifest\.json: kit is .* was made for another kit"):
        plug(saved(model, tmp_path / "base"), kit, [written[0], strange], tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()


def test_tensors_are_read_one_after_the_other(model, kit, written, monkeypatch):
    """None is kept: what is alive at a time is one tensor's factors."""
    alive, most, read = [], 0, OpenReturn.__getitem__

    def counted(self, name):
        nonlocal most
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        alive[:] = [ref for ref in alive if ref() is not None]
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(OpenReturn, "__getitem__", counted)
    with ExitStack() as stack:
        opened = [stack.enter_context(open_return(folder, kit)) for folder in written]
        plug_in(copy.deepcopy(model), kit, opened, LIMIT)
    assert 0 < most <= 2 * len(written)  # two factors of every return


# --- the owner's own rows


@pytest.fixture
def own(tmp_path):
    return prepare_rows(load_rows(str(save_rows(tmp_path / "r.jsonl", 9))), byte_tokenizer(), ("perplexity",), "none")


def against(model, kit, own, sign):
    """Whole layers after a step along the loss's gradient, up or down."""
    model = copy.deepcopy(model)
    for row, label in own.sequences:
        model(input_ids=torch.tensor([row]), labels=torch.tensor([label])).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += sign * 0.003 * parameter.grad.sign()
    return {name: tensor.clone() for name, tensor in outer_of(model, kit).items()}


@pytest.mark.parametrize("kind", ["whole", "thin"])
def test_each_is_measured_alone_and_then_all_together(model, kit, own, kind):
    """Factors are added to what is there: that must be the base each time."""
    returns = [against(model, kit, own, -1), whole(kit, 0)]
    if kind == "thin":
        returns = [thin(kit, seed, 0.2) for seed in range(2)]
    plugged, rows = copy.deepcopy(model), OwnRows(own, 10.0)
    report = plug_in(plugged, kit, returns, LIMIT, rows=rows)
    alone = [plug_in(copy.deepcopy(model), kit, [one], LIMIT, rows=rows).loss for one in returns]
    assert [part.report.loss.after for part in report.parts] == pytest.approx([one.after for one in alone], abs=1e-6)
    assert abs(alone[0].after - alone[1].after) > 1e-3
    assert report.loss.after == pytest.approx(rows.loss(plugged))
    without = copy.deepcopy(model)
    plug_in(without, kit, returns, LIMIT)
    assert all(torch.equal(without.state_dict()[name], tensor) for name, tensor in plugged.state_dict().items())


def test_one_that_makes_it_worse_is_refused_by_name(model, kit, own):
    returns = [against(model, kit, own, -1), against(model, kit, own, 0.5)]  # together they are better
    together = plug_in(copy.deepcopy(model), kit, returns, LIMIT, rows=OwnRows(own, 10.0)).loss
    assert together.after < together.before
    untouched(model, kit, returns, "return 2: the return makes the model worse", rows=OwnRows(own))
