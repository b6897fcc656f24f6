"""Options and values of other versions and of other trainers, and what to use instead."""

from typing import Any

_RECORDED = "scores and losses of rows are always recorded"
_TRIM = "use siftune sift with a few correct rows, or siftune rows and --drop-rows"
_ADAPTER = "use lora, rslora, dora, series, parallel, ia3, ln or full"

# option, or option=value -> what to do, to follow "was removed:"
REMOVED = {
    "allow_change": "train in a new folder with --out",
    "bad_steps": "three steps with non-finite numbers are skipped before a run stops",
    "dp_clipping": "every layer has its part of dp_clip",
    "eval_limit": "give a smaller file with --eval",
    "keep_scores": _RECORDED,
    "eval_split": "name the split in eval, such as google/boolq@validation",
    "format": "use columns, such as messages=messages if the rows have other columns too",
    "outside": "embeddings and head are frozen",
    "loss": "every label token counts alike",
    "neftune": "leave it out",
    "nonlinearity": "series and parallel adapters use ReLU",
    "record_rows": _RECORDED,
    "retrieve": "select rows before training, or use --target",
    "row_weights": "use a column weight in the training rows",
    "support_rows": "use --target, with --target-share 0 to compare rows only",
    "train_times": "name a file twice in train, or use a column weight",
    "watch": "use siftune report, also while a run trains",
    "loradrop": "use --layers to name the layers that train",
    "static": "use --layers to name the layers that train",
    "cut.depths": "they are 0, 0.25, 0.5 and 0.75",
    "gast.among": "rows compete within their batch; use a larger --batch-size",
    "gast.decay": "it was for support momentum; use support rest",
    "gast.select_until": "selection ends where the target's rows begin",
    "gast.support_decay": "with gast.support_every above 1, the mean keeps 0.9 of itself per step",
    "greats.support": "GREATS helps the rows of --target, else training rows",
    "greats.support_size": "4 support rows are drawn per step",
    "ist.factor": "it is 0.25, as in the paper",
    "ist.importance_from": "importance is measured by the adapters' response",
    "ist.score_lr": "it is 10, as in the paper",
    "ist.suppressed": "it is 0.5, as in the paper",
    "lisa.keep_state": "the optimizer drops the state of layers that leave",
    "trim": _TRIM,
    "gast.support=momentum": "use support rest",
    "gast.score=preconditioned": "use inner or cosine",
    "gast.score=preconditioned-cosine": "use inner or cosine",
    "method=loradrop": "use --layers to name the layers that train",
    "method=static": "use --layers to name the layers that train",
    "method=trim": _TRIM,
    **{f"adapter={name}": _ADAPTER for name in ("vera", "loha", "lokr", "oft", "boft", "adalora", "prefix")},
}


# defaults that options had: the recipe of a run lists them, too
FORMER_DEFAULTS = {
    "eval_split": "test",
    "format": "auto",
    "ist.factor": 0.25,
    "ist.score_lr": 10.0,
    "ist.suppressed": 0.5,
}

_TRAINER = "TRL's SFTTrainer, with a callback that selects layers, such as IST (docs/tools.md)"
_SERVING = "use `siftune export RUN`, then vLLM or `transformers serve`"
_FORM = "use LLaMA-Factory with our callbacks (docs/tools.md)"
# option of another trainer -> the tool that has it
OUT_OF_SCOPE = {
    "packing": f"siftune keeps one row per sequence: to pack rows, use {_TRAINER}",
    "padding_free": f"siftune keeps one row per sequence: to train without padding, use {_TRAINER}",
    "streaming": f"siftune reads all rows before it trains: to stream them, use {_TRAINER}",
}
# command of another tool, or an earlier name -> what to use
OTHER_COMMANDS = {
    "sweep": "`siftune sweep` is now `siftune compare-emulators`",
    "sweep-lr": "`siftune sweep-lr` is now `siftune find-lr`",
    "reproduce": "`siftune reproduce` is now `python -m lab.reproduce`, run from a clone of the repository",
    "chat": f"siftune has no chat: {_SERVING}",
    "serve": f"siftune serves no models: {_SERVING}",
    "web": f"siftune has no web form: {_FORM}",
    "webui": f"siftune has no web form: {_FORM}",
}


def removal(name: str, value: Any = None) -> str | None:
    """The sentence on an option, such as gast.select, or one of its values, if it was removed or is another tool's.

    Example:
        >>> removal("adapter", "vera")
        'vera was removed: use lora, rslora, dora, series, parallel, ia3, ln or full'
    """
    if name in OUT_OF_SCOPE:
        return OUT_OF_SCOPE[name]
    group = name.partition(".")[0]
    for key in (name, group):
        if key in REMOVED:
            return f"this option was removed: {REMOVED[key]}"
    key = f"{name}={value}"
    return f"{value} was removed: {REMOVED[key]}" if key in REMOVED else None
