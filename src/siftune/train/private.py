"""Differential privacy of a run: from what a recipe asks for to the noise, or why there can be none."""

import logging
import math
from collections.abc import Sequence

from transformers import TrainingArguments

from siftune.base.errors import RecipeError, UnsupportedError
from siftune.data.rows import WEIGHT
from siftune.engine.ranks import world_size
from siftune.methods.dp.accounting import calibrated
from siftune.methods.dp.callback import DP
from siftune.methods.dp.mechanism import Mechanism
from siftune.recipe.schema import Recipe

logger = logging.getLogger(__name__)


def privacy_of(recipe: Recipe, rows: int) -> DP | None:
    """What a recipe's promise takes on so many training rows; None where it makes none.

    Raises:
        RecipeError: The promise would be empty for so many rows, no noise keeps it, or Opacus is not installed.
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
            f"dp_delta is {recipe.dp_delta:g}, but with {rows} rows it must be below {1 / rows:.2g}: to give a row "
            "away whole would be within the promise"
        )
    steps = recipe.steps or math.ceil(recipe.epochs * math.ceil(rows / batch))
    asked = Mechanism(recipe.dp_epsilon, recipe.dp_delta, recipe.dp_clip, "layer", rows, batch, steps)
    mechanism = calibrated(asked)
    logger.info("noise of %.4g times dp_clip in each of %d steps", mechanism.noise, steps)
    return DP(mechanism, recipe.batch_size)


def refuse_weights(columns: Sequence[str]) -> None:
    """Refuse rows that are weighed: what a row may add to a step is bounded by clipping, the same for all.

    Raises:
        UnsupportedError: With one sentence.
    """
    if WEIGHT in columns:
        raise UnsupportedError(
            "rows have weights, but with dp_epsilon each row is clipped to the same norm, which undoes them: leave the "
            "column 'weight' out"
        )


def refuse_scaled_or_split(arguments: TrainingArguments) -> None:
    """Refuse what would clip gradients in other units, or draw rows and noise on several ranks.

    Raises:
        UnsupportedError: With one sentence.
    """
    if arguments.fp16:
        raise UnsupportedError(
            "training in float16 scales the loss up, so that clipping would not bound what it should: with dp_epsilon "
            "take --dtype bfloat16 or float32"
        )
    if world_size() > 1:
        raise UnsupportedError(
            f"{world_size()} ranks would each draw rows and noise of their own, for which ε is not counted: with "
            "dp_epsilon start one process"
        )
