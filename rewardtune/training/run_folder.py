"""The run folder: who may start or continue in it, and what is recorded of the run.

`run.py` calls this in the main process only.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from rewardtune import __version__, registry
from rewardtune.errors import DiskError, RecipeError
from rewardtune.recipe.sections import Recipe
from rewardtune.training.checkpoint import write_json, write_text

if TYPE_CHECKING:
    from rewardtune.plugins import RewardCard
    from rewardtune.recipe.file import LoadedRecipe

FINISHED = "finished.json"
REWARDS = "rewards.json"
BEFORE_TRAINING = {".lock", "recipe.yaml", "recipe.json", REWARDS}
"""What a run folder holds before its first look, picture or step."""
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")


def lock(folder: Path, who: str = "rewardtune train") -> int:
    """Create the folder and lock it for this process; closing the descriptor, or dying, lets it go.

    who: the command, for whoever comes second. Raises RecipeError, naming the holder, where another process has it,
    and DiskError where nothing can be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise DiskError(f"{folder} cannot be written ({error}). Name another folder with --out.") from error
    try:
        import fcntl
    except ImportError:
        return descriptor
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise RecipeError(
            f"{folder} is in use by {holder}. Wait until it has ended, or name another folder with --out."
        ) from error
    with contextlib.suppress(OSError):  # a full disk: the lock holds without its holder's name too
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"`{who}` (process {os.getpid()} on {platform.node()})\n".encode(), 0)
    return descriptor


def prepare(
    loaded: LoadedRecipe, folder: Path, *, fresh: bool, allow: Sequence[str], plugins: Sequence[str]
) -> str | None:
    """Check or create the run folder. Returns the run's id, or None when there is nothing to do."""
    resolved = loaded.resolved
    hashes = {Path(name).name: registry.load_plugin(name).sha256 for name in plugins}
    record = folder / "recipe.json"
    if fresh:
        _move_aside(folder)
    old = _read_record(record)
    if old is None and any(path.name != ".lock" for path in folder.iterdir()):
        raise RecipeError(
            f"{folder} is not empty and holds no recipe.json, so it is no run folder. Name another folder with --out, "
            "or use --fresh to move it aside."
        )
    if old is not None and {path.name for path in folder.iterdir()} <= BEFORE_TRAINING:
        # it ended while models loaded, and the change of the recipe may be what mends that: nothing is lost
        (folder / REWARDS).unlink(missing_ok=True)
        old = None
    if old is not None:
        changes = _changes({**_completed(old["recipe"]), "plugins": old["plugins"]}, {**resolved, "plugins": hashes})
        refused = [key for key in changes if not any(key == a or key.startswith(f"{a}.") for a in _split(allow))]
        if refused:
            lines = "\n".join(f"  {key}: {changes[key][0]} -> {changes[key][1]}" for key in refused)
            plugin = "Give the same --plugin again. " if any(key.startswith("plugins.") for key in refused) else ""
            raise RecipeError(
                f"{folder} was started with another recipe. Changed (there -> now):\n{lines}\n{plugin}"
                f"Use another --out, --fresh to move the old run aside, or --allow-changed {','.join(refused)} "
                "to continue it with these changes."
            )
        finished = folder / FINISHED
        if finished.exists() and not changes:
            print(f"{folder} is finished; --fresh starts it again.", file=sys.stderr)
            return None
        finished.unlink(missing_ok=True)
    run_id = str(old["run_id"]) if old else os.urandom(4).hex()
    write_text(folder / "recipe.yaml", loaded.text)
    write_json(
        record,
        {
            "run_id": run_id,
            "sha256": loaded.sha256,
            "recipe": resolved,
            "source": loaded.source.name,
            "overrides": list(loaded.overrides),
            "plugins": hashes,
            "rewardtune": __version__,
            "git_revision": _git_revision(),
            "python": sys.version.split()[0],
            "versions": {name: metadata.version(name) for name in PACKAGES},
        },
    )
    return run_id


