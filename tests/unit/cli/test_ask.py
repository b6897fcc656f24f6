"""`siftune ask`: the answers of both models against arg-max token by token, and every source of prompts."""

import io
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from support.commands import error_of, siftune
from support.tiny import tiny
from support.tokenizer import byte_tokenizer
from transformers import AutoModelForCausalLM

from siftune.base.errors import DataError, RecipeError
from siftune.cli.ask import Options, _show, run
from siftune.evaluate.measure import Answer
from siftune.recipe.read import recipe_to_yaml
from siftune.recipe.schema import Recipe

TOKENIZER = byte_tokenizer()
NEW = 12
PROMPTS = ["1?", "What is two and two?", "b"]
OTHER = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def chat(*turns):
    """The text of TOKENIZER's template up to the answer; the roles alternate."""
    roles = ("user", "assistant") * len(turns)
    parts = [f"<|start|>{role}\n{text}<|end|>\n" for role, text in zip(roles, turns, strict=False)]
    return "".join([*parts, "<|start|>assistant\n"])


def by_hand(model, text):
    """Arg-max token by token after a text, without padding, cache or batch."""
    begin = TOKENIZER(text)["input_ids"]
    ids = list(begin)
    with torch.no_grad():
        while len(ids) < len(begin) + NEW:
            token = model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
            if token == TOKENIZER.eos_token_id:
                break
            ids.append(token)
    return TOKENIZER.decode(ids[len(begin) :], skip_special_tokens=True)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a tiny model that writes ASCII, and a run on it with an adapter that changes its answers."""
    monkeypatch.chdir(tmp_path)
    model = tiny("llama", layers=2, vocab_size=len(TOKENIZER), max_position_embeddings=256)
    tokens = TOKENIZER.convert_ids_to_tokens(range(len(TOKENIZER)))
    mute = [i for i, token in enumerate(tokens) if token != "<|end|>" and (len(token) > 1 or not token.isascii())]
    model.lm_head.weight.data[mute] = 0
    model.save_pretrained("base")
    TOKENIZER.save_pretrained("base")
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    tuned.peft_config["default"].base_model_name_or_path = "base"
    tuned.save_pretrained("run/adapter")
    save_recipe(tmp_path)
    return tmp_path


def save_recipe(place, **settings):
    (place / "run" / "recipe.yaml").write_text(recipe_to_yaml(Recipe(model="base", **settings)))


def base_model():
    return AutoModelForCausalLM.from_pretrained("base")


def tuned_model():
    return PeftModel.from_pretrained(base_model(), "run/adapter")


def ask(source="run", prompt=None, **options):
    return run(Options(source, prompt, **{"max_new_tokens": NEW, **options}))["answers"]


def test_answers_of_both_models_in_one_batch(place):
    (place / "prompts.txt").write_text("\n".join(PROMPTS))
    found = ask(file="prompts.txt")
    assert [answer["prompt"] for answer in found] == PROMPTS
    base, tuned = base_model(), tuned_model()
    assert [answer["base"] for answer in found] == [by_hand(base, chat(prompt)) for prompt in PROMPTS]
    assert [answer["tuned"] for answer in found] == [by_hand(tuned, chat(prompt)) for prompt in PROMPTS]
    assert found[1]["base"] != found[1]["tuned"]
    assert "<|" not in json.dumps(found)
    assert ask(prompt=PROMPTS[1]) == [found[1]]


def test_a_file_of_rows(place):
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    (place / "open.jsonl").write_text(json.dumps({"messages": turns}))
    (place / "rows.jsonl").write_text(
        json.dumps({"q": "1?", "completion": "2"}) + "\n" + json.dumps({"q": "b", "completion": ""})
    )
    [conversation] = ask(file="open.jsonl")
    assert conversation["prompt"] == "user: a\nassistant: b\nuser: c"
    assert conversation["tuned"] == by_hand(tuned_model(), chat("a", "b", "c"))
    assert [answer["prompt"] for answer in ask(file="rows.jsonl", columns=("prompt=q",))] == ["1?", "b"]
    assert len(ask(file="rows.jsonl", columns=("prompt=q",), limit=1)) == 1
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the columns found \(q, completion\)"):
        ask(file="rows.jsonl")
    save_recipe(place, columns=("prompt=q",))
    assert [answer["prompt"] for answer in ask(file="rows.jsonl")] == ["1?", "b"]  # as in the run


def test_standard_input_is_one_prompt(place, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    [found] = ask()
    assert found["prompt"] == "two\nlines"
    assert found["base"] == by_hand(base_model(), chat("two\nlines"))


def test_the_template_is_that_of_the_run(place):
    save_recipe(place, template="none")
    assert ask(prompt="b")[0]["tuned"] == by_hand(tuned_model(), "b")
    assert ask(prompt="b", template="chat")[0]["tuned"] == by_hand(tuned_model(), chat("b"))
    (place / "run" / "adapter" / "chat_template.jinja").write_text(OTHER)
    assert ask("run", "b", template="auto")[0]["tuned"] == by_hand(tuned_model(), chat("b"))
    for source in ("run", "run/adapter"):
        save_recipe(place)
        assert ask(source, "b")[0]["tuned"] == by_hand(tuned_model(), "[user]b>")


def test_the_template_that_a_recipe_names_is_read_and_logged(place, caplog):
    caplog.set_level("INFO", "siftune")
    (place / "chat.jinja").write_text(OTHER)
    save_recipe(place, template=place / "chat.jinja")
    assert ask(prompt="b")[0]["tuned"] == by_hand(tuned_model(), "[user]b>")
    assert any(text.startswith(f"{place / 'chat.jinja'}: ") for text in caplog.messages)
    (place / "chat.jinja").unlink()
    with pytest.raises(DataError, match=r"chat\.jinja.*recipe\.yaml"):
        ask(prompt="b")


def test_a_model_by_itself_gives_one_answer(place, capsys):
    [found] = ask("base", "b")
    assert (found["base"], found["tuned"]) == (by_hand(base_model(), chat("b")), None)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["prompt", "answer"]


def test_answers_that_are_cut_are_counted(place, capsys):
    _, told = siftune(capsys, "ask", "run", "b", "--max-new-tokens", "1")
    assert "2 answers are cut at --max-new-tokens 1" in told
    model = base_model()
    model.lm_head.weight.data[TOKENIZER.eos_token_id] = 9 * model.lm_head.weight.data.abs().max()
    model.lm_head.weight.data[TOKENIZER.eos_token_id] *= model.model.norm.weight.sign()
    ended = by_hand(model, chat("b"))
    model.save_pretrained("ending")
    TOKENIZER.save_pretrained("ending")
    found, told = siftune(capsys, "ask", "ending", "b", "--max-new-tokens", NEW)
    assert found["answers"][0]["base"] == ended
    assert ("is cut" in told) == (len(TOKENIZER(ended)["input_ids"]) == NEW)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "RUN must be given"),
        (("run", " \n"), "there is no prompt: give a text after the run"),
        (("run", "b", "--file", "prompts.txt"), "a prompt and --file are given"),
        (("run", "b", "--limit", "2"), "--columns and --limit are for the rows of --file"),
        (("run", "--file", "none.txt"), "none.txt does not exist"),
        (("run", "b", "c"), "c is not expected here"),
        (("nowhere/at/all", "b"), "there is no run nowhere/at/all"),
        (("run", "b" * 250), "command line: the prompt with 256 new tokens takes"),
    ],
)
def test_what_cannot_be_asked(place, capsys, words, message):
    assert message in error_of(capsys, "ask", *words)


def test_a_terminal_as_standard_input_is_not_waited_for(place, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    with pytest.raises(RecipeError, match="there is no prompt"):
        ask()


def shown(width, terminal=True):
    file = io.StringIO()
    look = {"force_terminal": terminal, "color_system": None, "highlight": False, "emoji": False, "soft_wrap": True}
    console = Console(file=file, width=width, **look)
    columns = [[Answer("word " * 30, True), Answer("x\x1b[31m [b]y", True)], [Answer("25", True), Answer("a\nb", True)]]
    _show(["What is 12 + 13?", "second"], ("base", "tuned"), columns, console)
    return file.getvalue().splitlines()


def test_narrow_terminals_have_answers_below_each_other():
    lines = shown(80)
    assert max(map(len, lines)) <= 80
    assert [line[:8].rstrip() for line in lines if line[:8].strip()] == ["prompt", "base", "tuned"] * 2
    assert sum("word" in line for line in lines) > 1
    assert all(line.startswith(("base    word", "        word")) for line in lines if "word" in line)
    assert "base    x\\x1b[31m [b]y" in [line.rstrip() for line in lines]


def test_wide_terminals_have_answers_side_by_side():
    lines = shown(120)
    assert max(map(len, lines)) <= 120
    assert any("word" in line and line.rstrip().endswith("25") for line in lines)
    assert any(line.split() == ["base", "tuned"] for line in lines)


def test_other_output_has_a_line_for_each_line_of_an_answer():
    assert shown(30, terminal=False)[:3] == [
        "prompt  What is 12 + 13?",
        "base    " + "word " * 29 + "word",
        "tuned   25",
    ]
    assert shown(30, terminal=False)[-2:] == ["tuned   a", "        b"]
