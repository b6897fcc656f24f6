"""Plant canaries among the rows that an emulator is tuned on, plug its layers into the base, and look for them."""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets

from siftune.data.rows import Row
from siftune.data.tokenize import tokenize_rows
from siftune.evaluate.batching import model_device
from siftune.evaluate.bootstrap import Floats
from siftune.models.loss import IGNORED
from siftune.models.modes import evaluating
from siftune.offsite.audit.canaries import REPEATS, Canaries, CanaryGroup, exposure, group, make_canaries
from siftune.offsite.audit.job import Job
from siftune.offsite.audit.models import plugged, read_outer
from siftune.offsite.audit.rows import token_rows
from siftune.offsite.audit.tuning import Tuning, tuned

REFERENCES = 127  # other codes of each canary: 7 bits of exposure at most


def plant(job: Job) -> Canaries:
    """Tune once more, with canaries among the rows, and see what comes out of the plugged model.

    The steps grow with the rows, so that every row is passed over as often as without canaries.
    """
    settings, models, count = job.settings, job.models, job.settings.canaries
    canaries = make_canaries(count * len(REPEATS), REFERENCES, settings.seed)
    groups = [(repeats, canaries[i * count : (i + 1) * count]) for i, repeats in enumerate(REPEATS)]
    rows = [canary[0] for repeats, some in groups for canary in some for _ in range(repeats)]
    parts = [job.rows.train.select(job.used), _tokens(job, rows)]
    data = concatenate_datasets([part.select_columns(["input_ids", "labels"]) for part in parts])
    how = replace(settings, steps=round(settings.steps * len(data) / len(job.used)))
    tuning = Tuning(data, models.tokenizer, how)
    with tuned(models.emulator, job.outer(models.emulator), tuning, steps=partial(job.tell, "canaries: tuning")):
        layers = read_outer(models.emulator, models.split)
    with plugged(models.base, models.split, layers):
        found = tuple(_look(job, repeats, some) for repeats, some in groups)
    return Canaries(found, float(np.log2(REFERENCES + 1)))


def _look(job: Job, repeats: int, canaries: list[list[Row]]) -> CanaryGroup:
    """Exposure and verbatim completion of a group."""
    exposures, verbatim = [], []
    for canary in canaries:
        data = _tokens(job, canary)
        first, *others = job.losses(job.models.base, data)
        exposures.append(exposure(first, others))
        verbatim.append(completed(job.models.base, data.select([0])))
    return group(repeats, exposures, np.concatenate(verbatim), job.bootstrap)


def completed(model: torch.nn.Module, data: Dataset) -> Floats:
    """Whether greedy decoding after a row's prompt gives its labels to the end: 1 or 0 for every row.

    Decoding goes along the labels as long as each is the likeliest token after those before it, so that one forward
    pass shows it.
    """
    found = []
    with evaluating(model):
        for ids, labels in token_rows(data):
            inputs = torch.tensor([ids], device=model_device(model))
            likeliest = model(input_ids=inputs, use_cache=False).logits[0, :-1].argmax(-1).cpu()
            wanted = torch.tensor(labels[1:])
            counted = wanted != IGNORED
            found.append(float(torch.equal(likeliest[counted], wanted[counted])))
    return np.array(found)


def _tokens(job: Job, rows: list[Row]) -> Dataset:
    settings = job.settings
    return tokenize_rows(rows, job.models.tokenizer, settings.max_length, settings.template, True)
