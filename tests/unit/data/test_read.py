from __future__ import annotations

import csv
import json
import os

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from siftune.base.errors import DataError, RecipeError
from siftune.data.read import load_rows
from siftune.data.rows import Row, row_texts, rows_from
from siftune.data.turns import Message

GOOD = {"prompt": "1 + 1 =", "completion": " 2", "answer": "2"}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Farewell"},
]
UNLEARNED = {"role": "assistant", "content": "Er", "weight": 0}


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: bytes | str) -> str:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    return write


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def refused(source: str, **options) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# formats


def test_prompt_and_completion():
    (row,) = rows_from([GOOD], "demo")
    assert row == Row((Message("user", "1 + 1 ="),), " 2", "demo 1", {"answer": "2"})


def test_messages_learn_every_turn_of_the_assistant():
    (row,) = rows_from([{"messages": TURNS, "id": 7}])
    assert [m.role for m in row.prompt] == ["system", "user", "assistant", "user"]
    assert [m.learned for m in row.prompt] == [False, False, True, False]
    assert (row.completion, row.extra) == ("Farewell", {"id": 7})


def test_turns_of_weight_zero_are_not_learned():
    turns = [TURNS[1], UNLEARNED, TURNS[1], {**TURNS[2], "weight": 1}, *TURNS[3:]]
    (row,) = rows_from([{"messages": turns}])
    assert [m.learned for m in row.prompt] == [False, False, False, True, False]


def test_conversational_prompt_learns_the_completion_only():
    (row,) = rows_from([{"prompt": TURNS[:4], "completion": TURNS[4:]}])
    assert [m.learned for m in row.prompt] == [False] * 4
    assert row.completion == "Farewell"
    (row,) = rows_from([{"prompt": TURNS[:2], "completion": TURNS[2:]}])
    assert [m.learned for m in row.prompt] == [False, False, True, False]
    (row,) = rows_from([{"prompt": TURNS[:2], "completion": "Hello"}])
    assert (len(row.prompt), row.completion) == (2, "Hello")


@pytest.mark.parametrize(
    ("given", "expected"),
    [("a b", "Sort.\n\na b"), ("", "Sort."), (" \n", "Sort."), (None, "Sort."), ("absent", "Sort.")],
)
def test_alpaca_joins_instruction_and_input(given, expected):
    record = {"instruction": "Sort.", "input": given, "output": "b a", "text": "kept"}
    if given == "absent":
        del record["input"]
    (row,) = rows_from([record])
    assert row.prompt == (Message("user", expected),)
    assert (row.completion, row.extra) == ("b a", {"text": "kept"})


def test_text_has_no_prompt():
    (row,) = rows_from([{"text": "Once upon a time."}])
    assert (row.prompt, row.completion) == ((), "Once upon a time.")


def test_columns_under_other_names():
    record = {**GOOD, "text": "1 + 1 = 2"}
    assert rows_from([record])[0].completion == " 2"
    assert rows_from([record], columns=("text=text",))[0].completion == "1 + 1 = 2"
    (row,) = rows_from([{"q": "a", "a": "b", "prompt": "x", "id": 7}], columns=("prompt=q", "completion=a"))
    assert (row.prompt[0].content, row.completion, row.extra) == ("a", "b", {"id": 7})
    (row,) = rows_from([{**GOOD, "origin": "s"}], columns=("source=origin",))
    assert (row.completion, row.extra["source"]) == (" 2", "s")
    with pytest.raises(DataError, match="'q' of --columns prompt=q is missing"):
        rows_from([GOOD], columns=("prompt=q",))
    with pytest.raises(RecipeError, match="pairs such as"):
        rows_from([GOOD], columns=("prompt",))


def test_conversations_of_sharegpt():
    turns = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello"), ("human", "Bye"), ("gpt", "Bye.")]
    (row,) = rows_from([{"conversations": [{"from": role, "value": text} for role, text in turns], "id": 1}])
    assert [turn.role for turn in row.prompt] == ["system", "user", "assistant", "user"]
    assert [turn.learned for turn in row.prompt] == [False, False, True, False]
    assert (row.completion, row.extra) == ("Bye.", {"id": 1})
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    (same,) = rows_from([{"c": turns}], columns=("messages=c",))
    assert same.completion == "Hello"
    with pytest.raises(DataError, match="'conversations' has no turn of the assistant"):
        rows_from([{"conversations": [{"from": "human", "value": "Hi"}]}])


def test_names_of_columns_may_have_spaces_around_them(write):
    (row,) = load_rows(write("t.csv", "prompt, completion\n1 + 1 =, 2\n"))
    assert (row.prompt[0].content, row.completion, row.extra) == ("1 + 1 =", " 2", {})


