"""Output of commands on a kit's tokenizer and chat template, and on a tokenizer that panics on a row."""

import dataclasses
import json

from support.kits import contents, repair
from support.tiny import tiny
from support.tokenizer import CHATML, byte_tokenizer
from tokenizers import Regex, normalizers, pre_tokenizers

from siftune.cli.main import main
from siftune.offsite.kit.folder import write_kit

# clears the screen, turns the direction of writing, and has Rich's name of an emoji and what looks like a line feed
HOSTILE = CHATML + "\x1b[2J\u202egnp.exe:x: \\n."


def answer_of(capsys, *words):
    code = main([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def test_verify_shows_normalizers_and_fixed_text_and_nothing_of_it_acts(tmp_path, capsys):
    for name, template in (("hostile", HOSTILE), ("none", None)):
        tokenizer = byte_tokenizer(template)
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC() if template is None else None
        write_kit(tmp_path / name, dataclasses.replace(contents(), tokenizer=tokenizer))
    code, found, said = answer_of(capsys, "verify", tmp_path / "hostile")
    assert code == 0
    assert ["start", "user", "<|start|>user\n"] in found["chat_text"]
    assert ["assistant", "end", "<|end|>\n\x1b[2J\u202egnp.exe:x: \\n."] in found["chat_text"]
    assert r"assistant → end: <|end|>\n\x1b[2J\u202egnp.exe:x: \\n." in said
    assert "\x1b[2J" not in said
    assert "\u202e" not in said
    code, found, said = answer_of(capsys, "verify", tmp_path / "none")
    assert (code, found["chat_text"], found["normalizers"]) == (0, [], ["NFC"])
    assert "no chat template" in said
    assert "NFC" in said


def test_verify_refuses_a_bomb_in_one_sentence(tmp_path, capsys):
    kit = write_kit(tmp_path / "kit", contents())
    (kit.path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{{ m.content * 200 }}{% endfor %}"
    )
    repair(kit.path)
    code, found, said = answer_of(capsys, "verify", kit.path)
    assert code == 2
    assert "chat_template.jinja: a conversation of user" in found["error"]
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
