"""The papers' tasks: names, readers of answers, and conversion of the hub's rows into questions.

LLM-Adapters' files have them as `instruction`, `output` and `answer`; on the hub each has columns of its own, which are
put into the words of these files here. Rows of the hub are those that the files were made of, as far as is known.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lab.reproduce.answer_text import Reader

Record = Mapping[str, Any]
Question = dict[str, str]

# Stanford Alpaca's prompt, in which these models are trained and asked; LLM-Adapters' code indents its lines, which is
# left out here
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
CLOZE = "Question: {}\nAnswer:"  # ours, for small models: an answer's text follows, as lm-evaluation-harness asks ARC


@dataclass(frozen=True)
class Task:
    """A task of a suite.

    Attributes:
        title: Its name in tables.
        reader: How answers are read; "text": whether the model writes one of the texts that count.
        hub: Hub id of its questions, with a configuration behind a colon.
        split: Split of the hub's rows that is asked.
        question: Makes `instruction`, `output` and `answer` of a row of the hub.
    """

    title: str
    reader: Reader | Literal["text"]
    hub: str
    split: str
    question: Callable[[Record], Question]


def options_of(instruction: str) -> list[str]:
    r"""Names of a question's options: what stands behind "Answer format:", with slashes between; empty without them.

    Example:
        >>> options_of("Is it so?\n\nAnswer format: true/false")
        ['true', 'false']
    """
    _, found, names = instruction.rpartition("Answer format:")
    return [name.strip() for name in names.split("/")] if found else []


def texts_of(instruction: str) -> tuple[str, list[str]]:
    r"""A question by itself, and what its options say; the options' names where they say nothing more (true, false).

    Raises:
        ValueError: The options are not listed as their names say; the message tells how.

    Example:
        >>> texts_of("Please choose: Hot?\n\nAnswer1: ice Answer2: fire\n\nAnswer format: answer1/answer2")
        ('Hot?', ['ice', 'fire'])
    """
    names, (asked, _, _) = options_of(instruction), instruction.rpartition("Answer format:")
    if not any(name[-1:].isdigit() for name in names):
        return _without_lead(asked), names
    marks = [f"{name.capitalize()}:" for name in names]
    question, found, rest = asked.rpartition(f"\n\n{marks[0]}")
    if not found:
        raise ValueError(f"{marks[0]} begins no list of options")
    texts = []
    for mark in marks[1:]:
        if rest.count(mark) != 1:
            raise ValueError(f"{mark} stands {rest.count(mark)} times in its list of options")
        text, _, rest = rest.partition(mark)
        texts.append(text.strip())
    return _without_lead(question), [*texts, rest.strip()]


def _without_lead(asked: str) -> str:
    """A question without "Please choose the correct answer to the question:"."""
    lead, found, question = asked.partition(": ")
    return (question if found and lead.startswith("Please ") else asked).strip()


def _choice(lead: str, kind: str, texts: Sequence[str], right: int, between: str = " ") -> Question:
    """A question with numbered options; `right` counts from 0."""
    names = [f"{kind}{number}" for number in range(1, len(texts) + 1)]
    listed = between.join(f"{name.capitalize()}: {text}" for name, text in zip(names, texts, strict=True))
    return _asked(f"{lead}\n\n{listed}\n\nAnswer format: {'/'.join(names)}", names[right])


def _asked(instruction: str, answer: str) -> Question:
    return {"instruction": instruction, "output": f"the correct answer is {answer}", "answer": answer}


def _boolq(row: Record) -> Question:
    lead = f"Please answer the following question with true or false, question: {row['question']}?"
    return _asked(f"{lead}\n\nAnswer format: true/false", str(bool(row["answer"])).lower())


def _piqa(row: Record) -> Question:
    lead = f"Please choose the correct solution to the question: {row['goal']}"
    return _choice(lead, "solution", [row["sol1"], row["sol2"]], int(row["label"]), "\n\n")


def _siqa(row: Record) -> Question:
    lead = f"Please choose the correct answer to the question: {row['context']} {row['question']}"
    return _choice(lead, "answer", [row[f"answer{letter}"] for letter in "ABC"], int(row["label"]) - 1)


def _hellaswag(row: Record) -> Question:
    lead = f"Please choose the correct ending to complete the given sentence: {row['activity_label']}: {row['ctx']}"
    return _choice(lead, "ending", row["endings"], int(row["label"]))


def _winogrande(row: Record) -> Question:
    lead = f"Please choose the correct answer to fill in the blank to complete the given sentence: {row['sentence']}"
    return _choice(lead, "option", [row["option1"], row["option2"]], int(row["answer"]) - 1)


def _lettered(row: Record) -> Question:
    lead = f"Please choose the correct answer to the question: {row.get('question') or row['question_stem']}"
    choices = row["choices"]
    return _choice(lead, "answer", choices["text"], list(choices["label"]).index(row["answerKey"]))


def _gsm8k(row: Record) -> Question:
    return {
        "instruction": row["question"],
        "output": row["answer"],
        "answer": row["answer"].rpartition("####")[2].strip(),
    }


def _aqua(row: Record) -> Question:
    listed = " ".join(row["options"])
    return {
        "instruction": f"{row['question']} Answer Choices: {listed}",
        "output": row["rationale"],
        "answer": row["correct"],
    }


def _mawps(row: Record) -> Question:
    return {"instruction": row["question"], "output": str(row["result"]), "answer": str(row["result"])}


def _svamp(row: Record) -> Question:
    question = f"{row['Body'].strip()} {row['Question'].strip()}"
    return {"instruction": question, "output": str(row["Answer"]), "answer": str(row["Answer"])}


TASKS: dict[str, Task] = {
    "boolq": Task("BoolQ", "option", "google/boolq", "validation", _boolq),
    "piqa": Task("PIQA", "option", "baber/piqa", "validation", _piqa),
    "social_i_qa": Task("SIQA", "option", "lighteval/siqa", "validation", _siqa),
    "hellaswag": Task("HellaSwag", "option", "Rowan/hellaswag", "validation", _hellaswag),
    "winogrande": Task("WinoGrande", "option", "allenai/winogrande:winogrande_xl", "validation", _winogrande),
    "ARC-Easy": Task("ARC-e", "option", "allenai/ai2_arc:ARC-Easy", "test", _lettered),
    "ARC-Challenge": Task("ARC-c", "option", "allenai/ai2_arc:ARC-Challenge", "test", _lettered),
    "openbookqa": Task("OBQA", "option", "allenai/openbookqa:main", "test", _lettered),
    "gsm8k": Task("GSM8K", "number", "openai/gsm8k:main", "test", _gsm8k),
    "AQuA": Task("AQuA", "letter", "deepmind/aqua_rat:raw", "test", _aqua),
    "mawps": Task("MAWPS", "number", "MU-NLPC/Calc-mawps", "test", _mawps),
    "SVAMP": Task("SVAMP", "number", "ChilleD/SVAMP", "test", _svamp),
}
