"""Settings of an audit. Nothing here imports torch, so that a command can show its options quickly."""

from dataclasses import fields
from pathlib import Path
from typing import Literal

from pydantic.dataclasses import dataclass

from siftune.base.errors import RecipeError
from siftune.base.settings import (
    CONFIG,
    AtLeastTwo,
    Chance,
    Columns,
    Count,
    CountOrZero,
    Positive,
    Seed,
    Template,
    Validated,
)


@dataclass(config=CONFIG)
class AuditSettings(Validated):
    """Settings of the tuning and measurement of an audit's models.

    Every model is tuned on the same rows in the same order, from the same weights.
    """

    steps: Count = 100
    """Optimizer steps of each fine-tuning."""
    lr: Positive = 1e-4
    """Peak learning rate of the outer layers."""
    batch_size: Count = 16
    """Rows in an optimizer step."""
    max_length: AtLeastTwo = 512
    """Longest row in tokens, prompt and completion together."""
    template: Template = "auto"
    """Chat template: auto uses the tokenizer's if it has one, chat requires it, none leaves text as it is."""
    completion_only: bool = True
    """Learn and measure the completions alone, not the prompts."""
    recovery: bool = True
    """Also fine-tune the whole emulator: what a data owner could get who does not return anything."""
    recovery_lrs: tuple[Positive, ...] = ()
    """Peak learning rates of the whole emulator, of which the best counts; lr times 1, 3 and 10 if not given."""
    membership: bool = True
    """Also measure how well training rows are told from held-out ones by the plugged model."""
    membership_rows: Count = 512
    """Rows of either kind for that, at most."""
    shadows: CountOrZero = 0
    """Shadow models for LiRA, the stronger attack on membership; each is one more fine-tuning. 0 leaves it out."""
    eval_batch_size: Count = 16
    """Rows in a forward pass of a measurement."""
    resamples: Count = 10_000
    """Bootstrap resamples of every interval."""
    level: Chance = 0.95
    """Coverage of the intervals."""
    seed: Seed = 0
    """Seed of the order of rows and the bootstrap."""

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates of recovery."""
        return self.recovery_lrs or (self.lr, 3 * self.lr, 10 * self.lr)

    def check(self) -> None:
        """Check the ranges.

        Raises:
            RecipeError: With one sentence on the first value that cannot be used.
        """
        if self.shadows == 1:
            raise RecipeError(f"shadows is {self.shadows}, but must be 0, or 2 or more: one that saw a row, one not")
        if self.shadows and not self.membership:
            raise RecipeError("shadows attack membership, which is left out: give --membership, or no --shadows")


@dataclass(config=CONFIG)
class AuditOptions(AuditSettings):
    """Audit a kit: what its emulator gives the data owner, what it gives away, and what comes back.

    The base model and the emulator are measured before and after their outer layers are tuned on the same rows; the
    ones tuned on the emulator are plugged into the base; and what a data owner could recover, and what a return tells
    of its training rows, is tried out.
    """

    model: str = ""
    """Base model of the kit: a folder, a hub id, or smollm2. Data owners, who do not have it, leave it out."""
    kit: str = ""
    """Folder of the kit."""
    train: str = ""
    """Rows to tune on: a .jsonl, .json, .csv or .parquet file, or a hub id."""
    limit: Count | None = None
    """Number of training rows to use, from the first."""
    eval: str = ""
    """Held-out rows of the same source, as for train."""
    eval_limit: Count | None = None
    """Number of held-out rows to use, from the first."""
    columns: Columns = ()
    """Other names of columns, such as prompt=question completion=answer, as for siftune train."""
    returned: Path | None = None
    """Return to audit in place of layers that are tuned here; train is then the rows that it was tuned on."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of both models; auto: the checkpoint's, or float32 on a processor that lacks it."""

    def check(self) -> None:
        """Check the ranges, and that what is needed is given.

        Raises:
            RecipeError: With one sentence on the first value that cannot be used.
        """
        super().check()
        for name in ("kit", "train", "eval"):
            if not getattr(self, name):
                raise RecipeError(f"no {name} given: name it with --{name}")
        if not self.model and self.returned is None:
            raise RecipeError(
                "neither model nor return given: the owner names the base with --model, a data owner who has no base "
                "the return with --return"
            )
        if not self.model:
            self._check_without_base()

    def _check_without_base(self) -> None:
        """Refuse what a data owner's audit, of a return under the emulator, does not do."""
        if not self.membership:
            raise RecipeError("without the base, membership is all that is attacked: leave out --no-membership")
        if self.recovery_lrs:
            raise RecipeError("recovery is tried out beside the base: name it with --model, or leave out recovery_lrs")

    def settings(self) -> AuditSettings:
        """The settings alone."""
        return AuditSettings(**{field.name: getattr(self, field.name) for field in fields(AuditSettings)})
