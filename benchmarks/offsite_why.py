"""Why does the basis matter so much? What dropping directions costs, one by one and all at once.

    python benchmarks/offsite_why.py --calibration ../shared/data/ARC-Easy.train.json

GradOT scores directions singly, as if the cost of dropping several were the sum of their costs. Under KFAC the cost of
a change δ is the quadratic form ⟨δ, G δ A⟩. For attention matrices of a few middle layers of SmolLM2 the table has, at
`--keep`, as shares of ⟨W, G W A⟩ (the cost of dropping all of W):

    summed    Σ_k ⟨δ_k, G δ_k A⟩ over the dropped directions
    together  ⟨δ, G δ A⟩ of their sum δ

by singular value, by the paper's score (λ = 0), and for the whitened basis, whose directions are orthogonal in this
form, so that the two agree. Means over the layers; `--layers` names others.
"""

import argparse
import sys
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from offsite import text_batches
from siftune.models.families import family_of
from siftune.models.layers import find_layers
from siftune.models.source import load_model
from siftune.offsite.drd import Components, component_scores, components, keep_components, rank_of
from siftune.offsite.emulator import weight_OI
from siftune.offsite.kfac import Curvature, apply, curvature
from siftune.offsite.record import record, replay
from siftune.train.data import load_rows

CHOICES = ("singular vectors, largest", "singular vectors, by score", "whitened, by score")


def main(argv: list[str] | None = None) -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True, help="file of rows")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 15, 26])
    args = parser.parse_args(argv)
    model, tokenizer = load_model(args.model)
    batches = text_batches(load_rows(args.calibration, "train", args.rows), args.length, tokenizer)
    recording = record(model, batches, range(min(args.layers), max(args.layers) + 1))
    family = family_of(model.config)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for number in args.layers:
        layer = find_layers(model).layers[number]
        for path, seen in replay(layer, recording, number, family.attention).items():
            weight = weight_OI(layer.get_submodule(path)).detach().float()
            for choice, costs in _costs(weight, curvature(seen.x_NI, seen.g_NO), args.keep).items():
                found.setdefault((path, choice), []).append(costs)
    _print(found)
    return 0


def _costs(weight_OI: Tensor, known: Curvature, keep: float) -> dict[str, tuple[float, float]]:
    """Summed and joint cost of the dropped directions, as shares of the cost of dropping the matrix."""
    rank = rank_of(keep, *weight_OI.shape)
    whole = float((weight_OI * apply(known, weight_OI)).sum())
    plain, white = components(weight_OI, known, "svd"), components(weight_OI, known, "whitened")
    kept = (
        torch.arange(rank),
        keep_components(component_scores(plain, known, 0.0), plain.size_K, rank),
        keep_components(component_scores(white, known, 0.0), white.size_K, rank),
    )
    pairs = zip(CHOICES, (plain, plain, white), kept, strict=True)
    return {choice: _shares(parts, indices, known, whole) for choice, parts, indices in pairs}


def _shares(parts: Components, kept: Tensor, known: Curvature, whole: float) -> tuple[float, float]:
    mask = torch.ones(len(parts.size_K), dtype=torch.bool)
    mask[kept] = False
    left_OK, right_KI = parts.left_OK[:, mask], parts.right_KI[mask]
    lefts_K = (left_OK * known.gradients.times(left_OK)).sum(0)
    rights_K = (right_KI.T * known.inputs.times(right_KI.T)).sum(0)
    delta_OI = left_OK @ right_KI
    return float((lefts_K * rights_K).sum()) / whole, float((delta_OI * apply(known, delta_OI)).sum()) / whole


def _print(found: dict[tuple[str, str], Any]) -> None:
    print("| matrix | directions | summed | together |\n|---|---|---|---|")
    for (path, choice), costs in found.items():
        summed, together = (mean(pair[i] for pair in costs) for i in (0, 1))
        print(f"| {path.rpartition('.')[2]} | {choice} | {100 * summed:.2f} % | {100 * together:.2f} % |")


if __name__ == "__main__":
    sys.exit(main())
