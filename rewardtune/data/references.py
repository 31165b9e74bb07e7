"""Where models and data come from: hub ids, folders, exports, and `pocket:<name>` for what ships inside the package."""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path

from rewardtune.errors import RecipeError

PREFIX = "pocket:"
_COMMIT = re.compile(r"[0-9a-f]{40}")


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


def fetched(repository: str, file: str, revision: str | None) -> Path | None:
    """The folder of a hub id in the hub's cache that holds a file of its top level; None where it is not there. Asks no
    network."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repository, file, cache_dir=constants.HF_HUB_CACHE, revision=revision)
    except HFValidationError:
        return None  # no name that the hub could have
    return Path(found).parent if isinstance(found, str) else None


def version(reference: str, revision: str | None) -> str:
    """What a card says of a model that has been loaded: which bytes they were, as far as it can be known.

    `shipped` for `pocket:` references, `local` for files and folders, the commit of a hub id whose revision is one. A
    branch or tag moves: it is `not pinned`, with the commit that the hub's cache holds for it, which is the one loaded.
    """
    if reference.startswith(PREFIX):
        return "shipped"
    if Path(reference).expanduser().exists():
        return "local"
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    name = revision or "main"
    commit = cached_commit(reference, name)
    return f"{name}, not pinned" if commit is None else f"{name}, not pinned: loaded at {commit}"


def offline_variable() -> str | None:
    """The variable that keeps Hugging Face's libraries off the network, if one does."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return name
    return None


def why_not_loaded(error: Exception, reference: str) -> str:
    """What a library said of a model that did not load, on one line; the libraries' own words speak of the network also
    where a variable forbids it, so that is said first."""
    told = " ".join(str(error).split())[:300]
    variable = offline_variable()
    if variable is None or reference.startswith(PREFIX) or Path(reference).expanduser().exists():
        return told
    return f"{variable} is set, so the hub was not asked (unset it where there is a network). {told}"


def cached_commit(repository: str, revision: str) -> str | None:
    """The commit that the hub's cache holds for a branch or tag; None where it holds none."""
    from huggingface_hub import constants

    file = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "refs" / revision
    try:
        found = file.read_text().strip()
    except OSError:
        return None
    return found if _COMMIT.fullmatch(found) else None


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
