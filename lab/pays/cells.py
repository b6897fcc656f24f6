"""Cells of the scenarios: composition of a pool of training rows, and its target.

A cell is a plain dictionary, so that a job can be written down and read again:

    name     what tables call it
    target   the task that is measured: "arithmetic", "arc", "openbookqa", "boolq", "options" (ARC and OpenBookQA), or
             "letters" (ARC-Challenge and OpenBookQA, as many questions of each, with the options listed and a letter as
             the answer)
    share    share of the pool that are right rows of the target
    wrong    share of the pool that are rows of the target with a wrong completion
    near     wrong numbers are near misses; else they are drawn evenly from 0 to 198
    rest     the tasks that share the rest of the pool in equal parts
    others   tasks outside of the pool, whose loss is measured too
    known    clean rows of the target that a method may use
    longest  tokens of a question, as it is asked, with its longest option, for rows of text; short rows make short runs
    rows     rows in the pool; one pass of the job's steps where it is None
"""

from collections.abc import Sequence
from typing import Any

from lab.pays.natural import natural_cells

Cell = dict[str, Any]

_TASKS = ("arithmetic", "arc", "openbookqa", "boolq")
_MIXES = {
    "mix": {"target": "arithmetic", "share": 0.25, "wrong": 0.25, "rest": ["options"], "others": ["boolq"]},
    "mix-near": {"share": 0.25, "wrong": 0.25, "near": True, "rest": ["options"], "others": ["boolq"]},
    "reverse": {"target": "options", "share": 0.25, "wrong": 0.25, "rest": ["arithmetic"], "others": ["boolq"]},
}
_SHARES = (10, 25, 50)
_NOISES = (15, 30, 45)


def _cell(name: str, known: int, **changes: Any) -> Cell:
    plain = {"target": "arithmetic", "share": 1.0, "wrong": 0.0, "near": False, "rest": [], "rows": None, "longest": 28}
    plain["others"] = ["openbookqa", "boolq"] if not changes.get("rest") else []
    return {"name": name, **plain, **changes, "known": known}


def _pools(known: int) -> list[Cell]:
    """S1: the lab's mix, its reverse, and real text with each task as the target."""
    cells = [_cell(name, known, **mix) for name, mix in _MIXES.items()]
    for task in _TASKS:
        rest = [other for other in _TASKS if other != task]
        for share in _SHARES:
            for wrong in (0, 25):
                name = f"{task}-{share}{'-wrong' if wrong else ''}"
                cells.append(_cell(name, known, target=task, share=share / 100, wrong=wrong / 100, rest=rest))
    return cells


def _noises(known: int) -> list[Cell]:
    """S2: wrong labels in one pass, and in few rows that are passed over often."""
    cells = []
    for near in (False, True):
        for noise in _NOISES:
            name = f"{'near' if near else 'uniform'}-{noise}"
            values = {"share": 1 - noise / 100, "wrong": noise / 100, "near": near}
            cells += [_cell(name, known, **values), _cell(f"{name}-400", known, rows=400, **values)]
    return cells


def _clean(known: int) -> list[Cell]:
    """S5: correct rows of one task."""
    others = {"arithmetic": ["openbookqa", "boolq"], "options": ["boolq"], "boolq": ["openbookqa"], "letters": []}
    names = {task: "clean" if task == "arithmetic" else f"clean-{task}" for task in others}
    cells = [_cell(names[task], known, rows=2400, target=task, others=other) for task, other in others.items()]
    return [cell | {"longest": 64, "rows": 1200} if cell["target"] == "letters" else cell for cell in cells]


def _rates(known: int) -> list[Cell]:
    """S3: the lab's mix and clean arithmetic, for a row of learning rates."""
    return [*(cell for cell in _pools(known) if cell["name"] in ("mix", "reverse")), *_clean(known)]


SCENARIOS = {
    "S1": (_pools, 100), "S2": (_noises, 0), "S3": (_rates, 100), "S5": (_clean, 0), "N": (natural_cells, 100),
}  # fmt: skip


def cells_of(scenario: str, names: Sequence[str], known: int | None = None) -> list[Cell]:
    """Look up cells of a scenario by name.

    Args:
        scenario: "S1", "S2", "S3", "S5", or "N" for rows with natural errors.
        names: Names of its cells.
        known: Known rows of the target; the scenario's own number where it is None.

    Raises:
        ValueError: There is no such scenario or cell.
    """
    if scenario not in SCENARIOS:
        raise ValueError(f"there is no scenario {scenario!r}; use one of {', '.join(SCENARIOS)}")
    make, usual = SCENARIOS[scenario]
    cells = {cell["name"]: cell for cell in make(usual if known is None else known)}
    for name in names:
        if name not in cells:
            raise ValueError(f"{scenario} has no cell {name!r}; use {', '.join(cells)}")
    return [cells[name] for name in names]
