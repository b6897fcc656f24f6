"""Sources of models: one short request to the hub, folders that hold no model, origin and licence."""

import json
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from siftune.base.errors import ModelError
from siftune.models import load, source
from siftune.models.load import load_model
from siftune.models.smollm2 import REQUIREMENT
from siftune.models.source import Origin, check_source, origin_of, resolve, why_missing


@pytest.fixture
def answers(monkeypatch):
    """Set what the hub says, and count how often it is asked."""
    asked = []

    def set_answer(error=None, cached=None):
        def model_info(self, name, timeout=None):
            asked.append((name, timeout))
            if error is not None:
                raise error

        why_missing.cache_clear()
        monkeypatch.setattr(HfApi, "model_info", model_info)
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: cached)
        return asked

    yield set_answer
    why_missing.cache_clear()


def http(kind):
    """An answer of the hub, whichever library brought it."""
    request = SimpleNamespace(headers={})
    return kind("no", response=SimpleNamespace(headers={}, request=request, status_code=404))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (None, None),
        (http(GatedRepoError), None),
        (http(HfHubHTTPError), None),
        (http(RepositoryNotFoundError), "the hub has no such model that you may see"),
        (TimeoutError("slow"), "the hub cannot be reached (TimeoutError)"),
        (OSError("no route"), "the hub cannot be reached (OSError)"),
    ],
)
def test_answers_of_the_hub(answers, error, said):
    asked = answers(error)
    assert [why_missing("owner/name") for _ in range(2)] == [said, said]
    assert asked == [("owner/name", 5.0)]


def test_a_cached_model_needs_no_request(answers):
    asked = answers(OSError("no route"), cached="/cache/config.json")
    assert why_missing("owner/name") is None
    assert not asked


@pytest.mark.parametrize("name", ["a--b", "a..b", "-a", "a.git", "ü/b"])
def test_names_that_the_hub_cannot_have(name):
    with pytest.raises(ModelError, match="no name that the hub"):
        check_source(name)


def test_the_hub_is_not_asked_offline(monkeypatch):
    why_missing.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in why_missing("nobody/nothing")
    why_missing.cache_clear()


def test_a_mistyped_folder_is_refused_before_loading(answers, tmp_path, monkeypatch):
    answers(OSError("no route"))
    (tmp_path / "models" / "llama").mkdir(parents=True)
    (tmp_path / "models" / "llama" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "_model", None)
    for call in (load_model, check_source):
        with pytest.raises(ModelError, match=r"no such folder .*did you mean models/llama\?"):
            call("models/lama")
    check_source("models/llama")
    monkeypatch.setattr(source, "resolve", None)
    check_source("smollm2")


@pytest.mark.parametrize("name", ["./none", "/none/x", "~/none-such", "none/", "a/b/c", "a\\b"])
def test_a_path_that_does_not_exist_is_named(name):
    with pytest.raises(ModelError, match=r"model folder .*(none|b)"):
        resolve(name)


def test_folders_and_names_without_a_model_are_refused(tmp_path):
    (tmp_path / "w.bin").write_text("")
    with pytest.raises(ModelError, match="is a file: give the folder"):
        resolve(str(tmp_path / "w.bin"))
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter, not a model"):
        resolve(str(tmp_path))
    (tmp_path / "adapter_config.json").rename(tmp_path / "recipe.yaml")
    with pytest.raises(ModelError, match=f"--from-adapter {tmp_path}"):
        resolve(str(tmp_path))
    with pytest.raises(ModelError, match="neither a folder nor a hub id"):
        resolve("two words")
    with pytest.raises(ModelError, match="no model given"):
        resolve("")


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
    """Cards are untrusted, and the licence enters ours."""
    card = "---\nlicense: 'mit\n  evil: x'\n---\n"
    assert origin_of(str(folder_with(tmp_path / "m", README_md=card))).licence is None


def test_the_packaged_model_and_its_copy(tmp_path, monkeypatch):
    place = folder_with(tmp_path / "s", manifest_json=json.dumps({"source": REQUIREMENT}), LICENSE="a", NOTICE="b")
    papers = (place / "LICENSE", place / "NOTICE")
    wanted = Origin(str(place), "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0", papers)
    assert origin_of(str(place)) == wanted
    monkeypatch.setattr(source, "pull_smollm2", lambda: place)
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
