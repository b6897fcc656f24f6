"""Words of messages: numbers with their nouns, times, and what others say."""

import unicodedata


def counted(number: int, noun: str) -> str:
    """A number and what it counts.

    Example:
        >>> counted(1, "row"), counted(3000, "row")
        ('1 row', '3,000 rows')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """A time in seconds, or in the two units that suit it.

    Example:
        >>> duration(0.2), duration(42), duration(200), duration(7380)
        ('0.2 s', '42 s', '3 min 20 s', '2 h 3 min')
    """
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s" if whole else f"{seconds:.1g} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def one_line(text: str, longest: int = 200) -> str:
    r"""Words of others for a message of ours: on one line, cut short, and without characters that do not show.

    Example:
        >>> one_line("no\nsuch \x00 thing", 10)
        'no such...'
    """
    line = " ".join(text.split())
    clean = "".join(c if c.isprintable() else "?" for c in line)
    return clean if len(clean) <= longest else clean[: longest - 3] + "..."


def visible(text: str) -> str:
    r"""A text in which nothing moves the cursor or changes colours, but for new lines: what does is written out.

    Example:
        >>> print(visible("red \x1b[31mrot"))
        red \x1b[31mrot
    """
    return "".join(
        char
        if char == "\n" or unicodedata.category(char) not in ("Cc", "Cf")
        else char.encode("unicode_escape").decode()
        for char in text
    )
