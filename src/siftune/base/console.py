"""The consoles that commands write to."""

from rich.console import Console


def text_console(stderr: bool = False) -> Console:
    """A console that prints text as is: no emojis for words between colons, no colours for numbers, no line breaks."""
    return Console(stderr=stderr, highlight=False, emoji=False, soft_wrap=True)
