"""Numbers with their nouns."""


def counted(number: int, noun: str) -> str:
    """A number and what it counts.

    Example:
        >>> counted(1, "row"), counted(3000, "row")
        ('1 row', '3,000 rows')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
