"""The training that `siftune bench` measures: its options, and the recipe that it stands for."""

from typing import Any, Literal

from pydantic.dataclasses import dataclass

from siftune.base.settings import CONFIG, AtLeastTwo, Count, Seed, Settings, Share, Validated
from siftune.methods import METHODS
from siftune.recipe.schema import Recipe, resolve_recipe

# what GAST is measured with, each of which has a price of its own -> its settings
SUPPORTS: dict[str, dict[str, Any]] = {
    "sample": {"support": "sample"},
    "averaged": {"support": "sample", "support_every": 4},
    "rest": {"support": "rest"},
    "momentum": {"support": "momentum"},
}


@dataclass(config=CONFIG)
class Workload(Validated):
    """The same rows, model and adapter for every method."""

    model: str = "smollm2"
    """Model to train: a folder, a hub id, or smollm2 (packaged, no hub needed)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the frozen weights; auto keeps that of the checkpoint."""
    batch_size: Count = 16
    """Rows in a step."""
    length: AtLeastTwo = 128
    """Tokens in a row; every row has as many."""
    label_share: Share = 0.25
    """Fraction of a row, at its end, that is learned; the rest stands for the prompt."""
    rank: Count = 32
    """Rank of the LoRA matrices."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    """Names of the modules that get adapters."""
    active: Share = 0.25
    """rst, ist, lisa: fraction of the layers that train in a step."""
    interval: Count = 10
    """ist: optimizer steps between two updates of the importance; lisa: between two draws."""
    steps: Count = 20
    """Timed optimizer steps in a round; a multiple of interval, so that ist's scoring counts for its share."""
    warmup: Count = 2
    """Optimizer steps before these, not timed."""
    seed: Seed = 0
    """Seed of the tokens, the adapters and the draws."""

    def recipe(self, method: str, out: str) -> Recipe:
        """The recipe of one of siftune's own methods on this workload."""
        name, _, support = method.partition("-")
        shared = ("model", "dtype", "batch_size", "rank", "targets", "seed")
        fields: dict[str, Any] = {field: getattr(self, field) for field in shared}
        fields |= {"train": "random tokens", "max_length": self.length, "steps": self.warmup + self.steps}
        options: dict[str, Any] = {"active": self.active, "interval": self.interval}
        options |= {"select": 0.5}  # the papers' share of rows, for their own ways to run it as well
        if support == "compiled":
            fields["compile"] = True
        if name.endswith("gast"):
            options |= SUPPORTS[support or "rest"]
        for part in METHODS[name].parts:
            own = Settings.names(part.settings)
            settings = {option: value for option, value in options.items() if option in own}
            fields[part.settings.group] = part.settings(**settings)
        return resolve_recipe(Recipe(method=name, out=out, **fields))

    def labels(self) -> int:
        """Label tokens in a row."""
        return max(1, round(self.label_share * self.length))
