"""A further round: what the second kit shows lies in what the first one showed."""

import copy
import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from support.emulators import base, calibration, settings
from support.keys import make_keys
from support.tokenizer import byte_tokenizer

from siftune.base.errors import KitError, ModelError
from siftune.models.families import family_of
from siftune.models.layers import find_layers
from siftune.models.source import load_model
from siftune.offsite.emulator.model import weight_OI
from siftune.offsite.emulator.split import outer_names
from siftune.offsite.exchange.emulate import KitOptions, emulate
from siftune.offsite.exchange.load import load_emulator
from siftune.offsite.exchange.plug import plug_in
from siftune.offsite.exchange.rounds import _rows_of, next_kit
from siftune.offsite.kit.fingerprint import fingerprint
from siftune.offsite.kit.folder import read_kit
from siftune.offsite.kit.manifest import EMULATOR, OUTER

WAYS = [
    *((family, {"mlp": "refit"}) for family in ("llama", "gpt2", "opt", "gpt_neox", "qwen2", "gemma2")),
    ("llama", {"mlp": "channels"}), ("gpt2", {"mlp": "channels"}),
    ("llama", {"method": "svd+flap"}), ("opt", {"method": "svd+flap"}),
    ("llama", {"method": "layerdrop"}), ("llama", {"method": "crash"}), ("llama", {"keep_mlp": 1.0}),
    ("llama", {"distil": 5}), ("gpt2", {"distil": 5, "mlp": "channels"}), ("llama", {"allot": "measured"}),
]  # fmt: skip
IDS = [f"{family} {' '.join(map(str, how.values()))}" for family, how in WAYS]


def made(folder, family="llama", dtype=None, **how):
    """A base and its kit."""
    model = base(family, layers=4, vocab_size=300).float()
    options = KitOptions(dtype=dtype)
    how = {"keep": 0.5, **how}
    return model, emulate(model, byte_tokenizer(), calibration(model), folder, settings(**how), options)


def tuned_layers(model, kit, size=0.01):
    """The model after a return was plugged in."""
    generator = torch.Generator().manual_seed(1)
    returned = load_file(kit.path / OUTER)
    for tensor in returned.values():
        tensor += size * torch.randn(tensor.shape, generator=generator)
    model = copy.deepcopy(model)
    plug_in(model, kit, [returned], 10.0)
    return model


