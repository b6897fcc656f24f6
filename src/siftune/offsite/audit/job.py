"""An audit's job: its models, rows and settings, and what every stage does with them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from datasets import Dataset
from torch import nn

from siftune.base.errors import DataError
from siftune.base.files import Progress
from siftune.evaluate.bootstrap import Bootstrap, Floats
from siftune.models.layers import find_layers
from siftune.offsite.audit.models import OffsiteModels
from siftune.offsite.audit.result import LABELS
from siftune.offsite.audit.rows import AuditRows, RowScores, drawn, not_among, score_losses, score_rows
from siftune.offsite.audit.settings import AuditSettings
from siftune.offsite.audit.tuning import Steps, Tuning

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidates:
    """Rows for membership inference."""

    members: list[int]  # indices of training rows that the outer layers were tuned on
    others: list[int]  # indices of held-out rows that are no training rows
    left_out: int  # held-out rows that are


@dataclass(frozen=True)
class Job:
    """All that the stages need."""

    models: OffsiteModels
    rows: AuditRows
    settings: AuditSettings
    used: list[int]  # indices of the training rows that are tuned on
    candidates: Candidates | None  # None to leave membership inference out
    progress: Progress | None = None  # told what is being done

    @property
    def bootstrap(self) -> Bootstrap:
        """How intervals are drawn."""
        return Bootstrap(self.settings.resamples, self.settings.level, self.settings.seed)

    @property
    def tuning(self) -> Tuning:
        """What every model is tuned with."""
        return Tuning(self.rows.train.select(self.used), self.models.tokenizer, self.settings)

    def outer(self, model: nn.Module) -> list[int]:
        """Numbers of a model's outer layers."""
        return self.models.split.outer(len(find_layers(model).layers))

    def steps(self, condition: str) -> Steps:
        """Told of every step of a tuning."""
        return partial(self.tell, f"{LABELS[condition]}: tuning")

    def measure(self, condition: str, model: nn.Module) -> RowScores:
        """A model's scores on the held-out rows."""
        self.tell(f"{LABELS[condition]}: measuring")
        scores = score_rows(model, self.rows, self.settings.eval_batch_size)
        self.tell(f"{LABELS[condition]}: measuring", 1)
        return scores

    def losses(self, model: nn.Module, data: Dataset) -> Floats:
        """A model's mean loss per token of any rows, in nats."""
        return score_losses(model, data, self.settings.eval_batch_size).per_token

    def tell(self, what: str, done: int = 0, total: int = 1) -> None:
        """Pass progress on."""
        if not done:
            logger.info("%s", what)
        if self.progress is not None:
            self.progress(what, done, total)


def choose_rows(rows: AuditRows, settings: AuditSettings) -> list[int]:
    """Indices of the training rows to tune on: no more than the steps suffice for, so that each of them is seen."""
    return drawn(range(len(rows.train)), settings.steps * settings.batch_size, settings.seed)


def choose_candidates(rows: AuditRows, settings: AuditSettings, trained: Sequence[int]) -> Candidates:
    """Draw rows for membership inference; `trained` are the training rows that the outer layers were tuned on.

    Raises:
        DataError: No held-out row is left.
    """
    others = not_among(rows.held_out, rows.train)
    if not others:
        raise DataError(
            "every held-out row is a training row too, so membership cannot be inferred; give held-out rows of their "
            "own, or leave membership out."
        )
    members, outsiders = (drawn(indices, settings.membership_rows, settings.seed) for indices in (trained, others))
    return Candidates(members, outsiders, left_out=len(rows.held_out) - len(others))
