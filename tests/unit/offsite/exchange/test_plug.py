"""The owner's way back: a return changes the outer layers' tensors of the base and nothing else, or it is refused."""

import copy
import logging
import math
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.emulators import FAMILIES, base, calibration, made_kit, settings
from support.seen import assert_same
from support.tiny_run import save_rows
from support.tokenizer import byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from siftune.base.errors import DataError, KitError, ModelError, RecipeError, UnsupportedError
from siftune.data.read import load_rows
from siftune.evaluate.prepare import prepare_rows
from siftune.offsite.emulator.model import outer_names
from siftune.offsite.exchange.emulate import KitOptions
from siftune.offsite.exchange.plug import plug, plug_in
from siftune.offsite.exchange.returned import OpenReturn, open_return, write_return
from siftune.offsite.exchange.settings import PlugSettings
from siftune.offsite.exchange.updates import LossChange, OwnRows
from siftune.offsite.kit.folder import read_kit

USUAL = ("llama", "gemma3", "gpt_neox")


def moved(kit, by=0.01, seed=0):
    """The kit's outer layers, every number of it changed by about `by`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(kit.path / "adapter.safetensors")
    return {name: t + by * (1 + torch.rand(t.shape, generator=generator)) for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("family", "mlp"),
    [
        *(pytest.param(family, "refit", marks=[] if family in USUAL else pytest.mark.slow) for family in FAMILIES),
        ("gpt2", "channels"),
    ],
)
def test_a_round_trip_changes_exactly_the_outer_tensors(family, mlp, tmp_path):
    """The checkpoint is bfloat16; kit and model are made from a float32 copy of it, as on old processors."""
    original = base(family, layers=4, vocab_size=300, pad_token_id=0).to(torch.bfloat16)
    original.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    kit = made_kit(copy.deepcopy(original).float(), tmp_path / "kit", KitOptions(torch.bfloat16), mlp=mlp)
    tuned = moved(kit, 0.004)
    write_return(tmp_path / "return", tuned, kit)
    result = plug(str(tmp_path / "base"), read_kit(tmp_path / "kit"), tmp_path / "return", tmp_path / "tuned")
    assert (result.folder, result.dtype, result.kit.digest) == (tmp_path / "tuned", "bfloat16", kit.digest)

    plugged = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype="auto")
    assert type(plugged) is type(original)
    before, after = original.state_dict(), plugged.state_dict()
    names = {name: neutral for neutral, name in outer_names(original, settings().split).items()}
    assert len(names) == len(tuned) > 2 * 8
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == torch.bfloat16
        expected = tuned[names[name]].to(torch.bfloat16) if name in names else tensor
        assert torch.equal(after[name], expected), name
        assert torch.equal(after[name], tensor) == (name not in names)
    inputs = {key: calibration(original)[0][key] for key in ("input_ids", "attention_mask")}
    reference = base(family, layers=4, vocab_size=300, pad_token_id=0).float()
    reference.load_state_dict({name: after[name].float() for name in after})
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(exact(**inputs).logits, reference(**inputs).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "tuned")("a b").input_ids == byte_tokenizer()("a b").input_ids
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "kit", "return", "tuned"]


@pytest.mark.parametrize(
    ("limit", "refused"), [(0.05, True), (0.25, False), (5.0, False)]
)  # every number of the outer layers, about 0.1, moves by 0.01 to 0.02
def test_the_limit_can_be_chosen(model, kit, limit, refused):
    plugged = copy.deepcopy(model)
    if refused:
        with pytest.raises(KitError, match=r"0\.05.*--max-update"):
            plug_in(plugged, kit, moved(kit), limit)
    else:
        report = plug_in(plugged, kit, moved(kit), limit)
        assert 0.05 < report.to_dict()["largest"]["update"] < 0.25
        assert report.limit == limit


BROKEN = {
    "missing": (lambda t: t.pop("last.0.mlp.up_proj.weight"), r"last\.0\.mlp\.up_proj\.weight is missing"),
    "extra": (lambda t: t.update(x=torch.ones(2)), "tensor x is none of the outer layers'"),
    "shape": (
        lambda t: t.update({"first.0.mlp.up_proj.weight": torch.ones(2, 2)}),
        r"first\.0\.mlp\.up_proj\.weight .* shape \(2, 2\)",
    ),
    "infinite": (lambda t: t["last.0.input_layernorm.weight"].fill_(math.inf), "not finite"),
    "far": (lambda t: t["last.0.mlp.up_proj.weight"].mul_(-3), r"up_proj\.weight moved by 4"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_refused_leaves_the_model_untouched(model, kit, name):
    spoil, words = BROKEN[name]
    tensors = moved(kit)
    spoil(tensors)
    plugged = copy.deepcopy(model)
    with pytest.raises(KitError, match=words):
        plug_in(plugged, kit, tensors)
    for key, tensor in model.state_dict().items():
        assert torch.equal(plugged.state_dict()[key], tensor)


@pytest.mark.parametrize("where", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"])
def test_another_base_model_is_refused(model, kit, where):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.state_dict()[where][0, 0] += 1e-3
    wanted = kit.manifest.fingerprint[:12]
    with pytest.raises(KitError, match=rf"fingerprint {wanted}…, but this one has [0-9a-f]{{12}}…"):
        plug_in(other, kit, moved(kit))


def test_a_kit_that_gives_another_depth_for_its_base_is_refused(model, kit):
    other = replace(kit, manifest=replace(kit.manifest, depth=5))
    with pytest.raises(KitError, match=r"base\.layers is 5"):
        plug_in(copy.deepcopy(model), other, moved(kit))


def test_weights_that_accelerate_keeps_elsewhere_are_refused(model, kit):
    """Copying into their placeholders would change nothing, and say nothing."""
    from accelerate import cpu_offload

    offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="not in memory"):
        plug_in(offloaded, kit, moved(kit))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_kit_of_half_precision_does_not_round_the_base(model, tmp_path, dtype):
    """The kit's copy is rounded; what is added to the base is what moved since."""
    kit = made_kit(model, tmp_path / "kit", KitOptions(outer_dtype=dtype))
    returned = {name: tensor.to(dtype) for name, tensor in moved(kit).items()}
    plugged, names = copy.deepcopy(model), outer_names(model, kit.manifest.split)
    plug_in(plugged, kit, returned)
    for name, tensor in returned.items():
        before = model.state_dict()[names[name]]
        expected = before.double() + (tensor.double() - before.to(dtype).double())
        torch.testing.assert_close(plugged.state_dict()[names[name]].double(), expected, rtol=2e-7, atol=1e-9)


