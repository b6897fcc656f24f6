"""Thin returns: the factors of what LoRA added, and nothing that they do not say."""

import copy

import pytest
import torch
from support.kits import copied, edit, header_of, read_json, repair, write_header
from support.tiny_kit import SPLIT, base_model, save_kit

from siftune.base.errors import KitError
from siftune.models.adapters.attach import attach_adapter
from siftune.offsite.exchange.load import load_emulator
from siftune.offsite.exchange.plug import plug_in
from siftune.offsite.exchange.returned import Tuned, largest_rank, open_return, read_return, write_return
from siftune.offsite.exchange.tune import merged_layers, save_return, thin_layers
from siftune.offsite.kit.folder import load_weights
from siftune.offsite.kit.manifest import OUTER

NAME = "first.0.self_attn.q_proj.weight"
LAYERS = (0, 1, 3)


@pytest.fixture(scope="module")
def kits(tmp_path_factory):
    place = tmp_path_factory.mktemp("kits")
    return {family: save_kit(place / family, family=family) for family in ("llama", "gpt2", "opt", "gpt_neox")}


@pytest.fixture(scope="module")
def kit(kits):
    return kits["llama"]


def adapted(kit, kind="lora", rank=3, size=0.1, **settings):
    """The kit's emulator with an adapter in which every number has moved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = attach_adapter(load_emulator(kit.path), kind, rank, layers=LAYERS, **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return model


def shipped(kit):
    return load_weights(kit, OUTER)


@pytest.fixture(scope="module")
def sound(kit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("thin") / "return"
    save_return(folder, adapted(kit), kit)
    return folder


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_factors_multiply_to_what_peft_adds(kits, tmp_path, family, kind):
    """Against PEFT's own merge in float64, transposed weights and scales included."""
    kit = kits[family]
    model = adapted(kit, kind, alpha=5)
    state = copy.deepcopy(model.state_dict())
    save_return(tmp_path / "return", model, kit)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    wanted, before = merged_layers(model.double(), SPLIT), shipped(kit)
    with open_return(tmp_path / "return", kit) as found:
        assert {name.rpartition(".")[2] for name in found} == {"up", "down"}
        tuned = Tuned(before, found)
        assert set(tuned) == set(wanted) == set(before)
        for name, old in before.items():
            moved = not torch.equal(wanted[name].float(), old)
            assert moved == (f"{name}.up" in found)
            scale = float((wanted[name] - old.double()).abs().max())
            assert torch.allclose(tuned[name].double(), wanted[name], rtol=0, atol=1e-6 * scale + 1e-15), name


def test_what_is_read_is_what_a_whole_return_would_hold(kit, sound, tmp_path):
    model = adapted(kit)
    whole = write_return(tmp_path / "whole", merged_layers(model, SPLIT), kit)
    assert (sound / OUTER).stat().st_size < 0.6 * (whole / OUTER).stat().st_size
    ours, theirs = read_return(sound, kit), read_return(whole, kit)
    assert ours.keys() == theirs.keys() == kit.manifest.outer.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-7)


def test_factors_tell_nothing_but_their_product(kit, tmp_path):
    """Another pair with the same product, as another seed gives it: the same return."""
    one, other = adapted(kit), adapted(kit)
    turn = torch.randn(3, 3, generator=torch.Generator().manual_seed(5))
    for module in other.modules():
        if hasattr(module, "lora_A") and module.lora_A:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            a.data, b.data = turn @ a.data, b.data @ torch.linalg.inv(turn)
    ours, theirs = (thin_layers(model, kit) for model in (one, other))
    for name, factor in ours.items():
        torch.testing.assert_close(theirs[name], factor, rtol=1e-3, atol=1e-4)
    up, down = ours[f"{NAME}.up"], ours[f"{NAME}.down"]
    torch.testing.assert_close(up.T @ up, down @ down.T, rtol=1e-4, atol=1e-5)  # shared evenly
    gram = (up.T @ up).diagonal()
    torch.testing.assert_close(up.T @ up, gram.diag(), rtol=1e-4, atol=1e-5)  # in directions at right angles


