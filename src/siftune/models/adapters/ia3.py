"""IA3: keys, values and what the MLP's last module is given are each scaled by a vector (arXiv 2205.05638).

Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", NeurIPS 2022.

Ours: where a family has one module for queries, keys and values, all that it puts out is scaled; of a mixture's experts
nothing is.
"""

from peft import IA3Config
from torch import nn

from siftune.models.adapters.attach import chosen_linears, short_names, transposed
from siftune.models.adapters.registry import Shape
from siftune.models.sublayers import find_sublayers

_KEYS_AND_VALUES = ("k_proj", "v_proj")


def ia3(model: nn.Module, shape: Shape) -> IA3Config:
    """PEFT's config for keys, values and the MLP, or for the linear modules that are named.

    Raises:
        AdapterError: As `chosen_linears`.
    """
    chosen = chosen_linears(model, shape)
    places = find_sublayers(model)
    inputs = {place.writes for place in places if place.part == "mlp"}
    if shape.targets is None:
        outputs = {place.writes for place in places if place.part == "attention"}
        apart = {name for name in chosen if name.endswith(_KEYS_AND_VALUES)}
        fused = {n for n in chosen for place in places if place.part == "attention" and n.startswith(place.reads + ".")}
        wanted = inputs | (apart or fused - outputs)
        chosen = {name: module for name, module in chosen.items() if name in wanted}
    names = short_names(model, chosen)
    return IA3Config(
        task_type="CAUSAL_LM",
        target_modules=names,
        feedforward_modules=[end for end in names if any(name.endswith(end) for name in inputs & chosen.keys())],
        fan_in_fan_out=transposed(chosen),
    )