def test_turns_of_sharegpt_have_weights_and_no_calls():
    turns = [("human", 1), ("gpt", 0), ("human", 1), ("gpt", 1)]
    record = {"conversations": [{"from": role, "value": "a", "weight": weight} for role, weight in turns]}
    assert not any(turn.learned for turn in rows_from([record])[0].prompt)
    record["conversations"][1]["tool_calls"] = [1]
    with pytest.raises(DataError, match="turn 2 of 'conversations' has tool_calls"):
        rows_from([record])


UNREAD = [
    {"system": "Be rude."},
    {"history": [["a", "b"]]},
    {"tools": "[...]"},
    {"functions": [{"name": "f"}]},
]


@pytest.mark.parametrize("column", UNREAD, ids=lambda column: next(iter(column)))
@pytest.mark.parametrize("row", [GOOD, {"instruction": "a", "output": "b"}], ids=["prompt", "instruction"])
def test_columns_of_a_prompt_that_no_format_has_are_refused(write, row, column):
    """Without them the model would learn answers to another prompt, under the template's own system turn."""
    [name] = column
    for questions in (False, True):
        with pytest.raises(DataError, match=f"t.jsonl:1: .*'{name}' would not reach the model"):
            load_rows(write("t.jsonl", lines({**row, **column})), questions=questions)
    (empty,) = rows_from([{**row, name: ""}])
    assert name in empty.extra
    assert rows_from([{"text": "a", **column}])


def test_columns_of_a_conversation_that_no_format_has_are_refused():
    with pytest.raises(DataError, match="'system' would not reach"):
        rows_from([{"messages": TURNS[:3], "system": "Be rude."}])


@pytest.mark.parametrize("column", ["messages", "completion"])
def test_turns_of_the_user_at_the_end_are_left_out_and_counted(write, caplog, column):
    """The row is that of the conversation without them, in each form that has turns."""
    before, after = ([], TURNS) if column == "messages" else (TURNS[:2], TURNS[2:])
    thanks = [{"role": "user", "content": "Thanks"}, {"role": "user", "content": "!"}]
    forms = [{column: [*after, *thanks[:count]], **({"prompt": before} if before else {})} for count in range(3)]
    with caplog.at_level("WARNING", "siftune.data.read"):
        whole, *cut = load_rows(write("t.jsonl", lines(*forms)))
    assert [(row.prompt, row.completion) for row in cut] == [(whole.prompt, whole.completion)] * 2
    assert [whole.unanswered, *(row.unanswered for row in cut)] == [0, 1, 2]
    assert [*row_texts(cut)] == [*row_texts([whole])] * 2
    assert caplog.messages == ["t.jsonl: 2 of 3 rows end with a turn of the user, which has no answer and is left out"]
    caplog.clear()
    load_rows(write("t.jsonl", lines(forms[0])))
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"prompt": "a"}, ["user: a"]),
        ({"prompt": "a", "completion": 3}, ["user: a"]),
        ({"prompt": TURNS[:2], "completion": "b"}, ["system: Be brief.", "user: Hi"]),
        ({"messages": TURNS[:2]}, ["system: Be brief.", "user: Hi"]),
        ({"messages": TURNS[1:3]}, ["user: Hi"]),
        ({"messages": TURNS[1:4]}, ["user: Hi", "assistant: Hello", "user: Bye"]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, ["user: a"]),
        ({"instruction": "Sort.", "input": "b a"}, ["user: Sort.\n\nb a"]),
        ({"text": "a"}, ["user: a"]),
    ],
)
def test_prompts_to_answer(write, record, turns):
    [row] = load_rows(write("t.jsonl", lines(record)), questions=True)
    assert [f"{turn.role}: {turn.content}" for turn in row.prompt] == turns
    assert (row.completion, any(turn.learned for turn in row.prompt)) == ("", False)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": " "}, "t.jsonl:1: 'prompt' is empty"),
        ({"messages": TURNS[2:3]}, "t.jsonl:1: 'messages' has no turn to answer"),
        ({"messages": TURNS[:2], "tools": [1]}, "t.jsonl:1: the column 'tools' is not supported"),
        ({"completion": "a"}, "t.jsonl:1: the columns found (completion)"),
    ],
)
def test_rows_without_a_prompt_to_answer(write, record, message):
    assert refused(write("t.jsonl", lines(record)), questions=True).startswith(message)


