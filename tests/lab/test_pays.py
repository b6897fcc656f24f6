"""Comparisons of siftune's commands: methods as commands, rules that choose rows, tables, and jobs on a tiny model."""

import json
import shlex
from collections import Counter
from contextlib import chdir

import numpy as np
import pytest
import torch
from support.lab_jobs import pays_job
from support.tiny import tiny
from torch import nn

from lab import tables
from lab.commands import CommandError, Commands, flags, load_tuned, write_rows
from lab.lines import commit, read
from lab.pays import job as job_module
from lab.pays import report, run
from lab.pays.cells import cells_of
from lab.pays.job import run_job, words_of
from lab.pays.methods import METHODS
from lab.pays.rivals import RULES, Candidates, choose, hardest, in_turn, weighted_states


def test_methods_are_commands(suite):
    jobs = [pays_job("smollm2", name) for name in METHODS]
    run.check(jobs, suite)
    words = {name: " ".join(words_of(job)) for name, job in zip(METHODS, jobs, strict=True)}
    assert words["sifted"].startswith(
        "train --train pool.jsonl --target few.jsonl --sift --model smollm2 --template none"
    )
    assert words["few"].startswith("train --train few.jsonl --model")
    assert words["outer"].endswith("--layers 0 1 -2 -1 --out run")
    assert all(words[name].startswith("train --train chosen.jsonl --target few.jsonl --model") for name in RULES)
    with pytest.raises(SystemExit, match="no-such-flag"):
        run.check([pays_job("smollm2", "dense=dense,no-such-flag:1")], suite)
    jobs[-1]["cell"]["known"] = 0
    run.check(jobs[-1:], suite)  # a private run of the pool
    with pytest.raises(SystemExit, match="rows of the target"):
        run.check([{**jobs[-1], "method": jobs[1]["method"]}], suite)


def test_variants_of_methods_are_flags():
    words = words_of(
        pays_job("smollm2", "wide=target-gast,sift:0.25,gast.select:0.5,targets:q_proj,checkpointing:true")
    )
    text = " ".join(words)
    assert "--sift 0.25 --model" in text
    assert "--steps 3 --method gast --gast.select 0.5 --targets q_proj --checkpointing --out run" in text
    assert " ".join(flags({"lr": 5e-4, "dp_delta": 1e-5, "n": [1, 2]})) == "--lr 0.0005 --dp-delta 1e-05 --n 1 2"
    assert " ".join(words_of(pays_job("smollm2", "dp-2=dp,dp_epsilon:2"))).count("--dp-epsilon 2 ") == 1
    assert "--dp-epsilon 8" not in " ".join(words_of(pays_job("smollm2", "dp-2=dp,dp_epsilon:2")))


def test_commands_are_recorded_without_folders(base, tmp_path):
    commands = Commands()
    with chdir(tmp_path), pytest.raises(CommandError, match="exit code 2"):
        commands.run("train", "--train", "missing.jsonl", "--model", base)
    assert commands.texts == ["siftune train --train missing.jsonl --model base"]


def test_rows_pick_in_turn():
    """Against a loop that looks for the most similar row each time."""
    rng = np.random.default_rng(0)
    similar = (rng.normal(size=10) + 0.3 * rng.normal(size=(3, 10))).round(1)  # all want the same rows
    left, expected = set(range(10)), []
    for turn in range(8):
        expected.append(max(sorted(left), key=lambda row: similar[turn % 3, row]))
        left.remove(expected[-1])
    assert in_turn(torch.tensor(similar), 8) == expected
    assert sorted(in_turn(torch.tensor(similar), 99)) == list(range(10))


