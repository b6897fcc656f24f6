"""What a data owner is told of a return when training ends, before it is sent."""

from pathlib import Path

from siftune.config import Recipe, resolve_recipe, train_files
from siftune.errors import InputError
from siftune.offsite.audits.own import AFTER_TRAINING, audit_run
from siftune.report.audit_leaks import shown


def before_it_is_sent(recipe: Recipe, returned: Path) -> str:
    """Attack the return of a run, and sum up in a sentence or two.

    Training is over: whatever keeps the audit from being made is said, and raised no further.

    Args:
        recipe: What the run was trained by; its model is a kit.
        returned: The return.
    """
    rows = train_files(recipe)[0][0]
    hint = f"`siftune audit --kit {recipe.model} --return {returned} --train {rows} --eval OTHERS`"
    try:
        found = audit_run(resolve_recipe(recipe), returned)
    except InputError as error:
        return f"what the return tells of its rows was not tried out: {error}"
    if found is None:
        return (
            "what the return tells of its rows was not tried out: other rows of the same source are needed, by --eval "
            f"in training, or now: {hint}"
        )
    best = max(found.membership.loss, found.membership.reference, key=lambda attack: attack.auc.value or 0.0)
    assert best.auc.low is not None
    verdict = "can be told from others" if best.auc.low > 0.5 else "were not told from others"
    blind = " (but the two differ by source)" if found.membership.blind.tells_apart else ""
    return (
        f"rows {verdict} by the return{blind}: AUC {shown(best.auc)}, 0.5 is guessing; two attacks, at most "
        f"{AFTER_TRAINING} rows of either kind, on the emulator; more: {hint}"
    )