@pytest.mark.parametrize(
    ("record", "advice"),
    [
        ({"frage": "a", "antwort": "b"}, "--columns prompt=frage completion=antwort"),
        ({"x": 1}, "--columns prompt=NAME completion=NAME"),
    ],
)
def test_a_row_of_an_unknown_form_says_what_to_use(record, advice):
    with pytest.raises(DataError) as found:
        rows_from([record])
    assert advice in str(found.value)


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "c"}, "completion=chosen"),
        ({"prompt": TURNS[1:2], "chosen": TURNS[2:3], "rejected": []}, "completion=chosen"),
        ({"prompt": "Hi", "chosen": TURNS[1:3], "rejected": []}, "messages=chosen"),
        ({"chosen": TURNS[1:3], "rejected": []}, "messages=chosen"),
        ({"chosen": "Hello", "rejected": "c"}, "text=chosen"),
    ],
)
def test_the_advice_on_preference_pairs_reads_them(record, columns):
    with pytest.raises(DataError) as found:
        rows_from([record])
    assert str(found.value).endswith(f"give --columns {columns}")
    [row] = rows_from([record], columns=(columns,))
    assert row.completion == "Hello"
    assert [turn.content for turn in row.prompt] == ([] if columns == "text=chosen" else ["Hi"])


# files


def parquet(path, rows) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_every_kind_of_file_gives_the_same_rows(write, tmp_path):
    second = {"prompt": 'Say "é,\n"', "completion": "é,\n", "answer": "é"}
    rows = [GOOD, second]
    write("a.jsonl", lines(GOOD) + "\n" + lines(second))
    write("a.ndjson", b"\xef\xbb\xbf" + lines(*rows).encode())
    write("a.json", json.dumps(rows))
    write("b.json", json.dumps({"data": rows, "version": 1}))
    write("a.CSV", 'prompt,completion,answer\n1 + 1 =, 2,2\n\n"Say ""é,\n""","é,\n",é\n')
    parquet(tmp_path / "a.parquet", rows)
    origins = {
        "a.jsonl": ["a.jsonl:1", "a.jsonl:3"],
        "a.ndjson": ["a.ndjson:1", "a.ndjson:2"],
        "a.json": ["a.json row 1", "a.json row 2"],
        "b.json": ["b.json row 1", "b.json row 2"],
        "a.CSV": ["a.CSV:2", "a.CSV:4"],
        "a.parquet": ["a.parquet row 1", "a.parquet row 2"],
    }
    expected = [(row.prompt, row.completion, row.extra) for row in rows_from(rows)]
    for name, places in origins.items():
        loaded = load_rows(name)
        assert [(row.prompt, row.completion, row.extra) for row in loaded] == expected, name
        assert [row.origin for row in loaded] == places


def test_conversations_survive_parquet(tmp_path):
    parquet(tmp_path / "c.parquet", [{"messages": TURNS}])
    (row,) = load_rows(str(tmp_path / "c.parquet"))
    assert row.completion == "Farewell"
    assert len(row.prompt) == 4


def test_a_text_has_a_row_per_line(write):
    source = write("a.txt", b"\xef\xbb\xbf one \r\n\n \ntwo\xff\nthree")
    bad = []
    rows = load_rows(source, bad=bad)
    assert [(row.prompt, row.completion, row.origin) for row in rows] == [
        ((), " one ", "a.txt:1"), ((), "three", "a.txt:5"),
    ]  # fmt: skip
    assert "a.txt:4: invalid UTF-8" in str(*bad)


def test_the_limit_leaves_later_rows_unread(write):
    source = write("a.jsonl", lines(GOOD, GOOD) + "not JSON\n")
    assert len(load_rows(source, limit=2)) == 2
    assert "a.jsonl:3" in refused(source, limit=3)
    assert "limit on rows is 0" in refused(source, limit=0)


