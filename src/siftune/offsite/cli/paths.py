"""Swapped kits and returns, which are refused before torch is imported."""

from pathlib import Path

from siftune.base.errors import KitError

_LONGEST = 2**24  # bytes of a manifest; its keys are sorted, so the one that names its kind comes late


def refuse_swapped(kit: str | Path, returned: Path | None = None) -> None:
    """Refuse a return in the place of a kit, a kit in the place of a return, and a folder beside a return.

    Raises:
        KitError: The message says which folder to give.
    """
    if _manifest_of(kit) == "return":
        swapped = returned is not None and _manifest_of(returned) == "kit"
        advice = f"and --return {returned} is a kit: swap them" if swapped else "not a kit: name it with --return"
        raise KitError(f"--kit {kit} is a return, {advice}")
    if returned is None:
        return
    path, kind = returned.expanduser(), _manifest_of(returned)
    if kind == "kit":
        raise KitError(f"--return {returned} is a kit, not a return: give RUN/return of a run on the kit")
    beside = next((each / "return" for each in (path, path.parent) if _manifest_of(each / "return")), None)
    if not kind and beside:
        raise KitError(f"--return {returned} is no return: give {beside}")


def _manifest_of(folder: str | Path) -> str:
    """The kind of a folder by its manifest, "kit" or "return"; empty for another folder."""
    manifest = Path(folder).expanduser() / "manifest.json"
    try:
        if not manifest.is_file():
            return ""
        with manifest.open("rb") as file:
            content = file.read(_LONGEST)
    except OSError:  # reported by the command that reads it
        return ""
    return next((kind for kind in ("kit", "return") if f'"siftune_{kind}"'.encode() in content), "")
