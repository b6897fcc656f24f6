"""Commands as a user calls them, and what those of kits are told in every test."""

import json

from siftune.cli.main import main

EMULATE = ("--first", "1", "--last", "1", "--rows", "6", "--batch-size", "3", "--template", "none")
TRAIN = ("--steps", "2", "--batch-size", "2", "--adapter", "full", "--method", "dense", "--template", "none")


def siftune(capsys, *arguments):
    """Run a command that succeeds; return its JSON and what it said besides."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def error_of(capsys, *arguments):
    """Run a command that refuses; return its sentence."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    last = captured.err.splitlines()[-1]
    assert last.startswith("siftune: error: ")
    return last.removeprefix("siftune: error: ")
