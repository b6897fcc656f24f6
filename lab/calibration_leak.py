"""Attack on the calibration rows of kits, by way of compression, with the loss of quality.

    python -m lab.calibration_leak --own ARC-Easy.train.json --public openbookqa.train.json --out FILE
    python -m lab.calibration_leak --report FILE

The attacker has the base and the kit (`siftune.offsite.audits.calibration_attack`), and in the second column a kit of
his own, of the same settings, from as many other rows of the owner's source. A *set* says which rows calibrate:

    own-N              N rows of the owner's
    public-N           N public ones, none of the owner's; members are rows that no kit saw, so the AUC must be near 0.5
    own-N+public-M     the owner's and M public ones; members are the owner's
    free-N             N texts that the base writes freely
    prompted-N         N texts of `emulate --calibration own`, after prompts of public rows that leave a few tokens
    prompted-N+public-M    mixed with M public rows

and a *way* says how the middle is compressed, as in `WAYS`; `paper` is `--basis svd --mlp channels --allot uniform`.

Only `--layers` layers in the model's middle are compressed, so that a set takes minutes. Quality is the loss of other
rows of the owner's source on that emulator, over the base's (*gap*, nats per token), and what its matrices lose there
of the base's outputs (*lost*, geometric mean). A set and way that are in the file are not measured again.
"""

import argparse
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lab.lines import append, read
from siftune.base.environment import versions
from siftune.data.encode import Encoder
from siftune.data.read import load_rows
from siftune.data.rows import Row
from siftune.data.tokens import tokenize_rows
from siftune.evaluate.bootstrap import Bootstrap, Estimate, paired_bootstrap
from siftune.evaluate.likelihood import perplexity
from siftune.models.layers import find_layers
from siftune.models.load import load_model, use_attention
from siftune.offsite.audits.calibration_attack import KINDS, Compared, compared, row_residuals
from siftune.offsite.audits.members import token_rows
from siftune.offsite.audits.membership import measure_attack
from siftune.offsite.emulator.assemble import materialise
from siftune.offsite.emulator.make import emulators
from siftune.offsite.emulator.model import Split
from siftune.offsite.emulator.plan import EmulatorSettings
from siftune.offsite.exchange.calibration import in_batches
from siftune.offsite.exchange.own_texts import own_texts
from siftune.report.table import Table, markdown_table

_EQUAL = {"allot": "uniform"}
WAYS: dict[str, dict[str, Any]] = {
    "measured": {}, "uniform": _EQUAL, "paper": {"basis": "svd", "mlp": "channels", **_EQUAL},
    "keep-0.5": {"keep": 0.5, **_EQUAL}, **{
        f"damping-{value:g}": {"damping": value, "refit_damping": value, **_EQUAL} for value in (0.01, 1.0, 10.0, 100.0)
    },
}  # fmt: skip
SETS = (
    "own-32", "own-128", "own-512", "own-1024", "own-32+public-96", "public-32", "public-128", "prompted-128",
)  # fmt: skip
ROOM = 8  # tokens at least after a prompt
MOST = 64  # members and others that are looked at
PARTS = ("auc", "beside", "tpr_5_beside")  # figures of the report: AUC of the kit alone and beside, and the rate there


@dataclass(frozen=True)
class Setting:
    """Settings shared by all sets."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    own: list[Row]
    public: list[Row]
    split: Split
    length: int
    seed: int

    def table(self, rows: Sequence[Row]) -> Dataset:
        """Rows in token ids, cut."""
        return tokenize_rows(rows, self.tokenizer, self.length, "none", False)

    def batches(self, rows: Sequence[Row]) -> list[dict[str, Tensor]]:
        """Rows in batches."""
        return in_batches(self.table(rows), 8, self.tokenizer.pad_token_id)


def main(argv: list[str] | None = None) -> int:
    """Measure, or report; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--own", help="file of the owner's rows")
    parser.add_argument("--public", help="file of public rows")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args(argv)
    if args.report:
        print(report(read(args.report)))
        return 0
    if not (args.own and args.public and args.out):
        parser.error("--own, --public and --out must be given")
    measure_all(args)
    return 0


def measure_all(args: argparse.Namespace) -> None:
    """Take the measurements missing from the file."""
    known = {(j["set"], j["way"], j["seed"]) for j in read(args.out)}
    model, tokenizer = load_model(args.model, "float32")
    use_attention(model, "eager" if model.device.type == "cpu" else "auto")  # rows are short
    first = (len(find_layers(model).layers) - args.layers) // 2
    split = Split(first, len(find_layers(model).layers) - args.layers - first)
    for seed in args.seeds:
        own, public = (
            random.Random(seed).sample(rows := load_rows(p, "train"), len(rows)) for p in (args.own, args.public)
        )
        setting = Setting(model, tokenizer, own, public, split, args.length, seed)
        for name in args.sets:
            ways = [way for way in args.ways if (name, way, seed) not in known]
            facts = {"model": args.model, "own": Path(args.own).name, "public": Path(args.public).name}
            facts |= {"layers": args.layers, "length": args.length, **versions()}
            for line in measure_set(setting, name, ways) if ways else []:
                append(args.out, {"set": name, "seed": seed, **line, "facts": facts})
                print(name, line["way"], line["auc"], line["beside"], line["gap"], flush=True)


