"""Saved models and tokenizers load in this transformers and in 4.57, if SIFTUNE_TRANSFORMERS_4 names its folder."""

import json
import os
import subprocess
import sys

import pytest
import torch
from support.tiny import batch, tiny
from support.tokenizer import byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from siftune.models.save import save_model, save_tokenizer, with_older_rope

OLDER = os.environ.get("SIFTUNE_TRANSFORMERS_4")
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip

READ = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4."), transformers.__version__
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="eager").eval()
saved = torch.load(sys.argv[1] + "/saved.pt")
with torch.no_grad():
    logits = model(**saved["batch"]).logits
kept = saved["batch"]["attention_mask"].bool()
torch.testing.assert_close(logits[kept], saved["logits"][kept], rtol=1e-3, atol=1e-3)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
encoded = tokenizer("add 12 and 30!")
assert encoded["input_ids"] == saved["ids"]
assert list(encoded) == saved["names"]
assert set(saved["special"]) <= set(tokenizer.all_special_tokens)
"""


def unusual(family, **rope):
    """A tiny model whose rotary embeddings are not its family's defaults."""
    config = tiny(family).config
    parameters = getattr(config, "rope_parameters", None) or {}
    for part in parameters.values() if "full_attention" in parameters else [parameters]:
        part.update(rope_theta=3 * part.get("rope_theta", 1e4), **rope)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def save(model, tokenizer, folder):
    save_model(model, folder)
    save_tokenizer(tokenizer, folder)
    given = {name: values for name, values in batch(model).items() if name != "labels"}
    with torch.no_grad():
        logits = model(**given).logits
    encoded = tokenizer("add 12 and 30!")
    ids, special = encoded["input_ids"], tokenizer.all_special_tokens
    saved = {"batch": given, "logits": logits, "ids": ids, "names": list(encoded), "special": special}
    torch.save(saved, folder / "saved.pt")
    return given, logits, ids


CASES = [*((family, {}) for family in ("llama", "gemma3", "gpt2", "qwen2")), ("llama", LLAMA3)]


@pytest.mark.parametrize(("family", "rope"), CASES)
def test_here_it_loads_as_it_was(tmp_path, family, rope):
    tokenizer = byte_tokenizer()
    given, logits, ids = save(unusual(family, **rope), tokenizer, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(again(**given).logits, logits)
    reread = AutoTokenizer.from_pretrained(tmp_path)
    assert reread("add 12 and 30!")["input_ids"] == ids
    for name in ("bos_token", "eos_token", "pad_token"):
        assert getattr(reread, name) == getattr(tokenizer, name)
    assert {*tokenizer.all_special_tokens} <= {*reread.all_special_tokens}  # Qwen2's class adds one of its own
    assert reread.chat_template == tokenizer.chat_template


@pytest.mark.skipif(not OLDER, reason="SIFTUNE_TRANSFORMERS_4 names no folder with transformers 4.57")
@pytest.mark.parametrize(("family", "rope"), CASES)
def test_there_it_loads_as_it_was(tmp_path, family, rope):
    save(unusual(family, **rope), byte_tokenizer(), tmp_path)
    environment = {**os.environ, "PYTHONPATH": OLDER}
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_fields_of_the_saved_files(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = int(1e30)
    save(unusual("llama", **LLAMA3), tokenizer, tmp_path)
    config, words = (json.loads((tmp_path / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
    assert "_model_name_or_path" not in config
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 3e4
    assert config["rope_scaling"] == LLAMA3
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert words["model_input_names"] == ["input_ids", "attention_mask"]
    assert not {"model_max_length", "backend", "is_local", "local_files_only"} & words.keys()
    tokenizer.model_max_length = 512
    save_tokenizer(tokenizer, tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 512


def test_a_config_inside_of_a_config_and_values_that_are_there():
    inner = {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    found = with_older_rope({"text_config": inner, "vision_config": None, "rope_theta": 7.0})
    assert found == {"text_config": {**inner, "rope_theta": 5.0}, "vision_config": None, "rope_theta": 7.0}
    kinds = {"full_attention": {"rope_theta": 1.0}, "sliding_attention": {"rope_theta": 2.0}}
    found = with_older_rope({"rope_parameters": kinds})
    assert (found["rope_theta"], found["rope_local_base_freq"]) == (1.0, 2.0)