def trained_norm(model):
    next(p for name, p in model.named_parameters() if "layers.0.input_layernorm" in name).requires_grad_()
    return model


WHOLE = {
    "dora": lambda kit: adapted(kit, "dora"),
    "dora that does not train any more": lambda kit: adapted(kit, "dora").requires_grad_(False),
    "no adapter": lambda kit: load_emulator(kit.path),
    "a rank that saves nothing": lambda kit: adapted(kit, rank=32),
    "a norm that trains": lambda kit: trained_norm(adapted(kit)),
}


@pytest.mark.parametrize("what", WHOLE)
def test_what_factors_cannot_say_goes_back_whole(kit, tmp_path, what):
    model = WHOLE[what](kit)
    save_return(tmp_path / "return", model, kit)
    with open_return(tmp_path / "return", kit) as found:
        assert set(found) == set(kit.manifest.outer)
    assert "lora" not in read_json(tmp_path / "return" / "manifest.json")
    wanted = merged_layers(model, SPLIT)
    assert all(torch.equal(t, wanted[name]) for name, t in read_return(tmp_path / "return", kit).items())


def test_an_adapter_that_never_moved_changes_nothing(kit, tmp_path):
    model = attach_adapter(load_emulator(kit.path), rank=2, layers=LAYERS)
    save_return(tmp_path / "return", model, kit)
    found = read_return(tmp_path / "return", kit)
    assert all(torch.equal(found[name], tensor) for name, tensor in shipped(kit).items())


def test_a_factor_that_is_not_finite_is_not_written(kit, tmp_path):
    model = adapted(kit)
    next(p for name, p in model.named_parameters() if "lora_B" in name).data[0, 0] = float("nan")
    with pytest.raises(KitError, match=r"what was tuned: first\.0\..*\.up has values that are NaN or infinite"):
        save_return(tmp_path / "return", model, kit)
    assert not [*tmp_path.iterdir()]


def test_it_is_plugged_into_the_base_and_not_into_the_kits_copy(tmp_path):
    """The kit holds bfloat16: what it rounded away is still in the base afterwards."""
    base = base_model()
    kit = save_kit(tmp_path / "kit")
    save_return(tmp_path / "return", adapted(kit, size=0.01), kit)
    state = copy.deepcopy(base.state_dict())
    with open_return(tmp_path / "return", kit) as found:
        plug_in(base, kit, found, max_update=5)
        product = found[f"{NAME}.up"].double() @ found[f"{NAME}.down"].double()
    key = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(base.state_dict()[key], (state[key].double() + product).float())
    assert torch.equal(base.state_dict()["model.norm.weight"], state["model.norm.weight"])


# --- refusals of untrusted returns


@pytest.fixture
def folder(sound, tmp_path):
    return copied(sound, tmp_path / "return")


