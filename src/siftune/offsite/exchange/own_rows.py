"""The owner's own rows: a model's loss on them before and after a return is put into it."""

from dataclasses import dataclass

from torch import nn

from siftune.base.errors import KitError
from siftune.evaluate.measure import PERPLEXITY, measure
from siftune.evaluate.prepare import Prepared
from siftune.offsite.exchange.settings import MAX_LOSS_INCREASE, check_max_loss_increase


@dataclass(frozen=True)
class OwnRows:
    """Rows on which a model must not get worse.

    Attributes:
        prepared: From `evaluate.prepare_rows`, for the metric `perplexity`.
        max_loss_increase: By how many nats per token the loss may rise.

    Raises:
        RecipeError: The increase is no finite number from 0.
    """

    prepared: Prepared
    max_loss_increase: float = MAX_LOSS_INCREASE

    def __post_init__(self) -> None:
        check_max_loss_increase(self.max_loss_increase)

    def loss(self, model: nn.Module) -> float:
        """A model's mean loss over all tokens that training would learn, in nats per token."""
        found = measure(model, self.prepared)[PERPLEXITY]
        return float(found.values.sum() / found.weights.sum())


@dataclass(frozen=True)
class LossChange:
    """A model's loss on the owner's rows, in nats per token."""

    before: float  # of the base
    after: float  # of the base with the return in it
    rows: int  # how many
    limit: float  # by how much it may rise

    def check(self) -> None:
        """Refuse a model that got worse.

        Raises:
            KitError: The loss rose by more than the limit, or is no number any more.
        """
        if not self.after - self.before <= self.limit:
            raise KitError(
                f"the return makes the model worse: on your {self.rows} rows its loss goes from {self.before:.4f} to "
                f"{self.after:.4f} nats per token, and may rise by {self.limit:g}: refuse the return, or raise "
                "--max-loss-increase if you expect this"
            )
