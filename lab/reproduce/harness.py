"""The tasks of offsite-tuning's tables, in the words of lm-evaluation-harness, each trained on and asked by itself.

Xiao et al. 2023 (arXiv 2302.04870) tune on each task's training rows, a question's right answer behind it, and have
lm-evaluation-harness ask the questions: the option of the largest log-likelihood, for WebQs whether the model's
likeliest tokens are an accepted answer. CRaSh and GradOT print the same tasks.

Ours: the space before an answer is trained on as it is asked; options are compared in RACE question by question, where
the harness puts an article's questions into one prompt; WebQs is read from what is written, by whole words.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lab.reproduce.tasks import Task

Record = Mapping[str, Any]
Question = dict[str, Any]


def _chosen(prompt: str, options: Sequence[str], right: int) -> Question:
    texts = [f" {option.strip()}" for option in options]
    return {"prompt": prompt, "completion": texts[right], "choices": texts, "answer": right}


def _labelled(prompt: str, row: Record) -> Question:
    choices = row["choices"]
    return _chosen(prompt, choices["text"], list(choices["label"]).index(row["answerKey"].strip()))


def _openbookqa(row: Record) -> Question:
    return _labelled(row["question_stem"], row)


def _arc(row: Record) -> Question:
    return _labelled(f"Question: {row['question']}\nAnswer:", row)


def _piqa(row: Record) -> Question:
    return _chosen(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def _hellaswag(row: Record) -> Question:
    lead = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _chosen(_plain(lead), [_plain(ending) for ending in row["endings"]], int(row["label"]))


def _plain(text: str) -> str:
    """WikiHow's marks in brackets taken out."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ").strip()


def _sciq(row: Record) -> Question:
    options = [row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]]
    return _chosen(f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:", options, 3)


def _web_questions(row: Record) -> Question:
    accepted = list(row["answers"])
    return {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {accepted[0]}", "accepted": accepted}


def _race(row: Record) -> Question:
    prompt = f"Article: {row['article']}\n\nQuestion: {row['question']}\n\nAnswer:"
    return _chosen(prompt, row["options"], "ABCD".index(row["answer"]))


HARNESS: dict[str, Task] = {
    "openbookqa": Task("OBQA", "option", "allenai/openbookqa:main", "test", _openbookqa),
    "piqa": Task("PIQA", "option", "baber/piqa", "validation", _piqa),
    "arc_easy": Task("ARC-e", "option", "allenai/ai2_arc:ARC-Easy", "test", _arc),
    "arc_challenge": Task("ARC-c", "option", "allenai/ai2_arc:ARC-Challenge", "test", _arc),
    "hellaswag": Task("HellaSwag", "option", "Rowan/hellaswag", "validation", _hellaswag),
    "sciq": Task("SciQ", "option", "allenai/sciq", "test", _sciq),
    "web_questions": Task("WebQs", "text", "stanfordnlp/web_questions", "test", _web_questions),
    "race": Task("RACE", "option", "ehovy/race:high", "test", _race),
}
