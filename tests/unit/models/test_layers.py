"""Decoder layers are found by structure, in every family and behind every wrapper."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import FAMILIES, tiny
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    PreTrainedModel,
)

from siftune.base.errors import LayerError
from siftune.models.adapters.attach import attach_adapter
from siftune.models.layers import find_layers


class DDPLike(nn.Module):
    """Keeps the model under `module`, as DistributedDataParallel does, and passes no attributes on."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Block(nn.Module):
    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(experts))

    def forward(self, hidden, mask=None):
        return self.up(hidden)


class OtherBlock(Block):
    """Another class of the same file."""


class Unrelated(nn.Module):
    """A block with another signature, which the tests place in another file."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(4, 4)

    def forward(self, states):
        return self.down(states)


class Bare(nn.Module):
    """A model outside transformers: no config, no get_input_embeddings."""

    def __init__(self, **lists: nn.ModuleList) -> None:
        super().__init__()
        self.token = nn.Embedding(8, 4)
        for name, blocks in lists.items():
            self.add_module(name, blocks)


def blocks(count: int, experts: int = 0) -> nn.ModuleList:
    return nn.ModuleList(Block(experts) for _ in range(count))


WRAPPERS = {
    "": lambda model: model,
    "module.": DDPLike,
    "_orig_mod.": torch.compile,
    "module._orig_mod.": lambda model: DDPLike(torch.compile(model)),
}


@pytest.mark.parametrize(
    ("family", "prefix"),
    [*((family, "module._orig_mod.") for family in FAMILIES), *(("llama", prefix) for prefix in WRAPPERS)],
)
def test_every_family_and_every_wrapper(family, prefix):
    model = tiny(family)
    bare = find_layers(model)
    assert len(bare.layers) == 4
    assert len({type(layer) for layer in bare.layers}) == 1
    assert "Block" in type(bare.layers[0]).__name__ or "Layer" in type(bare.layers[0]).__name__
    assert find_layers(WRAPPERS[prefix](model)).path == prefix + bare.path
    adapted = find_layers(WRAPPERS[prefix](attach_adapter(model, rank=2)))
    assert adapted.path == prefix + "base_model.model." + bare.path
    assert adapted.layers == bare.layers


@given(layers=st.integers(1, 4), experts=st.integers(0, 9))
def test_experts_never_win(layers, experts):
    model = Bare(tower=blocks(layers, experts))
    assert find_layers(model).path == "tower"
    assert find_layers(model).layers == list(model.tower)


def test_lists_of_plain_modules_do_not_count():
    model = Bare(norms=nn.ModuleList(nn.LayerNorm(4) for _ in range(9)), tower=blocks(2))
    assert find_layers(model).path == "tower"


def test_blocks_of_two_files_count_if_their_forwards_agree(monkeypatch):
    monkeypatch.setattr(OtherBlock, "__module__", "elsewhere")
    monkeypatch.setattr(Unrelated, "__module__", "elsewhere")
    assert len(find_layers(Bare(tower=nn.ModuleList([Block(), OtherBlock()]))).layers) == 2
    with pytest.raises(LayerError, match=r"tower \(2 × Block/Unrelated\)"):
        find_layers(Bare(tower=nn.ModuleList([Block(), Unrelated()])))


def test_layers_compiled_one_by_one():
    model = tiny("llama")
    model.model.layers[1] = torch.compile(model.model.layers[1])
    assert find_layers(model).layers == list(model.model.layers)


def test_vision_language_model_yields_the_language_layers():
    config = AutoConfig.for_model(
        "llava",
        text_config={
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "vocab_size": 96,
        },
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5,
            "num_attention_heads": 4, "image_size": 8, "patch_size": 4, "projection_dim": 16,
        },
    )  # fmt: skip
    found = find_layers(AutoModelForImageTextToText.from_config(config))
    assert (found.path, len(found.layers)) == ("model.language_model.layers", 2)


def encoder_decoder(decoder_layers: int) -> nn.Module:
    config = AutoConfig.for_model(
        "t5",
        d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=decoder_layers, num_heads=4, vocab_size=96,
        decoder_start_token_id=0,
    )  # fmt: skip
    return AutoModelForSeq2SeqLM.from_config(config)


@pytest.mark.parametrize("decoder_layers", [3, 2])
def test_encoder_and_decoder_are_ambiguous(decoder_layers):
    model = encoder_decoder(decoder_layers)
    listed = rf"encoder\.block \(3 × T5Block\), decoder\.block \({decoder_layers} × T5Block\)"
    with pytest.raises(LayerError, match=listed):
        find_layers(model)
    assert find_layers(model, "decoder.block").layers == list(model.decoder.block)


def test_two_lists_of_one_length_are_ambiguous():
    with pytest.raises(LayerError, match=r"left \(2 × Block\), right \(2 × Block\)"):
        find_layers(Bare(left=blocks(2), right=blocks(2)))
    assert find_layers(Bare(left=blocks(2), right=blocks(3))).path == "right"


def test_nothing_that_looks_like_layers():
    with pytest.raises(LayerError, match="Linear"):
        find_layers(nn.Linear(2, 2))


@pytest.mark.parametrize(("path", "prefix"), [("model.layers", ""), ("layers", "module._orig_mod.")])
def test_path_by_hand_looks_through_wrappers(path, prefix):
    model = tiny("llama")
    layers = list(model.model.layers)
    for wrapped in (WRAPPERS[prefix](model), WRAPPERS[prefix](attach_adapter(model, rank=2))):
        found = find_layers(wrapped, path)
        assert found.layers == layers
        assert found.path.startswith(prefix)
        assert wrapped.get_submodule(found.path) is model.model.layers
        assert find_layers(wrapped, found.path) == found


def test_path_by_hand_accepts_what_structure_refuses():
    assert find_layers(Bare(tower=nn.ModuleList([Block(), Unrelated()])), "tower").path == "tower"
    assert len(find_layers(Bare(tower=nn.Sequential(Block(), Block())), "tower").layers) == 2


@pytest.mark.parametrize(
    ("path", "there"), [("model.layer", "nothing"), ("model.norm", "a LlamaRMSNorm"), ("self_attn", "nothing")]
)
def test_wrong_path_by_hand(path, there):
    with pytest.raises(LayerError, match=rf"'{path}' but {there}.*model\.layers \(4 × LlamaDecoder"):
        find_layers(tiny("llama"), path)


def test_a_module_that_does_not_know_its_embeddings_may_hold_one_that_does():
    class Odd(PreTrainedModel):
        config_class = LlamaConfig

        def __init__(self, inner):
            super().__init__(LlamaConfig(attn_implementation="eager"))
            self.odd = inner
            self.more = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(9))  # longer, but no decoder

    model = Odd(tiny("llama"))
    with pytest.raises(NotImplementedError):
        model.get_input_embeddings()
    assert find_layers(model).path == "odd.model.layers"
