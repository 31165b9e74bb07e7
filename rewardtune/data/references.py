"""Where models and data come from: hub ids, folders, exports, and `pocket:<name>` for what ships inside the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from rewardtune.errors import RecipeError

PREFIX = "pocket:"


def resolve(reference: str) -> str:
    """A local path for `pocket:` references and existing folders; anything else is returned as a hub id.

    Raises RecipeError when a `pocket:` name or a path that looks local does not exist.
    """
    if reference.startswith(PREFIX):
        return str(pocket_path(reference))
    path = Path(reference).expanduser()
    if path.exists():
        return str(path)
    if reference.count("/") == 1 and not reference.startswith((".", "~", "/")):
        return reference
    raise RecipeError(
        f"model {reference!r}: there is no such folder, and it is not a hub id (owner/name). "
        "Give a folder, a hub id, a run's export folder, or pocket:<name>."
    )


def pocket_path(reference: str) -> Path:
    """The file or folder behind `pocket:<name>`: a model under weights/, or prompts/<split> under data/.

    Raises RecipeError for any other name.
    """
    name = reference.removeprefix(PREFIX)
    root = Path(str(resources.files("rewardtune.pocket")))
    for candidate in (root / "weights" / name, root / "data" / name, root / "data" / f"{name}.jsonl"):
        if candidate.exists() and ".." not in name:
            return candidate
    known = sorted(p.name for p in (root / "weights").glob("*")) + sorted(
        f"prompts/{p.stem}" for p in (root / "data" / "prompts").glob("*.jsonl")
    )
    raise RecipeError(
        f"{reference!r} does not ship with rewardtune; there are: {', '.join(known) or 'none'}. What upstream recipes "
        "start from (pocket:teacher-base and others) comes with a checkout of the repository, not with the package."
    )