def record_rewards(
    folder: Path, trained: Sequence[RewardCard], held_out: Sequence[RewardCard], *, allow: Sequence[str]
) -> None:
    """Write which models a run's rewards are, with the commits that were loaded, into `rewards.json`.

    trained: those of the objective, role `trained`. held_out: those that its guard looks with, role `guard`. Raises
    RecipeError where the run was started with others, as when a branch of the hub has moved since; `rewards` in `allow`
    lets it.
    """
    found = [
        {"name": card.name, "role": role, "models": dict(card.models)}
        for role, cards in (("trained", trained), ("guard", held_out))
        for card in cards
    ]
    file = folder / REWARDS
    before = json.loads(file.read_bytes()) if file.exists() else found
    if not any("role" in reward for reward in before):  # written before guards were recorded
        before = [{"role": "trained", **reward} for reward in before] + found[len(trained) :]
    if before != found and "rewards" not in _split(allow):
        raise RecipeError(
            f"{folder} was started with other weights of its rewards: {json.dumps(before)} then, {json.dumps(found)} "
            "now. Name the earlier commit as the reward's `revision`, use --fresh to start again, or --allow-changed "
            "rewards to continue with these."
        )
    write_json(file, found)


def read_recipe(folder: Path) -> Recipe:
    """The resolved recipe of a run. Raises RecipeError where this version cannot read it."""
    record = folder / "recipe.json"
    try:
        recipe: Recipe = TypeAdapter(Recipe).validate_python(json.loads(record.read_bytes())["recipe"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise RecipeError(
            f"{record}: not the recipe of a run that this version can read ({first}). What the run exported, "
            f"{folder / 'export'}, can be used in its place."
        ) from error
    return recipe


def provenance(folder: Path, *, step: int) -> dict[str, str]:
    """What an export says of where it comes from."""
    record = json.loads((folder / "recipe.json").read_bytes())
    plain = {f"{name}_version": version for name, version in record["versions"].items()}
    return {
        "name": folder.resolve().name,
        "rewardtune_version": record["rewardtune"],
        "recipe_sha256": record["sha256"],
        "recipe": json.dumps(record["recipe"]),
        "git_revision": record["git_revision"] or "",
        "plugins": json.dumps(record["plugins"]),
        "step": str(step),
        "seed": str(record["recipe"]["train"]["seed"]),
        **plain,
    }


def _read_record(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_bytes())
        return {"recipe": dict(record["recipe"]), "plugins": dict(record["plugins"]), "run_id": record["run_id"]}
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{path} cannot be read; it is not the record of a run. Use --fresh or --out.") from error


def _completed(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recorded recipe with the defaults of settings that came after it; as it is where it no longer fits."""
    try:
        adapter: TypeAdapter[BaseModel] = TypeAdapter(Recipe)
        return adapter.validate_python(recipe).model_dump(mode="json")
    except ValidationError:
        return recipe


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Dotted keys whose values differ -> (old, new) as JSON."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    changes: dict[str, tuple[str, str]] = {}
    for key in sorted(flat_old.keys() | flat_new.keys()):
        before, now = flat_old.get(key), flat_new.get(key)
        if before == now:
            continue
        around = [".".join(key.split(".")[:n]) for n in range(1, key.count(".") + 1)]
        if any((flat_old if before is None else flat_new).get(name) == "null" for name in around):
            continue  # of a section that only one of them has, its name says it all
        sections = [any(other.startswith(f"{key}.") for other in flat) for flat in (flat_old, flat_new)]
        absent = ["a section" if section else "not there" for section in sections]
        changes[key] = (before or absent[0], now or absent[1])
    return changes


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        return {k: v for name, inner in value.items() for k, v in _flatten(inner, f"{prefix}{name}.").items()}
    if isinstance(value, list) and value and any(isinstance(inner, Mapping) for inner in value):
        return _flatten(dict(enumerate(value)), prefix)
    # An empty mapping stands for itself only below the top level.
    return {} if value == {} else {prefix.rstrip("."): json.dumps(value)}


def _split(keys: Sequence[str]) -> list[str]:
    return [key.strip() for group in keys for key in group.split(",") if key.strip()]


def _move_aside(folder: Path) -> None:
    """Move what is in `folder` to <folder>-<date>, so that nothing is lost. The lock file stays."""
    content = [path for path in folder.iterdir() if path.name != ".lock"]
    if not content:
        return
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    aside = folder.with_name(f"{folder.name}-{stamp}")
    number = 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}-{stamp}-{number}")
    aside.mkdir()
    for path in content:
        path.rename(aside / path.name)
    print(f"moved the old run to {aside}", file=sys.stderr)


def _git_revision() -> str | None:
    """Revision of the checkout that this package runs from, with `+` when it has changes; None outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        ask = ["git", "-C", str(root)]
        revision = subprocess.run([*ask, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        changed = subprocess.run(
            [*ask, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return revision.stdout.strip() + ("+" if changed.stdout.strip() else "")
