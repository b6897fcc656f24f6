"""Private runs: the noise for their rows and steps, and what they refuse."""

import logging
import math
from collections.abc import Sequence

from transformers import TrainingArguments

from siftune.base.errors import RecipeError, UnsupportedError
from siftune.base.ranks import world_size
from siftune.data.rows import WEIGHT
from siftune.methods.dp.accounting import Mechanism, calibrated
from siftune.methods.dp.callback import DP
from siftune.recipe.schema import Recipe

logger = logging.getLogger(__name__)


def privacy_of(recipe: Recipe, rows: int) -> DP | None:
    """Differential privacy of a recipe for a number of training rows; None if it asks for none.

    Raises:
        RecipeError: The guarantee would be empty for these rows, no noise achieves it, or Opacus is not installed.
    """
    if recipe.dp_epsilon is None or recipe.dp_delta is None:
        return None
    batch = recipe.batch_size * recipe.accumulate
    if batch > rows:
        raise RecipeError(
            f"a step would draw {batch} rows, but there are {rows}: with dp_epsilon lower --batch-size or --accumulate"
        )
    if recipe.dp_delta >= 1 / rows:
        raise RecipeError(
            f"dp_delta is {recipe.dp_delta:g}, but with {rows} rows it must be below {1 / rows:.2g}: otherwise "
            "the guarantee would allow publishing a row"
        )
    steps = recipe.steps or math.ceil(recipe.epochs * math.ceil(rows / batch))
    asked = Mechanism(recipe.dp_epsilon, recipe.dp_delta, recipe.dp_clip, rows, batch, steps)
    mechanism = calibrated(asked)
    logger.info("noise of %.4g times dp_clip in each of %d steps", mechanism.noise, steps)
    return DP(mechanism, recipe.batch_size)


def refuse_weights(columns: Sequence[str]) -> None:
    """Refuse weighted rows in a private run.

    Raises:
        UnsupportedError: Rows have weights.
    """
    if WEIGHT in columns:
        raise UnsupportedError(
            "rows have weights, but with dp_epsilon each row is clipped to the same norm, which undoes them: leave the "
            "column 'weight' out"
        )


def refuse_scaled_or_split(arguments: TrainingArguments) -> None:
    """Refuse scaled losses and several ranks in a private run.

    Raises:
        UnsupportedError: Training is in float16, or on several ranks.
    """
    if arguments.fp16:
        raise UnsupportedError(
            "training in float16 scales the loss, so clipping would not bound gradients: with dp_epsilon use --dtype "
            "bfloat16 or float32"
        )
    if world_size() > 1:
        raise UnsupportedError(
            f"{world_size()} ranks would each draw rows and noise, for which ε is not accounted: with dp_epsilon start "
            "one process"
        )
