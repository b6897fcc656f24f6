"""What is known of a base model: name on the hub, licence, files to hand on."""

import json

import pytest

from siftune.models import source as origin
from siftune.models.smollm2 import REQUIREMENT
from siftune.models.source import Origin, origin_of


def folder_with(path, **files):
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name.replace("_", ".", 1)).write_text(text)
    return path


def test_a_folder_tells_its_licence_and_its_papers(tmp_path, monkeypatch):
    card = "---\nlicense: llama3.2\nbase_model: x\n---\n# Model\n"
    place = folder_with(tmp_path / "m", README_md=card, LICENSE="a", NOTICE_txt="b", USE_POLICY_md="c", other_txt="d")
    (place / "USE.POLICY_md").rename(place / "USE_POLICY.md")
    papers = tuple(place / name for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md"))
    assert origin_of(str(place)) == Origin(str(place), None, "llama3.2", papers)
    monkeypatch.chdir(tmp_path)
    assert origin_of("m").place == str(place)


@pytest.mark.parametrize(
    "text", ["", "# no head", "---\n- a list\n---\n", "---\n: : :\n---\n", "---\nlicense: [a]\n---"]
)
def test_a_card_that_tells_nothing(tmp_path, text):
    assert origin_of(str(folder_with(tmp_path / "m", README_md=text))).licence is None


def test_a_licence_is_a_word_and_no_more(tmp_path):
    """Cards are written by anybody, and ours goes on from there."""
    card = "---\nlicense: 'mit\n  evil: x'\n---\n"
    assert origin_of(str(folder_with(tmp_path / "m", README_md=card))).licence is None


def test_the_packaged_model_and_its_copy(tmp_path, monkeypatch):
    place = folder_with(tmp_path / "s", manifest_json=json.dumps({"source": REQUIREMENT}), LICENSE="a", NOTICE="b")
    papers = (place / "LICENSE", place / "NOTICE")
    wanted = Origin(str(place), "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0", papers)
    assert origin_of(str(place)) == wanted
    monkeypatch.setattr(origin, "pull_smollm2", lambda: place)
    assert origin_of("smollm2") == wanted


def test_a_folder_of_the_hubs_cache_knows_its_name(tmp_path):
    place = folder_with(tmp_path / "models--some-owner--a.model" / "snapshots" / "abc", config_json="{}")
    assert origin_of(str(place)).hub_id == "some-owner/a.model"


@pytest.mark.parametrize("name", ["gone", "a--b"])
def test_a_folder_that_is_gone_is_no_hub_id(tmp_path, name):
    source = str(tmp_path / name)
    assert origin_of(source) == Origin(source)


def test_a_hub_id_and_the_card_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    assert origin_of("owner/name") == Origin("owner/name", "owner/name")
    card = folder_with(tmp_path / "m", README_md="---\nlicense: mit\n---\n") / "README.md"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(card))
    assert origin_of("owner/name").licence == "mit"