def with_tensors(folder, change):
    """Write the tensors anew, and bring the manifest in line."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / OUTER)
    tensors = change(tensors) or tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / OUTER, {"format": "pt"})
    repair(folder)


def changed(value, change):
    change(value)
    return value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda m: m["lora"].update({NAME: 4}),
            r"q_proj\.weight\.\w+ is F32 \[.*\], but manifest\.json: lora says F32",
        ),
        (
            lambda m: m["lora"].update({NAME: 17}),
            r"lora\.first\.0\.self_attn\.q_proj\.weight is 17, not a whole number",
        ),
        (lambda m: m["lora"].update({NAME: 0}), "is 0, not a whole number from 1 to 15"),
        (lambda m: m["lora"].update({NAME: True}), "is True, not a whole number"),
        (lambda m: m["lora"].update({NAME: 10**9}), "is 1000000000, not a whole number"),
        (lambda m: m["lora"].update({"first.9.x.weight": 3}), r"lora has the unknown key 'first\.9\.x\.weight'"),
        (lambda m: m["lora"].update({"first.0.input_layernorm.weight": 1}), "no factors are smaller than itself"),
        (
            lambda m: m["lora"].pop(NAME) is None,
            r"has a tensor 'first\.0\.self_attn\.q_proj\.weight\.\w+', which manifest\.json: lora lacks",
        ),
        (lambda m: m.update(lora={}), "lora has 0 entries"),
        (lambda m: m.update(lora=[NAME]), "lora is "),
        (lambda m: m.pop("lora") is None, "adapter.safetensors has no tensor"),
    ],
)
def test_every_rank_is_held_to_the_kit(kit, folder, change, words):
    edit(folder, "manifest.json", lambda m: changed(m, change))
    with pytest.raises(KitError, match=words), open_return(folder, kit):
        pass


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{NAME}.up") is None, r"has no tensor 'first\.0\.self_attn\.q_proj\.weight\.up'"),
        (
            lambda t: {**t, NAME: torch.ones(32, 32)},
            "has a tensor 'first.0.self_attn.q_proj.weight', which .* lacks",
        ),
        (lambda t: {**t, f"{NAME}.up": t[f"{NAME}.up"].T}, r"is F32 \[3, 32\], but"),
        (lambda t: {**t, f"{NAME}.up": t[f"{NAME}.up"].bfloat16()}, r"is BF16 \[32, 3\], but"),
        (lambda t: t[f"{NAME}.up"][1, 1].fill_(float("nan")) is None, "NaN or infinite"),
        (lambda t: t[f"{NAME}.down"][1, 1].fill_(-float("inf")) is None, "NaN or infinite"),
        (lambda t: t[f"{NAME}.down"][1, 1].fill_(7e4) is None, "has the value 70000; up to 65504"),
    ],
)
def test_every_factor_is_held_to_its_rank(kit, folder, change, words):
    with_tensors(folder, lambda t: None if (found := change(t)) in (True, False) else found)
    with pytest.raises(KitError, match=words), open_return(folder, kit):
        pass


@pytest.mark.parametrize(
    ("up", "down", "words"), [(6e4, 6e4, "up to 65504 is allowed"), (3.0, 3.0, "times its norm, and must stay below")]
)
def test_the_product_is_held_to_what_whole_tensors_are(kit, folder, up, down, words):
    """Factors that are sound by themselves, and a product that is not."""
    with_tensors(
        folder, lambda t: {**t, f"{NAME}.up": torch.full((32, 3), up), f"{NAME}.down": torch.full((3, 32), down)}
    )
    base = base_model()
    before = copy.deepcopy(base.state_dict())
    with open_return(folder, kit) as found, pytest.raises(KitError, match=words):
        plug_in(base, kit, found)
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())


def pair(name, up, down):
    return {f"{name}.up": torch.zeros(up), f"{name}.down": torch.zeros(down)}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{NAME}.up": torch.zeros(32, 2)}, "is not a pair of factors"),
        (pair(NAME, (32, 2), (3, 32)), "do not fit"),
        (pair("x", (32, 2), (2, 32)), "'x' is none of the outer layers'"),
        ({**pair(NAME, (32, 2), (2, 32)), NAME: torch.ones(32, 32)}, "not a pair"),
        (pair("last.0.input_layernorm.weight", (32, 1), (1, 1)), "do not fit"),
    ],
)  # fmt: skip
def test_factors_in_memory_are_held_to_the_base_too(kit, tensors, words):
    base = base_model()
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(KitError, match=words):
        plug_in(base, kit, tensors)
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())


def test_the_largest_rank_is_the_last_that_saves_a_byte(kit):
    for spec in kit.manifest.outer.values():
        rank = largest_rank(spec)
        if len(spec.shape) == 2:
            assert 4 * rank * sum(spec.shape) < spec.bytes <= 4 * (rank + 1) * sum(spec.shape)
        else:
            assert rank == 0


def test_the_header_alone_does_not_make_it_thin(kit, sound, folder):
    header, data = header_of(folder / OUTER)
    header["first.0.x.up"] = header.pop(f"{NAME}.up")
    write_header(folder / OUTER, header, data)
    repair(folder)
    with pytest.raises(KitError, match="has no tensor"), open_return(folder, kit):
        pass