# bad input: one sentence with file and row


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("e.jsonl", "\n \n", "e.jsonl is empty"),
        ("e.json", "[]", "e.json is empty"),
        ("e.csv", "prompt,completion\n", "e.csv is empty"),
        ("e.parquet", "", "e.parquet: invalid Parquet"),
        ("u.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "u.jsonl:2: invalid UTF-8, byte 0xff at position 11"),
        ("u.json", b'[\n {"prompt": "\xe9"}]', "u.json:2: invalid UTF-8, byte 0xe9 at position 14"),
        ("j.jsonl", lines(GOOD) + '{"prompt":\n', "j.jsonl:2: invalid JSON (Expecting value, character 11);"),
        ("j.jsonl", '{"n": ' + "9" * 5000 + "}", "j.jsonl:1: invalid JSON"),
        ("j.json", '[\n{"prompt": "a"}\n{"b": 1}]', "j.json:3: invalid JSON"),
        ("j.json", '{"rows": []}', "j.json: found an object"),
        ("l.json", '{"text": "a"}\n{"text": "b"}\n', "l.json has one object per line: name it .jsonl"),
        ("n.json", '{"a":' + "[" * 99_999 + "\n", "n.json:1: invalid JSON"),
        ("l.jsonl", '[{"text": "a"}]\n', "l.jsonl:1: the row is a list, but must be an object; if"),
        ("t.csv", "prompt\tcompletion\na\tb\n", "t.csv:1: tabs separate the fields; save the file with commas"),
        ("s.csv", "prompt;completion\na;b\n", "s.csv:1: semicolons separate the fields"),
        ("o.jsonl", lines(GOOD, ["a", "b"]), "o.jsonl:2: the row is a list"),
        ("c.csv", "prompt,completion\na,b\na,b,c\n", "c.csv:3: the row has 3 fields, but the header has 2"),
        ("c.csv", 'prompt,completion\na,"b\n', "c.csv:2: invalid CSV"),
        ("m.jsonl", lines(GOOD, {"prompt": "a"}), "m.jsonl:2: the column 'completion' is missing"),
        ("m.jsonl", lines({**GOOD, "completion": " \n"}), "m.jsonl:1: 'completion' is empty"),
        ("m.jsonl", lines({**GOOD, "completion": 2}), "m.jsonl:1: 'completion' is a number"),
        ("m.jsonl", lines({"instruction": "a", "input": 3, "output": "b"}), "m.jsonl:1: 'input' is a number"),
        ("s.jsonl", '{"text": "a\\ud83d"}', "s.jsonl:1: 'text' holds an unpaired surrogate ('\\ud83d') at character 1"),
        ("k.jsonl", lines({"question": "a", "reply": "b"}), "k.jsonl:1: the columns found (question, reply)"),
        ("t.jsonl", lines({"messages": []}), "t.jsonl:1: 'messages' is an empty list"),
        ("t.jsonl", lines({"messages": ["Hi"]}), "t.jsonl:1: turn 1 of 'messages' is a string"),
        ("t.jsonl", lines({"messages": TURNS[:2]}), "t.jsonl:1: 'messages' has no turn of the assistant"),
        (
            "t.jsonl",
            lines({"messages": [*TURNS, {"role": "tool", "content": "3"}]}),
            "t.jsonl:1: 'messages' ends with a turn of the role 'tool'",
        ),
        (
            "t.jsonl",
            lines({"prompt": TURNS[1:3], "completion": TURNS[3:4]}),
            "t.jsonl:1: 'completion' has no turn of the assistant",
        ),
        ("t.jsonl", lines({"messages": TURNS[4:]}), "t.jsonl:1: 'messages' has only the assistant's turn"),
        (
            "t.jsonl",
            lines({"messages": [*TURNS[:-1], UNLEARNED]}),
            "t.jsonl:1: the last turn of 'messages' has the weight 0",
        ),
        (
            "t.jsonl",
            lines({"messages": [{**UNLEARNED, "weight": 0.5}]}),
            "t.jsonl:1: turn 1 of 'messages' has the weight 0.5",
        ),
        ("t.jsonl", lines({"messages": [{"content": "a"}]}), "t.jsonl:1: turn 1 of 'messages' has no role"),
        (
            "t.jsonl",
            lines({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}),
            "t.jsonl:1: turn 1 of 'messages' has tool_calls, which is not supported, because only role and content",
        ),
        (
            "t.jsonl",
            lines({"messages": [{**TURNS[2], "function_call": {}}, {**TURNS[2], "function_call": {"name": "f"}}]}),
            "t.jsonl:1: turn 2 of 'messages' has function_call",
        ),
        ("t.jsonl", lines({"messages": TURNS, "tools": [{}]}), "t.jsonl:1: the column 'tools' is not supported"),
        (
            "t.jsonl",
            lines({"prompt": TURNS[:2], "completion": "a", "functions": [1]}),
            "t.jsonl:1: the column 'functions'",
        ),
        ("x.tsv", "a", "x.tsv: the ending '.tsv' is unknown"),
    ],
)
def test_bad_files_are_refused_with_file_and_row(write, name, content, expected):
    assert refused(write(name, content)).startswith(expected)


def test_missing_and_unreadable_files(write, tmp_path):
    assert refused("no.jsonl").startswith("no.jsonl does not exist")
    assert refused("a.jsonl,b.jsonl").endswith("put spaces between files, not commas")
    (tmp_path / "folder.csv").mkdir()
    assert "folder.csv is a folder" in refused("folder.csv")


