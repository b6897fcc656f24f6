"""Values of a config.json with which a model fails or blows up later, for every family; and those of real models."""

import pytest
from support.kits import contents
from transformers import CONFIG_MAPPING

from siftune.base.errors import KitError
from siftune.models.families import FAMILIES
from siftune.offsite.kit import config, ranges
from siftune.offsite.kit.config import check_settings, make_config, scrub
from siftune.offsite.kit.ranges import check_range

NO_SIZE = (0, -1, 1.0, True, "1", None, [], 10**9)
NO_TRUTH = (0, 1, 1.0, None, "true", [])
NO_CHANCE = (1, 1.0, -0.1, 2, 1e300, True, "0.1", None)
NO_TOKEN = (-1, 1.0, True, "1", [], [-1], [1.0], [None], 10**9)
NO_EPSILON = (0, 0.0, -1e-6, 1e-300, 1, 1e15, True, "1e-5", None)
NO_SCALE = (0, -0.02, 1e300, "x", True)
BAD = {
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "n_embd", "intermediate_size", "ffn_dim", "num_attention_heads", "n_head",
         "query_pre_attn_scalar", "max_position_embeddings", "n_positions", "num_hidden_layers", "n_layer"), NO_SIZE),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "n_inner", "word_embed_proj_dim"), (*NO_SIZE[:5], 10**9)),
    "sliding_window": (*NO_SIZE[:5], 10**9),
    **dict.fromkeys(("max_window_layers", "pretraining_tp"), (-1, 1.0, True, "1", 10**9)),
    **dict.fromkeys(("attention_dropout", "dropout", "hidden_dropout", "classifier_dropout", "resid_pdrop",
                     "embd_pdrop", "attn_pdrop", "summary_first_dropout"), NO_CHANCE),
    "layerdrop": (0.1, 1, -1, True, None),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), NO_TOKEN),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), NO_EPSILON),
    **dict.fromkeys(("initializer_range", "init_std"), (-0.1, 11, 1e300, "x", True, None)),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping"), NO_SCALE),
    **dict.fromkeys(("use_cache", "tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window",
                     "do_layer_norm_before", "_remove_final_layer_norm", "enable_bias", "layer_norm_elementwise_affine",
                     "use_parallel_residual", "is_decoder", "scale_attn_weights", "scale_attn_by_inverse_layer_idx",
                     "reorder_and_upcast_attn", "summary_use_proj", "summary_proj_to_labels"), NO_TRUTH),
    **dict.fromkeys(("use_bidirectional_attention", "add_cross_attention"), (True, 1, "yes")),
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), ("xielu", "prelu", 1, None, ["silu"])),
    **dict.fromkeys(("summary_type", "model_type", "dtype"), ("a/b", 1, None)),
    "summary_activation": ("a/b", 1),
    "layer_types": ([], ["linear_attention"], "full_attention", [None], ["full_attention"] * 2000),
    "rope_parameters": ([], 1, {"x": 1}),
}  # fmt: skip
BAD_ROTARY = {
    "rope_theta": (0, -1e4, 1, 1e300, "x", True, None),
    "rope_type": ("nonsense", 1, None, ["linear"]),
    "partial_rotary_factor": (0, -1, 1.5, True, None),
    **dict.fromkeys(("factor", "attention_factor"), (0, -1, 1e300, True, None)),
    **dict.fromkeys(("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"), (0, -1, 1e300, True)),
    **dict.fromkeys(("mscale", "mscale_all_dim"), (0, -1, 1e300, True)),
    "original_max_position_embeddings": (0, 1, -1, 64.0, True, 10**9),
    **dict.fromkeys(("short_factor", "long_factor"), ([], [0.0], [-1.0], [1e300], ["x"], 1.0, [1.0] * 2000)),
    "truncate": (0, 1, None, "x"),
}


def test_every_setting_of_every_family_has_a_range():
    known = set().union(*map(config._known, FAMILIES))
    assert known == set(ranges._RULES)
    assert known == set(BAD)
    assert set(ranges.ROTARY) == set(BAD_ROTARY)


@pytest.mark.parametrize("name", BAD)
def test_values_with_which_a_model_fails_are_refused(name):
    for value in BAD[name]:
        with pytest.raises(KitError, match=rf"^f: {name}\b"):
            check_range(name, value, f"f: {name}")


@pytest.mark.parametrize("name", BAD_ROTARY)
def test_so_are_rotary_settings_also_where_there_are_two_sets(name):
    for value in BAD_ROTARY[name]:
        for whole in ({name: value}, {"sliding_attention": {}, "full_attention": {name: value}}):
            with pytest.raises(KitError, match=rf"^f(\.full_attention)?\.{name}\b"):
                check_range("rope_parameters", whole, "f")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rope_type": "linear"}, "f has no factor, which rope_type linear needs"),
        ({"rope_type": "dynamic"}, "f has no factor"),
        ({"rope_type": "yarn", "factor": 2}, "f has no original_max_position_embeddings"),
        (
            {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 1.0],
             "original_max_position_embeddings": 8},
            r"f\.long_factor has 2 numbers, but short_factor has 1",
        ),
        (
            {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4,
             "original_max_position_embeddings": 8},
            "low_freq_factor is 4, but must be below high_freq_factor, which is 4",
        ),
    ],
)  # fmt: skip
def test_rotary_settings_that_do_not_fit_each_other(settings, words):
    with pytest.raises(KitError, match=words):
        check_range("rope_parameters", settings, "f")


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_transformers_presets_for_a_family_is_allowed(kind):
    settings = scrub(CONFIG_MAPPING[kind](), "F32")
    assert make_config(check_settings(settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768,
         "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707, "truncate": False},
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000},
        {"rope_type": "longrope", "short_factor": [1.0, 1.05], "long_factor": [1.1, 64], "rope_theta": 1e4,
         "original_max_position_embeddings": 4096, "attention_factor": 1.19},
        {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
         "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
    ],
)  # fmt: skip
def test_rotary_settings_of_real_models_are_allowed(settings):
    check_range("rope_parameters", settings, "f")


def test_what_is_left_out_counts_as_the_class_fills_it_in():
    settings = scrub(contents("gpt2").config, "F32")
    del settings["bos_token_id"]
    with pytest.raises(KitError, match=r"config\.json: bos_token_id is 50256, but the last of 320 tokens"):
        make_config(settings)


def test_a_token_that_the_vocabulary_lacks_leaves_as_none():
    base = contents().config
    base.pad_token_id, base.bos_token_id, base.eos_token_id = -1, 400, [2, 400]
    settings = scrub(base, "F32")
    assert [settings[f"{kind}_token_id"] for kind in ("pad", "bos", "eos")] == [None, None, None]
    base.pad_token_id, base.eos_token_id = 319, [2, 3]
    assert (scrub(base, "F32")["pad_token_id"], scrub(base, "F32")["eos_token_id"]) == (319, [2, 3])


def test_a_window_must_be_there_where_layers_use_it():
    settings = scrub(contents("gemma2").config, "F32") | {"sliding_window": None}
    with pytest.raises(KitError, match="layer_types has sliding_attention, but there is no sliding_window"):
        make_config(settings)


def test_settings_of_a_later_transformers_are_held_to_plain_values():
    for value in ("/etc/x", {"a": 1}, [[1]], 1e300, float("nan")):
        with pytest.raises(KitError, match=r"^f\b"):
            check_range("new_setting", value, "f")
    for value in ("word", 1, 1.5, True, None, [1, 2]):
        check_range("new_setting", value, "f")
