"""Generation from prompts of several lengths."""

import pytest
from support.tiny import tiny
from transformers import GenerationConfig

from siftune.models.generate import continued


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts_that_returns_the_logits_of_its_routers(family):
    """As TRL has it; their loss does not fit a cache."""
    model, settings = tiny(family), GenerationConfig(do_sample=False, max_new_tokens=3, pad_token_id=0)
    prompts = [[5, 6, 7], [8, 9]]
    plain = continued(model, prompts, settings)
    model.config.output_router_logits = True
    assert continued(model, prompts, settings) == plain
    assert model.config.output_router_logits
