"""The hub is asked once and shortly, and a name that stands for nothing is told of at once."""

from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from siftune.base.errors import ModelError
from siftune.models import load, source
from siftune.models.load import load_model
from siftune.models.source import check_source, why_missing


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
        (http(RepositoryNotFoundError), "the hub has no such model, or not for you"),
        (TimeoutError("slow"), "the hub cannot be reached (TimeoutError)"),
        (OSError("no route"), "the hub cannot be reached (OSError)"),
    ],
)
def test_what_the_hub_says(answers, error, said):
    asked = answers(error)
    assert [why_missing("owner/name") for _ in range(2)] == [said, said]
    assert asked == [("owner/name", 5.0)]


def test_what_is_in_the_cache_is_not_asked_for(answers):
    asked = answers(OSError("no route"), cached="/cache/config.json")
    assert why_missing("owner/name") is None
    assert not asked


@pytest.mark.parametrize("name", ["a--b", "a..b", "-a", "a.git", "ü/b"])
def test_names_that_the_hub_cannot_have(name):
    with pytest.raises(ModelError, match="it is no name that the hub can have"):
        check_source(name)


def test_a_mistyped_folder_is_told_of_before_anything_is_loaded(answers, tmp_path, monkeypatch):
    answers(OSError("no route"))
    (tmp_path / "models" / "llama").mkdir(parents=True)
    (tmp_path / "models" / "llama" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "_in_memory", None)
    for call in (load_model, check_source):
        with pytest.raises(ModelError, match=r"no such folder .*did you mean models/llama\?"):
            call("models/lama")
    check_source("models/llama")
    monkeypatch.setattr(source, "resolve", None)
    check_source("smollm2")