def test_a_file_that_cannot_be_read(write, monkeypatch):
    source = write("a.jsonl", lines(GOOD))

    def fail(*_, **__):
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr("pathlib.Path.open", fail)
    assert refused(source).startswith("a.jsonl cannot be read: Input/output error")


def test_columns_are_reported_on_one_short_line(write):
    names = ["\x00prompt", "a\nb", "\u202ecompletion", "x" * 5000]
    message = refused(write("rows.jsonl", lines(dict.fromkeys(names, "1"))))
    assert "the columns found (?prompt, a b, ?completion, xxx" in message
    assert message.isprintable()
    assert len(message) < 500


def test_a_column_that_is_there_twice_is_refused(write):
    path = write("rows.csv", "prompt,completion,,,prompt\na,b,,,c\n")
    with pytest.raises(DataError, match=r"rows\.csv:1: .*'prompt' comes twice"):
        load_rows(path)
    assert len(load_rows(write("more.csv", "prompt,completion,,\na,b,,\n"))) == 1


def test_fields_of_csv_may_be_longer_than_pythons_limit(tmp_path):
    """And the limit, which all of a process shares, is as it was."""
    long, before = "word " * 40_000, csv.field_size_limit()
    (tmp_path / "long.csv").write_text(f"prompt,completion\nshort,a\n{long},b\n", encoding="utf-8")
    rows = load_rows(str(tmp_path / "long.csv"))
    assert [len(row.prompt[0].content) for row in rows] == [5, len(long)]
    assert csv.field_size_limit() == before


def test_a_split_of_a_file_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match="a file has no splits"):
        load_rows(f"{tmp_path}/rows.jsonl@test", "train")


@pytest.mark.parametrize("other", ["c.csv", "c.tsv", "c.jsonl.gz"])
def test_a_folder_of_mixed_files_is_refused_unless_it_has_a_card(tmp_path, other):
    """`datasets` reads the files of one kind and ignores the others."""
    (tmp_path / "deep").mkdir()
    for number, name in enumerate(("deep/a.jsonl", "b.json")):
        (tmp_path / name).write_text(json.dumps({"text": f"row {number}"}) + "\n")
    assert len(load_rows(str(tmp_path))) == 2
    (tmp_path / other).write_text("text\nrow 2\n")
    with pytest.raises(DataError, match=rf"several kinds, such as b.json and {other}"):
        load_rows(str(tmp_path))
    if other == "c.csv":
        (tmp_path / "README.md").write_text("A data set.\n")
        assert load_rows(str(tmp_path))


def test_a_folder_with_the_sign_in_its_name_is_no_split(tmp_path):
    folder = tmp_path / "me@host" / "rows"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"text": "a"}\n')
    assert len(load_rows(str(folder), "train")) == 1


def test_a_table_of_many_columns_is_read_at_once(write):
    """With time quadratic in the columns, this would take minutes."""
    names = ["prompt", "completion", *(f"c{number}" for number in range(200_000))]
    (row,) = load_rows(write("wide.csv", f"{','.join(names)}\n{','.join(names)}\n"))
    assert row.completion == "completion"


@pytest.mark.parametrize(
    "row", [{"prompt": "a", "completion": "b" * 2**22}, {"prompt": "b" * 2**22, "completion": "a"}]
)
def test_a_row_that_is_too_long_is_refused(write, row):
    message = refused(write("rows.jsonl", lines(GOOD, row)))
    assert message.startswith("rows.jsonl:2: the row has 4,194,305 characters; at most 4,194,304")
    bad: list[DataError] = []
    assert len(load_rows("rows.jsonl", bad=bad)) == len(bad) == 1


NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"\xff\xfeA")]
)


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (pa.array([2**30, 1], pa.date32()), "days=1073741824; must have magnitude"),
        (pa.array([2**62, 1], pa.timestamp("us")), "out of range"),
        (pa.array([2**62, 1], pa.duration("s")), "too large"),
        (NOT_UTF8, "invalid start byte"),
    ],
    ids=["date", "time", "span", "text"],
)
def test_a_value_of_parquet_that_python_lacks_is_a_bad_row(write, tmp_path, column, reason):
    pq.write_table(pa.table({"prompt": ["a", "b"], "completion": ["c", "d"], "x": column}), tmp_path / "a.parquet")
    message = refused("a.parquet")
    assert message.startswith("a.parquet row 1: a value cannot be read (")
    assert reason in message
    bad: list[DataError] = []
    assert [row.origin for row in load_rows("a.parquet", bad=bad)] == ["a.parquet row 2"]
    assert len(bad) == 1
