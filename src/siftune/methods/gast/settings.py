"""Settings of GAST."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from siftune.settings import BELOW_ONE, COUNT, COUNT_OR_SHARE, NOT_NEGATIVE, OURS, Range, Settings

Support = Literal["sample", "rest", "momentum", "dataset"]
Choice = Literal["stochastic", "topk", "random"]
Score = Literal["inner", "cosine", "preconditioned"]
Pool = Literal["layer", "module"]
Scale = Literal["mean", "sum"]


@dataclass
class GASTSettings(Settings):
    """Gradient-aligned sparse tuning: every layer follows the rows whose gradients point its way."""

    group = "gast"

    select: Annotated[int | float, COUNT_OR_SHARE, OURS] = 0.75
    """Rows of a batch that a layer follows: a whole number of rows, or a share such as 0.75 (the paper's: 0.5)."""
    support: Support = "sample"
    """What rows are compared with: drawn training rows (the paper's), the batch's others, earlier gradients,
    support_rows."""
    support_size: Annotated[int, COUNT] = 4
    """Rows that are compared with in a step, for support sample and dataset."""
    choice: Choice = "stochastic"
    """Draw rows by their score (the paper's), take the highest, or draw evenly."""
    score: Score = "inner"
    """Inner product of gradients (the paper's), its cosine, or the inner product in Adam's metric."""
    pool: Annotated[Pool, OURS] = "layer"
    """Choose rows once per layer, or for each adapted module."""
    scale: Annotated[Scale, OURS] = "mean"
    """Scale the chosen rows' gradients up to the whole batch, or leave their sum."""
    replacement: Annotated[bool, OURS] = False
    """Draw rows with replacement."""
    temperature: Annotated[float, Range(lambda v: v >= 1e-6, "0.000001 or more"), OURS] = 1.0
    """Of the draw; high draws more evenly."""
    decay: Annotated[float, BELOW_ONE, OURS] = 0.9
    """Share of the running mean of earlier gradients that stays in a step, for support momentum."""
    select_after: Annotated[int, NOT_NEGATIVE, OURS] = 0
    """Optimizer steps at the start that follow all rows, before rows are selected."""

    def _faults(self) -> Iterable[tuple[bool, str]]:
        yield (
            self.replacement and self.choice == "topk",
            "gast.replacement goes with choice stochastic or random: topk draws nothing",
        )

    @property
    def needs_scores(self) -> bool:
        """Whether the choice depends on the samples."""
        return self.choice != "random"

    @property
    def needs_rows(self) -> bool:
        """Whether the support gradient takes rows of its own."""
        return self.needs_scores and self.support in ("sample", "dataset")
