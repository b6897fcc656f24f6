import json
from dataclasses import fields

import numpy as np
import pytest
from support.audits import QUICK, TOKENIZER, losses, records, rows
from support.tiny_kit import base_model, save_kit

from siftune.base.errors import DataError, KitError, RecipeError
from siftune.data.rows import rows_from
from siftune.offsite.audits.audit import audit, audit_paths
from siftune.offsite.audits.members import tokenize_audit
from siftune.offsite.audits.models import OffsiteModels
from siftune.offsite.audits.settings import AuditOptions, AuditSettings
from siftune.offsite.emulator.model import outer_names
from siftune.offsite.exchange.load import load_emulator
from siftune.offsite.exchange.returned import write_return
from siftune.offsite.kit.folder import read_kit
from siftune.offsite.report.audit import write_audit


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """A base model, a kit of it, a return and rows."""
    folder = tmp_path_factory.mktemp("kit")
    kit = save_kit(folder / "kit")
    base_model().save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    names = outer_names(base_model(), kit.manifest.split)
    state = base_model().state_dict()
    write_return(folder / "return", {neutral: state[name] + 0.01 for neutral, name in names.items()}, kit)
    for name, part in (("train", records(0, 20, False)), ("eval", records(100, 108, False))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def options(folder, **changes):
    paths = {name: str(folder / name) for name in ("kit", "train", "eval")}
    paths = {**paths, "train": paths["train"] + ".jsonl", "eval": paths["eval"] + ".jsonl"}
    quick = {field.name: getattr(QUICK, field.name) for field in fields(QUICK)}
    return AuditOptions(**{**quick, "model": str(folder / "base"), **paths, **changes})


def test_a_kit_on_disk(on_disk, tmp_path):
    out = tmp_path / "out"
    found = audit_paths(options(on_disk, limit=9, eval_limit=5))
    write_audit(found, out)
    assert {path.name for path in out.iterdir()} == {"audit.json", "audit.md"}
    assert json.loads((out / "audit.json").read_text()) == found.to_dict(rows=True)
    parts = [rows_from(records(*bounds, False)) for bounds in ((0, 9), (100, 105))]
    kit = read_kit(on_disk / "kit")
    both = OffsiteModels(base_model(), load_emulator(on_disk / "kit"), kit.manifest.split, TOKENIZER)
    wanted = audit(both, tokenize_audit(*parts, TOKENIZER, QUICK), QUICK)
    assert type(found.settings) is AuditSettings
    assert found.conditions.keys() == wanted.conditions.keys()
    for name, one in wanted.conditions.items():
        assert found.conditions[name].scores.nll.tolist() == one.scores.nll.tolist()
    assert found.accuracy == "exact_match"
    assert found.facts["kit"] == kit.digest
    assert (found.facts["train_rows"], found.facts["held_out_rows"]) == (9, 5)
    assert found.shares.middle == pytest.approx(1 / 3)


def test_a_return_on_disk(on_disk):
    found = audit_paths(options(on_disk, returned=on_disk / "return", membership=True))
    changed = base_model()
    for number in (0, 1, -1):
        for p in changed.model.layers[number].parameters():
            p.data += 0.01
    wanted = losses(changed, rows().held_out)
    np.testing.assert_allclose(found.conditions["plug_in"].scores.nll, wanted, rtol=2e-5)
    assert found.membership.members == 20


def test_a_kit_of_another_base(on_disk, tmp_path):
    other = base_model()
    other.lm_head.weight.data[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    TOKENIZER.save_pretrained(tmp_path / "other")
    with pytest.raises(KitError, match=r"was made from a model with fingerprint"):
        audit_paths(options(on_disk, model=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"kit": ""}, RecipeError, "no kit given: name it with --kit"),
        ({"eval": ""}, RecipeError, "no eval given"),
        ({"limit": 0}, RecipeError, "limit is 0"),
        ({"steps": 0}, RecipeError, "steps is 0"),
        ({"kit": "/nowhere"}, KitError, "nowhere"),
        ({"train": "/nowhere.jsonl"}, DataError, "does not exist"),
    ],
)
def test_options_that_cannot_be_used(on_disk, changes, error, words):
    with pytest.raises(error, match=words):
        audit_paths(options(on_disk, **changes))
