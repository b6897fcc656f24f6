"""Emulators: their limits, their shapes, and how they are made."""

import copy
import json

import pytest
import torch
from support.emulators import FAMILIES, base, calibration, emulator, logits, settings
from support.tokenizer import byte_tokenizer
from transformers import AutoModelForCausalLM

from siftune.base.errors import KitError, LayerError, ModelError, RecipeError, UnsupportedError
from siftune.models.families import family_of
from siftune.models.layers import find_layers
from siftune.offsite.emulator import make
from siftune.offsite.emulator.make import emulators
from siftune.offsite.emulator.model import FactoredLinear, Split, outer_names, weight_OI
from siftune.offsite.exchange.emulate import KitOptions, emulate
from siftune.offsite.exchange.load import load_emulator

METHODS = ("gradot", "layerdrop")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_everything_kept_is_the_base_model(family, method):
    model = base(family)
    batches = calibration(model)
    assert torch.equal(logits(emulator(model, batches, method=method, keep=1.0), batches[0]), logits(model, batches[0]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("basis", "mlp"), [("svd", "channels"), ("whitened", "channels"), ("whitened", "refit")])
def test_the_factored_emulator_equals_its_dense_product(family, basis, mlp):
    """A copy of the base, with products in the place of factors and zeros in the place of dropped channels."""
    model = base(family)
    batches = calibration(model)
    small = emulator(model, batches, keep=0.5, basis=basis, lambda_mlp=0.1, mlp=mlp)
    dense, matrices = copy.deepcopy(model), family_of(model.config)
    for number in range(1, 4):
        layer, thin = find_layers(dense).layers[number], find_layers(small).layers[number]
        for path in matrices.attention:
            factored = thin.get_submodule(path)
            assert isinstance(factored, FactoredLinear)
            product = factored.up.weight @ factored.down.weight
            weight_OI(layer.get_submodule(path)).data.copy_(product)
        _zero_dropped(layer, thin, matrices)
    torch.testing.assert_close(logits(small, batches[0]), logits(dense, batches[0]), rtol=1e-5, atol=1e-5)


def _zero_dropped(layer, thin, matrices):
    """Zero the writing columns of channels that are gone, and take over the others; the rows that read tell which."""
    whole, kept = (weight_OI(module.get_submodule(matrices.reads[0])) for module in (layer, thin))
    same = (whole[:, None] == kept[None]).all(-1)
    assert same.sum() == kept.shape[0] < whole.shape[0]
    found = same.int().argmax(0)
    assert torch.equal(found, found.sort().values), "an order that tells the ranking"
    writes = weight_OI(layer.get_submodule(matrices.writes)).data
    writes.zero_()
    writes[:, found] = weight_OI(thin.get_submodule(matrices.writes))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_an_emulator_is_smaller_generates_and_trains_its_outer_layers_alone(family, method):
    model = base(family)
    batches = calibration(model)
    small = emulator(model, batches, method=method, keep=0.5)
    unique = {p.data_ptr(): p.numel() for p in small.parameters()}
    assert sum(unique.values()) < sum(p.numel() for p in model.parameters())
    inputs = {name: batches[0][name][:1, :4] for name in ("input_ids", "attention_mask")}
    cached = small.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=True)
    assert torch.equal(cached, small.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False))
    small(**batches[0]).loss.backward()
    trained = {name for name, p in small.named_parameters() if p.grad is not None}
    outer = set(outer_names(small, Split(1, 1)).values())
    assert trained == {name for name, _ in small.named_parameters() if name in outer}


def test_layers_are_dropped_evenly_and_the_rest_is_the_base():
    model = base(layers=6)
    batches = calibration(model)
    small = emulator(model, batches, method="layerdrop", keep=0.5)
    expected = copy.deepcopy(model)
    expected.model.layers = torch.nn.ModuleList([expected.model.layers[i] for i in (0, 1, 4, 5)])
    for number, layer in enumerate(expected.model.layers):
        layer.self_attn.layer_idx = number
    expected.config.num_hidden_layers = 4
    assert torch.equal(logits(small, batches[0]), logits(expected, batches[0]))


