"""What is done around the steps of an optimizer, also where a step runs forward and backward itself, in a closure."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

Act = Callable[[], Any]


def around_steps(optimizer: torch.optim.Optimizer, before: Act, after: Act) -> Sequence[Any]:
    """Call `before` when the gradients of a step are whole, and `after` when it is done.

    A closure makes the gradients within the step, as Lightning has it: `before` then comes at the closure's end. The
    `remove()` of the handles ends it.
    """

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(("self", "closure"), args, strict=False)), **kwargs}
        if (closure := given.pop("closure", None)) is None:
            before()
            return None
        return (given.pop("self"), *args[2:]), {**given, "closure": lambda: _then(closure(), before)}

    return [optimizer.register_step_pre_hook(hook), optimizer.register_step_post_hook(lambda *_: after())]


def _then(value: Any, act: Act) -> Any:
    act()
    return value
