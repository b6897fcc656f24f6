"""The owner's limits on returns. Nothing here imports torch, so that commands can show their options quickly."""

from dataclasses import fields
from typing import Literal

from pydantic.dataclasses import dataclass

from siftune.base.errors import RecipeError
from siftune.base.settings import CONFIG, Columns, Count, NotNegative, Positive, Template, Validated

MAX_UPDATE = 0.25
# no worse, on rows that the owner chose: there is no other figure that suits rows of the task and any other text alike
MAX_LOSS_INCREASE = 0.0


@dataclass(kw_only=True, config=CONFIG)
class PlugSettings(Validated):
    """Limits on a return, and the format of the tuned model."""

    max_update: Positive = MAX_UPDATE
    """Each tensor must have moved by less, relative to its norm; at 1 nothing needs be left of what it was."""
    eval: str | None = None
    """Your own rows to measure the model on before and after, as for siftune eval; a model that got worse on them is
    refused."""
    eval_limit: Count | None = None
    """Number of your rows to use, from the first."""
    max_loss_increase: NotNegative | None = None
    """With --eval: how many nats per token the loss on your rows may rise; 0 if not given."""
    columns: Columns = ()
    """Other names of columns, such as prompt=question completion=answer, as for siftune train."""
    template: Template = "auto"
    """Chat template for your rows: auto uses the tokenizer's if it has one, chat requires it, none leaves text as it
    is."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the tuned model; auto: the base's own."""

    def check(self) -> None:
        """Check the ranges, and that nothing is asked of rows that are not there.

        Raises:
            RecipeError: With one sentence on the first value that cannot be used.
        """
        defaults = {field.name: field.default for field in fields(PlugSettings)}
        for name in ("max_loss_increase", "eval_limit", "columns", "template"):
            if self.eval is None and getattr(self, name) != defaults[name]:
                flag = f"--{name.replace('_', '-')}"
                raise RecipeError(f"{flag} has no effect without rows to measure on: add --eval FILE, or leave it out")

    @property
    def loss_limit(self) -> float:
        """Largest increase of the loss, in nats per token."""
        return MAX_LOSS_INCREASE if self.max_loss_increase is None else self.max_loss_increase