def test_kinds_of_attention_go_with_the_layers():
    model = base("gemma2", layers=6)
    small = emulator(model, calibration(model), method="layerdrop", keep=0.75)
    assert small.config.layer_types == [model.config.layer_types[i] for i in (0, 1, 3, 4, 5)]
    assert small.config.layer_types != model.config.layer_types[:5]


def test_a_head_of_its_own_stays_although_the_config_says_it_is_tied(tmp_path):
    base(vocab_size=300, tie_word_embeddings=False).float().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    batches = calibration(model)
    emulate(model, byte_tokenizer(), batches, tmp_path / "kit", settings(keep=1.0))
    found = load_emulator(tmp_path / "kit", "float32")
    torch.testing.assert_close(logits(found, batches[0]), logits(model, batches[0]))


def test_batches_and_padding_do_not_matter():
    model = base()
    (whole,) = calibration(model, count=1, rows=4)
    split = [{k: v[i : i + 1] for k, v in whole.items()} for i in (2, 0, 3, 1)]
    padded = {
        "input_ids": torch.nn.functional.pad(whole["input_ids"], (0, 3), value=5),
        "attention_mask": torch.nn.functional.pad(whole["attention_mask"], (0, 3)),
        "labels": torch.nn.functional.pad(whole["labels"], (0, 3), value=-100),
    }
    results = [
        logits(emulator(model, batches, keep=0.6, lambda_mlp=0.2), whole) for batches in ([whole], split, [padded])
    ]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[2], results[0], rtol=1e-4, atol=1e-4)


def test_several_at_once_are_those_made_one_by_one():
    model = base()
    batches = calibration(model)
    choices = [
        settings(keep=0.5),
        settings(keep=0.7, basis="svd", lambda_attn=0.3),
        settings(method="layerdrop", keep=0.4),
    ]
    for choice, parts in zip(choices, emulators(model, batches, choices), strict=True):
        (alone,) = emulators(model, batches, [choice])
        assert alone.middle == parts.middle
        for name, tensor in alone.frozen.items():
            assert torch.equal(tensor, parts.frozen[name])


def test_trained_outer_layers_leave_the_base_alone():
    model = base()
    before = copy.deepcopy(model.state_dict())
    small = emulator(model, calibration(model), keep=0.5)
    with torch.no_grad():
        for p in small.parameters():
            if p.requires_grad:
                p.add_(1)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


class Cut(Exception):
    """Stands in for a lost connection."""


def test_a_cut_run_goes_on_and_ends_as_an_uncut_one(tmp_path, monkeypatch):
    model, tokenizer = base(vocab_size=300).float(), byte_tokenizer()
    batches = calibration(model)
    uncut = emulate(model, tokenizer, batches, tmp_path / "uncut", settings(keep=0.5))

    def cut(what, done, _):
        if (what, done) == ("compression", 2):
            raise Cut

    with pytest.raises(Cut):
        emulate(model, tokenizer, batches, tmp_path / "kit", settings(keep=0.5), progress=cut)
    assert not (tmp_path / "kit").exists()
    made = []
    original = make.compress_layer
    monkeypatch.setattr(make, "compress_layer", lambda *args: made.append(args[1]) or original(*args))
    kit = emulate(model, tokenizer, batches, tmp_path / "kit", settings(keep=0.5))
    assert made == [1]
    assert kit.digest == uncut.digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kit", "uncut"]


def test_weights_that_accelerate_keeps_elsewhere_are_refused(tmp_path):
    from accelerate import cpu_offload

    model, tokenizer = base(vocab_size=300).float(), byte_tokenizer()
    offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    with pytest.raises(KitError, match="no values"):
        emulate(offloaded, tokenizer, calibration(model), tmp_path / "kit", settings(keep=0.5))
    assert [*tmp_path.iterdir()] == []


