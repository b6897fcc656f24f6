"""Words of messages: numbers with their nouns, and what others say."""


def counted(number: int, noun: str) -> str:
    """A number and what it counts.

    Example:
        >>> counted(1, "row"), counted(3000, "row")
        ('1 row', '3,000 rows')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def one_line(text: str, longest: int = 200) -> str:
    r"""Words of others for a message of ours: on one line, cut short, and without characters that do not show.

    Example:
        >>> one_line("no\nsuch \x00 thing", 10)
        'no such...'
    """
    line = " ".join(text.split())
    clean = "".join(c if c.isprintable() else "?" for c in line)
    return clean if len(clean) <= longest else clean[: longest - 3] + "..."
