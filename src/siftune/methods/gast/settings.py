"""Settings of GAST."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from siftune.base.settings import BELOW_ONE, COUNT, COUNT_OR_SHARE, OURS, SHARE, Settings

Support = Literal["sample", "rest", "momentum", "dataset"]
Choice = Literal["stochastic", "topk", "random"]
Score = Literal["inner", "cosine", "preconditioned", "preconditioned-cosine"]
Among = Literal["batch", "recent"]


@dataclass
class GASTSettings(Settings):
    """Gradient-aligned sparse tuning: every layer follows the rows whose gradients point its way."""

    group = "gast"

    # ours: where the paper draws rows of the training set, these are few, known, and what the model is for
    with_target: ClassVar[Mapping[str, Any]] = {
        "select": 0.5, "support": "dataset", "support_size": 8, "choice": "topk", "score": "cosine",
    }  # fmt: skip

    select: Annotated[int | float, COUNT_OR_SHARE, OURS] = 0.75
    """Rows of a batch that a layer follows: a whole number of rows, or a share such as 0.75 (the paper's: 0.5)."""
    support: Support = "sample"
    """What rows are compared with: drawn training rows (the paper's), the batch's others, earlier gradients, or
    a target's rows."""
    support_size: Annotated[int, COUNT] = 4
    """Rows that are compared with in a step, for support sample and dataset."""
    support_every: Annotated[int, COUNT, OURS] = 1
    """Optimizer steps between two support gradients, for support sample and dataset; the last one holds meanwhile."""
    support_decay: Annotated[float, BELOW_ONE, OURS] = 0.0
    """Share of the average of earlier support gradients that stays in a step, for support sample and dataset; 0: there
    is no average."""
    choice: Choice = "stochastic"
    """Draw rows by their score (the paper's), take the highest, or draw evenly."""
    score: Score = "inner"
    """Inner product of gradients (the paper's), its cosine, or either of them in Adam's metric."""
    decay: Annotated[float, BELOW_ONE, OURS] = 0.9
    """Share of the running mean of earlier gradients that stays in a step, for support momentum."""
    select_until: Annotated[float, SHARE, OURS] = 1.0
    """Share of the Trainer's steps, the first ones, in which rows are selected; in those after it all are followed.
    With a target it ends where the target's rows begin to come."""
    among: Annotated[Among, OURS] = "batch"
    """Whom a row competes with: the others of its batch, or the rows of the last steps, so that batches of a row or two
    can be selected from as well."""

    def _faults(self) -> Iterable[tuple[bool, str]]:
        yield (
            (self.support_every > 1 or self.support_decay > 0) and not self.needs_rows,
            "gast.support_every and gast.support_decay go with support sample or dataset, which draw rows: leave them "
            "out",
        )
        yield (
            self.among == "recent" and isinstance(self.select, int),
            "gast.among recent follows a share of the rows as they come: give gast.select as a share such as 0.5, not "
            f"as {self.select} rows of a batch",
        )
        yield (
            self.among == "recent" and self.needs_scores and self.support == "rest",
            "gast.among recent looks at one row at a time: it goes with support sample, dataset or momentum, as rest "
            "compares a row with its batch",
        )

    @property
    def needs_scores(self) -> bool:
        """Whether the choice depends on the samples."""
        return self.choice != "random"

    @property
    def in_metric(self) -> bool:
        """Whether inner products are those of Adam's metric."""
        return self.score.startswith("preconditioned")

    @property
    def is_cosine(self) -> bool:
        """Whether inner products are divided by the lengths of both sides."""
        return self.score.endswith("cosine")

    @property
    def needs_rows(self) -> bool:
        """Whether the support gradient takes rows of its own."""
        return self.needs_scores and self.support in ("sample", "dataset")