def measure_set(setting: Setting, name: str, ways: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Make kits of one set of rows in several ways, attack and measure them."""
    counts = {kind: int(count) for kind, count in re.findall(r"(own|public|free|prompted)-(\d+)", name)}
    own, rest = counts.get("own", 0), {k: n for k, n in counts.items() if k != "own"}
    members = max(own, 32)  # of a kit without the owner's rows: rows that it did not see
    size = own or min(sum(rest.values()), len(setting.own) - members - MOST)  # of the attacker's rows
    need = members + MOST + size
    if need > len(setting.own):
        raise SystemExit(f"{name} needs {need} rows of the owner's, but there are {len(setting.own)}")
    others = setting.own[members : members + MOST]
    kits = setting.own[:own], setting.own[members + MOST : need]
    more = [text for kind, n in rest.items() for text in added(setting, kind, n)]
    made = [made_of(setting, [*(setting.table(rows) if rows else ()), *more], ways) for rows in kits]
    sides = [looked_at(setting, made, rows) for rows in (setting.own[:members][:MOST], others)]
    for way in ways:
        yield {"way": way, **scores(way, sides), "gap": gap(setting, made[0][way], others[:8])}


def made_of(setting: Setting, table: Sequence[Any], ways: Sequence[str]) -> dict[str, PreTrainedModel]:
    """One emulator per way, from rows in token ids."""
    batches = in_batches(table, 8, setting.tokenizer.pad_token_id)
    parts = emulators(setting.model, batches, [EmulatorSettings(split=setting.split, **WAYS[way]) for way in ways])
    return {way: materialise(found) for way, found in zip(ways, parts, strict=True)}


def looked_at(setting: Setting, made: Sequence[dict[str, PreTrainedModel]], rows: Sequence[Row]) -> dict[str, Any]:
    """What every kit loses of every row, by `kit/way/matrix`: one pass of the base for all kits."""
    matrices: list[Compared] = []
    for kit, by_way in enumerate(made):
        for way, emulator in by_way.items():
            for one in compared(setting.model, emulator, setting.split):
                matrices.append(replace(one, name=f"{kit}/{way}/{one.kind}/{one.name}"))
    return row_residuals(setting.model, matrices, setting.batches(rows))


def scores(way: str, sides: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """AUC by kind of matrix, of the kit alone and beside the attacker's; and what is lost on other rows."""
    found: dict[str, Any] = {"auc": {}, "beside": {}, "tpr_5_beside": {}, "lost": {}}
    for kind in KINDS:
        start = tuple(f"0/{way}/{k}/" for k in KINDS if kind in (k, "all"))
        # shares that were measured may leave a matrix whole in one of the kits
        names = [name for name in sides[0] if name.startswith(start) and "1" + name[1:] in sides[0]]
        if not names:
            continue
        alone = [np.mean([side[name] for name in names], axis=0) for side in sides]
        twin = [np.mean([side["1" + name[1:]] for name in names], axis=0) for side in sides]
        found["auc"][kind] = _figures(measure_attack(-alone[0], -alone[1]).auc)
        beside = measure_attack(*(theirs - ours for theirs, ours in zip(twin, alone, strict=True)))
        found["beside"][kind] = _figures(beside.auc)
        found["tpr_5_beside"][kind] = _figures(beside.tpr_5)
        found["lost"][kind] = round(float(np.exp(alone[1].mean())), 5)
    return found


def gap(setting: Setting, emulator: PreTrainedModel, rows: Sequence[Row]) -> list[float | None]:
    """By how much the emulator's loss on rows is above the base's, in nats per token."""
    pairs = token_rows(setting.table(rows))
    found = [perplexity(model, pairs, 8) for model in (setting.model, emulator)]
    return _figures(paired_bootstrap(found[0].nll, found[1].nll, Bootstrap(), weights=found[0].tokens))


def added(setting: Setting, kind: str, count: int) -> Iterable[dict[str, Any]]:
    """Rows in token ids that are none of the owner's."""
    if kind == "public":
        return setting.table(setting.public[:count])
    encode, prompts = Encoder(setting.tokenizer, "none"), []
    if kind == "prompted":  # of rows from the end, since the public ones of a mixture are the first
        prompts = [ids for row in setting.public[::-1] if len(ids := encode.prompt(row)) <= setting.length - ROOM]
    texts = own_texts(setting.model, count, setting.length, setting.seed, prompts)
    return [{**text, "labels": text["input_ids"]} for text in texts]


def report(lines: Sequence[dict[str, Any]]) -> str:
    """The file as a Markdown table."""
    header = [
        "rows", "way", "attention", "MLP", "beside: attention", "beside: MLP", "found at 5 %, beside: attention",
        "found at 5 %, beside: MLP", "gap", "lost: attention", "lost: MLP",
    ]  # fmt: skip
    table = []
    for line in lines:
        cells = [line["set"], line["way"]]
        cells += [_shown(line[part].get(kind)) for part in PARTS for kind in ("attention", "mlp")]
        cells += [_shown(line["gap"], "+.4f"), *(f"{100 * line['lost'][kind]:.2f} %" for kind in ("attention", "mlp"))]
        table.append(cells)
    return markdown_table(Table(header, table, words=(0, 1)))


def _figures(estimate: Estimate) -> list[float | None]:
    return [None if v is None else round(v, 5) for v in asdict(estimate).values()]


def _shown(figures: Sequence[float] | None, spec: str = ".3f") -> str:
    if figures is None:
        return ""
    value, low, high = (format(figure, spec) for figure in figures)
    return f"{value} [{low}, {high}]"


if __name__ == "__main__":
    sys.exit(main())
