"""Run folders that are damaged in every way, given to the commands that read them.

Each file of a run, of its adapter and of its checkpoint is cut, emptied, filled with junk, put away, or made a folder;
in JSON and YAML values are replaced, too, but for those of PEFT's that it looks at when a batch comes. A command then
works, or refuses in one sentence with exit code 2. `pytest` runs a sample; `pytest -m fuzz` runs all.
"""

import random
import shutil

import pytest
import yaml
from support.damage import JUNK, dump, places, with_value
from support.tiny_run import save_rows

from siftune.cli.main import main

SAMPLE = 24
DRAWN = 60  # values of a file of JSON or YAML that are replaced
COMMANDS = {
    "report": ["report", "{run}", "-o", "{out}/page.html"],
    "rows": ["rows", "{run}"],
    "eval": ["eval", "{run}", "--limit", "2", "--metrics", "perplexity"],
    "export": ["export", "{run}", "--out", "{out}/merged"],
    "resume": ["train", "--resume", "{run}"],
    "recipe": ["train", "{run}/recipe.yaml", "--dry-run", "--out", "{out}/new"],
}
READ = {  # what of a run each reads; the rest of the run's files is of no account to it
    "report": ("run.json", "recipe.yaml", "metrics.jsonl", "selections.parquet", "eval.json"),
    "rows": ("run.json", "recipe.yaml", "rows.txt", "losses.parquet"),
    "eval": ("recipe.yaml", "run.json", "adapter/"),
    "export": ("recipe.yaml", "run.json", "adapter/"),
    "resume": ("recipe.yaml", "run.json", "metrics.jsonl", "selections.parquet", "checkpoints/"),
    "recipe": ("recipe.yaml",),
}


@pytest.fixture(scope="module")
def place(base, tmp_path_factory):
    """A folder with a run that was measured, and beside it a copy: a recipe names its folder, so runs stay in place."""
    place = tmp_path_factory.mktemp("place")
    rows = save_rows(place / "rows.jsonl", 64)
    given = ["--train", str(rows), "--eval", str(rows), "--template", "none", "--rank", "2"]
    given += ["--model", str(base), "--steps", "4", "--batch-size", "4", "--log-every", "1", "--save-every", "2"]
    assert main(["train", *given, "--method", "gast", "--gast.support", "rest", "--out", str(place / "run")]) == 0
    assert main(["eval", str(place / "run"), "--limit", "2"]) == 0
    assert main(["rows", str(place / "run")]) == 0
    shutil.copytree(place / "run", place / "sound")
    return place


def files(run):
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())


def spoilt(name, data):
    """What a file is made into: bytes, None for nothing, or "folder"."""
    draw = random.Random(name)
    yield "gone", None
    yield "a folder", "folder"
    yield "empty", b""
    yield "zeros", bytes(len(data))
    yield from ((f"{part}/6 of it", data[: len(data) * part // 6]) for part in range(1, 6))
    for number in range(6):
        turned = bytearray(data)
        turned[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        yield f"bit {number}", bytes(turned)
    for what in (b"\xff\xfe", b"[" * 50_000, b"null", b'"\\ud800"', b"9" * 5000, b"{}", b"[]", b"- 1\n"):
        yield f"{what[:6]!r} alone", what
        yield f"{what[:6]!r} first", what + data
    if name.endswith((".json", ".jsonl", ".yaml")):
        first, _, rest = data.partition(b"\n") if name.endswith(".jsonl") else (data, b"", b"")
        whole = yaml.safe_load(first)  # JSON is YAML
        ours = [path for path in places(whole) if "alora_invocation_tokens" not in path]
        for path in draw.choices(ours, k=DRAWN):
            new = draw.choice(JUNK)
            changed = dump(with_value(whole, path, new))
            yield f"{path} = {new!r}", changed.replace(b"\n", b" ") + b"\n" + rest if rest else changed


def cases(sound):
    """Command, file, what was done to it, and what stands there then."""
    for command, read in READ.items():
        for name in files(sound):
            if name.startswith(read) and not (command == "resume" and name.startswith("checkpoints/checkpoint-4")):
                for what, content in spoilt(name, (sound / name).read_bytes()):
                    yield command, name, what, content


def prepared(place, command):
    """The run as it was; for commands that resume it, as if it had been killed in its third step."""
    run = place / "run"
    for folder in (run, place / "out"):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place / "sound", run)
    (place / "out").mkdir()
    if command == "resume":
        for name in ("adapter", "checkpoints/checkpoint-4"):
            shutil.rmtree(run / name)
        (run / "run.json").unlink()
    return run


def outcome(place, capsys, case):
    """Exit code of the command, and what it told."""
    command, name, _, content = case
    run = prepared(place, command)
    (run / name).unlink()
    if content == "folder":
        (run / name).mkdir()
    elif content is not None:
        (run / name).write_bytes(content)
    capsys.readouterr()
    try:
        code = main([word.format(run=run, out=place / "out") for word in COMMANDS[command]])
    except BaseException as error:  # what a user would see as a traceback
        return type(error).__name__, str(error)
    return code, capsys.readouterr().err


def faults(place, capsys, chosen):
    """Where a command neither worked nor refused in one sentence."""
    found = []
    for case in chosen:
        code, told = outcome(place, capsys, case)
        refused = code == 2 and told.splitlines()[-1].startswith("siftune: error: ")
        if (code != 0 and not refused) or "Traceback" in told:
            found.append(f"{case[:3]}: {code}, {told[-500:]}")
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_work_on_what_is_sound(place, capsys, command):
    readme = (place / "sound" / "README.md").read_bytes()
    code, told = outcome(place, capsys, (command, "README.md", "nothing", readme))
    assert code == 0, told


def test_a_sample_of_damaged_runs_works_or_is_refused(place, capsys):
    assert faults(place, capsys, random.Random(0).sample([*cases(place / "sound")], SAMPLE)) == []


@pytest.mark.fuzz
@pytest.mark.parametrize("part", range(16))
@pytest.mark.parametrize("command", COMMANDS)
def test_damaged_runs_work_or_are_refused(place, capsys, command, part):
    mine = [case for case in cases(place / "sound") if case[0] == command]
    assert faults(place, capsys, mine[part::16]) == []
