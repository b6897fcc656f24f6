"""The answer in a text that a model wrote, as the evaluation of LLM-Adapters (arXiv 2304.01933) looks for it.

A question of choice is answered by the first of its options' names that comes up, whatever stands around it; a sum by
the last number. That takes "true" in "untrue" and 3 in "3 of 12 are left" for answers, too: so does theirs, and figures
are comparable only if answers are found in the same way.
"""

import re
from collections.abc import Sequence
from typing import Literal

Reader = Literal["option", "number", "letter"]

_NUMBER = re.compile(r"-?\d+\.?\d*")
_CLOSE = 1e-3  # between numbers that count as the same


def first_option(text: str, options: Sequence[str]) -> str | None:
    """The option whose name comes first; None where none does. Letter case counts.

    Example:
        >>> first_option("the correct answer is answer2, not answer1", ["answer1", "answer2"])
        'answer2'
    """
    found = re.search("|".join(map(re.escape, sorted(options, key=len, reverse=True))), text)
    return found and found[0]


def last_number(text: str) -> float | None:
    """The last number, commas between digits left out; None where there is none.

    Example:
        >>> last_number("She pays $1,250.50 for 3, that is 3,751.5.")
        3751.5
    """
    found = _NUMBER.findall(text.replace(",", ""))
    return float(found[-1]) if found else None


def begins_with(text: str, accepted: Sequence[str]) -> bool:
    """Whether a text begins with one of the texts that count, white space before it left out, and the word ends there.

    Example:
        >>> begins_with(" Paris, France", ["Paris"]), begins_with(" Parisian", ["Paris"])
        (True, False)
    """
    return any(re.match(rf"{re.escape(one.strip())}(?!\w)", text.strip()) for one in accepted)


def is_right(text: str, answer: str, reader: Reader, options: Sequence[str] = ()) -> bool:
    """Whether a text answers a question.

    Args:
        text: What the model wrote.
        answer: The right option or letter, or a number.
        reader: How the answer is found: "option", the first of `options`; "letter", the first capital of A to E;
            "number", the last number, within 0.001 of the right one.
        options: Names of the options, for "option".
    """
    if reader == "number":
        written, wanted = last_number(text), last_number(answer)
        return written is not None and wanted is not None and abs(written - wanted) <= _CLOSE
    return first_option(text, "ABCDE" if reader == "letter" else options) == answer.strip()
