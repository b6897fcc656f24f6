"""The data owner's own audit, before a return is sent: what does it tell of the rows, as far as that can be seen here?

The data owner has no base, and needs none: the emulator stands in for it. The same attacks are made with the loss under
the emulator, with the outer layers as they came and as they go back. Where the emulator is near the base, so are the
figures; the owner's own may be higher or lower, and so may those of attacks that nobody tried here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from siftune.base.environment import versions
from siftune.base.files import Progress
from siftune.base.jsonable import jsonable
from siftune.data.read import load_rows
from siftune.offsite.audit.attacks import attack
from siftune.offsite.audit.job import Job, choose_candidates
from siftune.offsite.audit.membership import Membership
from siftune.offsite.audit.models import OffsiteModels, on_accelerator, plugged, read_outer
from siftune.offsite.audit.rows import AuditRows, score_losses, tokenize_audit
from siftune.offsite.audit.settings import AuditOptions, AuditSettings
from siftune.offsite.exchange.load import load_kit
from siftune.offsite.exchange.returned import read_return
from siftune.offsite.exchange.updates import compare
from siftune.offsite.kit.folder import read_kit
from siftune.recipe.schema import Recipe, train_files

AFTER_TRAINING = 128  # rows of either kind that are looked at when training ends: seconds, not minutes


@dataclass(frozen=True)
class OwnAudit:
    """What a data owner's audit found."""

    membership: Membership  # the attacks, by losses under the emulator
    settings: AuditSettings
    facts: dict[str, Any]  # names and versions

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain types for JSON."""
        record: dict[str, Any] = jsonable(self)
        return record


def own_audit(
    models: OffsiteModels,
    rows: AuditRows,
    returned: Mapping[str, Tensor],
    settings: AuditSettings | None = None,
    progress: Progress | None = None,
) -> Membership:
    """Attack a return without the base.

    Args:
        models: The emulator, as base too; tuned in place and put back bit for bit.
        rows: Rows that the return was tuned on, and others of the same source.
        returned: Its tensors by neutral name.
        settings: How many rows, shadow models, and the seed.
        progress: Told what is being done.

    Raises:
        KitError: The return does not fit the emulator.
        DataError: Every other row is a training row too.
    """
    settings = settings or AuditSettings()
    settings.check()
    compare(read_outer(models.emulator, models.split), returned)
    everything = list(range(len(rows.train)))
    job = Job(models, rows, settings, everything, choose_candidates(rows, settings, everything), progress)
    plug = partial(plugged, models.emulator, models.split, returned)
    before = score_losses(models.emulator, rows.held_out, settings.eval_batch_size)
    with plug():
        after = score_losses(models.emulator, rows.held_out, settings.eval_batch_size)
    found = attack(job, plug, before, after)
    assert found is not None  # there are candidates
    return found


def own_audit_paths(options: AuditOptions, progress: Progress | None = None) -> OwnAudit:
    """Attack a return on disk without the base; no model need be named.

    Raises:
        InputError: On a kit, return, rows or settings that cannot be used.
    """
    options.check()
    kit = read_kit(options.kit, options.public_key)
    assert options.returned is not None  # checked where no model is named
    returned = read_return(options.returned, kit)
    train = load_rows(options.train, options.train_split, options.limit, options.format)
    others = load_rows(options.eval, options.eval_split, options.eval_limit, options.format)
    emulator, tokenizer = load_kit(kit, options.dtype)
    settings = options.settings()
    rows = tokenize_audit(train, others, tokenizer, settings)
    models = on_accelerator(OffsiteModels(emulator, emulator, kit.manifest.split, tokenizer))
    found = own_audit(models, rows, returned, settings, progress)
    facts = {"kit": kit.digest, "train": options.train, "eval": options.eval, "versions": versions()}
    return OwnAudit(found, settings, facts)


def audit_run(recipe: Recipe, returned: Path) -> OwnAudit | None:
    """Attack the return of a run of a kit that has just ended, on at most `AFTER_TRAINING` rows of either kind.

    None where the recipe names no held-out rows: without others there is nothing to compare with.
    """
    if not recipe.eval:
        return None
    return own_audit_paths(
        AuditOptions(
            kit=str(Path(recipe.model).expanduser()),
            returned=returned,
            train=train_files(recipe)[0],
            train_split=recipe.train_split,
            limit=recipe.limit,
            eval=recipe.eval,
            eval_split=recipe.eval_split,
            eval_limit=AFTER_TRAINING,
            format=recipe.format,
            max_length=recipe.max_length,
            template=recipe.template,
            completion_only=recipe.completion_only,
            membership_rows=AFTER_TRAINING,
            dtype=recipe.dtype,
            seed=recipe.seed,
        )
    )
