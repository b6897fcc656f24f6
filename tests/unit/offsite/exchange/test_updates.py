"""How far a return moved: against plain sums, and what of it is refused, by plug and by verify in the same words."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from support.emulators import FAMILIES, base, calibration, settings
from support.tokenizer import byte_tokenizer

from siftune.base.errors import KitError
from siftune.models.families import family_of
from siftune.models.layers import find_layers
from siftune.offsite.emulator.model import Split, outer_names
from siftune.offsite.exchange.emulate import KitOptions, emulate
from siftune.offsite.exchange.plug import plug_in
from siftune.offsite.exchange.updates import check_return, compare

GAIN, UP = "first.0.input_layernorm.weight", "first.0.mlp.up_proj.weight"


def length(numbers):
    return math.sqrt(sum(number**2 for number in numbers))


def outer_of(model):
    """Copies of the outer layers' tensors."""
    state = model.state_dict()
    return {neutral: state[name].clone() for neutral, name in outer_names(model, Split(1, 1)).items()}


def test_against_sums_over_single_numbers():
    """The outer layers of a model with matrices, biases and norms, half of them in Gemma's way."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "first.0.up.weight": (3, 4), "first.0.up.bias": (3,), "first.0.norm.weight": (4,), "first.0.scale": (2,),
        "last.0.norm.weight": (4,), "last.0.norm.bias": (4,), "last.1.down.weight": (2, 5),
    }  # fmt: skip
    before = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    after = {name: t.float() + 0.1 * torch.randn(t.shape, generator=generator) for name, t in before.items()}
    old, new = ({n: t.flatten().tolist() for n, t in tensors.items()} for tensors in (before, after))
    for model_type, shift in (("llama", 0), ("gemma2", 1)):
        report = compare(before, after, 3.0, model_type)
        for name, update in report.tensors.items():
            measured = [number + shift for number in old[name]] if name.endswith("norm.weight") else old[name]
            if name.endswith(".bias"):
                measured = old[name] + old[name.replace("bias", "weight")]
            change = length(b - a for a, b in zip(old[name], new[name], strict=True))
            assert update.relative == pytest.approx(change / length(measured), rel=1e-9), name
            lost = length(float(torch.tensor(b).bfloat16()) - b for b in new[name])
            assert (update.change, update.lost) == pytest.approx((change, lost), rel=1e-9)
        assert list(report.layers) == ["first.0", "last.0", "last.1"]
        for place, update in report.layers.items():
            pairs = [p for n in shapes if n.startswith(place) for p in zip(old[n], new[n], strict=True)]
            assert update.relative == pytest.approx(length(b - a for a, b in pairs) / length(a for a, _ in pairs))
        assert report.largest == max(shapes, key=lambda n: report.tensors[n].relative)
        assert report.to_dict()["tensors"] == {name: update.relative for name, update in report.tensors.items()}


@pytest.mark.parametrize(("to", "refused"), [(5.0, True), (3.0, True), (4.99, False), (3.01, False), (4.0, False)])
@pytest.mark.parametrize("shape", [(4, 4), (4,)])
def test_a_quarter_is_too_far(to, refused, shape):
    before = {"first.0.a.weight": torch.full(shape, 4.0), "first.0.b.weight": torch.ones(400, 400)}
    report = compare(before, {**before, "first.0.a.weight": torch.full(shape, to)})
    if refused:
        with pytest.raises(KitError, match=r"first\.0\.a\.weight moved by 0\.25 times .* must stay below 0\.25"):
            report.check()
    else:
        report.check()


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_without_weight_are_silent_but_for_those_that_are_centred(family):
    """What the table of families says is what transformers does."""
    model = base(family)
    norms = {n: m for n, m in find_layers(model).layers[0].named_modules() if getattr(m, "weight", None) is not None}
    norms = {name: module for name, module in norms.items() if module.weight.ndim == 1}
    assert norms
    for module in norms.values():
        x = torch.randn(3, len(module.weight), dtype=torch.float64)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
            assert bool(module(x).any()) == family_of(model.config).centred_norms


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_every_tensor_that_is_silenced_is_refused_by_name(family):
    """A norm without gain or a matrix of zeros: each by itself."""
    model = base(family)
    before, kind = outer_of(model), model.config.model_type
    for name, tensor in before.items():
        if name.endswith("weight"):
            silent = -1.0 if tensor.ndim == 1 and family_of(model.config).centred_norms else 0.0
            with pytest.raises(KitError, match=rf"return: {name} moved by 1 times its norm"):
                compare(before, {**before, name: torch.full_like(tensor, silent)}, 0.25, kind).check()


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_a_matrix_that_was_replaced_is_refused_whatever_its_scale(scale):
    generator = torch.Generator().manual_seed(0)
    before = {"first.0.w": torch.randn(40, 40, generator=generator), "first.0.v": torch.ones(400, 40)}
    with pytest.raises(KitError, match=r"first\.0\.w moved by"):
        compare(before, {**before, "first.0.w": scale * torch.randn(40, 40, generator=generator)}, 0.99).check()


def test_biases_that_are_zero_may_move_as_their_weights_may():
    before = {"first.0.a.weight": torch.ones(4, 4), "first.0.a.bias": torch.zeros(4)}
    compare(before, {**before, "first.0.a.bias": torch.full((4,), 0.49)}).check()
    with pytest.raises(KitError, match=r"first\.0\.a\.bias moved by 0\.255 times"):
        compare(before, {**before, "first.0.a.bias": torch.full((4,), 0.51)}).check()


@pytest.mark.parametrize("value", [1e-45, 1e-30, 1.0, 1e38])
@pytest.mark.parametrize("shape", [(2, 2), (2,)])
def test_what_was_zero_must_stay_so_where_nothing_measures_it(value, shape):
    before = {"first.0.a.weight": torch.zeros(shape), "first.0.b.weight": torch.eye(3)}
    report = compare(before, {**before, "first.0.a.weight": torch.full(shape, value)}, 1e30)
    assert report.tensors["first.0.a.weight"].relative is None
    with pytest.raises(KitError, match=r"first\.0\.a\.weight was zero"):
        report.check()
    compare(before, before).check()


@pytest.mark.parametrize("unit", [1e-45, 1e-38, 1e-20, 1e20, 1e37])
def test_tiny_and_huge_numbers_are_measured_as_others(unit):
    """Neither squares that vanish nor such that overflow, in either direction."""
    numbers = torch.full((2, 2), 1e5 if unit < 1e-20 else 1.0)
    before = {"first.0.a.weight": (numbers.double() * unit).float()}
    moved = {"first.0.a.weight": (numbers.double() * unit * 1.2).float()}
    assert compare(before, moved).tensors["first.0.a.weight"].relative == pytest.approx(0.2, rel=1e-4)
    compare(before, moved).check()
    with pytest.raises(KitError, match="must stay below"):
        compare(before, {"first.0.a.weight": torch.full((2, 2), 3e38)}).check()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused(value):
    before = {"first.0.a.weight": torch.ones(2, 2)}
    after = torch.ones(2, 2)
    after[0, 1] = value
    with pytest.raises(KitError, match=r"first\.0\.a\.weight .*not finite"):
        compare(before, {"first.0.a.weight": after})


def test_numbers_too_large_for_the_bases_dtype_are_refused():
    before = {"first.0.a.weight": torch.full((4,), 6e4).half()}
    after = {"first.0.a.weight": torch.tensor([7e4, 6e4, 6e4, 6e4])}
    with pytest.raises(KitError, match=r"a\.weight.*too large for torch\.float16"):
        compare(before, after)


# --- verify and plug


DTYPES = {
    "as usual": (torch.float32, KitOptions()),
    "half": (torch.bfloat16, KitOptions()),
    "rounded": (torch.float32, KitOptions(outer_dtype=torch.bfloat16)),
    "float16": (torch.float16, KitOptions(outer_dtype=torch.float16)),
}


@pytest.fixture(scope="module", params=DTYPES)
def parties(request, tmp_path_factory):
    """The owner's model and kit."""
    dtype, options = DTYPES[request.param]
    model = base("qwen2", layers=3, vocab_size=300).to(dtype)
    folder = tmp_path_factory.mktemp("owner") / "kit"
    made = copy.deepcopy(model).float()
    options = KitOptions(dtype=dtype, outer_dtype=options.outer_dtype)
    return model, emulate(made, byte_tokenizer(), calibration(made), folder, settings(keep=0.5), options)


