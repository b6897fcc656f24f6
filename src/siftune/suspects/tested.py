"""How often rows that were named were wrong where that is known: in siftune's own tests with planted errors.

The figures are those of `tested.json`, which `python -m lab.rows.report --write-tested` makes of finished runs.
"""

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, NamedTuple

_KINDS = {
    "uniform": "wrong answers, drawn evenly",
    "near": "wrong answers, near misses",
    "option": "wrong answers, other options",
    "mixed": "wrong answers in a mixed pool",
    "off-task": "rows of another task",
    "truncated": "answers cut in half",
    "duplicate": "copies of other rows",
}


class Tested(NamedTuple):
    """What came of planted errors of one kind and number.

    Attributes:
        kind: Of the errors, in words.
        planted: Their share of all rows.
        runs: Runs, of all models.
        rows: Rows that were named in these.
        bad: How many of them were planted.
    """

    kind: str
    planted: float
    runs: int
    rows: int
    bad: int


def figures(text: str | None = None) -> list[Tested]:
    """The figures, added up over models; empty where there are none.

    Args:
        text: Those of another file than the package's.
    """
    source = files("siftune.suspects") / "tested.json"
    if text is None and not source.is_file():
        return []
    found: dict[tuple[str, float], list[int]] = {}
    for line in json.loads(source.read_text(encoding="utf-8") if text is None else text):
        sums = found.setdefault((line["kind"], line["planted"]), [0, 0, 0])
        for place, name in enumerate(("runs", "rows", "bad")):
            sums[place] += line[name]
    kinds = list(dict.fromkeys([*_KINDS, *(kind for kind, _ in found)]))
    ordered = sorted(found.items(), key=lambda item: (kinds.index(item[0][0]), item[0][1]))
    return [Tested(_KINDS.get(kind, kind), planted, *sums) for (kind, planted), sums in ordered]


def in_words(found: Sequence[Tested]) -> list[dict[str, Any]]:
    """The figures as cells of a table: kind, share planted, runs, rows named, and how many of these were wrong."""
    return [
        {
            "planted errors": each.kind,
            "of all rows": f"{each.planted:.0%}",
            "runs": str(each.runs),
            "named": str(each.rows),
            "of these wrong": f"{each.bad / each.rows:.0%}" if each.rows else "–",
        }
        for each in found
    ]
