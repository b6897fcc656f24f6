"""Options and values that recipes of other versions may name, and what to use instead."""

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


def removal(name: str, value: Any = None) -> str | None:
    """The sentence on an option, such as gast.select, or one of its values, if it was removed; else None.

    Example:
        >>> removal("adapter", "vera")
        'vera was removed: use lora, rslora, dora, series, parallel, ia3, ln or full'
    """
    group = name.partition(".")[0]
    for key in (name, group):
        if key in REMOVED:
            return f"this option was removed: {REMOVED[key]}"
    key = f"{name}={value}"
    return f"{value} was removed: {REMOVED[key]}" if key in REMOVED else None