def test_dtypes_of_the_kit(tmp_path):
    from support.kits import tensor_specs

    model = base(vocab_size=300).float()
    options = KitOptions(dtype=torch.bfloat16, outer_dtype=torch.float32)
    kit = emulate(model, byte_tokenizer(), calibration(model), tmp_path / "kit", settings(keep=0.5), options)
    assert {s.dtype for s in tensor_specs(kit.path / "emulator.safetensors").values()} == {"BF16"}
    assert {s.dtype for s in tensor_specs(kit.path / "adapter.safetensors").values()} == {"F32"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("parts", ["attention", "mlp"])
def test_a_kit_of_which_one_part_is_compressed_is_read_back(tmp_path, family, parts):
    model = base(family, vocab_size=300).float()
    batches = calibration(model)
    kit = emulate(model, byte_tokenizer(), batches, tmp_path / "kit", settings(keep=0.5, parts=parts))
    expected = logits(emulator(model, batches, keep=0.5, parts=parts), batches[0])
    torch.testing.assert_close(logits(load_emulator(kit.path), batches[0]), expected)
    assert not torch.allclose(expected, logits(model, batches[0]))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"keep": 0.0}, "keep is 0.0"),
        ({"keep": 1.1}, "keep is 1.1"),
        ({"lambda_mlp": -1.0}, "lambda_mlp is -1.0"),
        ({"lambda_attn": float("inf")}, "lambda_attn is inf"),
        ({"damping": 0.0}, "damping is 0.0"),
        ({"refit_damping": float("inf")}, "refit_damping is inf"),
        ({"method": "layerdrop", "lambda_attn": 0.1}, "layerdrop drops whole layers"),
        ({"method": "layerdrop", "parts": "mlp"}, "layerdrop drops whole layers"),
        ({"lambda_unit": "paper"}, "both λ are 0"),
        ({"parts": "mlp", "lambda_attn": 0.1}, "lambda_attn has no effect"),
        ({"parts": "attention", "lambda_mlp": 0.1}, "lambda_mlp has no effect"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, values, words):
    model = base()
    with pytest.raises(RecipeError, match=words):
        emulate(model, byte_tokenizer(), calibration(model), tmp_path / "kit", settings(**values))


def test_a_folder_in_use_is_refused_before_the_work(tmp_path):
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "mine").write_text("")
    model = base()
    with pytest.raises(ModelError, match="not empty"):
        emulate(model, byte_tokenizer(), calibration(model), tmp_path / "kit", settings())


@pytest.mark.parametrize("split", [Split(3, 2), Split(0, 0), Split(-1, 2)])
def test_a_split_that_leaves_nothing_is_refused(split):
    model = base()
    with pytest.raises(LayerError):
        emulators(model, calibration(model), [settings(split=split)])


def test_unknown_families_are_refused():
    model = base("bloom")
    with pytest.raises(UnsupportedError, match="bloom"):
        emulators(model, calibration(model), [settings()])


def test_layers_that_know_their_number_are_not_dropped():
    model = base("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UnsupportedError, match="scale_attn_by_inverse_layer_idx"):
        emulators(model, calibration(model), [settings(method="layerdrop", keep=0.5)])


def test_a_tokenizer_that_may_not_leave_is_refused_before_any_work(tmp_path):
    model = base("llama")  # 96 embeddings for more than 256 tokens
    told = []
    with pytest.raises(KitError, match="embeddings"):
        emulate(model, byte_tokenizer(), calibration(model), tmp_path / "kit", progress=lambda *one: told.append(one))
    assert told == list(tmp_path.iterdir()) == []


def test_a_config_that_no_kit_may_hold_is_refused_before_any_work(tmp_path):
    model = base(vocab_size=300).float()
    model.config.hidden_act = "a/b"
    told = []
    with pytest.raises(KitError, match="hidden_act is 'a/b'"):
        emulate(model, byte_tokenizer(), calibration(model), tmp_path / "kit", progress=lambda *one: told.append(one))
    assert told == list(tmp_path.iterdir()) == []
