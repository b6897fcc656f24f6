import logging
import warnings

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from siftune.base.errors import AdapterError
from siftune.evaluate.generation import exact_match, greedy

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17], [18, 19, 20]]
NEW = 6


def by_hand(model, prompt, eos_ids=()):
    """Arg-max token by token, without padding or cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(NEW):
            token = model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
            if token in eos_ids:
                break
            ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("pad_id", [0, 7])
def test_padding_changes_nothing(model, batch_size, pad_id):
    wanted = [by_hand(model, prompt) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in wanted}) > 1  # the model does look at its prompt
    assert greedy(model, PROMPTS, NEW, batch_size, pad_id) == wanted


def test_ends_at_an_end_token(model):
    free = [by_hand(model, prompt) for prompt in PROMPTS]
    eos_ids = [free[0][2], free[2][0]]
    wanted = [by_hand(model, prompt, eos_ids) for prompt in PROMPTS]
    found = greedy(model, PROMPTS, NEW, eos_ids=eos_ids)
    assert found == wanted
    assert found[2] == []


def test_the_model_s_own_settings_are_put_aside_and_come_back(model, caplog):
    wanted = [by_hand(model, prompt) for prompt in PROMPTS]
    own = model.generation_config
    own.do_sample, own.temperature, own.top_p = True, 3.0, 0.5
    own.repetition_penalty, own.num_beams, own.max_length = 9.0, 1, 4
    model.train()
    logging.getLogger("transformers").propagate = True
    try:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            assert greedy(model, PROMPTS, NEW) == wanted
    finally:
        logging.getLogger("transformers").propagate = False
    assert not caplog.records
    assert model.generation_config is own
    assert own.repetition_penalty == 9.0
    assert model.training


def test_an_adapter_counts_and_can_be_switched_off(model):
    targets = ["q_proj", "v_proj"] if hasattr(model.config, "hidden_act") else ["c_attn"]
    plain = greedy(model, PROMPTS, NEW)
    options = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM", "target_modules": targets}
    tuned = get_peft_model(model, LoraConfig(**options))
    for name, parameter in tuned.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter)
    wanted = [by_hand(tuned, prompt) for prompt in PROMPTS]
    assert wanted != plain
    assert greedy(tuned, PROMPTS, NEW, 2) == wanted
    with tuned.disable_adapter():
        assert greedy(tuned, PROMPTS, NEW) == plain


def test_virtual_tokens_are_refused(model):
    tuned = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(AdapterError, match="virtual tokens"):
        greedy(tuned, PROMPTS, NEW)


@pytest.mark.parametrize(
    ("prediction", "answer", "same"),
    [
        ("42", " 42\n", True),
        ("Answer1.", "answer1", True),
        ("STRASSE", "straße", True),
        ("7 .", "7", True),
        ("7..", "7", False),
        (".7", "7", False),
        ("a  b", "a b", False),
        ("", ".", True),
        ("42!", "42", False),
    ],
)
def test_exact_match(prediction, answer, same):
    assert exact_match([prediction, "x"], [answer, "x"]).tolist() == [same, True]


def test_the_head_gets_contiguous_hidden_states(model):
    """Strided ones take hundreds of times longer on processors, in half precision."""
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda _, args, __: seen.append(args[0].is_contiguous())
    )
    try:
        greedy(model, PROMPTS, NEW)
    finally:
        handle.remove()
    assert len(seen) >= NEW
    assert all(seen)
