"""Experiment trackers: known by transformers, and installed, before any work is done."""

from collections.abc import Sequence

from siftune.base.errors import RecipeError
from siftune.base.settings import nearest

NONE = "none"


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers, a recipe's `report_to`, that the Trainer would stumble over once the model is loaded.

    Raises:
        RecipeError: A name is unknown, "none" stands beside others, or a tracker's package is missing.
    """
    if tuple(names) == (NONE,):
        return
    from transformers.integrations import integration_utils

    known = sorted(integration_utils.INTEGRATION_TO_CALLBACK)
    if not names or NONE in names:
        raise RecipeError("report_to names trackers, or none and nothing else: leave it out to report to none")
    for name in names:
        if name not in known:
            close = nearest(name, known)
            if "," in name:
                raise RecipeError(f"report_to has {name!r}: put spaces between trackers, not commas")
            hint = f"did you mean {close!r}?" if close else f"use one of {', '.join(known)}, or none"
            raise RecipeError(f"report_to has the unknown tracker {name!r}; {hint}")
    installed = integration_utils.get_available_reporting_integrations()
    if missing := [name for name in names if name not in installed]:
        package = missing[0].replace("_", "-")
        raise RecipeError(
            f"the package of the tracker {missing[0]} is not installed: `pip install {package}`, or leave it out of "
            "report_to"
        )