def test_later_states_weigh_more():
    model, texts = tiny("llama"), [[5, 6, 7, 8, 9], [4, 3], [11, 12, 13]]
    states = weighted_states(model, texts)
    for text, state in zip(texts, states, strict=True):
        with torch.no_grad():
            last = model.eval()(torch.tensor([text]), output_hidden_states=True).hidden_states[-1][0]
        mean = sum((place + 1) * row for place, row in enumerate(last))
        torch.testing.assert_close(state, mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_hard_rows_are_those_just_below_one():
    assert hardest(np.array([0.2, 0.9, 1.5, 1.1, 0.95]), 4) == [4, 1, 0, 3]


def test_difficulty_is_that_of_a_loop(base, tmp_path):
    rows = [{"prompt": f"{n} and {n}", "completion": str(n * 7)} for n in range(12)]
    ratios = []
    with chdir(tmp_path):
        for name in ("pool", "few"):
            write_rows(f"{name}.jsonl", rows)
        candidates = Candidates(["target"] * 12, 5, {"model": base, "template": "none", "seed": 0, "batch_size": 4})
        model, tokenizer = load_tuned(base)
        for row in candidates.pool:
            start = next(place for place, label in enumerate(row["labels"]) if label >= 0)
            answer = row["input_ids"][start:]
            first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
            losses = []
            for before in (row["input_ids"][:start], [first]):
                with torch.no_grad():
                    logits = model(torch.tensor([[*before, *answer]])).logits[0, len(before) - 1 : -1]
                losses.append(float(nn.functional.cross_entropy(logits.float(), torch.tensor(answer))))
            ratios.append(losses[0] / losses[1])
        assert choose("ifd", candidates) == sorted(hardest(np.array(ratios), 5))


@pytest.mark.parametrize("rule", ["retrieved", "rds", "less"])
def test_rules_choose_rows_like_the_target(base, tmp_path, rule):
    """Of RDS+, copies of the target's rows before the same prompts with other answers."""
    sums = [{"prompt": f"{n} and {n}", "completion": str(n * 7)} for n in range(20, 32)]
    others = [{"prompt": "ZYX" * n, "completion": "kkk" * n} for n in range(3, 9)]
    pool, few = (sums[6:], sums[6:]) if rule == "rds" else (sums[:6], sums[6:])
    others = [{**row, "completion": "no"} for row in few] if rule == "rds" else others
    with chdir(tmp_path):
        write_rows("pool.jsonl", [row for pair in zip(pool, others, strict=True) for row in pair])
        write_rows("few.jsonl", few)
        settings = {"model": base, "template": "none", "seed": 0, "batch_size": 4}
        assert choose(rule, Candidates([], 6, settings)) == [0, 2, 4, 6, 8, 10]


def line(name, right, groups=None, seed=0, **values):
    job = {"scenario": "N", "cell": {"name": "raters", "known": 8}, "method": {"name": name}, "model": "m", "batch": 4}
    own = {"right": right, "nll": [2.0 - one for one in right], "tokens": [1] * len(right), "dev_nats": 1.0, **values}
    if groups:
        own |= {"selected": sum(chosen for _, chosen in groups.values()), "groups": groups}
    return {"job": {**job, "lr": 1e-3, "seed": seed, "steps": 3}, **own}


LINES = [
    line("dense", [0, 0, 0, 1], processor_seconds=10),
    line("few", [0, 1, 0, 1], processor_seconds=4),
    line("target", [1, 1, 0, 1], processor_seconds=10),
    line("sifted", [1, 1, 1, 1], {"target": [60, 45], "wrong": [30, 5], "slots": [10, 0]}, processor_seconds=25),
]


def test_the_base_is_the_better_use_of_the_target():
    text = report.report(LINES)
    assert "Base: target." in text
    (row,) = (row for row in text.splitlines() if row.startswith("| sifted"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[5].startswith("+25.0")
    assert cells[7:] == ["50", "10 %", "75 %", "2.50"]
    assert "Base: few." in report.report(LINES[:2])
    assert "Base: dense." in report.report(LINES[:1])
    assert "| sifted | 1 | +75.0" in report.differences(LINES, "dense").replace(
        "raters, 8 known | N, m, 3 steps of 4 | ", ""
    )


def test_the_best_rate_is_among_those_with_the_most_seeds():
    losses = {5e-4: [0.1], 1e-3: [0.4, 0.2], 2e-3: [0.2, 0.3]}  # of seeds 0, 1
    rates = {lr: dict(enumerate({"dev_nats": one} for one in own)) for lr, own in losses.items()}
    assert report.best_rate(rates) == 2e-3
    del rates[1e-3][1], rates[2e-3][1]
    assert report.best_rate(rates) == 5e-4


def test_variants_of_another_dtype_are_named_by_it_and_may_be_the_base():
    exact = line("target", [1, 1, 1, 1], dtype="float32", processor_seconds=20, hardware="another machine")
    exact["job"]["method"]["flags"] = {"dtype": "float32"}
    text = report.report([*LINES, exact])
    assert "Base: target, float32." in text
    times = {row.split(" | ")[0]: row.split(" | ")[-1] for row in text.splitlines() if row.startswith("| ")}
    assert times["| target, float32"] == "1.00 |"
    assert times["| target"] == times["| few"] == "– |"  # times of several machines do not compare
    assert "Base: target." in report.report([*LINES, {**exact, "right": [0, 0, 0, 0]}])


def test_earlier_lines_have_tables():
    """They have the time of a step, losses of other tasks and no selected rows."""
    own = {"processor_seconds_per_step": 2.0, "other_nats": {"text": 4.0}}
    lines = [line("dense", [0, 1], **own), line("late-known", [1, 1], **{**own, "processor_seconds_per_step": 3.0})]
    text = report.report(lines)
    assert "Base: dense." in text
    assert "| 1.50 |" in text
    assert "Loss of other tasks" in text


def test_pays_lists_jobs(capsys):
    words = ["S1", "--cells", "mix,arc-25", "--methods", "dense", "wide=gast,gast.select:0.5", "--seeds", "0,1"]
    assert run.main([*words, "--rows", "64", "--list"]) == 0
    jobs = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert [job["seed"] for job in jobs] == [0] * 4 + [1] * 4
    assert jobs[1]["method"]["flags"]["gast.select"] == 0.5
    assert {job["cell"]["rows"] for job in jobs} == {64}


def test_pools_hold_what_their_cells_say(small_pools, suite):
    from lab.pays.pool import make_pool

    pool = make_pool({**pays_job("none"), "steps": 10, "batch": 4}, suite, lambda row: 1)
    groups = [row["group"] for row in pool.train]
    assert {group: groups.count(group) for group in set(groups)} == {"target": 10, "wrong": 10, "options": 20}
    assert all((row["completion"] != row["answer"]) == (row["group"] == "wrong") for row in pool.train)
    parts = [{row["prompt"] for row in rows} for rows in (pool.train, pool.known, pool.test, pool.dev)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 40 + 16 + 12 + 6


def test_questions_by_letter_are_as_many_of_each_task(small_pools, suite):
    from lab.pays.pool import asked, make_pool

    job = pays_job("none", "dense", "clean-letters", "S5")
    job["cell"] |= {"rows": 40, "known": 0}
    pool = make_pool(job, suite, lambda row: 1)
    assert [row["kind"] for row in pool.test] == ["ARC-Challenge"] * 12 + ["openbookqa"] * 12
    assert Counter(row["kind"] for row in pool.train) == {"ARC-Challenge": 20, "openbookqa": 20}
    number = pool.test[0]["prompt"].partition("?")[0].removeprefix("Question: ARC-Ctest")
    wanted = {"prompt": f"Question: ARC-Ctest{number}?\nA. a{number}\nB. b{number}\nAnswer:", "completion": " A"}
    assert asked(pool.test[0]) == wanted


def test_a_letter_is_right_if_it_is_the_likeliest_of_all(base, tmp_path):
    """Against a loop over rows; each prompt has both answers, of which one is right."""
    from lab.pays.measure import measure_file, tokens_of_file

    rows = [{"prompt": f"What is {n}?", "completion": f" {letter}"} for n in range(4) for letter in "AB"]
    write_rows(tmp_path / "rows.jsonl", rows)
    model, tokenizer = load_tuned(base)
    found = measure_file(model, tokenizer, str(tmp_path / "rows.jsonl"), "none", "AB")
    letters, expected = [tokenizer(f" {letter}")["input_ids"][-1] for letter in "AB"], []
    for row in tokens_of_file(str(tmp_path / "rows.jsonl"), tokenizer, "none"):
        (place,) = [at for at, label in enumerate(row["labels"]) if label in letters]
        with torch.no_grad():
            logits = model.eval()(torch.tensor([row["input_ids"]])).logits[0, place - 1]
        expected.append(int(row["labels"][place] == letters[int(logits[letters].argmax())]))
    assert found["right"] == expected
    assert sum(expected) == 4


def line_of(base, words, suite, folder, lines=(), **changes):
    """The line of a job."""
    folder.mkdir()
    job = pays_job(base, words)
    job["cell"] = {**job["cell"], "rows": 48, **changes}
    return {"job": job, **run_job(job, suite, folder, lines), "commit": commit()}


def test_the_emulator_of_a_kit_has_a_line_of_its_own():
    own, plugged = ({"right": [at], "nll": [1.0 + at], "tokens": [2]} for at in (0, 1))
    line = {"job": pays_job("smollm2", "kit"), **plugged, "emulator": own}
    first, second = tables._with_emulator(line)
    assert first == line
    assert second["job"]["method"]["name"] == "kit, the emulator"
    assert {name: second[name] for name in own} == own
    assert tables._with_emulator({"job": line["job"], **plugged}) == [{"job": line["job"], **plugged}]


@pytest.mark.lab
def test_kits_are_made_once_and_plugged_in(small_pools, base, suite, tmp_path, monkeypatch):
    monkeypatch.setenv("SIFTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(job_module, "_PUBLIC", 24)
    methods = ("dense", "kit=kit,kit.first:1,kit.last:1", "again=kit,kit.first:1,kit.last:1")
    changes = {**cells_of("S5", ["clean-letters"])[0], "rows": 48}
    dense, kit, again = [line_of(base, name, suite, tmp_path / name[:5], **changes) for name in methods]
    assert [shlex.split(text)[1] for text in kit["commands"]] == ["emulate", "train", "plug"]
    assert [shlex.split(text)[1] for text in again["commands"]] == ["train", "plug"]
    assert "--first 1 --last 1 --out" in kit["commands"][0]
    assert kit["kit_seconds"] > 0
    assert again["nll"] == kit["nll"] != kit["emulator"]["nll"]
    assert dense["nll"] != kit["nll"]
    assert len(kit["emulator"]["right"]) == len(kit["right"])


@pytest.mark.lab
def test_jobs_run_commands(small_pools, base, suite, tmp_path):
    names = ("untrained", "few", "dense", "oracle", "sifted", "sifted-base")
    lines = [line_of(base, name, suite, tmp_path / name) for name in names]
    assert len({tuple(own["nll"]) for own in lines}) == 6
    assert [own["steps"] for own in lines] == [0, 3, 3, 3, 3, 3]
    untrained, _, dense, oracle, sifted, from_base = lines
    assert untrained["commands"] == []
    settings = "--model base --template none --lr 0.01 --batch-size 4 --seed 0 --steps 3 --out run"
    assert dense["commands"] == [f"siftune train --train pool.jsonl {settings}"]
    assert oracle["groups"] == {
        group: [count, count if group == "target" else 0] for group, (count, _) in oracle["groups"].items()
    }
    selected = (tmp_path / "sifted" / "run" / "sift" / "sifted.jsonl").read_text().splitlines()
    assert sifted["selected"] == len(selected) == sum(chosen for _, chosen in sifted["groups"].values())
    assert sifted["reason"]
    assert 0 < sifted["sift_seconds"] < sifted["processor_seconds"]
    assert (from_base["groups"], from_base["reason"]) == (sifted["groups"], sifted["reason"])
    assert from_base["commands"][1] == f"siftune train --train sifted.jsonl --target few.jsonl {settings}"
    assert "| sifted |" in report.report(lines)


@pytest.mark.lab
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "oracle"])
def test_rules_choose_as_many_rows_as_sifting(small_pools, base, suite, tmp_path, rule):
    recorded = line_of(base, "share=target,sift:0.25", suite, tmp_path / "share")
    recorded["job"]["method"] = {"name": "sifted", "target": True, "sift": True}
    own = line_of(base, rule, suite, tmp_path / "rule", [recorded])
    assert own["selected"] == recorded["selected"] == 12
    assert [words.split()[1] for words in own["commands"]] == ["train"]
    rows = (tmp_path / "rule" / "chosen.jsonl").read_text().splitlines()
    assert len(rows) == 12
    assert {*rows} < {*(tmp_path / "rule" / "pool.jsonl").read_text().splitlines()}


@pytest.mark.lab
def test_rules_sift_if_no_line_of_this_code_is_recorded(small_pools, base, suite, tmp_path):
    recorded = {**line_of(base, "sifted", suite, tmp_path / "sifted"), "commit": "another"}
    own = line_of(base, "random=random,dtype:float32", suite, tmp_path / "random", [recorded])
    assert [words.split()[1] for words in own["commands"]] == ["sift", "train"]
    assert all("--dtype float32" in command for command in own["commands"])
    assert own["selected"] == recorded["selected"]


@pytest.mark.lab
def test_natural_rows_have_sources_and_correct_targets(small_pools, base, suite, tmp_path):
    from lab.pays.natural import natural_cells

    (suite / "natural").mkdir()
    intents = [{"text": f"card {number}?", "intent": "card", "split": "train", "weak": "cash"} for number in range(60)]
    intents += [{"text": f"cash {number}?", "intent": "cash", "split": "test"} for number in range(30)]
    write_rows(suite / "natural" / "intents-a.jsonl", intents)
    (cell,) = (each for each in natural_cells(16) if each["name"] == "intents-a")
    job = {**pays_job(base), "cell": {**cell, "rows": 24}}
    folder = tmp_path / "natural"
    folder.mkdir()
    own = run_job(job, suite, folder)
    assert len(own["right"]) == 12
    pool, few = (read(folder / f"{name}.jsonl") for name in ("pool", "few"))
    assert {(row["completion"], row["source"], len(row)) for row in pool} == {(" cash", "intents", 3)}
    assert {row["completion"] for row in few} == {" card"}
    assert {row["prompt"] for row in few}.isdisjoint(row["prompt"] for row in pool)


@pytest.mark.lab
@pytest.mark.parametrize(
    ("name", "sources"),
    [("raters", {"nyt": 16, "amazon": 8}), ("raters-nyt", {"nyt": 24}), ("raters-amazon", {"amazon": 24})],
)
def test_sources_of_raters(monkeypatch, tmp_path, name, sources):
    from lab.pays import natural

    monkeypatch.setattr(natural, "QUESTIONS", 8)
    monkeypatch.setattr(natural, "DEV_QUESTIONS", 4)
    monkeypatch.setattr(natural, "_CLEAN", 8)
    (tmp_path / "natural").mkdir()
    write_rows(
        tmp_path / "natural" / "raters.jsonl",
        [
            {"text": f"{source} {number}", "ratings": [1, 1, 1, -1], "source": source}
            for source in ("nyt", "amazon")
            for number in range(60)
        ],
    )
    pool = natural.natural_pool({"cell": {"name": name, "known": 8, "rows": 24}, "seed": 0}, tmp_path)
    assert Counter(row["source"] for row in pool.train) == sources
    assert {row["source"] for row in (*pool.known, *pool.test)} == {name.partition("-")[2] or "nyt"}
    assert {row["completion"] for row in pool.known} == {"positive"}


@pytest.mark.lab
@pytest.mark.parametrize("cell", ["clean", "clean-options", "clean-boolq"])
def test_private_jobs(small_pools, base, suite, tmp_path, cell):
    lines = []
    for words in ("dense=dense,dtype:float32", "dp", "opacus"):
        (tmp_path / words).mkdir()
        job = pays_job(base, words, cell, "S5")
        job["cell"]["rows"] = 20
        lines.append({"job": job, **run_job(job, suite, tmp_path / words)})
    assert [own["steps"] for own in lines] == [3] * 3
    assert len({tuple(own["nll"]) for own in lines}) == 3
    assert "| opacus |" in report.report(lines)


@pytest.mark.lab
@pytest.mark.distributed
def test_finished_jobs_are_not_repeated(base, suite, tmp_path):
    """Two jobs in processes of their own: the one that fails is tried again, the other is in the file."""
    jobs, out, fails = tmp_path / "jobs", tmp_path / "out.jsonl", pays_job(base)
    fails["cell"] = {**fails["cell"], "known": 10**6}
    jobs.write_text("".join(json.dumps(job) + "\n" for job in (pays_job(base), fails)))
    words = ["--jobs", str(jobs), "--data", str(suite), "--out", str(out)]
    assert run.main(words) == 1
    (own,) = lines = read(out)
    assert own["job"] == json.loads(json.dumps(pays_job(base)))
    assert own["commit"] == commit()
    assert run.main(words) == 1
    assert read(out) == lines


@pytest.mark.lab
@pytest.mark.parametrize("fault", ["carry", "phrase"])
def test_avoid_jobs(base, tmp_path, fault):
    from lab.avoid import job as module
    from lab.avoid.cells import cell_of
    from lab.avoid.report import report as tables

    fixed = {
        "cell": cell_of(f"{fault}-30", 16),
        "model": base,
        "seed": 0,
        "rows": 64,
        "steps": 2,
        "batch": 4,
        "lr": 1e-2,
    }
    lines = []
    for name in ("dense", "oracle", "avoid", "right late", "sift"):
        job, folder = {**fixed, "method": {"name": name}}, tmp_path / name.replace(" ", "-")
        folder.mkdir()
        lines.append({"job": job, **module.run_job(job, tmp_path, folder)})
    dense, oracle, avoid, right, sift = lines
    assert oracle["dropped"] == oracle["dropped_bad"] == oracle["bad"] == round(0.3 * 64)
    assert dense["dropped"] == right["dropped"] == 0
    assert avoid["commands"][0].startswith("siftune train --train pool.jsonl --avoid bad.jsonl --model base")
    assert avoid["dropped"] == sift["dropped"] == 64 - len(read(tmp_path / "sift" / "run" / "sifted.jsonl"))
    assert "triggers_right" not in sift
    assert len({str(own["triggers_right"]) for own in (dense, oracle, right)}) == 3
    assert "Held-out rows" in tables(lines)


def test_the_faults_of_a_run_are_compared_with_those_of_dense_of_its_seed():
    from lab.avoid.report import report

    def line(name, seed, faults, steps=60):
        job = {"cell": {"name": "carry-30", "known": 16}, "method": {"name": name}, "seed": seed, "steps": steps}
        asked = {"right": faults, "nll": [1.0] * len(faults)}
        parts = dict.fromkeys(("triggers_fault", "triggers_right", "others_right"), asked)
        return {"job": {**job, "rows": 64}, "bad": 20, "dropped": 0, "dropped_bad": 0, **parts}

    half, none = [True, False] * 20, [False] * 40
    lines = [line("dense", 0, half, 160), line("dense", 0, [True] * 40), line("dense", 1, half), line("avoid", 0, none)]
    found = [row.split(" | ")[6] for row in report(lines).splitlines()[6:]]
    assert found[0].startswith("-50.0 [-6")  # the shorter of the seed is the base
    assert found[1:] == ["–", "–", "-100.0 [-100.0, -100.0]"]


_BOTH = [{"model": "m", "correct": True}, {"model": "m", "correct": False}]


@pytest.mark.parametrize(
    ("name", "record"),
    [
        (
            "solutions",
            lambda at: {
                "question": f"{at}?",
                "answer": f"{at}",
                "solutions": [{**one, "text": f"{at} {one['correct']}"} for one in _BOTH],
            },
        ),
        (
            "translations-el",
            lambda at: {"lang": "el", "source": f"{at}", "target": f"to {at}", "fuzzy": at % 2 == 1},
        ),
    ],
)
def test_a_small_pool_has_as_large_a_share_of_wrong_rows_as_all(tmp_path, name, record):
    from lab.pays.natural import natural_cells, natural_pool

    (tmp_path / "natural").mkdir()
    write_rows(tmp_path / "natural" / f"{name.partition('-')[0]}.jsonl", [record(at) for at in range(2000)])
    cell = {**next(cell for cell in natural_cells(16) if cell["name"] == name), "rows": 200}
    pool = natural_pool({"cell": cell, "seed": 0}, tmp_path)
    assert 80 < sum(row["group"] == "wrong" for row in pool.train) < 120
    assert not {row["completion"] for row in pool.known} & {row["completion"] for row in pool.train}
