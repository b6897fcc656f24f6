"""By what should the refit of an MLP be damped: the mean of A's diagonal, or its median?

    python -m lab.refit_damping --calibration ARC-Easy.train.json

A few channels can be so large that the mean is theirs; one of SmolLM2's layer 11 is. The table has, for some layers,
the share of the trace in the largest channel, and what `--mlp refit` at 0.7 loses of what the MLP writes, on the
calibration rows and on others: the geometric mean over tokens of ‖d x − d̂ x_K‖² / ‖d x‖², so that the few tokens on
which that channel fires do not decide. *No fit* keeps the same channels' columns as they were.
"""

import argparse
import sys

from torch import Tensor

from lab.offsite import text_batches
from siftune.data.read import load_rows
from siftune.models.families import family_of
from siftune.models.layers import find_layers
from siftune.models.load import load_model, use_attention
from siftune.offsite.emulator.model import Base, Split, weight_OI
from siftune.offsite.emulator.record import Captured, record, replay
from siftune.offsite.maths.channels import DAMPING, keep_channels, refit, refit_scores
from siftune.offsite.maths.kfac import curvature


def main(argv: list[str] | None = None) -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True, help="file of rows")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--layers", type=int, nargs="+", default=[11, 12])
    args = parser.parse_args(argv)
    model, tokenizer = load_model(args.model, "float32")
    use_attention(model, "eager" if model.device.type == "cpu" else "auto")
    rows, write = load_rows(args.calibration, "train", 2 * args.rows), family_of(model.config).writes
    batches = text_batches(rows, args.length, tokenizer, "none")
    base = Base(model, Split(min(args.layers), len(find_layers(model).layers) - 1 - max(args.layers)))
    recordings = [record(base, part) for part in (batches[: len(batches) // 2], batches[len(batches) // 2 :])]
    print("| layer | largest channel's share | damping by | calibration rows | other rows | other rows, no fit |")
    print("|---|---:|---|---:|---:|---:|")
    for number in args.layers:
        layer = find_layers(model).layers[number]
        seen = [replay(base, recording, number, (write,))[write] for recording in recordings]
        for line in compare(weight_OI(layer.get_submodule(write)).detach(), seen, args.keep):
            print(f"| {number} | {' | '.join(line)} |", flush=True)
    return 0


def compare(write_OC: Tensor, seen: list[Captured], keep: float) -> list[list[str]]:
    """A line for either damping."""
    known = curvature(seen[0].x_NI, seen[0].g_NO)
    sizes_C = known.inputs.dense().diagonal()
    lines = []
    for name, damping in (("mean", DAMPING * float(sizes_C.mean() / sizes_C.median())), ("median", DAMPING)):
        kept = keep_channels(refit_scores(write_OC, known, 0.0, damping), int(keep * write_OC.shape[1]))
        fitted = refit(write_OC, known.inputs, kept, damping)
        figures = [lost(write_OC, fitted, kept, one.x_NI) for one in seen]
        figures.append(lost(write_OC, write_OC[:, kept], kept, seen[1].x_NI))
        share = f"{100 * float(sizes_C.max() / sizes_C.sum()):.1f} %"
        lines.append([share, name, *(f"{100 * figure:.2f} %" for figure in figures)])
    return lines


def lost(write_OC: Tensor, fitted_OK: Tensor, kept_K: Tensor, x_NC: Tensor) -> float:
    """Geometric mean over tokens of what is lost."""
    whole_NO = x_NC @ write_OC.T
    left_N = (whole_NO - x_NC[:, kept_K] @ fitted_OK.T).square().sum(1) / whole_NO.square().sum(1)
    return float(left_N.log().mean().exp())


if __name__ == "__main__":
    sys.exit(main())
