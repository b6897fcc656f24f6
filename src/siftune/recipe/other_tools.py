"""Options and commands of other tools that users may try, and what to use instead."""

_TRAINER = "TRL's SFTTrainer, with a callback that selects layers, such as IST (docs/tools.md)"
_SERVING = "use `siftune export RUN`, then vLLM or `transformers serve`"
_FORM = "use LLaMA-Factory with our callbacks (docs/tools.md)"

OTHER_OPTIONS = {
    "packing": f"siftune keeps one row per sequence: to pack rows, use {_TRAINER}",
    "padding_free": f"siftune keeps one row per sequence: to train without padding, use {_TRAINER}",
    "streaming": f"siftune reads all rows before it trains: to stream them, use {_TRAINER}",
}
OTHER_COMMANDS = {
    "chat": f"siftune has no chat: {_SERVING}",
    "serve": f"siftune serves no models: {_SERVING}",
    "web": f"siftune has no web form: {_FORM}",
    "webui": f"siftune has no web form: {_FORM}",
}
