"""What a command says of a kit's chat template, and of a tokenizer that panics on a row."""

import dataclasses
import json

from support.kits import contents, repair
from support.tiny import tiny
from support.tokenizer import CHATML, byte_tokenizer
from tokenizers import Regex, pre_tokenizers

from siftune.cli.main import main
from siftune.offsite.kit.folder import write_kit

HOSTILE = CHATML + "\x1b[2J\u202egnp.exe"  # clears the screen, and turns the direction of writing


def answer_of(capsys, *words):
    code = main([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def test_verify_shows_a_conversation_in_the_templates_form_and_nothing_of_it_acts(tmp_path, capsys):
    for name, template in (("hostile", HOSTILE), ("none", None)):
        write_kit(tmp_path / name, dataclasses.replace(contents(), tokenizer=byte_tokenizer(template)))
    code, found, said = answer_of(capsys, "verify", tmp_path / "hostile")
    assert code == 0
    assert found["example"].startswith("<|start|>user\nHow many legs has a spider?<|end|>\n<|start|>assistant\nEight.")
    assert found["example"].endswith("\u202egnp.exe")
    assert r"chats      <|start|>user\nHow many legs" in said
    assert r"\x1b[2J\u202egnp.exe" in said
    assert "\x1b[2J" not in said
    assert "\u202e" not in said
    code, found, said = answer_of(capsys, "verify", tmp_path / "none")
    assert (code, found["example"]) == (0, None)
    assert "no chat template" in said


def test_verify_refuses_a_bomb_in_one_sentence(tmp_path, capsys):
    kit = write_kit(tmp_path / "kit", contents())
    (kit.path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{{ m.content * 200 }}{% endfor %}"
    )
    repair(kit.path)
    code, found, said = answer_of(capsys, "verify", kit.path)
    assert code == 2
    assert "chat_template.jinja writes" in found["error"]
    assert found["error"].endswith("ask whoever made it for a sound copy")
    assert "Traceback" not in said


def test_a_tokenizer_that_panics_on_a_row_is_one_sentence_and_json(tmp_path, capsys):
    tokenizer = byte_tokenizer()
    split = pre_tokenizers.Split(Regex(r"^(\w+ ?)*$"), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, tokenizer.backend_tokenizer.pre_tokenizer]
    )
    tiny("llama", vocab_size=300, eos_token_id=tokenizer.eos_token_id).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "Q", "completion": "a" * 60 + "!"}) + "\n")
    train = ("train", "--model", tmp_path / "base", "--train", data, "--out", tmp_path / "run")
    for words in (train, ("eval", tmp_path / "base", "--data", data)):
        code, found, said = answer_of(capsys, *words)
        assert code == 2, said
        assert "the tokenizer fails on the text" in found["error"], words
        assert "rows.jsonl" in found["error"]
        assert "Traceback" not in said
