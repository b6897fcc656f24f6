"""Values of a config.json with which a model fails or blows up later, for every family; and those of real models."""

import pytest
from support.kits import contents
from transformers import CONFIG_MAPPING

from siftune.base.errors import KitError
from siftune.models.families import FAMILIES
from siftune.offsite.kit.config import check_settings, make_config, scrub
from siftune.offsite.kit.ranges import check_range

NO_SIZE = (0, -1, 1.0, True, "1", None, [], 10**9)
NO_CHANCE = (1, 1.0, -0.1, 2, 1e300, True, "0.1", None)
NO_TOKEN = (-1, 1.0, True, "1", [], [-1], [1.0], [None], 10**9)
BAD = {
    "vocab_size": NO_SIZE,
    "num_attention_heads": NO_SIZE,
    "num_hidden_layers": (*NO_SIZE, 1, 513),
    "num_key_value_heads": (*NO_SIZE[:5], 10**9),
    "attention_dropout": NO_CHANCE,
    "layerdrop": (0.1, 1, -1, True, None),
    "pad_token_id": NO_TOKEN,
    "rms_norm_eps": (0, 0.0, -1e-6, 1e-300, 1, 1e15, True, "1e-5", None),
    "final_logit_softcapping": (0, -0.02, 1e300, "x", True),
    "use_bidirectional_attention": (True, 1, "yes"),
    "rope_parameters": ([], 1, {"x": 1}, {"full_attention": {"x": 1}}, {"rope_theta": {}}, {"rope_type": "a b"}),
    "new_setting": ("/etc/x", {"a": 1}, [[1]], 1e300, float("nan")),
}


@pytest.mark.parametrize("name", BAD)
def test_values_with_which_a_model_fails_are_refused(name):
    for value in BAD[name]:
        with pytest.raises(KitError, match=rf"^f: {name}\b"):
            check_range(name, value, f"f: {name}")


def test_other_settings_are_plain_values():
    for value in ("word", 1, 1.5, True, None, [1, 2]):
        check_range("new_setting", value, "f")


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_transformers_presets_for_a_family_is_allowed(kind):
    settings = scrub(CONFIG_MAPPING[kind](), "F32")
    assert make_config(check_settings(settings))


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