def changed(model, size=0.05):
    """The model after the owner tuned all of it."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize(("family", "how"), WAYS, ids=IDS)
def test_after_plug_the_middle_stays_bit_for_bit(tmp_path, family, how):
    model, kit = made(tmp_path / "first", family, **how)
    tuned = tuned_layers(model, kit)
    second = next_kit(model, tuned, kit, tmp_path / "second")
    assert second.moved == ()
    assert (tmp_path / "second" / EMULATOR).read_bytes() == (kit.path / EMULATOR).read_bytes()
    assert second.kit.manifest.middle == kit.manifest.middle
    assert second.kit.manifest.fingerprint == fingerprint(tuned) != kit.manifest.fingerprint
    outer, state = load_file(second.kit.path / OUTER), tuned.state_dict()
    for neutral, name in outer_names(tuned, kit.manifest.split).items():
        assert torch.equal(outer[neutral], state[name])
    assert any(not torch.equal(tensor, outer[name]) for name, tensor in load_file(kit.path / OUTER).items())
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (second.kit.path / name).read_bytes() == (kit.path / name).read_bytes()
    again = tuned_layers(tuned, second.kit)  # the second round goes on from the first
    assert fingerprint(again) != fingerprint(tuned)
    with pytest.raises(KitError, match="fingerprint"):
        tuned_layers(model, second.kit)


def projections(up, down):
    """On the directions that a product writes and reads."""
    left, right = (torch.linalg.qr(part.double()).Q for part in (up, down.T))
    return left @ left.T, right @ right.T


@pytest.mark.parametrize(("family", "how"), WAYS, ids=IDS)
def test_what_the_owner_changed_moves_in_the_first_kits_subspace(tmp_path, family, how):
    """By hand, matrix by matrix: the projections of the change, the kept channels, and whole tensors."""
    model, kit = made(tmp_path / "first", family, **how)
    tuned = changed(model)
    second = next_kit(model, tuned, kit, tmp_path / "second")
    one, two = (load_file(folder / EMULATOR) for folder in (kit.path, second.kit.path))
    assert one.keys() == two.keys()
    assert second.kit.manifest.middle == kit.manifest.middle
    path, table = find_layers(model).path, family_of(model.config)
    seen = set()
    for place, shape in enumerate(kit.manifest.middle):
        if shape.same_as is not None:
            continue
        start = f"{path}.{kit.manifest.split.first + place}."
        old, new = (find_layers(m).layers[shape.base] for m in (model, tuned))
        for matrix in shape.ranks:
            up, down = (f"{start}{matrix}.{end}.weight" for end in ("up", "down"))
            seen |= {up, down, f"{start}{matrix}.up.bias"}
            assert torch.equal(one[up], two[up])  # the directions that are written: bit for bit
            left, right = projections(one[up], one[down])
            torch.testing.assert_close(two[down].double() @ right, two[down].double(), rtol=1e-4, atol=1e-6)
            for ours, theirs in zip(projections(two[up], two[down]), (left, right), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
            change = weight_OI(new.get_submodule(matrix)).double() - weight_OI(old.get_submodule(matrix)).double()
            wanted = one[up].double() @ one[down].double() + left @ change @ right
            torch.testing.assert_close(two[up].double() @ two[down].double(), wanted, rtol=1e-4, atol=1e-6)
        if shape.channels is not None:
            seen |= check_channels(start, old, new, table, one, two)
        for name, tensor in new.state_dict().items():
            if f"{start}{name}" in two and f"{start}{name}" not in seen:
                assert torch.equal(two[f"{start}{name}"], tensor), name
                seen.add(f"{start}{name}")
    state = tuned.state_dict()
    rest = two.keys() - seen
    assert rest
    for name in rest:
        assert not name.startswith(f"{path}.")
        assert torch.equal(two[name], state[name]), name
    assert set(second.moved) == {name for name in one if not torch.equal(one[name], two[name])}


def check_channels(start, old, new, table, one, two):
    """The channels are the same ones, found by the rows that the first kit has of them."""
    before = weight_OI(old.get_submodule(table.reads[0])).detach()
    rows = one[f"{start}{table.reads[0]}.weight"]
    kept = [next(c for c in range(len(before)) if torch.equal(before[c], row)) for row in rows]
    assert kept == sorted(kept)
    assert len(kept) < len(before)
    for path in table.reads:
        assert torch.equal(two[f"{start}{path}.weight"], weight_OI(new.get_submodule(path)).detach()[kept])
    change = (weight_OI(new.get_submodule(table.writes)) - weight_OI(old.get_submodule(table.writes))).detach()
    name = f"{start}{table.writes}.weight"
    torch.testing.assert_close(two[name], one[name] + change[:, kept], rtol=1e-4, atol=1e-6)
    for path in table.reads:
        if f"{start}{path}.bias" in one:
            assert torch.equal(two[f"{start}{path}.bias"], new.get_submodule(path).bias.detach()[kept])
    bias = f"{start}{table.writes}.bias"
    if bias in one:
        ours, theirs = (layer.get_submodule(table.writes).bias for layer in (old, new))
        moved = 0 if ours is None else (theirs - ours).detach()
        torch.testing.assert_close(two[bias], one[bias] + moved, rtol=1e-4, atol=1e-6)
    return {f"{start}{path}.{kind}" for path in (*table.reads, table.writes) for kind in ("weight", "bias")}


def test_what_moves_past_the_directions_and_channels_leaves_no_trace(tmp_path):
    """A change of what the first kit left out is not in the second one."""
    model, kit = made(tmp_path / "first", mlp="channels")
    one = load_file(kit.path / EMULATOR)
    tuned = tuned_layers(model, kit)
    layer, start = tuned.model.layers[1], "model.layers.1."
    left, right = projections(*(one[f"{start}self_attn.q_proj.{end}.weight"] for end in ("up", "down")))
    noise = torch.randn(left.shape[0], right.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = one[f"{start}mlp.up_proj.weight"]
    dropped = [c for c in range(48) if not any(torch.equal(layer.mlp.up_proj.weight[c], row) for row in rows)]
    assert dropped
    with torch.no_grad():
        layer.self_attn.q_proj.weight += (noise - left @ noise @ right).float()
        layer.mlp.up_proj.weight[dropped] += 1
        layer.mlp.gate_proj.weight[dropped] += 1
        layer.mlp.down_proj.weight[:, dropped] += 1
    second = next_kit(model, tuned, kit, tmp_path / "second")
    two = load_file(second.kit.path / EMULATOR)
    assert set(second.moved) <= {f"{start}self_attn.q_proj.down.weight"}
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_kit_of_half_precision_stays_as_it_was(tmp_path, dtype):
    model, kit = made(tmp_path / "first", dtype=dtype)
    second = next_kit(model, tuned_layers(model, kit), kit, tmp_path / "second")
    assert second.moved == ()
    tuned = changed(model)
    moved = load_file(next_kit(model, tuned, kit, tmp_path / "third").kit.path / EMULATOR)
    assert {t.dtype for t in moved.values()} == {dtype}
    for name in ("model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"):  # rounded once, not twice
        assert torch.equal(moved[name], tuned.state_dict()[name].to(dtype))


def test_a_tuned_model_in_fewer_bits_did_not_move_for_that(tmp_path):
    model, kit = made(tmp_path / "first")
    tuned = tuned_layers(model, kit).to(torch.bfloat16)
    assert next_kit(model, tuned, kit, tmp_path / "second").moved == ()


def test_layers_may_stay_in_their_files(tmp_path):
    model, kit = made(tmp_path / "first")
    tuned = changed(model)
    for name, what in (("base", model), ("tuned", tuned)):
        what.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    one = next_kit(model, tuned, kit, tmp_path / "one").kit
    there = (load_model(str(tmp_path / name), "float32", streamed=True)[0] for name in ("base", "tuned"))
    two = next_kit(*there, kit, tmp_path / "two").kit
    assert (one.path / EMULATOR).read_bytes() == (two.path / EMULATOR).read_bytes()
    assert one.digest == two.digest


def test_a_second_kit_is_a_kit(tmp_path):
    """It loads, runs, and can be signed."""
    pytest.importorskip("model_signing")
    model, kit = made(tmp_path / "first")
    private, public = make_keys(tmp_path, name="owner")
    made_kit = next_kit(model, changed(model), kit, tmp_path / "second", private).kit
    assert read_kit(made_kit.path, public).verified
    ids = torch.tensor([[5, 80, 91, 17]])
    with torch.no_grad():
        assert bool(load_emulator(made_kit.path)(ids).logits.isfinite().all())


def test_what_is_refused(tmp_path):
    model, kit = made(tmp_path / "first")
    tuned = tuned_layers(model, kit)
    deeper = base(layers=5, vocab_size=300).float()
    wider = base(layers=4, vocab_size=300, intermediate_size=52).float()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("")
    for (first, then, out), kind, words in [
        ((model, copy.deepcopy(model), "new"), KitError, "the tuned model is the base itself: plug a return in first"),
        ((tuned, model, "new"), KitError, "fingerprint"),
        ((model, deeper, "new"), KitError, "is not of one shape in the base and in the tuned model"),
        ((model, wider, "new"), KitError, r"mlp\.down_proj\.weight is not of one shape"),
        ((model, tuned, "used"), ModelError, "not empty"),
    ]:
        with pytest.raises(kind, match=words):
            next_kit(first, then, kit, tmp_path / out)
        assert not (tmp_path / "new").exists()
    spoiled = copy.deepcopy(tuned)
    spoiled.model.layers[1].mlp.up_proj.weight.data.fill_(float("nan"))
    with pytest.raises(KitError, match="NaN or infinite"):
        next_kit(model, spoiled, kit, tmp_path / "new")
    path = kit.path / EMULATOR
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(KitError, match=r"kit .*/first: emulator\.safetensors has the SHA-256"):
        next_kit(model, tuned, kit, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "used"]


def test_channels_that_are_alike_are_told_apart_by_their_order():
    """As where several never move, and their rows are zero."""
    every = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    assert _rows_of(every[[0, 1, 2, 3]], every, "").tolist() == [0, 1, 2, 3]
    assert _rows_of(every[[1, 2, 4]], every, "").tolist() == [1, 2, 4]
    with pytest.raises(KitError, match="none of the base's"):
        _rows_of(every[[3, 1]], every, "")


def test_channels_of_another_base_are_refused(tmp_path):
    """A forged kit: it names the base's fingerprint, and has rows that are not the base's."""
    other, strange = made(tmp_path / "strange", keep=0.4)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    forged = dataclasses.replace(
        strange, manifest=dataclasses.replace(strange.manifest, fingerprint=fingerprint(other))
    )
    with pytest.raises(KitError, match=r"channels of model\.layers\.\d\.mlp in the kit are none of the base's"):
        next_kit(other, changed(other), forged, tmp_path / "new")
