import pytest
import torch
from support.kits import contents
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from siftune.base.errors import KitError
from siftune.offsite.emulator.model import build
from siftune.offsite.kit import config as trial
from siftune.offsite.kit.config import try_model

YARN = {"factor": 2.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
KINDS = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": YARN,
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32},
    "llama3": {**YARN, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


def model(family="llama", **overrides):
    parts = contents(family, **overrides)
    return build(parts.config, parts.split, parts.middle)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_rotary_embedding_runs(kind):
    try_model(model(rope_parameters={"rope_theta": 1e4, "rope_type": kind, **KINDS[kind]}), "f")


def test_two_sets_of_rotary_settings_run():
    try_model(model("gemma3_text"), "f")


def test_numbers_that_do_not_fit_the_long_rows_are_refused():
    """Only rows past `original_max_position_embeddings` use them: nothing would show in a short trial."""
    settings = {**KINDS["longrope"], "rope_type": "longrope", "rope_theta": 1e4, "long_factor": [1.0] * 3}
    with pytest.raises(KitError, match=r"f: the model of it cannot run \("):
        try_model(model(rope_parameters=settings), "f")


def test_a_position_past_the_last_is_tried(monkeypatch):
    """Only there `dynamic` takes other numbers."""
    seen, compute = [], ROPE_INIT_FUNCTIONS["dynamic"]

    def watched(config, device=None, seq_len=None, **options):
        seen.append(None if seq_len is None else int(seq_len))
        return compute(config, device, seq_len, **options)

    monkeypatch.setitem(ROPE_INIT_FUNCTIONS, "dynamic", watched)
    try_model(model(rope_parameters={"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}), "f")
    assert seen[-1] == 65  # of 64


def test_angles_must_be_finite():
    built = model()
    built.config.rope_parameters["rope_theta"] = float("nan")
    with pytest.raises(KitError, match="f: rope_parameters make angles that are not finite"):
        try_model(built, "f")


def test_neither_memory_nor_random_numbers_are_used(monkeypatch):
    built = model(attention_dropout=0.5)
    before = torch.get_rng_state()
    made = []
    monkeypatch.setattr(trial, "_angles", lambda module: made.append(module) or [])
    try_model(built, "f")
    assert made
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.device.type for p in built.parameters()} == {"meta"}
