import torch
from support.tiny import tiny

from siftune.data.sampled_texts import sample_texts


def test_sampling_leaves_the_generators_and_settings_alone():
    model = tiny("llama")
    before, config = torch.get_rng_state(), model.generation_config
    first = sample_texts(model, 3, 6, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.generation_config is config
    assert sample_texts(model, 3, 6, seed=1) == first != sample_texts(model, 3, 6, seed=2)


def test_prompts_begin_texts_and_are_no_labels():
    text = sample_texts(tiny("llama"), 2, 9, seed=0, prompts=[[5, 6, 7]])[0]
    assert text["input_ids"][:3] == [5, 6, 7]
    assert text["labels"][:3] == [-100] * 3
    assert text["labels"][3:] == text["input_ids"][3:]


def test_every_prompt_has_room_up_to_the_length():
    prompts = [[5] * 8, [6], [7] * 5]
    texts = [text["input_ids"] for text in sample_texts(tiny("llama", eos_token_id=None), 3, 9, 0, prompts)]
    assert [len(text) for text in texts] == [9, 9, 9]
    assert all(text[: len(prompt)] == prompt for text, prompt in zip(texts, prompts, strict=True))
    texts = [text["input_ids"] for text in sample_texts(tiny("llama", eos_token_id=None), 3, 9, 0, prompts, least=3)]
    assert [len(text) for text in texts] == [11, 9, 9]
