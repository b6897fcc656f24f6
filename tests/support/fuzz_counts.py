"""Counts of mutations by class and end: `python -m support.fuzz_counts [CLASS ...] [N]` in the folder `tests`.

With N, every N-th mutation is followed. The table goes to standard output, what is at fault to standard error.
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path

from support.fuzz_cases import CLASSES, cases
from support.fuzz_child import ENDS, Child
from support.fuzz_kits import write_all


def unlawful(name, case, outcome):
    """Whether a mutation of a class must not end so.

    A kit is its owner's model, tokenizer and template: with other ones, other numbers are no fault. In classes of
    `STRICT` there is nothing to gain by a mutation. Only the owner, who has the base, can see that a kit is not of it.
    Gradients can be not finite though every number of a kit is of a sane size.
    """
    if outcome.end in ("refused", "rows refused", "harmless"):
        return False
    if outcome.end == "other numbers":
        return name in STRICT
    if outcome.end == "breaks later":
        by_owner = outcome.stage == "plug" and any(words in outcome.words for words in OWNERS)
        by_size = name in SIZES and outcome.stage in ("train", "return") and outcome.words.endswith(NOT_FINITE)
        by_race = name == "swaps"  # what is read again is held to the hashes that were checked
        return not (by_owner or by_size or by_race)
    return True


STRICT = ("swaps", "signatures", "versions", "votes")
SIZES = ("values", "forged", "extremes", "ruinous")
NOT_FINITE = ("is not finite", "is nan", "is inf", "NaN or infinite", "on either side of 0")
# said by plug alone, of a kit that is sound by itself: another base, and weights that are not the base's
OWNERS = (
    "was made from a model with fingerprint",
    "base.layers is",
    "layer_types are not those",
    "moved by",
    "but the base model's has",
)


def outcomes(child, name, chosen):
    """Follow mutations of a class: (case, outcome, whether it must not end so)."""
    for case in chosen:
        outcome = child.outcome(case)
        yield case, outcome, unlawful(name, case, outcome)


def main(names, every=1):
    """Print the table of these classes, or of all, with every N-th mutation."""
    with tempfile.TemporaryDirectory() as place:
        sound = Path(place)
        write_all(sound)
        child = Child(sound)
        sys.stdout.write("class | n | " + " | ".join(ENDS) + " | at fault\n")
        for name in names or CLASSES:
            counts, faults, chosen = Counter(), 0, cases(name, sound)[::every]
            for case, outcome, fault in outcomes(child, name, chosen):
                counts[outcome.end] += 1
                faults += fault
                if fault:
                    said = (outcome.words.strip().splitlines() or [""])[-1][:250]
                    parts = (name, outcome.end, outcome.stage, case.subject, case.what[:150], said)
                    sys.stderr.write("\t".join(parts) + "\n")
            sys.stdout.write(f"{name} | {len(chosen)} | {' | '.join(str(counts[end]) for end in ENDS)} | {faults}\n")
            sys.stdout.flush()
        child.stop()


if __name__ == "__main__":
    words = sys.argv[1:]
    main([word for word in words if not word.isdigit()], *(int(word) for word in words if word.isdigit()))
