"""How much of the base an emulator can be made into, by whoever has rows and time: recovery.

All decoder layers of the emulator are tuned. An attacker takes the learning rate that serves him best, so several are
tried, and the best one on the held-out rows counts. A run is measured on its way, after an eighth, a quarter and half
of its steps, so that one sees whether more rows would bring more. The learning rate falls along a run, so its early
points are a little below what a run of that length would reach.
"""

from siftune.evaluate.bootstrap import resample
from siftune.models.layers import find_layers
from siftune.offsite.audit.job import Job
from siftune.offsite.audit.models import unshared
from siftune.offsite.audit.result import RECOVERED, RecoveryPoint, negative
from siftune.offsite.audit.rows import RowScores, score_losses
from siftune.offsite.audit.tuning import tuned

_PARTS = (8, 4, 2)  # of the steps after which a run is measured on its way


def recovered(job: Job, full_ft: RowScores, emulator_zs: RowScores) -> tuple[RowScores, tuple[RecoveryPoint, ...]]:
    """Tune all decoder layers of the emulator, once for every learning rate.

    The way begins at `emulator_zs`, and ends at the base with its outer layers tuned, `full_ft`.

    Returns:
        Scores of the best run at its end, and every run's points, by learning rate and then by tokens.
    """
    ends: list[RowScores] = []
    points: list[RecoveryPoint] = []
    for lr in job.settings.rates:
        found, end = _run(job, lr)
        ends.append(end)
        points += [_point(lr, done, one, (full_ft, emulator_zs), job) for done, one in found.items()]
    return min(ends, key=lambda one: one.nll.sum()), tuple(points)


def _run(job: Job, lr: float) -> tuple[dict[int, RowScores], RowScores]:
    """One run: scores by steps done, and those at its end, with an accuracy if there is one."""
    emulator, settings = job.models.emulator, job.settings
    wanted = {settings.steps // part for part in _PARTS} - {0, settings.steps}
    found: dict[int, RowScores] = {}
    tell = job.steps(RECOVERED)

    def told(done: int, total: int) -> None:
        tell(done, total)
        if done in wanted:
            found[done] = score_losses(emulator, job.rows.held_out, settings.eval_batch_size)

    everything = range(len(find_layers(emulator).layers))
    with unshared(emulator), tuned(emulator, everything, job.tuning, lr, told):
        found[settings.steps] = job.measure(RECOVERED, emulator)
    return found, found[settings.steps]


def _point(lr: float, steps: int, scores: RowScores, ends: tuple[RowScores, RowScores], job: Job) -> RecoveryPoint:
    """A run at one time: its loss, and how much of the way it has come."""
    named = {"full": ends[0], "zero": ends[1], "here": scores}
    means = resample({name: -one.nll for name, one in named.items()}, scores.tokens, job.bootstrap)
    lengths = [len(job.rows.train[i]["input_ids"]) for i in job.used]
    tokens = round(steps * job.settings.batch_size * sum(lengths) / len(lengths))
    return RecoveryPoint(lr, tokens, negative(means.mean("here")), means.share("here", "zero", "full"))
