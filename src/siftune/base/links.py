"""Links and pipes in folders of models, adapters and data sets, which another party may have made.

A link could have any file of the user read as a part of the folder, and copied into what is made of it. Reading a pipe
never ends. The folders of the hub's cache consist of links, which lead to files beside them and are followed.
"""

import re
import stat
from pathlib import Path

from siftune.base.errors import InputError

_CACHED = re.compile(r"(models|datasets)--.+")  # folder of a repository in the hub's cache: snapshots of links, blobs
_WEIGHTS = (".safetensors", ".bin")  # nothing but tensors is read from them, and they are often on another disk
_TEMPLATES = "additional_chat_templates"  # the only folder in a model's folder that transformers reads


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path, links followed, stays in a folder, or in the repository of the hub's cache that the folder is in.

    Args:
        path: The path.
        folder: The folder; it may be a link itself.

    Example:
        >>> is_inside(Path("data/rows.jsonl"), Path("data")), is_inside(Path("data/../secret.jsonl"), Path("data"))
        (True, False)
    """
    place = folder.resolve()
    root = next((each for each in (place, *place.parents) if _CACHED.fullmatch(each.name)), place)
    return path.resolve().is_relative_to(root)


def check_links(folder: Path) -> None:
    """Check that the files in a folder of a model or an adapter are files of this folder.

    A link to a file of weights may lead elsewhere.

    Raises:
        InputError: A link leads out of the folder, or something is neither a file nor a folder; the message names it.
    """
    try:
        paths = [*folder.iterdir(), *(folder / _TEMPLATES).glob("*")]
        for path in sorted(paths):
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
                continue
            if not stat.S_ISLNK(mode):
                raise InputError(f"{path} is neither a file nor a folder: remove it, or give another folder")
            if not is_inside(path, folder) and not (path.is_file() and path.suffix in _WEIGHTS):
                raise InputError(
                    f"{path} is a symbolic link, which leads out of the folder: copy the file there, or remove the link"
                )
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}); give another folder") from error
