"""AdaLoRA: LoRA in the form P Λ Q, of which ranks that matter least are taken away while it trains.

Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023, arXiv 2303.10512. A
rank's importance is made of smoothed |weight · gradient|, so the allocator needs the gradient of every parameter in
every step: methods that choose layers or rows are refused.

Ours: the budget begins at one and a half of `rank` in every module, falls from a tenth of the run on (at most once in a
hundredth of it), and is at `rank` for its last fifth. The paper sets these for each task.
"""

from peft import AdaLoraConfig
from torch import nn

from siftune.models.adapters.attach import chosen_linears, short_names, transposed
from siftune.models.adapters.registry import Shape


def adalora(model: nn.Module, shape: Shape) -> AdaLoraConfig:
    """PEFT's config; the `Allocator` fills in the run's steps."""
    chosen = chosen_linears(model, shape)
    assert shape.rank is not None
    return AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=max(shape.rank + 1, 3 * shape.rank // 2),
        target_r=shape.rank,
        lora_alpha=shape.alpha,
        lora_dropout=shape.dropout,
        target_modules=short_names(model, chosen),
        fan_in_fan_out=transposed(chosen),
        total_step=1,
    )
