"""Examples in docstrings run as is, on the tiny models that `names` gives them. Error messages have one form."""

import ast
import doctest
import inspect
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from support import audits
from support.emulators import calibration
from support.tiny import tiny
from support.tiny_run import save_base, save_rows
from support.tokenizer import byte_tokenizer
from support.trainers import adapted, arguments, rows
from transformers import PrinterCallback, Trainer

import siftune
import siftune.base.errors
import siftune.base.numerics
import siftune.offsite
from siftune.data.rows import rows_from
from siftune.offsite.audits.members import tokenize_audit
from siftune.offsite.audits.models import OffsiteModels
from siftune.offsite.emulator.model import Split
from siftune.offsite.emulator.plan import EmulatorSettings
from siftune.offsite.exchange.returned import read_return, write_return

PUBLIC = [(module, name) for module in (siftune, siftune.offsite) for name in module.__all__]
ALSO = [(siftune.base.numerics, "gumbel_top_k")]


def examples(module, name):
    value = getattr(module, name)
    tests = doctest.DocTestFinder(recurse=inspect.isclass(value)).find(value, name, module=False)
    return [test for test in tests if test.examples]


class QuietTrainer(Trainer):
    """An example shows what it is about, not the Trainer's logs."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)


def for_methods(folder):
    model, data = adapted(), rows()
    batch = {key: torch.tensor(data[:4][key]) for key in data.column_names}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    loader = torch.utils.data.DataLoader(data.with_format("torch"), batch_size=4)
    names = {
        "Trainer": QuietTrainer,
        "model": model,
        "args": arguments(folder),
        "rows": data,
        "batch": batch,
        "torch": torch,
    }
    names |= {"loader": loader, "optimizer": optimizer, "base": tiny("llama")}
    return {**names, **{name: getattr(siftune, name) for name in siftune.__all__}}


def for_sifting(folder):
    """A saved model, a pool and a target in the working directory."""
    save_base(folder / "base")
    save_rows(folder / "pool.jsonl", 36)
    save_rows(folder / "few.jsonl", 12)
    return {"load_dataset": partial(load_dataset, cache_dir=str(folder / "cache"))}


def for_offsite(folder):
    """An owner's model of four layers, a kit of it, and a return in which nothing was tuned."""
    base, tokenizer = tiny("llama", vocab_size=320), byte_tokenizer()
    batches = calibration(base)
    settings = EmulatorSettings(keep=0.5, split=Split(1, 1))
    kit = siftune.offsite.emulate(base, tokenizer, batches, folder / "made", settings)
    state = {name: tensor.clone() for name, tensor in _outer(base, kit).items()}
    returned = read_return(write_return(folder / "return", state, kit), kit)
    train_rows, held_out_rows = (rows_from(audits.records(*span)) for span in ((0, 20), (100, 108)))
    return {
        "base": base, "tokenizer": tokenizer, "batches": batches, "folder": folder, "kit": kit, "returned": returned,
        "Split": Split, "OffsiteModels": OffsiteModels, "tokenize_audit": tokenize_audit, "settings": audits.QUICK,
        "emulator": siftune.offsite.load_emulator(kit.path), "train_rows": train_rows, "held_out_rows": held_out_rows,
        **{name: getattr(siftune.offsite, name) for name in siftune.offsite.__all__},
    }  # fmt: skip


def _outer(base, kit):
    from siftune.offsite.emulator.model import outer_names

    own = base.state_dict()
    return {neutral: own[name] for neutral, name in outer_names(base, kit.manifest.split).items()}


@pytest.mark.parametrize(("module", "name"), PUBLIC + ALSO, ids=[name for _, name in PUBLIC + ALSO])
def test_examples_run(module, name, tmp_path, monkeypatch):
    tests = examples(module, name)
    assert tests, f"{name} has no example"
    monkeypatch.chdir(tmp_path)
    names = for_offsite if module is siftune.offsite else for_sifting if name == "sift" else for_methods
    for test in tests:
        test.globs = names(tmp_path) | {name: getattr(module, name)}
        report = []
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append)
        assert not result.failed, "".join(report)
        assert result.attempted == len(test.examples)


def test_the_harness_sees_a_wrong_example():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner().run(test, out=lambda _: None).failed == 1


def messages():
    """The texts of all errors in the source, with their places; `{}` for what is formatted in."""
    for path in sorted(Path(siftune.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if name in vars(siftune.base.errors) and node.args:
                text = node.args[0]
                parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                said = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
                yield f"{path.name}:{node.lineno}", said


def fault_of(message):
    capital = re.match(r"([A-Z][a-z]*)\b", message)
    if capital and capital[1] not in (*siftune.__all__, "Sift"):
        return "an upper-case letter at the start"
    if message.endswith("."):
        return "a full stop at the end"
    if re.search(r"[a-z)}`][.!] +[A-Z{]", message):
        return "two sentences"
    negation = re.search(r"can't|can not|could not|n't\b", message)
    return negation and negation[0]


def test_errors_are_one_sentence_without_capital_and_full_stop():
    faults = {place: fault for place, message in messages() if (fault := fault_of(message))}
    assert not faults


@pytest.mark.parametrize("message", ["Give a row", "give a row.", "no row. Give one", "{} can't train", "{}. {}"])
def test_the_check_of_messages_sees_a_fault(message):
    assert fault_of(message)
    assert not fault_of("Keep has {} rows, e.g. those of {}: give N; PEFT cannot")
