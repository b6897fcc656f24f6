"""What an owner demands of a return. Nothing here imports torch, so that commands can show their options quickly."""

from dataclasses import dataclass, fields
from typing import Literal

from siftune.errors import RecipeError

MAX_UPDATE = 0.25
# no worse, on rows that the owner chose: there is no other figure that suits rows of the task and any other text alike
MAX_LOSS_INCREASE = 0.0


@dataclass(frozen=True, kw_only=True)
class PlugSettings:
    """What a return must be like, and how the tuned model is stored."""

    max_update: float = MAX_UPDATE
    """Each tensor must have moved by less, relative to its norm; at 1 nothing needs be left of what it was."""
    eval: str | None = None
    """Your own rows to measure the model on before and after, as for siftune eval; a model that got worse on them is
    refused."""
    eval_split: str = "test"
    """Split of --eval, where it has splits."""
    eval_limit: int | None = None
    """Use only the first so many of your rows."""
    max_loss_increase: float | None = None
    """With --eval: how many nats per token the loss on your rows may rise; 0 if not given."""
    format: Literal["auto", "prompt", "messages", "alpaca", "text"] = "auto"
    """Columns of your rows: prompt and completion; messages; instruction, input and output; or text."""
    template: Literal["auto", "chat", "none"] = "auto"
    """Chat template for your rows: auto uses the tokenizer's if it has one, chat demands it, none leaves text as it
    is."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the tuned model; auto: the base's own."""

    def check(self) -> None:
        """Check the ranges, and that nothing is asked of rows that are not there.

        Raises:
            RecipeError: With one sentence on the first value that cannot be used.
        """
        check_max_update(self.max_update)
        if self.eval is None:
            self._refuse_idle()
        if self.eval_limit is not None and self.eval_limit < 1:
            raise RecipeError(f"--eval-limit is {self.eval_limit}, but must be 1 or more")
        check_max_loss_increase(self.loss_limit)

    @property
    def loss_limit(self) -> float:
        """By how much the loss may rise, in nats per token."""
        return MAX_LOSS_INCREASE if self.max_loss_increase is None else self.max_loss_increase

    def _refuse_idle(self) -> None:
        own = {field.name: field.default for field in fields(PlugSettings)}
        for name in ("max_loss_increase", "eval_split", "eval_limit", "format", "template"):
            if getattr(self, name) != own[name]:
                flag = f"--{name.replace('_', '-')}"
                raise RecipeError(f"{flag} has no effect without rows to measure on: add --eval FILE, or leave it out")


def check_max_update(value: float) -> None:
    """Refuse what is no limit on updates.

    Raises:
        RecipeError: It is no finite number above 0.
    """
    if not 0 < value < float("inf"):
        raise RecipeError(f"the largest update is {value}, but must be a finite number above 0")


def check_max_loss_increase(value: float) -> None:
    """Refuse what is no limit on a loss's increase.

    Raises:
        RecipeError: It is no finite number from 0.
    """
    if not 0 <= value < float("inf"):
        raise RecipeError(f"the largest increase of the loss is {value}, but must be a finite number, 0 or more")
