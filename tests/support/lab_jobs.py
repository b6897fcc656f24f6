"""Jobs of the laboratory on a tiny model."""

from typing import Any


def pays_job(base: str, words: str = "dense", cell: str = "mix", scenario: str = "S1") -> dict[str, Any]:
    """A job of `lab.pays`: three steps of four rows, 16 rows of the target."""
    from lab.pays.cells import cells_of
    from lab.pays.methods import method_of

    own = cells_of(scenario, [cell], 16)[0] | {"longest": 64}
    return {
        "scenario": scenario, "cell": own, "method": method_of(words), "model": base, "seed": 0, "steps": 3, "batch": 4,
        "lr": 1e-2,
    }  # fmt: skip