def factors(kit):
    """A return of factors for every matrix."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, spec in kit.manifest.outer.items():
        if len(spec.shape) == 2:
            tensors[f"{name}.up"] = 0.05 * torch.randn(spec.shape[0], 2, generator=generator)
            tensors[f"{name}.down"] = 0.05 * torch.randn(2, spec.shape[1], generator=generator)
    return tensors


def test_factors_are_read_one_pair_after_the_other(model, kit, tmp_path, monkeypatch):
    alive, most, read = [], [], OpenReturn.__getitem__

    def counted(self, name):
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        alive[:] = [ref for ref in alive if ref() is not None]
        most.append(len(alive))
        return tensor

    monkeypatch.setattr(OpenReturn, "__getitem__", counted)
    write_return(tmp_path / "return", factors(kit), kit)
    with open_return(tmp_path / "return", kit) as opened:
        plug_in(copy.deepcopy(model), kit, opened, 100.0)
    assert 1 <= max(most) <= 2


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, math.inf])
def test_a_limit_that_is_none_is_refused(model, kit, limit):
    with pytest.raises(RecipeError, match="max_update is"):
        plug_in(copy.deepcopy(model), kit, moved(kit), limit)


@pytest.mark.parametrize(("dtype", "by", "lost"), [(torch.bfloat16, 1e-6, True), (torch.float32, 1e-6, False)])
def test_rounding_that_drowns_the_update_is_told(tmp_path, caplog, dtype, by, lost):
    model = base(layers=3, vocab_size=300).to(dtype)
    kit = made_kit(copy.deepcopy(model).float(), tmp_path / "kit")
    with caplog.at_level(logging.WARNING, logger="siftune"):
        report = plug_in(model, kit, moved(kit, by))
    assert (report.rounding > 0.9) == lost
    assert (report.rounding < 0.1) == (not lost)
    assert ("--dtype float32 avoids it" in caplog.text) == lost


def saved(model, folder):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def test_the_dtype_can_be_chosen(tmp_path):
    model = base(layers=3, vocab_size=300).to(torch.bfloat16)
    source = saved(model, tmp_path / "base")
    kit = made_kit(model.float(), tmp_path / "kit")
    tuned = moved(kit, 1e-5)
    write_return(tmp_path / "return", tuned, kit)
    result = plug(source, kit, tmp_path / "return", tmp_path / "tuned", PlugSettings(dtype="float32"))
    assert result.dtype == "float32"
    assert result.report.rounding == 0.0
    assert result.privacy is None
    found = load_file(tmp_path / "tuned" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert torch.equal(found["model.layers.2.mlp.up_proj.weight"], tuned["last.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_can_be_tuned_to_a_narrower_dtype(model, kit, tmp_path, dtype):
    source, back = saved(model, tmp_path / "base"), tmp_path / "return"
    write_return(back, moved(kit), kit)
    result = plug(source, kit, back, tmp_path / "tuned", PlugSettings(dtype=dtype))
    whole = plug(source, kit, back, tmp_path / "whole")
    assert (result.dtype, whole.dtype) == (dtype, "float32")
    assert 0 == whole.report.rounding < result.report.rounding < 0.5
    found, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "tuned", tmp_path / "whole"))
    assert_same(found, {name: tensor.to(getattr(torch, dtype)) for name, tensor in wanted.items()})


def test_a_base_in_the_dtype_that_its_kit_was_made_in(model, tmp_path):
    half = made_kit(copy.deepcopy(model).to(torch.bfloat16), tmp_path / "kit")
    write_return(tmp_path / "return", moved(half), half)
    source, where = saved(model, tmp_path / "base"), (half, tmp_path / "return", tmp_path / "tuned")
    with pytest.raises(KitError, match="--dtype"):
        plug(source, *where)
    with pytest.raises(KitError, match="fingerprint"):
        plug(source, *where, PlugSettings(dtype="float16"))
    assert plug(source, *where, PlugSettings(dtype="bfloat16")).dtype == "bfloat16"


def test_a_template_for_the_rows_is_not_that_of_the_model(model, kit, tmp_path):
    source, rows = saved(model, tmp_path / "base"), save_rows(tmp_path / "rows.jsonl", 4)
    template = tmp_path / "other.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}")
    write_return(tmp_path / "return", moved(kit, 0.0), kit)
    settings = PlugSettings(eval=str(rows), template=template, max_loss_increase=9.0)
    plug(source, kit, tmp_path / "return", tmp_path / "tuned", settings)
    own, tuned = (AutoTokenizer.from_pretrained(folder).chat_template for folder in (source, tmp_path / "tuned"))
    assert own == tuned


def test_nothing_is_written_where_something_is_wrong(model, kit, tmp_path):
    source = saved(model, tmp_path / "base")
    write_return(tmp_path / "return", moved(kit), kit)
    write_return(tmp_path / "far", moved(kit, 1.0), kit)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("")
    other = saved(base(layers=3, vocab_size=300, initializer_range=0.2).float(), tmp_path / "other")
    back = tmp_path / "return"
    before = sorted(path.name for path in tmp_path.iterdir())
    for (model_source, folder, back_from, to), kind, words in [
        ((source, kit.path, tmp_path / "far", tmp_path / "tuned"), KitError, "--max-update"),
        ((other, kit.path, back, tmp_path / "tuned"), KitError, "fingerprint"),
        ((source, kit.path, kit.path, tmp_path / "tuned"), KitError, "return"),
        ((source, back, back, tmp_path / "tuned"), KitError, "kit"),
        ((source, kit.path, back, tmp_path / "used"), ModelError, "not empty"),
        ((str(tmp_path / "none"), kit.path, back, tmp_path / "tuned"), ModelError, "does not exist"),
    ]:
        with pytest.raises(kind, match=words):
            plug(model_source, read_kit(folder), back_from, to)
        assert sorted(path.name for path in tmp_path.iterdir()) == before


# --- the owner's own rows


@pytest.fixture
def own(tmp_path):
    """Rows as a user has them, prepared."""
    return prepare_rows(
        load_rows(str(save_rows(tmp_path / "rows.jsonl", 9))), byte_tokenizer(), ("perplexity",), "none"
    )


def plain_loss(model, prepared):
    """Mean over all labels, one row at a time."""
    total = count = 0
    for ids, labels in prepared.sequences:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
        wanted = torch.tensor(labels[1:])
        total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        count += int((wanted != -100).sum())
    return total / count


def test_losses_are_of_the_model_before_and_after(model, kit, own):
    plugged = copy.deepcopy(model)
    report = plug_in(plugged, kit, moved(kit), rows=OwnRows(own, max_loss_increase=10.0))
    assert report.loss.before == pytest.approx(plain_loss(model, own), rel=1e-5)
    assert report.loss.after == pytest.approx(plain_loss(plugged, own), rel=1e-5)
    assert abs(report.loss.after - report.loss.before) > 1e-3
    assert report.to_dict()["loss"] == {
        "before": report.loss.before, "after": report.loss.after, "rows": 9, "limit": 10.0
    }  # fmt: skip


@pytest.mark.parametrize("form", [moved, factors])
def test_measuring_does_not_change_what_is_put_in(model, kit, own, form):
    """Factors are added to what is there, which must be the base."""
    measured, plain = copy.deepcopy(model), copy.deepcopy(model)
    plug_in(measured, kit, form(kit), 100.0, OwnRows(own, max_loss_increase=10.0))
    plug_in(plain, kit, form(kit), 100.0)
    assert_same(measured.state_dict(), plain.state_dict())


def worse(model, kit, own):
    """Tensors that raise the loss on the rows: against its gradient."""
    model = copy.deepcopy(model)
    ids, labels = zip(*own.sequences, strict=True)
    for row, label in zip(ids, labels, strict=True):
        model(input_ids=torch.tensor([row]), labels=torch.tensor([label])).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * parameter.grad.sign()
    state, names = model.state_dict(), outer_names(model, kit.manifest.split)
    return {neutral: state[name] for neutral, name in names.items()}


def test_a_model_that_got_worse_is_refused_and_left_as_it_was(model, kit, own):
    plugged, returned = copy.deepcopy(model), worse(model, kit, own)
    with pytest.raises(KitError, match="on your 9 rows"):
        plug_in(plugged, kit, returned, rows=OwnRows(own))
    assert all(torch.equal(plugged.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    increase = plain_loss(filled(model, kit, returned), own) - plain_loss(model, own)
    with pytest.raises(KitError, match="makes the model worse"):
        plug_in(plugged, kit, returned, rows=OwnRows(own, 0.99 * increase))
    plug_in(plugged, kit, returned, rows=OwnRows(own, 1.01 * increase))


def filled(model, kit, returned):
    model = copy.deepcopy(model)
    names = outer_names(model, kit.manifest.split)
    model.load_state_dict({names[name]: tensor for name, tensor in returned.items()}, strict=False)
    return model


def test_a_measurement_that_is_cut_short_leaves_the_model_as_it_was(model, kit, own, monkeypatch):
    plugged, rows, losses = copy.deepcopy(model), OwnRows(own), iter([1.0])
    monkeypatch.setattr(OwnRows, "loss", lambda *_: next(losses, None) or stop())

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plug_in(plugged, kit, moved(kit), rows=rows)
    assert all(torch.equal(plugged.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("before", "after", "limit", "refused"),
    [
        (2.0, 2.0, 0.0, False), (2.0, 2.1, 0.0, True), (2.0, 2.25, 0.25, False), (2.0, 1.0, 0.0, False),
        (2.0, math.nan, 9.0, True), (2.0, math.inf, 9.0, True), (math.nan, 2.0, 9.0, True),
    ],
)  # fmt: skip
def test_what_counts_as_worse(before, after, limit, refused):
    change = LossChange(before, after, 3, limit)
    if refused:
        with pytest.raises(KitError, match="--max-loss-increase"):
            change.check()
    else:
        change.check()


@pytest.mark.parametrize("limit", [-0.1, math.nan, math.inf])
def test_an_increase_that_is_none_is_refused(own, limit):
    with pytest.raises(RecipeError, match="max_loss_increase is"):
        OwnRows(own, limit)


def test_rows_are_read_before_a_model_is_loaded(model, kit, tmp_path, monkeypatch):
    write_return(tmp_path / "return", moved(kit), kit)
    monkeypatch.setattr("siftune.offsite.exchange.plug.load_model", None)
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        plug("smollm2", kit, tmp_path / "return", tmp_path / "tuned", PlugSettings(eval=str(tmp_path / "none.jsonl")))
    assert not (tmp_path / "tuned").exists()