def outcome(call):
    try:
        return call().to_dict()
    except KitError as error:
        return str(error)


RETURNS = {
    "untouched": (lambda t: None, "largest"),
    "a little": (lambda t: [x.mul_(1.02) for x in t.values()], "largest"),
    "just below": (lambda t: t[UP].mul_(1.2), "largest"),
    "too far": (lambda t: t[UP].mul_(1.3), f"{UP} moved by 0.3"),
    "zeros": (lambda t: [x.zero_() for x in t.values()], "moved by 1 times"),
    "a norm of zeros": (lambda t: t[GAIN].zero_(), f"{GAIN} moved by 1 times"),
    "a layer for another": (
        lambda t: [t[n].copy_(t[n.replace("first", "last")]) for n in t if n.startswith("first")],
        "must stay below",
    ),
    "the largest number": (lambda t: t[UP][0].fill_(torch.finfo(t[UP].dtype).max), "return"),
    "one number of 6e4": (lambda t: t[UP][0, :1].fill_(6e4), "times its norm"),
    "NaN": (lambda t: t[UP][0, :1].fill_(math.nan), "numbers that are not finite"),
    "one missing": (lambda t: t.pop(UP), f"{UP} is missing"),
    "another shape": (lambda t: t.update({UP: t[UP].T}), "has the shape"),
}


@pytest.mark.parametrize("name", RETURNS)
def test_verify_says_what_plug_says(parties, name):
    model, kit = parties
    change, words = RETURNS[name]
    returned = load_file(kit.path / "adapter.safetensors")
    change(returned)
    by_kit = outcome(lambda: check_return(kit, returned))
    assert words in by_kit, by_kit
    assert by_kit == outcome(lambda: plug_in(copy.deepcopy(model), kit, returned))


def test_verify_holds_the_kit_to_what_was_read(parties, tmp_path):
    """The outer layers that a return is compared with are those that were checked."""
    import dataclasses
    import shutil

    _, kit = parties
    moved = dataclasses.replace(kit, path=tmp_path / "kit")
    shutil.copytree(kit.path, moved.path)
    returned = load_file(kit.path / "adapter.safetensors")
    check_return(moved, returned)
    path = moved.path / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(KitError, match=r"kit .*/kit: adapter\.safetensors has the SHA-256"):
        check_return(moved, returned)
