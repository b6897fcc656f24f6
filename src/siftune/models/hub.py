"""Whether a name stands for a model on the hub, asked once and shortly.

Loading asks for one file after the other, each with retries, which without a network takes minutes to come to nothing.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from siftune.base.settings import nearest

_SECONDS = 5.0  # for the hub to answer


@cache
def why_missing(name: str) -> str | None:
    """Say why a hub id cannot be loaded; None where it may be: it is in the cache, or the hub has it or may have it."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return None
        HfApi().model_info(name, timeout=_SECONDS)
    except HFValidationError:
        return "it is no name that the hub can have"
    except GatedRepoError:
        return None  # loading says what is to be done
    except RepositoryNotFoundError:
        return "the hub has no such model, or not for you"
    except HfHubHTTPError:
        return None
    except OfflineModeIsEnabled:
        return "the hub is not asked, as HF_HUB_OFFLINE is set"
    except Exception as error:  # of the network, in the words of whichever library goes there
        return f"the hub cannot be reached ({type(error).__name__})"
    return None


def similar_folder(name: str, suits: Callable[[Path], bool]) -> Path | None:
    """The folder, if any, that `suits` and whose name is most like one that is not there, beside where it would be."""
    parent = Path(name).expanduser().parent
    if not parent.is_dir():
        return None
    close = nearest(Path(name).name, (place.name for place in parent.iterdir() if suits(place)))
    return None if close is None else parent / close
