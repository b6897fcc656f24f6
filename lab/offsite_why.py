"""Effect of basis and refit: cost of dropping directions or channels, singly and together.

    python -m lab.offsite_why --calibration ARC-Easy.train.json

GradOT scores directions singly, as if the cost of dropping several were the sum of their costs. Under KFAC the cost of
a change δ is the quadratic form ⟨δ, G δ A⟩. For attention matrices of a few middle layers of SmolLM2 the table has, at
`--keep`, as shares of ⟨W, G W A⟩ (the cost of dropping all of W):

    summed    Σ_k ⟨δ_k, G δ_k A⟩ over the dropped directions
    together  ⟨δ, G δ A⟩ of their sum δ; also on as many further rows, of which A and G are taken anew

by singular value, by the paper's score (λ = 0), and for the whitened basis, whose directions are orthogonal in this
form, so that the two agree.

The second table is of channels, in the matrix of the MLP that writes: cost of dropping them together, on the
calibration rows and on the others, with its columns unchanged, and fitted to the output of the complete matrix.

Means over the layers; `--layers` names others.
"""

import argparse
import sys
from collections.abc import Sequence
from statistics import mean

import torch
from torch import Tensor

from lab.offsite import text_batches
from siftune.data.read import load_rows
from siftune.models.families import Family, family_of
from siftune.models.layers import find_layers
from siftune.models.load import load_model
from siftune.offsite.emulator.curvature import Sums
from siftune.offsite.emulator.model import Base, Split, weight_OI
from siftune.offsite.emulator.record import record, replay
from siftune.offsite.maths.channels import channel_scores, keep_channels, refit, refit_scores
from siftune.offsite.maths.drd import Components, component_scores, components, keep_components, rank_of
from siftune.offsite.maths.kfac import Curvature, apply

Found = dict[tuple[str, ...], list[tuple[float, ...]]]

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
    rows = load_rows(args.calibration, "train", 2 * args.rows)
    if len(rows) < 2 * args.rows:
        parser.error(f"{args.calibration} has {len(rows)} rows, but {2 * args.rows} are needed; take fewer --rows")
    base = Base(model, Split(min(args.layers), len(find_layers(model).layers) - 1 - max(args.layers)))
    recordings = [
        record(base, text_batches(part, args.length, tokenizer)) for part in (rows[: args.rows], rows[args.rows :])
    ]
    family = family_of(model.config)
    directions: Found = {}
    channels: Found = {}
    for number in args.layers:
        layer = find_layers(model).layers[number]
        weights = {path: weight_OI(layer.get_submodule(path)).detach().float() for path in family.matrices}
        sums = [Sums(recording.positions) for recording in recordings]
        for recording, part in zip(recordings, sums, strict=True):
            replay(base, recording, number, family.matrices, part.add)
        seen, others = (part.curvature().curvature for part in sums)
        for path in family.attention:
            for choice, costs in _costs(weights[path], (seen[path], others[path]), args.keep).items():
                directions.setdefault((path.rpartition(".")[2], choice), []).append(costs)
        for choice, costs in _channel_costs(weights, family, (seen, others), args.keep).items():
            channels.setdefault((choice,), []).append(costs)
    _print(("matrix", "directions", "summed", "together", "on other rows"), directions)
    print()
    _print(("channels that stay", "calibration rows", "other rows"), channels)
    return 0


def _costs(weight_OI: Tensor, curvatures: Sequence[Curvature], keep: float) -> dict[str, tuple[float, ...]]:
    """Costs of dropped directions, as shares of the cost of dropping the matrix: summed, joint, joint on other rows."""
    known, other = curvatures
    rank = rank_of(keep, *weight_OI.shape)
    plain, white = components(weight_OI, known, "svd"), components(weight_OI, known, "whitened")
    kept = (
        torch.arange(rank),
        keep_components(component_scores(plain, known, 0.0), plain.size_K, rank),
        keep_components(component_scores(white, known, 0.0), white.size_K, rank),
    )
    pairs = zip(CHOICES, (plain, plain, white), kept, strict=True)
    return {choice: _shares(parts, indices, known, other) for choice, parts, indices in pairs}


def cost(curvature: Curvature, delta_OI: Tensor) -> float:
    """⟨δ, G δ A⟩: E (gᵀ δ x)², where x and g are independent."""
    return float((delta_OI.double() * apply(curvature, delta_OI).double()).sum())


def _shares(parts: Components, kept: Tensor, known: Curvature, other: Curvature) -> tuple[float, ...]:
    mask = torch.ones(len(parts.size_K), dtype=torch.bool)
    mask[kept] = False
    left_OK, right_KI = parts.left_OK[:, mask], parts.right_KI[mask]
    lefts_K = (left_OK * known.gradients.times(left_OK)).sum(0)
    rights_K = (right_KI.T * known.inputs.times(right_KI.T)).sum(0)
    delta_OI, whole_OI = left_OK @ right_KI, parts.left_OK @ parts.right_KI
    summed = float((lefts_K * rights_K).sum()) / cost(known, whole_OI)
    return summed, *(cost(at, delta_OI) / cost(at, whole_OI) for at in (known, other))


def _channel_costs(
    weights: dict[str, Tensor], family: Family, curvatures: Sequence[dict[str, Curvature]], keep: float
) -> dict[str, tuple[float, ...]]:
    """Joint cost of the dropped channels in each of the curvatures, as shares of the cost of dropping the matrix."""
    write_OC, known = weights[family.writes], curvatures[0]
    inputs, count = known[family.writes].inputs, int(keep * write_OC.shape[1])
    scp = channel_scores([(weights[p], known[p]) for p in family.reads], (write_OC, known[family.writes]), 0.0)
    by_scp, by_cost = (keep_channels(s, count) for s in (scp, refit_scores(write_OC, known[family.writes], 0.0)))
    choices = {
        "SCP's, as they were": (by_scp, write_OC[:, by_scp]),
        "SCP's, fitted": (by_scp, refit(write_OC, inputs, by_scp)),
        "of the highest cost after the fit, fitted": (by_cost, refit(write_OC, inputs, by_cost)),
    }
    found = {}
    for choice, (kept, columns) in choices.items():
        delta_OC = -write_OC
        delta_OC[:, kept] += columns
        ends = [c[family.writes] for c in curvatures]
        found[choice] = tuple(cost(at, delta_OC) / cost(at, write_OC) for at in ends)
    return found


def _print(columns: Sequence[str], found: Found) -> None:
    """Names, then means over the layers in per cent."""
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for names, costs in found.items():
        means = [f"{100 * mean(column):.2f} %" for column in zip(*costs, strict=True)]
        print("| " + " | ".join([*names, *means]) + " |")


if __name__ == "__main__":
    sys.exit(main())
